"""The contract between a self-supervised method and everything else.

A method is a NamedTuple of pure functions, made by a factory that closes over its hyper-parameters,
as optax makes gradient transformations. The one train step, the evaluations and the report know
nothing else about it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any  # a pytree of float32 arrays, trained by gradient
Weights = dict[str, Any]  # {"params": trainable, "batch_stats": running moments} of an encoder
MethodState = Any  # a pytree of arrays, not trained by gradient: batch statistics, targets, queues


class ViewSpec(NamedTuple):
  """One kind of random view, as data. Probabilities are in [0, 1]; area is relative to the picture.

  `make_views` turns a batch into `{spec.name: float32 [B, count, size, size, 3]}`, normalised, and
  `{box_name(spec.name): float32 [B, count, 4]}`, where in the picture each view lies.
  """

  name: str  # key of the views in the dictionary handed to `Method.loss`
  count: int = 2  # of an image
  size: int = 32  # side of the square view, pixels
  area: tuple[float, float] = (0.08, 1.0)  # of the crop, as a fraction of the picture's area
  aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width over height, drawn log-uniformly
  flip: float = 0.5  # probability of a horizontal flip
  jitter: float = 0.8  # probability of the colour jitter as a whole
  brightness: float = 0.4  # factor drawn from [max(0, 1 - x), 1 + x]
  contrast: float = 0.4  # as brightness
  saturation: float = 0.4  # as brightness
  hue: float = 0.1  # shift drawn from [-x, x], as a fraction of the colour circle; at most 0.5
  greyscale: float = 0.2  # probability
  blur: tuple[float, ...] = (0.0,)  # probability, for each of the count views (or one for all)
  blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
  solarise: tuple[float, ...] = (0.0,)  # probability, for each of the count views (or one for all)
  noise: tuple[float, ...] = (0.0,)  # probability, for each of the count views (or one for all)
  noise_sigma: tuple[float, float] = (0.02, 0.2)  # of Gaussian noise; pixels are in [0, 1]
  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # subtracted, pixels being in [0, 1]
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # divided by


def box_name(name: str) -> str:
  """The key of the boxes of the views `name`."""
  return f"{name}_box"


class Features(NamedTuple):
  """What every encoder returns, so that no evaluation needs a special case."""

  pooled: Array  # float32 [B, D]
  maps: dict[int, Array]  # stride in input pixels -> [B, h, w, C]
  attention: Array | None = None  # [B, A, Q, N]: ViT, last block, Q = N; AttentionEncoder, Q = 1
  tokens: Array | None = None  # ViT: [B, N, D] after the final norm
  scales: Array | None = None  # FusionEncoder: [B, S, F] pooled vector of each scale, finest first
  fused: Array | None = None  # FusionEncoder: [B, F]


class Aux(NamedTuple):
  """What a loss returns beside its scalar."""

  method_state: MethodState
  metrics: dict[str, Array]  # scalars, averaged over the global batch
  # [B, D] pooled features of one training view per image, no gradient: online probe
  features: Array
  embeddings: Array  # [B, P] the vectors that the loss compares, no gradient: health figures
  targets: Array | None = None  # [B, P] what `embeddings` should meet, where there is such a thing


class Encoder(NamedTuple):
  """The encoder that is judged and taken along: frozen features, fine-tuning, detection."""

  weights: Callable[[Params, MethodState], Weights]
  # (weights, images [B, h, w, 3], train, key of dropout or None) -> features, batch_stats after it
  apply: Callable[[Weights, Array, bool, Array | None], tuple[Features, Any]]


class Run(NamedTuple):
  """What a run fixes before its method is made."""

  batch_size: int  # images per step over all devices
  steps_per_epoch: int
  total_steps: int
  num_classes: int | None  # None: no labels


NEVER = math.inf  # of `Method.frozen`


class Method(NamedTuple):
  """Pure functions; `key` is a jax.random key, `views` what `make_views` returns and `label` [B].

  By convention of all methods params and batch statistics have the encoder's under "encoder", and
  a moving average of the network is method_state["target"], {"params", "batch_stats"}.
  """

  views: tuple[ViewSpec, ...]
  init: Callable[[Array, dict[str, Array]], tuple[Params, MethodState]]
  loss: Callable[[Params, MethodState, dict[str, Array], Array, Array], tuple[Array, Aux]]
  after_update: Callable[[Params, MethodState, Array], tuple[Params, MethodState]]
  encoder: Encoder
  constant_lr: tuple[str, ...] = ()  # names in params whose learning rate stays at its peak
  unit_variance: bool = False  # whether the loss asks for embeddings of variance 1
  # {path in params: steps at the start in which what lies there is not trained}; NEVER: in none
  frozen: Mapping[str, float] = MappingProxyType({})

  def encode(self, params: Params, method_state: MethodState, images: Array) -> Features:
    """What is learned, of normalised images [B, h, w, 3]; pure, nothing moves."""
    return self.encoder.apply(self.encoder.weights(params, method_state), images, False, None)[0]


def global_spec(views: tuple[ViewSpec, ...], *, method: str, count: int) -> ViewSpec:
  """The only spec of a method that takes `count` global views and no local ones."""
  if [(v.name, v.count) for v in views] != [("global", count)]:
    raise ValueError(
      f"{method} takes {count} global views and no others, but views are: {describe_views(views)}"
    )
  return views[0]


def global_views(
  views: tuple[ViewSpec, ...], *, method: str, at_least: int, local: bool = True
) -> ViewSpec:
  """The first spec of a method that takes `at_least` global views, and perhaps local ones."""
  names = [v.name for v in views]
  if names[:1] != ["global"] or views[0].count < at_least or (names[1:] and not local):
    also = "and may have local ones" if local else "and takes no others"
    raise ValueError(
      f"{method} needs at least {at_least} global views {also}, but views are: "
      f"{describe_views(views)}"
    )
  return views[0]


def describe_views(views: tuple[ViewSpec, ...]) -> str:
  return ", ".join(f"{v.count} {v.name}" for v in views) or "none"


def check_positive(method: str, **options: float) -> None:
  for name, value in options.items():
    if not value > 0:
      raise ValueError(f"{method}: {name} is {value}; it must be positive, e.g. 0.1")


def check_fraction(method: str, **options: float) -> None:
  for name, value in options.items():
    if not 0 < value < 1:
      raise ValueError(f"{method}: {name} is {value}; it must be above 0 and below 1, e.g. 0.75")


def check_share(method: str, **options: float) -> None:
  for name, value in options.items():
    if not 0 <= value <= 1:
      raise ValueError(f"{method}: {name} is {value}; it must be between 0 and 1, e.g. 0.5")


def check_range(method: str, *, most: float, **options: tuple[float, float]) -> None:
  """Of two numbers, as of the areas that are drawn."""
  for name, (low, high) in options.items():
    if not 0 < low <= high <= most:
      raise ValueError(
        f"{method}: {name} is ({low}, {high}); expected the lower number first, both above 0 and "
        f"at most {most:g}"
      )


def check_labelled(method: str, run: Run) -> None:
  if not run.num_classes:
    raise ValueError(
      f"{method} learns from labels, and the training data have none; use class folders, or a "
      "self-supervised method"
    )


def check_queue(method: str, queue_size: int, run: Run) -> None:
  if queue_size < run.batch_size or queue_size % run.batch_size:
    nearest = max(round(queue_size / run.batch_size), 1) * run.batch_size
    raise ValueError(
      f"{method}: queue_size {queue_size} is not a multiple of batch_size {run.batch_size}; "
      f"nearest: {nearest}"
    )


def fold_views(views_BVHWC: Array) -> Array:
  """[B, V, ...] -> [B * V, ...], example-major, so that the batch axis stays sharded."""
  return views_BVHWC.reshape(-1, *views_BVHWC.shape[2:])


def unfold_views(x: Any, num_views: int) -> Any:
  """[B * V, ...] -> [B, V, ...], the inverse of `fold_views`; of every array of a tree."""
  return jax.tree.map(lambda a: a.reshape(-1, num_views, *a.shape[1:]), x)


def normalise(x: Array, *, eps: float = 1e-12) -> Array:
  """Scales the last axis to unit length in float32; the gradient at zero is finite."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)


