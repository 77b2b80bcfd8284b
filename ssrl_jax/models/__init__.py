"""Every encoder by name. A new one is a file beside this and a line here."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssrl_jax.models.attention import AttentionEncoder
from ssrl_jax.models.fusion import FusionEncoder
from ssrl_jax.models.resnet import NORMS, make_resnet
from ssrl_jax.models.vit import make_vit
from ssrl_jax.options import nearest

ENCODERS = {
  "resnet6": partial(make_resnet, depth=6),
  "resnet8": partial(make_resnet, depth=8),
  "resnet10": partial(make_resnet, depth=10),
  "resnet18": partial(make_resnet, depth=18),
  "resnet34": partial(make_resnet, depth=34),
  "resnet50": partial(make_resnet, depth=50),
  "resnet101": partial(make_resnet, depth=101),
  "vit_pico": partial(make_vit, size="pico"),
  "vit_nano": partial(make_vit, size="nano"),
  "vit_ti": partial(make_vit, size="ti"),
  "vit_s": partial(make_vit, size="s"),
  "vit_b": partial(make_vit, size="b"),
  "vit_l": partial(make_vit, size="l"),
}
DTYPES = ("float32", "bfloat16")


def make_encoder(
  *,
  name: str,
  dtype: str,
  norm: str,
  remat: bool,
  resnet: dict[str, Any],
  vit: dict[str, Any],
  fusion: dict[str, Any],
  attention: dict[str, Any],
) -> nn.Module:
  """The encoder of a recipe: encoder(images [B, H, W, 3], train) -> Features.

  Args:
    name: a key of `ENCODERS`.
    dtype: of the computation, "float32" or "bfloat16"; parameters are float32.
    norm: of ResNets and of fusion and attention, "batch" or "group"; a ViT's is layer norm.
    remat: the backward pass computes each block again instead of keeping its insides.
    resnet, vit: options of `make_resnet` and `make_vit`; the other family's are not used.
    fusion: enabled (wraps the encoder in a FusionEncoder), and FusionEncoder's fields.
    attention: enabled (wraps the encoder in an AttentionEncoder), and its fields.
  """
  if name not in ENCODERS:
    raise ValueError(nearest(name, ENCODERS, "encoder"))
  if dtype not in DTYPES:
    raise ValueError(f"dtype {dtype!r}: expected one of {DTYPES}")
  if norm not in NORMS:
    raise ValueError(f"norm {norm!r}: expected one of {NORMS}")
  family = {**resnet, "norm": norm} if name.startswith("resnet") else vit
  encoder = ENCODERS[name](**family, dtype=dtype, remat=remat)
  for wrapper, group in ((FusionEncoder, fusion), (AttentionEncoder, attention)):
    options = dict(group)
    enabled = options.pop("enabled")
    # Built also where it is not enabled, so that an unused key fails there too.
    wrapped = wrapper(backbone=encoder, dtype=jnp.dtype(dtype), norm=norm, **options)
    encoder = wrapped if enabled else encoder
  return encoder
