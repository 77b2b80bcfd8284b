"""DINOv2: DINO on the class token, iBOT on masked patches, and KoLeo (Oquab et al. 2023).

Official code: facebookresearch/dinov2 train/ssl_meta_arch.py, with what configs/train/vitg14.yaml
changes in the objective: patches have a head of their own, and Sinkhorn stands in for centring.
Departures: one rectangle is masked in a view, where the official code joins several; as many views
of each image are masked, not of the batch, so that the head sees a fixed number of patches;
KoLeo's neighbours are those in the global batch, not in a device's part of it; schedules run by
step; the gain of the prototypes' weight norm stays 1; the projectors begin as `dino`'s. Layer-wise
learning rates, LayerScale, gradients clipped by module and the last iterations at a higher
resolution are left out.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.distribution import koleo
from ssrl_jax.losses.masked import mean_where, random_blocks
from ssrl_jax.losses.prototypes import cross_entropy, cross_view_entropy, sinkhorn
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
  unfold_views,
)
from ssrl_jax.models.heads import GELU, MLP, Prototypes
from ssrl_jax.models.vit import check_vit


class Network(nn.Module):
  """pooled h [N, D], class token [N, D], patches [N, n, D], scores of the class token [N, K]."""

  encoder: nn.Module
  projector: nn.Module
  prototypes: nn.Module
  patch_projector: nn.Module
  patch_prototypes: nn.Module

  def __call__(self, images: Array, train: bool, mask_BN: Array | None = None):
    features = self.encoder(images, train, mask_BN=mask_BN)
    class_BD, patches_BND = features.tokens[:, 0], features.tokens[:, self.encoder.num_prefix :]
    if self.is_initializing():
      self.score_patches(patches_BND)
    scores_BK = self.prototypes(self.projector(class_BD, train), train)
    return features.pooled, class_BD, patches_BND, scores_BK

  def score_patches(self, patches_BND: Array) -> Array:
    """[..., D] -> [..., K]."""
    return self.patch_prototypes(self.patch_projector(patches_BND, True), True)


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
  tau: float = 0.992,
  mask_probability: float = 0.5,
  mask_ratio: tuple[float, float] = (0.1, 0.5),
  patch_weight: float = 1.0,
  koleo_weight: float = 0.1,
  freeze_epochs: float = 1.0,
  hidden_dim: int = 2048,
  out_dim: int = 256,
  num_layers: int = 3,
) -> Method:
  """DINOv2's Method.

  Args:
    encoder: a ViT.
    views: "global", 2 or more, and optionally "local", which only the student sees, unmasked.
    run: epochs and the length of tau's schedule are counted with it.
    num_prototypes, hidden_dim, out_dim, num_layers: of both heads.
    mask_probability: share of an image's global views that are masked, to whole views, at least 1.
    mask_ratio: share of such a view's patches, drawn uniformly from this range.
    patch_weight: of the masked patches' loss, the class token's having 1.
    koleo_weight: of each global view's KoLeo on class tokens.
    others: as `dino.make`.
  """
  check_positive(
    "dinov2",
    temperature=temperature,
    teacher_temperature=teacher_temperature,
    start_teacher_temperature=start_teacher_temperature,
  )
  check_fraction("dinov2", tau=tau)
  check_share("dinov2", mask_probability=mask_probability)
  check_range("dinov2", most=0.99, mask_ratio=mask_ratio)
  patch = check_vit("dinov2", encoder)
  spec = global_views(views, method="dinov2", at_least=2)
  side, num_views = spec.size // patch, spec.count
  num_masked = max(round(num_views * mask_probability), 1)  # views of an image
  most = mask_ratio[1] * side**2  # patches of such a view, before a block's sides are rounded
  num_judged = min(math.floor(most + 1.2 * math.sqrt(most) + 0.25), side**2)
  options = {"norm": False, "final_norm": False, "final_bias": True, "activation": GELU}
  heads = [
    part
    for _ in range(2)
    for part in (
      MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, **options),
      Prototypes(num_prototypes, weight_norm=True),
    )
  ]
  network = Network(encoder, *heads)
  warmup_steps = warmup_epochs * run.steps_per_epoch
  frozen_steps = round(freeze_epochs * run.steps_per_epoch)
  frozen = dict.fromkeys(("prototypes", "patch_prototypes"), frozen_steps)

  def init(key, views):
    images = fold_views(views["global"])
    params, stats = init_network(network, key, images, jnp.zeros((len(images), side**2), bool))
    target = make_target(params, stats, tuple(params))
    return params, {"batch_stats": stats, "target": target}

  def draw_masks(key, b):
    """Which m views of an image are masked, int [B, m], and which of their patches, [B, m, N]."""
    keys = jax.random.split(key)
    view_Bm = jnp.argsort(jax.random.uniform(keys[0], (b, num_views)), axis=1)[:, :num_masked]
    block_BN = random_blocks(
      keys[1], b * num_masked, (side, side), area=mask_ratio, aspect=(0.3, 1 / 0.3)
    )
    return view_Bm, unfold_views(block_BN, num_masked)

  def loss(params, method_state, views, key, step):
    keys, b = jax.random.split(key, 3), len(views["global"])
    view_Bm, mask_BmN = draw_masks(keys[2], b)
    this_BmV = view_Bm[:, :, None] == jnp.arange(num_views)[None, None, :]
    mask_BVN = jnp.any(this_BmV[..., None] & mask_BmN[:, :, None, :], axis=1)
    (h_BVD, class_BVD, patches_BVND, s_BVK), stats = forward(
      network, params, method_state["batch_stats"], views["global"], keys[0], fold_views(mask_BVN)
    )
    (_, _, target_BVND, t_BVK), target = forward_target(
      network, method_state["target"], views["global"]
    )
    if "local" in views:
      (_, _, _, s), stats = forward(network, params, stats, views["local"], keys[1])
      s_BVK = jnp.concatenate([s_BVK, s], axis=1)
    heat = linear_warmup(start_teacher_temperature, teacher_temperature, step, warmup_steps)
    p_BVK = unfold_views(sinkhorn(fold_views(t_BVK), eps=heat), num_views)
    class_loss = cross_view_entropy(p_BVK, s_BVK, temperature=temperature)

    place_Bmn = jnp.argsort(~mask_BmN, axis=-1)[..., :num_judged]  # the masked ones come first
    masked_Mn = fold_views(jnp.take_along_axis(mask_BmN, place_Bmn, axis=-1))
    among_all_BP = (view_Bm[:, :, None] * side**2 + place_Bmn).reshape(b, -1)

    def score_masked(params, patches_BVND):
      patches_BND = patches_BVND.reshape(b, num_views * side**2, -1)
      patches_BPD = jnp.take_along_axis(patches_BND, among_all_BP[..., None], axis=1)
      patches_MnD = patches_BPD.reshape(b * num_masked, num_judged, -1)
      return network.apply({"params": params}, patches_MnD, method="score_patches")

    t_MnK = jax.lax.stop_gradient(score_masked(target["params"], target_BVND))
    codes_NK = sinkhorn(fold_views(t_MnK), eps=heat, chosen_N=fold_views(masked_Mn))
    p_MnK = unfold_views(codes_NK, num_judged)
    entropy_Mn = cross_entropy(p_MnK, score_masked(params, patches_BVND), temperature=temperature)
    patch_loss = jnp.mean(mean_where(entropy_Mn, masked_Mn)) * num_masked / num_views
    spread = sum(koleo(class_BVD[:, v]) for v in range(num_views))
    aux = Aux(
      method_state={"batch_stats": stats, "target": target},
      metrics={"class": class_loss, "patches": patch_loss, "koleo": spread},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(jax.nn.softmax(s_BVK[:, 0] / temperature)),
      targets=p_BVK[:, 1],
    )
    return class_loss + patch_weight * patch_loss + koleo_weight * spread, aux

  after_update = follow(lambda step: cosine_tau(tau, step, run.total_steps))
  return Method(views, init, loss, after_update, encode_with(encoder, target=True), frozen=frozen)
