"""Fine-grained: an image and its most attended parts find the image's other view among many.

After Lin et al. 2025 (zenodo 15232950). Only its abstract is public (multi-scale attention, whole
image and local regions, momentum encoder with a queue, contrastive loss), so the concrete form is
ours. An AttentionEncoder pools several stages with several heads; the squares of the view that its
attention prefers are cut out on the device and encoded again; the whole and each part are queries
whose positive is the momentum encoder's key of the whole other view, and whose negatives are a
queue of such keys (MoCo). `encode` gives the whole's vector and the attention maps. What is an
override: encoder.attention.* (levels, heads, width), num_parts (0: the whole only), part_weight,
encode_parts (puts the mean of the parts' vectors behind the whole's; docs/methods.md: worse).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.contrastive import info_nce_queue
from ssrl_jax.method import (
  Array,
  Aux,
  Encoder,
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
  global_spec,
  init_network,
  make_target,
  normalise,
  push,
  random_queue,
  unfold_views,
)
from ssrl_jax.models.attention import AttentionEncoder, cut_parts
from ssrl_jax.models.heads import MLP


class Network(nn.Module):
  """Images -> pooled [N, D], embedding [N, P], attention [N, H, W], its mean over heads."""

  encoder: nn.Module
  projector: nn.Module

  def __call__(self, images: Array, train: bool):
    features = self.encoder(images, train)
    return features.pooled, self.projector(features.pooled, train), attention_map(features)


def attention_map(features) -> Array:
  """[B, H, W]: the mean over heads, on the grid of the finest level."""
  _, h, w, _ = features.maps[min(features.maps)].shape
  return jnp.mean(features.attention[:, :, 0], axis=1).reshape(-1, h, w)


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  temperature: float = 0.2,
  tau: float = 0.999,
  queue_size: int = 65536,
  num_parts: int = 2,
  part_fraction: float = 0.5,
  part_weight: float = 1.0,
  encode_parts: bool = False,
  hidden_dim: int = 2048,
  out_dim: int = 128,
) -> Method:
  """The fine-grained system's Method.

  Args:
    encoder: an AttentionEncoder (encoder.attention.enabled).
    views: one spec named "global" with count 2.
    run: queue_size must be a multiple of its batch size.
    temperature: of the cosines, > 0.
    tau: kept by the moving average, constant.
    queue_size: keys of earlier batches, at random at the start.
    num_parts: squares cut from a view; 0 = none. part_fraction: side of a part, as a share
      of the view's.
    part_weight: of the parts' mean loss, the whole's having 1.
    encode_parts: whether the parts' mean vector is part of the features, for twice the numbers.
    hidden_dim, out_dim: of the projector.
  """
  check_positive("finegrained", temperature=temperature)
  check_fraction("finegrained", tau=tau, part_fraction=part_fraction)
  check_queue("finegrained", queue_size, run)
  global_spec(views, method="finegrained", count=2)
  if not isinstance(encoder, AttentionEncoder):
    raise ValueError(
      "finegrained needs an encoder with attention over its maps; set encoder.attention.enabled"
    )
  if num_parts < 0:
    raise ValueError(f"finegrained: num_parts is {num_parts}; expected 0 or more, e.g. 2")
  network = Network(encoder, MLP(hidden=hidden_dim, out=out_dim, final_norm=False, final_bias=True))
  with_parts = encode_parts and num_parts > 0

  def part_size(images_BHWC):
    innermost = encoder
    while hasattr(innermost, "backbone"):
      innermost = innermost.backbone
    patch = getattr(innermost, "patch", 1)  # a ViT needs whole patches
    return max(round(images_BHWC.shape[1] * part_fraction / patch), 1) * patch

  def parts_of(images_BHWC, attention_BHW):
    size = part_size(images_BHWC)
    return cut_parts(images_BHWC, attention_BHW, size=size, num=num_parts)

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    target = make_target(params, stats, ("encoder", "projector"))
    queue_QP = random_queue(key, queue_size, out_dim)
    return params, {"batch_stats": stats, "target": target, "queue": queue_QP}

  def loss(params, method_state, views, key, step):
    del step
    keys, queue_QP = jax.random.split(key), method_state["queue"]
    view1_BHWC = views["global"][:, 0]
    outputs, stats = forward(
      network, params, method_state["batch_stats"], view1_BHWC[:, None], keys[0]
    )
    h_BD, q_BP, attention_BHW = (x[:, 0] for x in outputs)
    (_, k_BVP, _), target = forward_target(network, method_state["target"], views["global"][:, 1:])
    k_BP = normalise(k_BVP[:, 0])
    whole = jnp.mean(info_nce_queue(q_BP, k_BP, queue_QP, temperature=temperature))
    value, metrics = whole, {"whole": whole}
    if num_parts:
      (h_BKD, q_BKP, _), stats = forward(
        network, params, stats, parts_of(view1_BHWC, attention_BHW), keys[1]
      )
      key_MP = k_BP.repeat(num_parts, axis=0)
      part_M = info_nce_queue(fold_views(q_BKP), key_MP, queue_QP, temperature=temperature)
      metrics["parts"] = jnp.mean(part_M)
      value += part_weight * metrics["parts"]
      if with_parts:
        h_BD = jnp.concatenate([h_BD, jnp.mean(h_BKD, axis=1)], axis=1)
    aux = Aux(
      method_state={"batch_stats": stats, "target": target, "queue": push(queue_QP, k_BP)},
      metrics=metrics,
      features=jax.lax.stop_gradient(h_BD),
      embeddings=jax.lax.stop_gradient(q_BP),
      targets=k_BP,
    )
    return value, aux

  after_update = follow(lambda step: tau)
  whole = encode_with(encoder)

  def apply(weights, images, train, key):
    features, stats = whole.apply(weights, images, train, key)
    if not with_parts:
      return features, stats
    parts_BKHWC = parts_of(images, attention_map(features))
    parts, stats = whole.apply(
      weights | {"batch_stats": stats}, fold_views(parts_BKHWC), train, key
    )
    h_BD = jnp.mean(unfold_views(parts.pooled, num_parts), axis=1)
    pooled_BD = jnp.concatenate([features.pooled, h_BD], axis=1)
    return features._replace(pooled=pooled_BD), stats

  return Method(views, init, loss, after_update, Encoder(whole.weights, apply))
