"""What detection and segmentation share: the view of an annotated picture, and a head's training.

A picture is enlarged or reduced until its longer side is the view's, and lies at the view's top
left; the rest has the mean colour. Training scales and shifts it anew each time, and mirrors half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssrl_jax import parallel
from ssrl_jax.data.dense import IGNORE, DenseSource
from ssrl_jax.data.dense_batches import train_batches
from ssrl_jax.evaluate.features import Apply, Evaluation
from ssrl_jax.evaluate.fit import fit
from ssrl_jax.method import Array
from ssrl_jax.optim import decay_mask, warmup_cosine
from ssrl_jax.pixels import normalise, resample, resize_weights

WARMUP = 0.05  # of the steps

# (outputs of the head, images' places, batch) -> scalar
HeadLoss = Callable[[Any, "Places", dict[str, Array]], Array]


class Places(NamedTuple):
  """Where in its view each picture lies."""

  scale_B: Array  # pixels of the view for one of the canvas
  start_B2: Array  # row and column of the canvas at the view's top left
  flip_B: Array  # bool: mirrored after that


class Trained(NamedTuple):
  """An encoder, perhaps trained further, and its head; arrays replicated on the mesh."""

  encoder: Any  # {"params", "batch_stats"}
  head: Any  # the same


def draw_places(
  key: Array | None, batch: dict[str, Array], *, size: int, scales: tuple[float, float]
) -> Places:
  """A function of the key and each picture's id; without a key the evaluation's place."""
  extent_B2 = batch["extent"].astype(jnp.float32)
  scale_B = size / jnp.max(extent_B2, axis=1)
  if key is None:
    return Places(scale_B, jnp.zeros_like(extent_B2), jnp.zeros(scale_B.shape, bool))

  def one(id_2):
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, id_2[0]), id_2[1]), (4,))

  u_B4 = jax.vmap(one)(batch["id"])
  low, high = scales
  scale_B *= jnp.exp(np.log(low) + u_B4[:, 0] * np.log(high / low))
  beyond_B2 = jnp.maximum(extent_B2 - size / scale_B[:, None], 0)
  return Places(scale_B, u_B4[:, 1:3] * beyond_B2, u_B4[:, 3] < 0.5)


def view_images(
  batch: dict[str, Array], places: Places, *, size: int, mean: tuple, std: tuple
) -> Array:
  """Normalised, float32 [B, size, size, 3], 0 (the mean colour) outside the picture."""

  def one(image_SSC, extent_2, scale, start_2, flip):
    canvas_SSC, length = image_SSC.astype(jnp.float32) / 255, size / scale
    weights, inside = [], []
    for axis in (0, 1):
      at_O = start_2[axis] + (np.arange(size, dtype=np.float32) + 0.5) / scale
      inside.append(at_O < extent_2[axis])
      weights_OI = resize_weights(
        image_SSC.shape[axis], size, start_2[axis], length, 0, extent_2[axis]
      )
      # Beyond the picture there is nothing to weigh, and the sum of the weights is 0 / 0.
      weights.append(jnp.where(inside[axis][:, None], weights_OI, 0))
    view_OPC = normalise(resample(canvas_SSC, *weights), mean, std)
    view_OPC *= (inside[0][:, None] & inside[1][None, :])[..., None]
    return jnp.where(flip, view_OPC[:, ::-1], view_OPC)

  return jax.vmap(one)(batch["image"], batch["extent"], *places)


def view_masks(mask_BSS: Array, extent_B2: Array, places: Places, *, size: int) -> Array:
  """The masks of the views, by nearest neighbour: int32 [B, size, size], IGNORE outside."""

  def one(mask_SS, extent_2, scale, start_2, flip):
    at_O = (np.arange(size, dtype=np.float32) + 0.5) / scale
    rows_O, columns_O = (jnp.floor(start_2[i] + at_O).astype(jnp.int32) for i in (0, 1))
    inside_OP = (rows_O < extent_2[0])[:, None] & (columns_O < extent_2[1])[None, :]
    # An index beyond the canvas is clamped, and its value not used.
    mask_OP = jnp.where(inside_OP, mask_SS[rows_O][:, columns_O].astype(jnp.int32), IGNORE)
    return jnp.where(flip, mask_OP[:, ::-1], mask_OP)

  return jax.vmap(one)(mask_BSS, extent_B2, *places)


def view_boxes(boxes_BN4: Array, valid_BN: Array, places: Places, *, size: int) -> tuple:
  """Boxes in pixels of the view, cut at its border; valid if at least a pixel wide and high."""

  def one(boxes_N4, valid_N, scale, start_2, flip):
    start_4 = jnp.tile(start_2[::-1], 2)
    boxes_N4 = jnp.clip((boxes_N4 - start_4[None, :]) * scale, 0, size)
    mirrored_N4 = jnp.stack(
      [size - boxes_N4[:, 2], boxes_N4[:, 1], size - boxes_N4[:, 0], boxes_N4[:, 3]], axis=1
    )
    boxes_N4 = jnp.where(flip, mirrored_N4, boxes_N4)
    return boxes_N4, valid_N & jnp.all(boxes_N4[:, 2:] - boxes_N4[:, :2] >= 1, axis=1)

  return jax.vmap(one)(boxes_BN4, valid_BN, *places)


def map_strides(evaluation: Evaluation, size: int, name: str) -> list[int]:
  """The strides of the encoder's maps; refuses what has none, or does not divide `size`."""
  strides = sorted(_abstract_maps(evaluation, size))
  if not strides:
    raise ValueError(f"{name} reads an encoder's maps, and this encoder has none; choose another")
  if size < 1 or size % strides[-1]:
    nearest = max(round(size / strides[-1]), 1) * strides[-1]
    raise ValueError(
      f"{name}: size {size} is not a multiple of the encoder's coarsest stride {strides[-1]}; "
      f"nearest: {nearest}"
    )
  return strides


