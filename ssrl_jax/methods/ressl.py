"""ReSSL: what a strong view is like among others, a weak view tells (Zheng et al. 2021).

The teacher, a moving average, sees the picture cropped and flipped only; its cosines to a queue of
its earlier embeddings, sharpened, are what the student's cosines to the same queue must become. No
pair of pictures is said to differ. Official code: KyleZheng1997/ReSSL (now mingkai-zheng/ReSSL)
ressl.py and network/ressl.py, with a head without BatchNorm, and ressl_multi.py, where the student
sees several crops. Departures: none of its shuffling of BatchNorm, statistics are those of the
whole batch; crops of two sizes at most, the official ones of five.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.consistency import relation_entropy
from ssrl_jax.method import (
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  check_positive,
  check_queue,
  encode_with,
  fold_views,
  follow,
  forward,
  forward_target,
  global_views,
  init_network,
  make_target,
  normalise,
  push,
  random_queue,
)
from ssrl_jax.models.heads import MLP, JointEmbedding

PLAIN = {"jitter": 0.0, "greyscale": 0.0, "blur": (0.0,), "solarise": (0.0,), "noise": (0.0,)}


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  temperature: float = 0.1,
  teacher_temperature: float = 0.04,
  tau: float = 0.999,
  queue_size: int = 131072,
  hidden_dim: int = 4096,
  out_dim: int = 512,
) -> Method:
  """ReSSL's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: "global", 1 or more, and optionally "local", which the student sees; beside them one view
      "weak" for the teacher, the global one without its colours, blur and noise.
    run: queue_size must be a multiple of its batch size.
    temperature: of the student's cosines, > 0.
    teacher_temperature: of the teacher's, > 0; below the student's, so that it is sharper.
    tau: kept by the moving average, constant; 0.99 for small sets.
    queue_size: embeddings of earlier batches, at random at the start; 4096 for small sets.
    hidden_dim, out_dim: of the projector, which has no BatchNorm.
  """
  check_positive("ressl", temperature=temperature, teacher_temperature=teacher_temperature)
  check_fraction("ressl", tau=tau)
  check_queue("ressl", queue_size, run)
  spec = global_views(views, method="ressl", at_least=1)
  views = (*views, spec._replace(name="weak", count=1, **PLAIN))
  head = MLP(hidden=hidden_dim, out=out_dim, norm=False, final_norm=False, final_bias=True)
  network = JointEmbedding(encoder, head)

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    queue_QP = random_queue(key, queue_size, out_dim)
    target = make_target(params, stats, ("encoder", "projector"))
    return params, {"batch_stats": stats, "target": target, "queue": queue_QP}

  def loss(params, method_state, views, key, step):
    del step
    keys, queue_QP = jax.random.split(key), method_state["queue"]
    (h_BVD, s_BVP, _), stats = forward(
      network, params, method_state["batch_stats"], views["global"], keys[0]
    )
    if "local" in views:
      (_, s, _), stats = forward(network, params, stats, views["local"], keys[1])
      s_BVP = jnp.concatenate([s_BVP, s], axis=1)
    (_, t_BVP), target = forward_target(
      network, method_state["target"], views["weak"], method="project"
    )
    t_BP = normalise(t_BVP[:, 0])
    heat = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    value = jnp.mean(relation_entropy(s_BVP, t_BP, queue_QP, **heat))
    aux = Aux(
      method_state={"batch_stats": stats, "target": target, "queue": push(queue_QP, t_BP)},
      metrics={"relation": value},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(s_BVP[:, 0]),
      targets=t_BP,
    )
    return value, aux

  after_update = follow(lambda step: tau)
  return Method(views, init, loss, after_update, encode_with(encoder))
