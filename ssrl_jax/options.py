"""Options by name: the defaults of a function's arguments, and what is said of an unknown name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def nearest(name: str, known: Iterable[str], what: str) -> str:
  """The message for an unknown name: the nearest valid one first, then all of them."""
  known = list(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  hint = f"did you mean {close[0]!r}? " if close else ""
  return f"unknown {what} {name!r}; {hint}known: {', '.join(known)}"


def keyword_defaults(f: Callable, *, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
  """{name: default} of the arguments of `f` that have one."""
  parameters = inspect.signature(f).parameters.values()
  return {
    p.name: p.default
    for p in parameters
    if p.default is not inspect.Parameter.empty and p.name not in leave_out
  }
