"""Linear evaluation as the papers run it: the head is trained on augmented views.

The encoder is frozen, BatchNorm included (MoCo, SimCLR, BYOL: running moments); each step crops and
flips the pictures anew. Where a paper sweeps the learning rate (BYOL) one head for each rate is
trained here, all at once: views and encoder are computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssrl_jax.evaluate import linear
from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.evaluate.fit import fit
from ssrl_jax.evaluate.linear_fit import Head, apply, ranking, unstack
from ssrl_jax.evaluate.pictures import crop_and_flip, training_batches
from ssrl_jax.optim import cosine


def run(
  evaluation: Evaluation,
  *,
  learning_rates: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
  epochs: int = 100,
  batch_size: int = 256,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  smallest_crop: float = 0.08,
  held_out: float = 0.1,
  seed: int = 0,
) -> dict[str, float]:
  """Trains the heads on crops and flips, and applies the chosen one to the test pictures.

  MoCo v1 and v2 (README of facebookresearch/moco: SGD, momentum 0.9, batch 256, 100 epochs, no
  weight decay, learning rate 30 on unscaled features) with the cosine schedule of MoCo v3's
  main_lincls.py instead of their two steps, and a grid. Training views: random resized crop of
  [smallest_crop, 1] of the area, and flip. Test: the evaluation view. The held-out training
  pictures that choose the rate are seen in the evaluation view too, and no head is trained on them,
  before or after the choice; with a single rate nothing is held out.

  Args:
    learning_rates: at the start and for batch 256; scaled linearly with the batch size.
    epochs: over the training pictures that are not held out.
    batch_size: at most; of all devices together.
    momentum: of SGD.
    weight_decay: of the kernel, added to the gradient.
    smallest_crop: of a training view, as a share of the picture's area.
    held_out: share of each class that chooses the rate.
    seed: of the held-out part, the order and the views.

  Returns:
    linear_sgd/accuracy: percent of the labelled test pictures, at the last step.
    linear_sgd/top5: percent whose class is among the five likeliest; with 20 classes or more.
    linear_sgd/held_out_accuracy: percent of the held-out pictures; with two rates or more.
    linear_sgd/learning_rate: the rate chosen, for batch 256.
    linear_sgd/unlabelled: pictures of both sets that were left out.
  """
  if not learning_rates or min(learning_rates) <= 0:
    raise ValueError(f"learning_rates is {learning_rates}; give one or more positive numbers")
  if epochs < 1 or weight_decay < 0 or not 0 <= momentum < 1:
    raise ValueError(
      f"epochs is {epochs}, weight_decay {weight_decay}, momentum {momentum}; expected 1 or more, "
      "0 or more, and 0 to below 1"
    )
  train, train_unlabelled = evaluation.labelled("train")
  kept = held = np.arange(len(train.labels))
  if len(learning_rates) > 1:
    kept, held = linear.split_held_out(train.labels, held_out, seed=seed)
  heads = fit_heads(
    evaluation, train.ids[kept], train.features.shape[1], learning_rates=learning_rates,
    epochs=epochs, batch_size=batch_size, momentum=momentum, weight_decay=weight_decay,
    smallest_crop=smallest_crop, seed=seed,
  )  # fmt: skip
  accuracy, _, best = ranking(heads, train.features[held], train.labels[held])[0]
  test, test_unlabelled = evaluation.labelled("test")
  logits = np.asarray(apply(unstack(heads)[best], test.features))
  figures = linear.accuracies(logits, test.labels)
  if len(learning_rates) > 1:
    figures["held_out_accuracy"] = accuracy
    linear.warn_at_edge("linear_sgd", "learning_rates", learning_rates[best], learning_rates)
  figures["learning_rate"] = float(learning_rates[best])
  figures["unlabelled"] = float(train_unlabelled + test_unlabelled)
  return {f"linear_sgd/{name}": value for name, value in figures.items()}


def fit_heads(
  evaluation: Evaluation,
  ids: np.ndarray,
  dim: int,
  *,
  learning_rates: Sequence[float],
  epochs: int,
  batch_size: int,
  momentum: float,
  weight_decay: float,
  smallest_crop: float,
  seed: int,
) -> Head:
  """One head for each rate, stacked: kernel float32 [G, D, K], bias [G, 1, K]; zero at the start.

  A head is what it would be alone: the loss is the sum of theirs, and they share nothing else.
  """
  batches, batch_size, steps = training_batches(evaluation, ids, batch_size=batch_size, seed=seed)
  rate_G11 = np.float32(learning_rates).reshape(-1, 1, 1) * np.float32(batch_size / 256)
  shape = (len(learning_rates), dim, evaluation.num_classes)
  heads = {"kernel": jnp.zeros(shape), "bias": jnp.zeros((shape[0], 1, shape[2]))}

  def loss(heads, weights, batch, key):
    images = crop_and_flip(evaluation, key, batch, smallest_crop=smallest_crop)
    features, _ = evaluation.apply(weights, images, False, None)
    x_BD = jax.lax.stop_gradient(features.pooled.astype(jnp.float32))
    logits_GBK = jax.vmap(apply, in_axes=(0, None))(heads, x_BD)
    label_GB = jnp.broadcast_to(batch["label"], logits_GBK.shape[:2])
    losses_GB = optax.softmax_cross_entropy_with_integer_labels(logits_GBK, label_GB)
    return jnp.sum(jnp.mean(losses_GB, axis=1)), weights

  total = epochs * steps
  optimizer = optax.chain(
    optax.add_decayed_weights(weight_decay, mask={"kernel": True, "bias": False}),
    optax.sgd(cosine(1.0, 0.0, total), momentum),
    optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * rate_G11, updates)),
  )
  heads, _ = fit(
    loss, heads, evaluation.weights, batches, optimizer=optimizer, num_steps=total, seed=seed,
    mesh=evaluation.mesh, name="linear_sgd", moved=evaluation.moved,
  )  # fmt: skip
  return heads
