"""What each knob of a config means, read from the one place where it is said.

That is the comment beside it in config.py or in a class's field, and of an option of a method or a
protocol the "Args" of its function. For --help.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from ssrl_jax import config as knobs
from ssrl_jax.evaluate import EVALS, finetune
from ssrl_jax.method import ViewSpec
from ssrl_jax.methods import METHODS
from ssrl_jax.models.attention import AttentionEncoder
from ssrl_jax.models.fusion import FusionEncoder
from ssrl_jax.models.resnet import ResNet
from ssrl_jax.models.vit import ViT

COMMENTED = {
  "global_views": ViewSpec, "local_views": ViewSpec, "encoder.resnet": ResNet,
  "encoder.vit": ViT, "encoder.fusion": FusionEncoder, "encoder.attention": AttentionEncoder,
}  # fmt: skip


def meanings(method: str) -> dict[str, str]:
  """{path of a knob: one line} of the config of a method; all but that of `method.name`."""
  found = comments(knobs.base_config, r"c\.([\w.]+)")
  for group, where in COMMENTED.items():
    found |= _below(group, comments(where, r"(\w+): [^=#\n]+?"))
  found |= _below("method", arguments(METHODS[method]))
  for name, protocol in EVALS.items():
    found |= _below(f"evaluate.{name}", arguments(protocol.run))
  found |= _below("evaluate.low_label.finetune", arguments(finetune.run), "_")
  return {key: found[key] for key in knobs.flatten(knobs.base_config(method)) if key in found}


def help_lines(prefix: str, values: Mapping[str, Any], method: str) -> list[str]:
  """A line for each knob: its flag, its value, what it means."""
  told = meanings(method) if method in METHODS else {}
  flags = {key: f"  --{prefix}{key} [{value}]" for key, value in values.items()}
  return [f"{flag:<48}  {told.get(key, '')}".rstrip() for key, flag in flags.items()]


def _below(group: str, found: dict[str, str], joint: str = ".") -> dict[str, str]:
  return {f"{group}{joint}{name}": text for name, text in found.items()}


def comments(where: Any, name: str) -> dict[str, str]:
  """{name: comment} of the lines `NAME [= VALUE]  # COMMENT` in a function's or class's source.

  Args:
    name: a pattern of what stands before " = ", its group the name.
  """
  lines = re.findall(rf"^ +{name}(?: = [^#\n]*?)?  # (.+)$", inspect.getsource(where), re.MULTILINE)
  return dict(lines)


def arguments(f: Callable) -> dict[str, str]:
  """{name: text} of the "Args" in a docstring; of several names before one text each has it.

  "others: as `module.g`." stands for those that g, a function of that module beside, tells.
  """
  block = re.search(r"\nArgs:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(f) or "", re.DOTALL)
  if not block:
    return {}
  known = inspect.signature(f).parameters
  one = rf"(?:{'|'.join([*known, 'others'])})(?: \([^)]*\))?"
  parts = re.split(rf"(?:^|(?<=[.;:] ))({one}(?:, {one})*): ", " ".join(block[1].split()))
  found = {
    name: text.strip().rstrip(".;")
    for names, text in zip(parts[1::2], parts[2::2], strict=True)
    for name in re.sub(r" \([^)]*\)", "", names).split(", ")
  }
  if others := re.fullmatch(r"as `(?:(\w+)\.)?(\w+)`", found.pop("others", "")):
    package, _, here = f.__module__.rpartition(".")
    module = importlib.import_module(f"{package}.{others[1] or here}")
    found = arguments(getattr(module, others[2])) | found
  return {name: found[name] for name in known if name in found}