def exact_matmul(x: Array, y: Array) -> Array:
  """x @ y in float32 also on accelerators, which would round to TensorFloat-32 or bfloat16."""
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def init_network(
  network: nn.Module, key: Array, images_NHWC: Array, *args: Any
) -> tuple[Params, Any]:
  """Parameters and batch statistics."""
  variables = network.init({"params": key, "dropout": key}, images_NHWC, True, *args)
  return variables["params"], variables.get("batch_stats", {})


def forward(
  network: nn.Module,
  params: Params,
  batch_stats: Any,
  views_BVHWC: Array,
  key: Array | None,
  *args: Any,
  method: str | None = None,
) -> tuple[Any, Any]:
  """One training pass over all views at once: outputs [B, V, ...], batch statistics after it.

  key: of what is dropped; None, for a target: nothing is.
  """
  output, mutated = network.apply(
    {"params": params, "batch_stats": batch_stats},
    fold_views(views_BVHWC),
    True,
    *args,
    mutable=["batch_stats"],
    rngs={} if key is None else {"dropout": key},
    method=method,
  )
  return unfold_views(output, views_BVHWC.shape[1]), mutated.get("batch_stats", {})


def forward_target(
  network: nn.Module,
  target: dict[str, Any],
  views_BVHWC: Array,
  *args: Any,
  method: str | None = None,
) -> tuple[Any, dict[str, Any]]:
  """What the target says of views, [B, V, ...] without gradient, and the target after it."""
  output, stats = forward(
    network, target["params"], target["batch_stats"], views_BVHWC, None, *args, method=method
  )
  return jax.lax.stop_gradient(output), target | {"batch_stats": stats}


