"""Options by name: the defaults of a function's arguments, and what is said of an unknown name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str], what: str) -> str:
  """The message for an unknown name: the nearest valid one first, then all of them."""
  known = list(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  hint = f"did you mean {close[0]!r}? " if close else ""
  return f"unknown {what} {name!r}; {hint}known: {', '.join(known)}"


def nearest_key(key: str, known: Iterable[str], what: str) -> str:
  """As `nearest` for a key such as evaluate.knn.k, but of all it lists only those of its group."""
  known, parts = list(known), key.split(".")
  for depth in range(len(parts), -1, -1):  # the deepest group that there is
    group = "".join(f"{part}." for part in parts[:depth])
    names = [k.removeprefix(group).split(".")[0] for k in known if k.startswith(group)]
    beside = list(dict.fromkeys(names))
    if beside:
      break
  if depth == len(parts):
    return f"the {what} {key!r} is a group; set one of its {', '.join(beside)}"
  hint = ""
  if close := difflib.get_close_matches(parts[depth], beside, n=1, cutoff=0.5):
    whole = ".".join([group + close[0], *parts[depth + 1 :]])
    meant = whole if whole in known else group + close[0]
    hint = f"did you mean {meant!r}? "
  return f"unknown {what} {key!r}; {hint}in {group.rstrip('.') or 'all'}: {', '.join(beside)}"


def check_numbers(where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
  """Refuses numbers below 0, and whole ones below 1 unless their default is 0.

  Raises:
    ValueError: names the option as `where` and its key.
  """
  for key, default in defaults.items():
    if key in values and type(default) in (int, float):
      least = min(default, 1 if type(default) is int else 0)
      if not values[key] >= least:
        raise ValueError(f"{where}{key} is {values[key]}; expected {least:g} or more")


def keyword_defaults(f: Callable, *, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
  """{name: default} of the arguments of `f` that have one."""
  parameters = inspect.signature(f).parameters.values()
  return {
    p.name: p.default
    for p in parameters
    if p.default is not inspect.Parameter.empty and p.name not in leave_out
  }
