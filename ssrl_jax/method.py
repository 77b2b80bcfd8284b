"""The contract between a self-supervised method and everything else.

A method is a NamedTuple of pure functions, made by a factory that closes over its hyper-parameters,
as optax makes gradient transformations. The one train step, the evaluations and the report know
nothing else about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any  # a pytree of float32 arrays, trained by gradient
MethodState = Any  # a pytree of arrays, not trained by gradient: batch statistics, targets, queues


class ViewSpec(NamedTuple):
  """One kind of random view, as data. Probabilities are in [0, 1]; area is relative to the picture.

  `make_views` turns a batch into `{spec.name: float32 [B, count, size, size, 3]}`, normalised, and
  `{box_name(spec.name): float32 [B, count, 4]}`, where in the picture each view lies.
  """

  name: str  # key of the views in the dictionary handed to `Method.loss`
  count: int = 2
  size: int = 32  # side of the square view, pixels
  area: tuple[float, float] = (0.08, 1.0)  # of the crop, as a fraction of the picture's area
  aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width over height, drawn log-uniformly
  flip: float = 0.5  # probability of a horizontal flip
  jitter: float = 0.8  # probability of the colour jitter as a whole
  brightness: float = 0.4  # factor drawn from [max(0, 1 - x), 1 + x]
  contrast: float = 0.4
  saturation: float = 0.4
  hue: float = 0.1  # shift drawn from [-x, x], as a fraction of the colour circle; at most 0.5
  greyscale: float = 0.2  # probability
  blur: tuple[float, ...] = (0.0,)  # probability, for each of the count views (or one for all)
  blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
  solarise: tuple[float, ...] = (0.0,)  # probability, for each of the count views (or one for all)
  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # subtracted, pixels being in [0, 1]
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # divided by


def box_name(name: str) -> str:
  """The key of the boxes of the views `name`."""
  return f"{name}_box"


class Features(NamedTuple):
  """What every encoder returns, so that no evaluation needs a special case."""

  pooled: Array  # float32 [B, D]
  maps: dict[int, Array]  # stride in input pixels -> [B, h, w, C]
  attention: Array | None = None  # ViT: [B, A, N, N] of the last block
  scales: Array | None = None  # FusionEncoder: [B, S, F] pooled vector of each scale, finest first
  fused: Array | None = None  # FusionEncoder: [B, F]


class Aux(NamedTuple):
  """What a loss returns beside its scalar."""

  method_state: MethodState
  metrics: dict[str, Array]  # scalars, averaged over the global batch
  features: (
    Array  # [B, D] pooled features of one training view per image, no gradient: online probe
  )
  embeddings: Array  # [B, P] the vectors that the loss compares, no gradient: health figures
  targets: Array | None = None  # [B, P] what `embeddings` should meet, where there is such a thing


class Method(NamedTuple):
  """Pure functions; `key` is a jax.random key, `views` what `make_views` returns."""

  views: tuple[ViewSpec, ...]
  init: Callable[[Array, dict[str, Array]], tuple[Params, MethodState]]
  loss: Callable[[Params, MethodState, dict[str, Array], Array, Array], tuple[Array, Aux]]
  after_update: Callable[[Params, MethodState, Array], MethodState]
  encode: Callable[[Params, MethodState, Array], Features]  # images: normalised float [B, h, w, 3]


def global_spec(views: tuple[ViewSpec, ...], *, method: str, count: int) -> ViewSpec:
  """The only spec of a method that takes `count` global views and no local ones."""
  if [(v.name, v.count) for v in views] != [("global", count)]:
    got = ", ".join(f"{v.count} {v.name}" for v in views) or "none"
    raise ValueError(f"{method} takes {count} global views and no others, but views are: {got}")
  return views[0]


def fold_views(views_BVHWC: Array) -> Array:
  """[B, V, ...] -> [B * V, ...], example-major, so that the batch axis stays sharded."""
  return views_BVHWC.reshape(-1, *views_BVHWC.shape[2:])


def unfold_views(x: Array, num_views: int) -> Array:
  """[B * V, ...] -> [B, V, ...], the inverse of `fold_views`."""
  return x.reshape(-1, num_views, *x.shape[1:])


def normalise(x: Array, *, eps: float = 1e-12) -> Array:
  """Scales the last axis to unit length in float32; the gradient at zero is finite."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)


def ema(target: Params, online: Params, tau: Array) -> Params:
  """Moving average: tau is the fraction of the target that is kept."""
  return jax.tree.map(lambda t, o: t * tau + o.astype(t.dtype) * (1 - tau), target, online)