def encode_with(encoder: nn.Module, *, target: bool = False) -> Encoder:
  """`Method.encoder`: the online network's, or the target's."""

  def weights(params, method_state):
    if target:
      method_state = method_state["target"]
      params = method_state["params"]
    stats = method_state["batch_stats"].get("encoder", {})
    return {"params": params["encoder"], "batch_stats": stats}

  return Encoder(weights, functools.partial(apply_encoder, encoder))


def apply_encoder(
  encoder: nn.Module, weights: Weights, images: Array, train: bool, key: Array | None
) -> tuple[Features, Any]:
  """One pass: features, and the batch statistics after it, which move when `train` is True."""
  rngs = {} if key is None else {"dropout": key}
  features, mutated = encoder.apply(weights, images, train, mutable=["batch_stats"], rngs=rngs)
  return features, mutated.get("batch_stats", weights["batch_stats"])


def keep(params: Params, method_state: MethodState, step: Array) -> tuple[Params, MethodState]:
  """`Method.after_update` where nothing moves but by gradient."""
  del step
  return params, method_state


def make_target(params: Params, batch_stats: Any, names: tuple[str, ...]) -> dict[str, Any]:
  """The moving average at the start: a copy of these parts of the network."""
  pick = lambda tree: {name: tree[name] for name in names if name in tree}  # noqa: E731
  return {"params": pick(params), "batch_stats": pick(batch_stats)}


def update_target(method_state: MethodState, params: Params, tau: Array | float) -> MethodState:
  """The target's parameters moved towards the online ones: tau is the fraction that is kept.

  Online ones that the target lacks, heads or what another term of `hybrid` adds, are passed by.
  """

  def move(target, online):
    if isinstance(target, Mapping):
      return {name: move(target[name], online[name]) for name in target}
    return target * tau + online * (1 - tau)

  target = method_state["target"]
  return method_state | {"target": target | {"params": move(target["params"], params)}}


def follow(tau: Callable[[Array], Array | float]) -> Callable[..., tuple[Params, MethodState]]:
  """`Method.after_update` that moves the target; tau: step -> the fraction of it that is kept."""

  def after_update(params, method_state, step):
    return params, update_target(method_state, params, tau(step))

  return after_update


def cosine_tau(base: float, step: Array, total_steps: int) -> Array:
  """BYOL's schedule: `base` at step 0, 1 at the last, as half a cosine."""
  return 1 - (1 - base) * (jnp.cos(jnp.pi * step / total_steps) + 1) / 2


def random_queue(key: Array, *shape: int) -> Array:
  """A queue before its first batch: [..., Q, P], rows uniform on the sphere."""
  return normalise(jax.random.normal(jax.random.fold_in(key, 1), shape))


def push(queue_QP: Array, newest_BP: Array) -> Array:
  """The queue without its oldest B rows and with the newest in front; Q is a multiple of B."""
  # Not concatenated: the queue would be cut as the batch is, and sent around whole.
  older_QP = jnp.roll(queue_QP, newest_BP.shape[0], axis=0)
  return jax.lax.dynamic_update_slice(older_QP, jax.lax.stop_gradient(newest_BP), (0, 0))


def linear_warmup(start: float, end: float, step: Array, num_steps: float) -> Array:
  """From `start` at step 0 to `end` at `num_steps`, and that from then on."""
  return start + (end - start) * (jnp.minimum(step / num_steps, 1) if num_steps > 0 else 1.0)


def joint_embedding(
  network: nn.Module,
  views: tuple[ViewSpec, ...],
  objective: Callable[..., tuple[Array, dict[str, Array]]],
  *,
  constant_lr: tuple[str, ...] = (),
  unit_variance: bool = False,
) -> Method:
  """The Method of an objective on one network's embeddings of all views, global ones first.

  Args:
    network: a `models.heads.JointEmbedding`.
    views: "global", and optionally "local".
    objective: (z_BVP, q_BVP, label_B, key) -> loss, metrics; projections and predictions.
    constant_lr, unit_variance: see `Method`.
  """

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    return params, {"batch_stats": stats}

  def loss(params, method_state, views, key, step):
    del step
    keys = jax.random.split(key, 3)
    (h_BVD, z_BVP, q_BVP), stats = forward(
      network, params, method_state["batch_stats"], views["global"], keys[0]
    )
    if "local" in views:
      (_, z, q), stats = forward(network, params, stats, views["local"], keys[1])
      z_BVP, q_BVP = jnp.concatenate([z_BVP, z], 1), jnp.concatenate([q_BVP, q], 1)
    value, metrics = objective(z_BVP, q_BVP, views["label"], keys[2])
    aux = Aux(
      method_state={"batch_stats": stats},
      metrics=metrics,
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(z_BVP[:, 0]),
      targets=jax.lax.stop_gradient(z_BVP[:, 1]) if z_BVP.shape[1] > 1 else None,
    )
    return value, aux

  encoder = encode_with(network.encoder)
  return Method(views, init, loss, keep, encoder, constant_lr, unit_variance)
