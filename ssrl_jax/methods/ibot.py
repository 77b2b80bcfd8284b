"""iBOT: DINO on the class token, and the same on masked patches of one view (Zhou et al. 2022).

Official code: bytedance/ibot main_ibot.py, with its shared head. The student sees global views with
a block of patches masked, the teacher whole; patches have a centre of their own. Departures: one
rectangle is masked in each view, where the official code joins several; schedules run by step; the
projector begins as `dino`'s.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.masked import mean_where, random_blocks
from ssrl_jax.losses.prototypes import centred_softmax, cross_entropy, cross_view_entropy
from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  check_positive,
  check_range,
  check_share,
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
)
from ssrl_jax.models.heads import GELU, MLP, Prototypes
from ssrl_jax.models.vit import check_vit


class Network(nn.Module):
  """h [N, D], scores of the class token [N, K] and of the patches [N, n, K]."""

  encoder: nn.Module
  projector: nn.Module
  prototypes: nn.Module

  def __call__(self, images: Array, train: bool, mask_BN: Array | None = None):
    features = self.encoder(images, train, mask_BN=mask_BN)
    tokens_BND = features.tokens
    z_BP = self.projector(tokens_BND[:, 0], train)
    patches_BNP = self.projector(tokens_BND[:, self.encoder.num_prefix :], train)
    return features.pooled, self.prototypes(z_BP, train), self.prototypes(patches_BNP, train)


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  num_prototypes: int = 8192,
  temperature: float = 0.1,
  teacher_temperature: float = 0.07,
  start_teacher_temperature: float = 0.04,
  warmup_epochs: float = 30.0,
  centre_momentum: float = 0.9,
  tau: float = 0.996,
  mask_probability: float = 0.5,
  mask_ratio: tuple[float, float] = (0.1, 0.5),
  patch_weight: float = 1.0,
  freeze_epochs: float = 1.0,
  hidden_dim: int = 2048,
  out_dim: int = 256,
  num_layers: int = 3,
) -> Method:
  """iBOT's Method.

  Args:
    encoder: a ViT.
    views: "global", 2 or more, and optionally "local", which only the student sees, unmasked.
    run: epochs and the length of tau's schedule are counted with it.
    mask_probability: of a view to be masked at all.
    mask_ratio: share of its patches, drawn uniformly from this range.
    patch_weight: of the masked patches' loss, the class token's having 1.
    others: as `dino.make`.
  """
  check_positive(
    "ibot",
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    start_teacher_temperature=start_teacher_temperature,
  )
  check_fraction("ibot", tau=tau, centre_momentum=centre_momentum)
  check_share("ibot", mask_probability=mask_probability)
  check_range("ibot", most=0.99, mask_ratio=mask_ratio)
  patch = check_vit("ibot", encoder)
  side = global_views(views, method="ibot", at_least=2).size // patch
  options = {"norm": False, "final_norm": False, "final_bias": True, "activation": GELU}
  projector = MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, **options)
  network = Network(encoder, projector, Prototypes(num_prototypes, weight_norm=True))
  warmup_steps = warmup_epochs * run.steps_per_epoch
  frozen = {"prototypes": round(freeze_epochs * run.steps_per_epoch)}

  def init(key, views):
    images = fold_views(views["global"])
    no_mask = jnp.zeros((images.shape[0], side * side), bool)
    params, stats = init_network(network, key, images, no_mask)
    target = make_target(params, stats, ("encoder", "projector", "prototypes"))
    centre = {"class": jnp.zeros(num_prototypes), "patches": jnp.zeros(num_prototypes)}
    return params, {"batch_stats": stats, "target": target, "centre": centre}

  def draw_masks(key, num):
    keys = jax.random.split(key)
    block_BN = random_blocks(keys[0], num, (side, side), area=mask_ratio, aspect=(0.3, 1 / 0.3))
    return block_BN & (jax.random.uniform(keys[1], (num, 1)) < mask_probability)

  def loss(params, method_state, views, key, step):
    keys, centre = jax.random.split(key, 4), method_state["centre"]
    b, v = views["global"].shape[:2]
    mask_BN = draw_masks(keys[3], b * v)
    (h_BVD, s_BVK, s_BVNK), stats = forward(
      network, params, method_state["batch_stats"], views["global"], keys[0], mask_BN
    )
    (_, t_BTK, t_BTNK), target = forward_target(network, method_state["target"], views["global"])
    if "local" in views:
      (_, s, _), stats = forward(network, params, stats, views["local"], keys[1])
      s_BVK = jnp.concatenate([s_BVK, s], axis=1)
    heat = linear_warmup(start_teacher_temperature, teacher_temperature, step, warmup_steps)
    p_BTK = centred_softmax(t_BTK, centre["class"], temperature=heat)
    class_loss = cross_view_entropy(p_BTK, s_BVK, temperature=temperature)
    p_BTNK = centred_softmax(t_BTNK, centre["patches"], temperature=heat)
    patch_BN = fold_views(cross_entropy(p_BTNK, s_BVNK, temperature=temperature))
    patch_loss = jnp.mean(mean_where(patch_BN, mask_BN))
    newest = {"class": jnp.mean(t_BTK, axis=(0, 1)), "patches": jnp.mean(t_BTNK, axis=(0, 1, 2))}
    centre = {k: c * centre_momentum + newest[k] * (1 - centre_momentum) for k, c in centre.items()}
    aux = Aux(
      method_state={"batch_stats": stats, "target": target, "centre": centre},
      metrics={"class": class_loss, "patches": patch_loss},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(jax.nn.softmax(s_BVK[:, 0] / temperature)),
      targets=p_BTK[:, 1],
    )
    return class_loss + patch_weight * patch_loss, aux

  after_update = follow(lambda step: cosine_tau(tau, step, run.total_steps))
  return Method(views, init, loss, after_update, encode_with(encoder, target=True), frozen=frozen)
