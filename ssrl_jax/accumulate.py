"""A batch in parts: the gradient of the whole batch with the activations of one part.

The encoder runs over one part of the batch after another without keeping its activations; the
heads and the loss see the embeddings of all parts at once; the backward pass goes over the parts
again, computing each one's activations anew. It is the cached gradient of Gao et al. 2021
(GradCache, arXiv 2101.06983), written as the autodiff of a rematerialised loop. So it holds for
every loss, however that couples the examples, as long as the encoder sees each image by itself; an
encoder with batch statistics does not, and is refused.

It costs one more forward pass. Dropout and drop path draw other numbers than without parts, as
with another seed; views, masks and whatever else the loss draws are drawn for the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssrl_jax.method import Method
from ssrl_jax.views import abstract_views


def accumulated(method: Method, num_parts: int, *, batch_size: int, num_devices: int) -> Method:
  """The method whose loss puts the batch through its networks in `num_parts` parts.

  Raises:
    ValueError: the batch cannot be cut so, or its examples are coupled inside the encoder.
  """
  if num_parts == 1:
    return method
  if num_parts < 1 or batch_size % (num_parts * num_devices):
    fitting = [n for n in range(1, batch_size + 1) if batch_size % (n * num_devices) == 0]
    close = min(fitting, key=lambda n: abs(n - num_parts))
    raise ValueError(
      f"accumulate is {num_parts}: batch_size {batch_size} on {num_devices} device(s) cannot be "
      f"cut into so many equal parts; nearest: {close}"
    )
  views = abstract_views(method.views, batch_size)
  _, method_state = jax.eval_shape(method.init, jax.random.key(0), views)
  if jax.tree.leaves(method_state["batch_stats"].get("encoder", {})):
    raise ValueError(
      f"accumulate is {num_parts}, but the encoder's BatchNorm has its statistics over the batch, "
      "so a part's gradient would be another; set encoder.norm=group or encoder.name to a ViT, or "
      "accumulate=1 and encoder.remat=True"
    )

  def loss(params, method_state, views, key, step):
    cut = cut_networks(num_parts, batch_size=views["label"].shape[0])
    with nn.intercept_methods(cut):
      return method.loss(params, method_state, views, key, step)

  return method._replace(loss=loss)


def cut_networks(num_parts: int, *, batch_size: int) -> Callable:
  """Runs in parts: a network without batch statistics, else its encoder alone.

  A method's network is what its loss applies, the encoder its attribute of this name. A BatchNorm
  in a head sees the whole batch, as it would without parts.
  """
  inside = []

  def cut(call, args, kwargs, context):
    module, name = context.module, context.method_name
    whole = not module.path and not jax.tree.leaves(module.variables.get("batch_stats", {}))
    if inside or name == "setup" or not (whole or module.path == ("encoder",)):
      return call(*args, **kwargs)
    network, variables = module.unbind()
    keys = {"dropout": module.make_rng("dropout")} if module.has_rng("dropout") else {}

    def apply(part, args, kwargs):
      rngs = {kind: jax.random.fold_in(key, part) for kind, key in keys.items()}
      return network.apply(variables, *args, **kwargs, rngs=rngs, method=name)

    inside.append(True)
    try:
      return in_parts(apply, num_parts, batch_size, args, kwargs)
    finally:
      inside.pop()

  return cut


def in_parts(apply: Callable, num_parts: int, batch_size: int, *arguments: Any) -> Any:
  """apply(part, *arguments), part by part; only its arguments and results are kept.

  Every array in `arguments` and in the result has rows [B * V, ...], those of an example together;
  V may differ from array to array. Part p is of the examples p, p + num_parts, p + 2 num_parts, ...
  so that each device, which holds a run of examples, has its share of every part.
  """
  leaves, tree = jax.tree.flatten(arguments)
  is_array = [np.ndim(x) > 0 for x in leaves]
  size = batch_size // num_parts

  @functools.partial(jax.checkpoint, prevent_cse=False)  # a loop's body needs no such barrier
  def run(part):
    def take(x):
      x = x.reshape(size, num_parts, -1, *x.shape[1:])
      x = jax.lax.dynamic_index_in_dim(x, part, axis=1, keepdims=False)
      return x.reshape(-1, *x.shape[2:])

    taken = [take(x) if cut else x for x, cut in zip(leaves, is_array)]
    return apply(part, *jax.tree.unflatten(tree, taken))

  def put_together(y):
    y = y.reshape(num_parts, size, -1, *y.shape[2:])
    return jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[3:])

  return jax.tree.map(put_together, jax.lax.map(run, jnp.arange(num_parts)))