def _abstract_maps(evaluation: Evaluation, size: int) -> dict[int, jax.ShapeDtypeStruct]:
  images = jax.ShapeDtypeStruct((1, max(size, 1), max(size, 1), 3), jnp.float32)
  apply = evaluation.apply
  return jax.eval_shape(lambda w, x: apply(w, x, False, None)[0].maps, evaluation.weights, images)


def train_head(
  evaluation: Evaluation,
  head: nn.Module,
  head_loss: HeadLoss,
  source: DenseSource,
  *,
  name: str,
  size: int,
  scales: tuple[float, float],
  steps: int,
  batch_size: int,
  learning_rate: float,
  weight_decay: float,
  finetune: bool,
  encoder_rate: float,
  seed: int,
) -> Trained:
  """Trains a head (maps, train -> outputs) on the encoder's maps, and the encoder if `finetune`.

  AdamW, warm-up over the first twentieth of the steps, then half a cosine to 0. A frozen encoder
  runs as in evaluation and keeps every byte; one that is fine-tuned runs as in training.

  Args:
    steps: of the training.
    batch_size: of all devices together.
    learning_rate: at the peak.
    weight_decay: of kernels.
    finetune: trains the encoder, too.
    encoder_rate: multiplies the learning rate of an encoder that is trained, too.
    seed: of the head, the order and the views.
  """
  _check_options(name, scales, steps, learning_rate, encoder_rate)
  parallel.check_batch_size(batch_size, evaluation.mesh)
  view = {"size": size, "mean": evaluation.mean, "std": evaluation.std}
  variables = _init(evaluation, head, size, seed)
  weights = evaluation.weights
  params = {"head": variables["params"]}
  stats = {"head": variables.get("batch_stats", {}), "encoder": weights["batch_stats"]}
  if finetune:
    params["encoder"] = weights["params"]
  else:
    stats["frozen"] = weights["params"]

  def loss(params, stats, batch, key):
    place_key, dropout_key = jax.random.split(key)
    places = draw_places(place_key, batch, size=size, scales=scales)
    encoder = _encoder(params, stats)
    features, moved = evaluation.apply(
      encoder, view_images(batch, places, **view), finetune, dropout_key if finetune else None
    )
    variables = {"params": params["head"], "batch_stats": stats["head"]}
    outputs, mutated = head.apply(variables, features.maps, True, mutable=["batch_stats"])
    stats = stats | {"head": mutated.get("batch_stats", {})}
    if finetune:
      stats |= {"encoder": moved}
    return head_loss(outputs, places, batch), stats

  schedule = warmup_cosine(
    peak=learning_rate,
    warmup_steps=int(WARMUP * steps),
    total_steps=steps,
    final_fraction=0.0,
  )
  optimizer = optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay, mask=decay_mask),
    optax.masked(optax.scale(encoder_rate), {part: part == "encoder" for part in params}),
    optax.scale_by_learning_rate(schedule),
  )
  params, stats = fit(
    loss, params, stats, _batches(evaluation, source, batch_size, size, scales, seed),
    optimizer=optimizer, num_steps=steps, seed=seed, mesh=evaluation.mesh, name=name,
    moved=evaluation.moved,
  )  # fmt: skip
  variables = {"params": params["head"], "batch_stats": stats["head"]}
  return Trained(_encoder(params, stats), variables)


def apply_head(
  apply: Apply, head: nn.Module, trained: Trained, batch: dict[str, Array], **view: Any
) -> tuple[Any, Places]:
  """The head's outputs for the evaluation views of a batch, and where the pictures lie in them."""
  places = draw_places(None, batch, size=view["size"], scales=(1.0, 1.0))
  images = view_images(batch, places, **view)
  return head.apply(
    trained.head, apply(trained.encoder, images, False, None)[0].maps, False
  ), places


def _encoder(params: dict[str, Any], stats: dict[str, Any]) -> dict[str, Any]:
  return {
    "params": params["encoder"] if "encoder" in params else stats["frozen"],
    "batch_stats": stats["encoder"],
  }


def _init(evaluation: Evaluation, head: nn.Module, size: int, seed: int) -> Any:
  shapes = _abstract_maps(evaluation, size)

  def init(key):
    maps = {s: jnp.zeros(x.shape, x.dtype) for s, x in shapes.items()}
    return head.init(key, maps, False)

  whole = parallel.replicated(evaluation.mesh)
  init = jax.jit(init, out_shardings=whole, compiler_options=parallel.quick_compile())
  return init(jax.random.key(seed))


def _batches(evaluation, source, batch_size, size, scales, seed) -> Iterator[dict[str, np.ndarray]]:
  """On a canvas on which even the largest view is not enlarged."""
  return train_batches(
    source, seed=seed, batch_size=batch_size, canvas=int(np.ceil(size * max(1.0, scales[1]))),
    **evaluation.reading(),
  )  # fmt: skip


def _check_options(name, scales, steps, learning_rate, encoder_rate) -> None:
  if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
    raise ValueError(f"{name}: scales is {scales}; expected 0 < low <= high, e.g. (0.8, 1.25)")
  if steps < 1 or not learning_rate > 0 or encoder_rate < 0:
    raise ValueError(
      f"{name}: steps is {steps}, learning_rate {learning_rate} and encoder_rate {encoder_rate}; "
      "expected at least 1 step, a positive learning rate, and 0 or more"
    )
