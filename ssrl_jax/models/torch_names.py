"""Arrays of ResNets (timm's, torchvision's) and of ViTs (timm's) by their names and layouts.

Arrays here are named as `state.named_leaves` does, "params/stem_conv/kernel"; of a wrapped encoder
only those of its backbone are meant. Layouts: convolutions HWIO here and OIHW there, products IO
and OI. What has no weights is not in a file: these are ResNet 1.5 with BatchNorm and the pre-norm
ViT with exact GELU; of anything else with the same names and shapes the outputs would be others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ssrl_jax.models.vit import sincos

RULES: tuple[tuple[str, Callable[..., str]], ...] = (
  (r"stem_conv", lambda: "conv1"),
  (r"stem_norm", lambda: "bn1"),
  (r"stage(\d+)_block(\d+)/Conv_(\d+)", lambda s, b, i: f"layer{s}.{b - 1}.conv{i + 1}"),
  (
    r"stage(\d+)_block(\d+)/BatchNorm_(\d+)",
    lambda s, b, i: f"layer{s}.{b - 1}.bn{i + 1}",
  ),
  (r"stage(\d+)_block(\d+)/shortcut_conv", lambda s, b: f"layer{s}.{b - 1}.downsample.0"),
  (r"stage(\d+)_block(\d+)/shortcut_norm", lambda s, b: f"layer{s}.{b - 1}.downsample.1"),
  (r"patches", lambda: "patch_embed.proj"),
  (r"block(\d+)/norm(\d)", lambda b, i: f"blocks.{b - 1}.norm{i}"),
  (r"block(\d+)/attention/qkv", lambda b: f"blocks.{b - 1}.attn.qkv"),
  (r"block(\d+)/attention/out", lambda b: f"blocks.{b - 1}.attn.proj"),
  (r"block(\d+)/mlp_in", lambda b: f"blocks.{b - 1}.mlp.fc1"),
  (r"block(\d+)/mlp_out", lambda b: f"blocks.{b - 1}.mlp.fc2"),
  (r"norm", lambda: "norm"),
)
LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
TOKENS = {"class_token": "cls_token", "registers": "reg_token"}
CLASS, CLASS_PLACE, PLACES = "params/class_token", "params/class_position", "params/position"
REGISTERS = "params/registers"
POSITIONS = (CLASS_PLACE, PLACES)  # one array there: pos_embed
BACKBONE = re.compile(r"^(params|batch_stats)/backbone/")
SCALE = re.compile(r"(blocks\.\d+)\.(ls\d)\.gamma")
SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}
# What a file may hold beside an encoder: heads, MAE's decoder, counters, a mask token.
BESIDE = re.compile(
  r"(fc|head\w*|classifier|decoder\w*|mask_token|proj\w*_head|projector|predictor|prototypes)(\.|$)|.*num_batches_tracked$"
)


def torch_name(name: str) -> str:
  """The file's name: "params/stage1_block2/Conv_0/kernel" -> "layer1.1.conv1.weight".

  Raises:
    ValueError: there is none.
  """
  module, _, leaf = name.partition("/")[2].rpartition("/")
  if leaf in TOKENS:
    return TOKENS[leaf]
  for pattern, there in RULES:
    if match := re.fullmatch(pattern, module):
      return f"{there(*map(int, match.groups()))}.{LEAVES[leaf]}"
  raise ValueError(f"{name} has no counterpart in timm's or torchvision's encoders")


def backbone_names(names: Iterable[str]) -> dict[str, str]:
  """Name in the encoder without its wrapper -> name in it as it is; no mask token."""
  names = [k for k in names if not k.endswith("mask_token")]
  inside = {BACKBONE.sub(r"\1/", k): k for k in names if BACKBONE.match(k)}
  return inside or {k: k for k in names}


def to_torch(weights: Mapping[str, np.ndarray], grid: tuple[int, int]) -> dict[str, np.ndarray]:
  """The arrays of an encoder's backbone, by the names and in the layouts of timm.

  Args:
    weights: by name; those of a wrapper (fusion, attention) and the mask token are left out.
    grid: rows and columns of patches that a ViT is used with: where its positions are computed
      (sincos) they are written out for it.
  """
  mine = {short: np.asarray(weights[name]) for short, name in backbone_names(weights).items()}
  found = {torch_name(k): _turned(k, x) for k, x in mine.items() if k not in POSITIONS}
  if CLASS in mine:
    dim = mine[CLASS].shape[-1]
    first_D = mine.get(CLASS_PLACE, np.zeros(dim, np.float32))
    pos_ND = (mine[PLACES] if PLACES in mine else sincos(*grid, dim)).reshape(-1, dim)
    if "reg_token" in found:  # timm's ViTs with registers have no place for the class token
      found["cls_token"] = found["cls_token"] + first_D
    else:
      pos_ND = np.concatenate([first_D[None], pos_ND])
    found["pos_embed"] = pos_ND[None]
  return {k: np.ascontiguousarray(x) for k, x in found.items()}


def from_torch(
  tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
  """The arrays of an encoder's backbone, from those of a file with timm's or torchvision's names.

  Names may have something before them, as "module.encoder_q."; the file may hold other things
  beside. LayerScale (DINOv2's) is multiplied into the products before it. Learned positions of
  another grid are resized, bicubic as the ViT itself does; a ViT whose positions are computed
  (sincos) takes a file that has the same.

  Args:
    wanted: shapes by name; those of a wrapper (fusion, attention) and the mask token are left out.

  Returns:
    Float32, by the names of `wanted`.

  Raises:
    ValueError: it is another encoder's, or holds none or several.
  """
  whole = backbone_names(wanted)
  shapes = {short: wanted[name] for short, name in whole.items()}
  there = {k: torch_name(k) for k in shapes if k not in POSITIONS}
  expected = {*there.values(), *(["pos_embed"] if CLASS in shapes else [])}
  tensors = _scaled(_alone(tensors, list(there.values())))
  found = {k: _back(k, tensors[t], shapes[k]) for k, t in there.items() if t in tensors}
  wrong = [f"{t} is missing" for t in sorted(expected - tensors.keys())]
  wrong += [f"{t} is not in this one" for t in sorted(tensors.keys() - expected)]
  wrong += [
    f"{there[k]} is {list(tensors[there[k]].shape)}, which is no {list(shapes[k])}"
    for k, x in found.items()
    if x.shape != shapes[k]
  ]
  if wrong:
    raise ValueError(f"another encoder: {len(wrong)} arrays differ, e.g. {'; '.join(wrong[:3])}")
  if CLASS in shapes:
    found |= _positions(tensors["pos_embed"], shapes)
  if bad := [k for k, x in found.items() if not np.isfinite(x).all()]:
    raise ValueError(f"{len(bad)} arrays hold NaN or infinity, e.g. {there.get(bad[0], bad[0])}")
  return {whole[k]: x for k, x in found.items()}


def _alone(tensors: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
  """The encoder's arrays as float32, without what stands before their names, and nothing beside."""
  first = min(names)
  starts = [k.removesuffix(first) for k in tensors if k == first or k.endswith(f".{first}")]
  starts = [start for start in starts if not re.search(r"layer\d\.\d+\.$", start)]  # of a block
  if not starts:
    raise ValueError(
      f"it has no {first}, a name that timm's ResNets and ViTs have, and torchvision's ResNets; it "
      f"has e.g. {', '.join(sorted(tensors)[:3]) or 'nothing'}"
    )
  held = {start: sum(start + name in tensors for name in names) for start in starts}
  starts = [start for start in starts if held[start] == max(held.values())]
  if len(starts) > 1:
    told = ", ".join(map(repr, sorted(starts)))
    raise ValueError(f"it holds several encoders, their names beginning with {told}; keep one")
  own = {k.removeprefix(starts[0]): x for k, x in tensors.items() if k.startswith(starts[0])}
  own = {k: x for k, x in own.items() if not BESIDE.match(k)}
  if wrong := [k for k, x in own.items() if not jnp.issubdtype(x.dtype, jnp.floating)]:
    raise ValueError(f"{wrong[0]} is {own[wrong[0]].dtype}, expected floating point numbers")
  return {k: np.asarray(x, np.float32) for k, x in own.items()}


def _scaled(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without LayerScale: g (W x + b) = (g W) x + g b."""
  found = {k: x for k, x in tensors.items() if not SCALE.fullmatch(k)}
  for name in tensors.keys() - found.keys():
    block, which = SCALE.fullmatch(name).groups()
    for leaf in ("weight", "bias"):
      product = f"{block}.{SCALED[which]}.{leaf}"
      if product in found:
        if found[product].shape[:1] != tensors[name].shape:
          raise ValueError(f"{name} is {list(tensors[name].shape)}, {product} another length")
        found[product] = (found[product].T * tensors[name]).T
  return found


def _positions(pos_1ND: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """class_position and position of the ViT, where these are learned."""
  dim = shapes[CLASS][-1]
  if pos_1ND.ndim != 3 or pos_1ND.shape[0] != 1 or pos_1ND.shape[2] != dim:
    raise ValueError(f"pos_embed is {list(pos_1ND.shape)}, expected [1, N, {dim}]")
  pos_ND, grid = pos_1ND[0], shapes.get(PLACES, (0, 0))[:2]
  N, square = len(pos_ND), lambda n: (math.isqrt(max(n, 0)),) * 2
  layouts = ((1, grid), (0, grid), (1, square(N - 1)), (0, square(N)))  # tokens before, and places
  fits = [(first, hw) for first, hw in layouts if first + math.prod(hw) == N]
  if not fits:
    raise ValueError(f"pos_embed has {N} places, neither a square nor {grid[0]} x {grid[1]}")
  registers = shapes.get(REGISTERS, (0,))[0]
  rest = N - 1 - registers
  if registers and rest in (math.prod(grid), math.prod(square(rest))):
    raise ValueError(f"pos_embed has {N} places, maybe some for {registers} registers")
  first, hw = fits[0]
  first_D = pos_ND[0] if first else np.zeros_like(pos_ND[0])
  pos_hwD = pos_ND[first:].reshape(*hw, dim)
  if PLACES not in shapes:
    if np.any(first_D) or not np.allclose(pos_hwD, sincos(*pos_hwD.shape), atol=1e-4):
      raise ValueError("its positions are not sincos: set encoder.vit.position to learned")
    return {}
  if hw != grid:
    pos_hwD = jax.image.resize(pos_hwD, (*grid, dim), "bicubic", antialias=False)
  return {CLASS_PLACE: first_D, PLACES: np.asarray(pos_hwD)}


def _turned(name: str, x: np.ndarray) -> np.ndarray:
  """Ours -> theirs."""
  if name.endswith("kernel"):
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
  if name.rpartition("/")[2] in TOKENS:
    return x.reshape(1, -1, x.shape[-1])
  return x


def _back(name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Theirs -> ours; one of another shape comes as it is."""
  if name.endswith("kernel") and x.ndim == len(shape):
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
  if name.rpartition("/")[2] in TOKENS and x.size == math.prod(shape):
    return x.reshape(shape)
  return x
