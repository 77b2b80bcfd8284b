"""SwAV: predict from one view the codes of another, which use all prototypes alike (Caron 2020).

Official code: facebookresearch/swav main_swav.py. Prototypes are brought to unit length before
every step (here after every update, and at init), are frozen at first, and codes come from
Sinkhorn over the batch and, late in training, a queue. The loss of each of the two global views'
codes is the mean over all other views. Departures: the queue is filled from the start, and used
from `queue_start`; the recipe's batch norms and LARC: docs/methods.md. As there, the encoder's
BatchNorms take crops of one size at once, the projector's all crops.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.prototypes import cross_view_entropy, sinkhorn
from ssrl_jax.method import (
  Aux,
  Method,
  Run,
  ViewSpec,
  check_positive,
  check_queue,
  encode_with,
  fold_views,
  global_views,
  init_network,
  normalise,
  push,
)
from ssrl_jax.models.heads import MLP, JointEmbedding, Prototypes

NUM_CODED = 2  # global views that codes are made of


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  num_prototypes: int = 3000,
  temperature: float = 0.1,
  eps: float = 0.05,
  iterations: int = 3,
  queue_size: int = 0,
  queue_start: float = 15.0,
  freeze_epochs: float = 1.0,
  hidden_dim: int = 2048,
  out_dim: int = 128,
) -> Method:
  """SwAV's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: "global" with count 2 or more, and optionally "local"; codes come from the first two.
    run: queue_size must be a multiple of its batch size; epochs are counted with it.
    num_prototypes: K; about ten times as many as there are classes.
    temperature: of the predictions' softmax. eps: of Sinkhorn; 0.03 where the loss stays at ln K.
    iterations: of Sinkhorn.
    queue_size: embeddings of earlier batches that codes are made with, 0 = none; for small batches.
    queue_start: epochs before the queue is used.
    freeze_epochs: in which the prototypes stay as they are.
    hidden_dim, out_dim: of the projector.
  """
  check_positive("swav", temperature=temperature, eps=eps)
  if queue_size:
    check_queue("swav", queue_size, run)
  global_views(views, method="swav", at_least=NUM_CODED)
  network = JointEmbedding(
    encoder,
    MLP(hidden=hidden_dim, out=out_dim, final_norm=False, final_bias=True),
    Prototypes(num_prototypes),
  )
  frozen = {"predictor": round(freeze_epochs * run.steps_per_epoch)}
  first_queue_step = max(round(queue_start * run.steps_per_epoch), queue_size // run.batch_size)

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    queue = {"queue": jnp.zeros((NUM_CODED, queue_size, out_dim))} if queue_size else {}
    return params, {"batch_stats": stats, **queue}

  def codes(scores_BK, view, method_state, kernel_KP, step):
    alone_BK = sinkhorn(scores_BK, eps=eps, iterations=iterations)
    if not queue_size:
      return alone_BK
    queue_QK = method_state["queue"][view] @ kernel_KP.T
    with_queue_BK = sinkhorn(scores_BK, eps=eps, iterations=iterations, others_QK=queue_QK)
    return jnp.where(step >= first_queue_step, with_queue_BK, alone_BK)

  def loss(params, method_state, views, key, step):
    variables = {"params": params, "batch_stats": method_state["batch_stats"]}
    crops = [views[name] for name in ("global", "local") if name in views]
    (h_BVD, z_BVP, s_BVK), mutated = network.apply(
      variables, crops, True, mutable=["batch_stats"], rngs={"dropout": key}, method="crops"
    )
    kernel_KP = params["predictor"]["kernel"]
    codes_BTK = jax.lax.stop_gradient(
      jnp.stack(
        [codes(s_BVK[:, t], t, method_state, kernel_KP, step) for t in range(NUM_CODED)], axis=1
      )
    )
    value = cross_view_entropy(codes_BTK, s_BVK, temperature=temperature)
    usage_K = jnp.mean(codes_BTK, axis=(0, 1))
    z_BVP = jax.lax.stop_gradient(normalise(z_BVP))
    new_state = {"batch_stats": mutated.get("batch_stats", {})}
    if queue_size:
      old = method_state["queue"]
      new_state["queue"] = jnp.stack([push(old[t], z_BVP[:, t]) for t in range(NUM_CODED)])
    aux = Aux(
      method_state=new_state,
      metrics={
        "swapped": value,
        "prototype_entropy": -jnp.sum(jax.scipy.special.xlogy(usage_K, usage_K)),
      },
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=z_BVP[:, 0],
      targets=z_BVP[:, 1],
    )
    return value, aux

  def after_update(params, method_state, step):
    del step
    kernel_KP = normalise(params["predictor"]["kernel"])
    return params | {"predictor": {"kernel": kernel_KP}}, method_state

  return Method(views, init, loss, after_update, encode_with(encoder), frozen=frozen)
