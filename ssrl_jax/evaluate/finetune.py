"""Fine-tuning: head and encoder are trained with labels, from the pretrained weights.

What the encoder is worth as a start. The same training from a random start is the control that
says how much of the figure is due to pretraining; the suite runs it beside this.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssrl_jax.data.sources import labels_of
from ssrl_jax.evaluate import labels as label_choice
from ssrl_jax.evaluate import linear, linear_fit
from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.evaluate.fit import fit
from ssrl_jax.evaluate.pictures import classify, crop_and_flip, training_batches
from ssrl_jax.losses import classification
from ssrl_jax.method import Array
from ssrl_jax.optim import make_optimizer

# What enters a ResNet's or a ViT's first block.
_ENTRANCE = (
  *("stem_conv", "stem_norm", "patches", "position"),
  *("class_token", "class_position", "registers", "mask_token"),
)
_BLOCK = re.compile(r"(?:stage(\d+)_)?block(\d+)")


def run(
  evaluation: Evaluation,
  *,
  epochs: int = 50,
  batch_size: int = 128,
  optimizer: str = "adamw",
  learning_rate: float = 1e-3,
  head_rate: float = 1.0,
  weight_decay: float = 0.05,
  momentum: float = 0.9,
  warmup_epochs: float = 5.0,
  layer_decay: float = 0.75,
  clip_norm: float = 0.0,
  smallest_crop: float = 0.08,
  label_smoothing: float = 0.0,
  loss: str = "cross_entropy",
  q: float = 0.7,
  alpha: float = 0.1,
  beta: float = 1.0,
  log_zero: float = -4.0,
  label_noise: float = 0.0,
  label_fraction: float = 1.0,
  num_per_class: int = 0,
  labels_file: str = "",
  seed: int = 0,
) -> dict[str, float]:
  """Trains everything on crops and flips; BatchNorm in training mode, its moments from the start.

  With the defaults the recipe of MAE and BEiT for fine-tuning (facebookresearch/mae, FINETUNE.md):
  AdamW, cosine with warm-up, layer decay; without their mixup, cutmix, RandAugment and random
  erasing, so lower than theirs. SimCLR's (Chen et al. 2020, appendix B.5): optimizer=sgd,
  learning_rate=0.05, layer_decay=1, weight_decay=0, warmup_epochs=0, with momentum that is not
  Nesterov's here. The head starts at zero. Drop path and the like are those of the encoder's own
  config.

  Args:
    epochs: of the labelled pictures that are used; also where these are few.
    batch_size: at most; of all devices together.
    optimizer: adamw or sgd.
    learning_rate: at the peak and for batch 256; scaled linearly with the batch size.
    head_rate: multiplies the learning rate of the head.
    weight_decay: on arrays of two or more axes; so on learned positions, which MAE and BEiT except.
    momentum: of sgd.
    warmup_epochs: over which the rate rises linearly from 0.
    layer_decay: see `layer_factors`; 1 = off.
    clip_norm: the gradient's global norm is cut to this; 0 = off.
    smallest_crop: of a training view, as a share of the picture's area.
    label_smoothing: of cross_entropy.
    loss: cross_entropy, or one that tolerates wrong labels: generalised (with `q`; Zhang & Sabuncu
      2018) or symmetric (with alpha, beta, log_zero; Wang et al. 2019). See
      losses/classification.py.
    q: of loss generalised, in (0, 1]; the larger, the less a label that looks wrong pulls.
    alpha: of loss symmetric: weight of cross-entropy. beta: of loss symmetric: weight of its
      reverse. log_zero: of loss symmetric: what stands for log 0 in the reverse.
    label_noise: share of the training labels in use that become another class, uniformly.
    label_fraction, num_per_class, labels_file: the labels in use; see `labels.choose_ids`.
    seed: of the choice of labels, their noise, the order and the views.

  Returns:
    finetune/accuracy: percent of the labelled test pictures after the last epoch.
    finetune/top5: percent whose class is among the five likeliest; with 20 classes or more.
    finetune/mean_class_accuracy: percent; the mean over the test set's classes of each one's own.
    finetune/epochs: trained.
    finetune/labels: number of labelled training pictures in use.
    finetune/label_noise: percent of them that had a wrong label put on.
    finetune/unlabelled: test pictures that were left out.
  """
  per_picture = make_loss(
    loss, smoothing=label_smoothing, q=q, alpha=alpha, beta=beta, log_zero=log_zero
  )
  _check_options(epochs, warmup_epochs, optimizer, layer_decay, head_rate)
  ids = label_choice.choose_ids(
    evaluation.train, label_fraction=label_fraction, num_per_class=num_per_class,
    labels_file=labels_file, seed=seed,
  )  # fmt: skip
  label_N = labels_of(evaluation.train)[ids]
  frozen, unlabelled = evaluation.labelled("test")  # before the training, not after it
  dim = frozen.features.shape[1]
  noisy_N = label_choice.symmetric_noise(
    label_N, evaluation.num_classes, rate=label_noise, seed=seed
  )
  batches, batch_size, steps = training_batches(
    evaluation, ids, batch_size=batch_size, seed=seed, labels=noisy_N
  )
  head = {
    "kernel": jnp.zeros((dim, evaluation.num_classes)),
    "bias": jnp.zeros(evaluation.num_classes),  # of one axis: not decayed
  }
  params = {"encoder": evaluation.weights["params"], "head": head}
  base, _ = make_optimizer(
    name=optimizer, scale_by_batch=True, warmup_epochs=warmup_epochs, final_fraction=0.0, b1=0.9,
    b2=0.999, trust_coefficient=0.001, clip_ratio=False, final_weight_decay=-1.0, clip_each=False,
    learning_rate=learning_rate, weight_decay=weight_decay, momentum=momentum, clip_norm=clip_norm,
    batch_size=batch_size, steps_per_epoch=steps, total_steps=epochs * steps,
  )  # fmt: skip
  factors = {
    "encoder": layer_factors(params["encoder"], layer_decay),
    "head": jax.tree.map(lambda _: head_rate, head),
  }
  scale = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))

  def value(params, stats, batch, key):
    view_key, dropout_key = jax.random.split(key)
    images = crop_and_flip(evaluation, view_key, batch, smallest_crop=smallest_crop)
    weights = {"params": params["encoder"], "batch_stats": stats}
    features, stats = evaluation.apply(weights, images, True, dropout_key)
    logits_BK = linear_fit.apply(_rows(params["head"]), features.pooled.astype(jnp.float32))
    return jnp.mean(per_picture(logits_BK, batch["label"])), stats

  params, stats = fit(
    value, params, evaluation.weights["batch_stats"], batches,
    optimizer=optax.chain(base, scale), num_steps=epochs * steps, seed=seed,
    mesh=evaluation.mesh, name="finetune", moved=evaluation.moved,
  )  # fmt: skip
  tuned = {"params": params["encoder"], "batch_stats": stats}
  test = classify(evaluation, tuned, _rows(params["head"]), "test")
  figures = linear.accuracies(test.features, test.labels) | {
    "mean_class_accuracy": mean_class_accuracy(test.features, test.labels),
    "epochs": float(epochs),
    "labels": float(len(ids)),
    "label_noise": 100 * float(np.mean(noisy_N != label_N)),
    "unlabelled": float(unlabelled),
  }
  return {f"finetune/{name}": value for name, value in figures.items()}


def _rows(head: dict[str, Array]) -> linear_fit.Head:
  return head | {"bias": head["bias"][None]}


def make_loss(
  name: str, *, smoothing: float, q: float, alpha: float, beta: float, log_zero: float
) -> Callable[[Array, Array], Array]:
  """(logits [B, K], labels [B]) -> [B]; options of other losses are not used."""
  if name not in classification.LOSSES:
    raise ValueError(f"unknown loss {name!r}; known: {', '.join(classification.LOSSES)}")
  if not 0 <= smoothing < 1:
    raise ValueError(f"label_smoothing is {smoothing}; expected 0 or more and below 1, e.g. 0.1")
  if smoothing and name != "cross_entropy":
    raise ValueError(
      f"label_smoothing is {smoothing}, but the loss is {name}; set it to 0 or take cross_entropy"
    )
  if name == "generalised":
    return lambda logits, label: classification.generalised_cross_entropy(logits, label, q=q)
  if name == "symmetric":
    return lambda logits, label: classification.symmetric_cross_entropy(
      logits, label, alpha=alpha, beta=beta, log_zero=log_zero
    )
  return lambda logits, label: classification.cross_entropy(logits, label, smoothing=smoothing)


def layer_factors(params: Any, decay: float) -> Any:
  """What multiplies each array's learning rate: decay^(L + 1 - layer), as BEiT and MAE.

  The stem, or patches, positions and tokens, are layer 0, the blocks 1 to L in their order, and all
  that comes after (a ViT's last norm, a FusionEncoder's or AttentionEncoder's own) L + 1, so 1.

  Raises:
    ValueError: there are no blocks to tell apart, and decay is not 1.
  """
  paths = [
    jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  blocks = sorted({block for path in paths for block in _blocks(path)})
  if not blocks and decay != 1:
    raise ValueError(
      f"layer_decay is {decay}, but the encoder has no blocks in order (stage1_block1 or block1); "
      "set it to 1"
    )

  def factor(path):
    if own := _blocks(path):
      layer = 1 + blocks.index(own[0])
    else:
      layer = 0 if any(name in _ENTRANCE for name in path) else len(blocks) + 1
    return decay ** (len(blocks) + 1 - layer)

  return jax.tree.unflatten(jax.tree.structure(params), [factor(path) for path in paths])


def _blocks(path: list[str]) -> list[tuple[int, int]]:
  """(stage, number) of the blocks that an array lies in; one at most."""
  found = [_BLOCK.fullmatch(name) for name in path]
  return [(int(match[1] or 0), int(match[2])) for match in found if match]


def mean_class_accuracy(logits_NK: np.ndarray, label_N: np.ndarray) -> float:
  """Percent: the mean over the classes that occur."""
  right_N = np.argmax(logits_NK, axis=1) == label_N
  return 100 * float(np.mean([np.mean(right_N[label_N == k]) for k in np.unique(label_N)]))


def _check_options(epochs, warmup_epochs, optimizer, layer_decay, head_rate) -> None:
  if epochs < 1 or not 0 <= warmup_epochs < epochs:
    raise ValueError(
      f"epochs is {epochs} and warmup_epochs {warmup_epochs}; expected at least 1, and a warm-up "
      "that is shorter"
    )
  if optimizer not in ("adamw", "sgd"):
    raise ValueError(f"unknown optimizer {optimizer!r}; known: adamw, sgd")
  if not 0 < layer_decay <= 1 or head_rate <= 0:
    raise ValueError(
      f"layer_decay is {layer_decay} and head_rate {head_rate}; expected above 0 to 1, and above 0"
    )
