"""DINO: a student meets the sharpened, centred output of its own moving average (Caron 2021).

Official code: facebookresearch/dino main_dino.py. The last layer's prototypes are used at unit
length (weight norm, gain 1) and are frozen in the first epoch; the teacher's temperature
rises; the centre is a moving average of the teacher's mean output over both global views. The
teacher is what is evaluated. Departures: schedules run by step, not by epoch (so that a resumed run
goes on exactly); DINOv2's Sinkhorn can stand in for centring; the projector begins by flax's
default, where the official code draws from a normal of 0.02. Weight decay 0.04 -> 0.4 and each
array's gradient clipped at 3.0 belong to the optimizer (optim.weight_decay, final_weight_decay,
clip_norm, clip_each).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.prototypes import centred_softmax, cross_view_entropy, sinkhorn
from ssrl_jax.method import (
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  check_positive,
  cosine_tau,
  encode_with,
  fold_views,
  follow,
  forward,
  forward_target,
  global_views,
  init_network,
  linear_warmup,
  make_target,
  unfold_views,
)
from ssrl_jax.models.heads import GELU, MLP, JointEmbedding, Prototypes

CENTRINGS = ("centre", "sinkhorn", "none")


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  num_prototypes: int = 65536,
  temperature: float = 0.1,
  teacher_temperature: float = 0.07,
  start_teacher_temperature: float = 0.04,
  warmup_epochs: float = 30.0,
  centring: str = "centre",
  centre_momentum: float = 0.9,
  tau: float = 0.996,
  freeze_epochs: float = 1.0,
  hidden_dim: int = 2048,
  out_dim: int = 256,
  num_layers: int = 3,
) -> Method:
  """DINO's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: "global" with count >= 2, and optionally "local", which only the student sees.
    run: epochs and the length of tau's schedule are counted with it.
    num_prototypes: outputs of the head.
    temperature: of the student.
    teacher_temperature: of the teacher, after warmup_epochs.
    start_teacher_temperature: of the teacher at step 0.
    warmup_epochs: in which the teacher's temperature goes from the one to the other, linearly.
    centring: "centre", "sinkhorn" (DINOv2), or "none", which collapses; for ablations.
    centre_momentum: kept of the centre at each step.
    tau: kept by the teacher at step 0, rising to 1 as half a cosine; 0.9995 for batch 256.
    freeze_epochs: in which the prototypes stay as they are.
    hidden_dim, out_dim, num_layers: of the projector; GELU, no BatchNorm.
  """
  check_positive(
    "dino",
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    start_teacher_temperature=start_teacher_temperature,
  )
  check_fraction("dino", tau=tau, centre_momentum=centre_momentum)
  if centring not in CENTRINGS:
    raise ValueError(f"dino: centring {centring!r}; expected one of {CENTRINGS}")
  global_views(views, method="dino", at_least=2)
  options = {"norm": False, "final_norm": False, "final_bias": True, "activation": GELU}
  network = JointEmbedding(
    encoder,
    MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, **options),
    Prototypes(num_prototypes, weight_norm=True),
  )
  warmup_steps = warmup_epochs * run.steps_per_epoch
  frozen = {"predictor": round(freeze_epochs * run.steps_per_epoch)}

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    target = make_target(params, stats, ("encoder", "projector", "predictor"))
    return params, {"batch_stats": stats, "target": target, "centre": jnp.zeros(num_prototypes)}

  def teach(t_BTK, centre_K, step):
    heat = linear_warmup(start_teacher_temperature, teacher_temperature, step, warmup_steps)
    if centring == "sinkhorn":
      codes = sinkhorn(fold_views(t_BTK), eps=heat)
      return unfold_views(codes, t_BTK.shape[1])
    return centred_softmax(t_BTK, centre_K, temperature=heat)

  def loss(params, method_state, views, key, step):
    keys, centre_K = jax.random.split(key, 3), method_state["centre"]
    (h_BVD, _, s_BVK), stats = forward(
      network, params, method_state["batch_stats"], views["global"], keys[0]
    )
    if "local" in views:
      (_, _, s), stats = forward(network, params, stats, views["local"], keys[1])
      s_BVK = jnp.concatenate([s_BVK, s], axis=1)
    (_, _, t_BTK), target = forward_target(network, method_state["target"], views["global"])
    p_BTK = teach(t_BTK, centre_K, step)
    value = cross_view_entropy(p_BTK, s_BVK, temperature=temperature)
    if centring == "centre":
      mean_K = jnp.mean(t_BTK, axis=(0, 1))
      centre_K = centre_K * centre_momentum + mean_K * (1 - centre_momentum)
    entropy = -jnp.mean(jnp.sum(jax.scipy.special.xlogy(p_BTK, p_BTK), axis=-1))
    aux = Aux(
      method_state={"batch_stats": stats, "target": target, "centre": centre_K},
      metrics={"distillation": value, "teacher_entropy": entropy},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      # Distributions: both ways to collapse, uniform and one prototype for all, make them alike.
      embeddings=jax.lax.stop_gradient(jax.nn.softmax(s_BVK[:, 0] / temperature)),
      targets=p_BTK[:, 1],
    )
    return value, aux

  after_update = follow(lambda step: cosine_tau(tau, step, run.total_steps))
  return Method(views, init, loss, after_update, encode_with(encoder, target=True), frozen=frozen)
