"""MSN: a view with patches left out is assigned to the prototypes of a whole one (Assran 2022).

Official code: facebookresearch/msn src/msn_train.py and losses.py. The first global view goes
whole through a moving average of encoder and projector, the target; the others, the anchors, lose a
random share of their patches, small local views none. All are compared with the online prototypes;
the target's probabilities are sharpened and balanced by Sinkhorn, and the mean of all anchors'
probabilities is to use every prototype alike. tau rises linearly and would be 1 after 1.25 times
the run, as there. The target's encoder is what is judged. Departures: each view loses patches of
its own, where the views on a device lose the same; the recipe's cosines of learning rate and weight
decay end with the run, not after 1.25 times its length; prototypes start uniform on the sphere and
are decayed, which at unit length only changes their rate, and clipping counts them, too; weights
begin as in all ViTs and heads here.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.masked import random_order
from ssrl_jax.losses.prototypes import cross_entropy, mean_entropy_gap, sinkhorn
from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  check_positive,
  encode_with,
  fold_views,
  follow,
  forward,
  forward_target,
  global_views,
  init_network,
  make_target,
)
from ssrl_jax.models.heads import GELU, MLP, Prototypes
from ssrl_jax.models.vit import check_vit


class Network(nn.Module):
  """Images [N, s, s, 3] and which patches enter -> pooled [N, D], scores [N, K]."""

  encoder: nn.Module
  projector: nn.Module
  prototypes: nn.Module

  def __call__(self, images: Array, train: bool, keep_BK: Array | None = None):
    h_ND = self.encoder(images, train, keep_BK=keep_BK).pooled
    return h_ND, self.score(self.projector(h_ND, train))

  def project(self, images: Array, train: bool) -> Array:
    """What the target computes of whole images."""
    return self.projector(self.encoder(images, train).pooled, train)

  def score(self, z_NP: Array) -> Array:
    return self.prototypes(z_NP, False)


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  num_prototypes: int = 1024,
  temperature: float = 0.1,
  sharpen: float = 0.25,
  balance: bool = True,
  mask_ratio: float = 0.15,
  mean_entropy_weight: float = 1.0,
  entropy_weight: float = 0.0,
  tau: float = 0.996,
  hidden_dim: int = 2048,
  out_dim: int = 256,
  num_layers: int = 3,
) -> Method:
  """MSN's Method.

  Args:
    encoder: a ViT.
    views: "global", 2 or more, the first of them the target's; and optionally "local", unmasked.
    run: total_steps is the length of tau's schedule.
    num_prototypes: outputs of the head.
    temperature: of the probabilities, p = softmax(cosine / temperature).
    sharpen: T; the target's are p^(1 / T), normalised, so of temperature x T.
    balance: Sinkhorn over the target's, three rounds; as in the official ImageNet run.
    mask_ratio: share of an anchor's patches that are left out, rounded up; paper: more for larger
      encoders, 0.15 for ViT-S, 0.7 for ViT-L.
    mean_entropy_weight: of log K minus the entropy of the anchors' mean probabilities (me-max).
    entropy_weight: of the anchors' mean entropy; 0 in the official run.
    tau: kept by the target at step 0, rising linearly.
    hidden_dim, out_dim, num_layers: of the projector; BatchNorm and GELU.
  """
  check_positive("msn", temperature=temperature, sharpen=sharpen)
  check_fraction("msn", tau=tau, mask_ratio=mask_ratio)
  patch = check_vit("msn", encoder)
  num_patches = (global_views(views, method="msn", at_least=2).size // patch) ** 2
  num_visible = max(math.floor(num_patches * (1 - mask_ratio)), 1)
  options = {"final_norm": False, "final_bias": True, "activation": GELU}
  projector = MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, **options)
  network = Network(encoder, projector, Prototypes(num_prototypes, weight_norm=True))

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    target = make_target(params, stats, ("encoder", "projector"))
    return params, {"batch_stats": stats, "target": target}

  def teach(t_BK):
    """The target's assignments: sharpened, then balanced."""
    log_BK = jax.nn.log_softmax(t_BK / (temperature * sharpen))
    return sinkhorn(log_BK, eps=1.0) if balance else jnp.exp(log_BK)

  def loss(params, method_state, views, key, step):
    del step
    keys, anchors_BVHWC = jax.random.split(key, 3), views["global"][:, 1:]
    order_BN = random_order(keys[2], math.prod(anchors_BVHWC.shape[:2]), num_patches)
    (h_BVD, s_BVK), stats = forward(
      network,
      params,
      method_state["batch_stats"],
      anchors_BVHWC,
      keys[0],
      order_BN[:, :num_visible],
    )
    if "local" in views:
      (_, s), stats = forward(network, params, stats, views["local"], keys[1])
      s_BVK = jnp.concatenate([s_BVK, s], axis=1)
    t_B1P, target = forward_target(
      network, method_state["target"], views["global"][:, :1], method="project"
    )
    fixed = {"params": jax.lax.stop_gradient(params)}
    p_BK = teach(network.apply(fixed, t_B1P[:, 0], method="score"))
    prediction = jnp.mean(cross_entropy(p_BK[:, None], s_BVK, temperature=temperature))
    gap = mean_entropy_gap(s_BVK, temperature=temperature)
    own_BVK = jax.nn.softmax(s_BVK / temperature)
    entropy = jnp.mean(cross_entropy(own_BVK, s_BVK, temperature=temperature))
    aux = Aux(
      method_state={"batch_stats": stats, "target": target},
      metrics={"prediction": prediction, "mean_entropy_gap": gap, "entropy": entropy},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      # Distributions, as of `dino`.
      embeddings=jax.lax.stop_gradient(own_BVK[:, 0]),
      targets=p_BK,
    )
    return prediction + mean_entropy_weight * gap + entropy_weight * entropy, aux

  after_update = follow(lambda step: tau + (1 - tau) * step / (1.25 * run.total_steps))
  return Method(views, init, loss, after_update, encode_with(encoder, target=True))
