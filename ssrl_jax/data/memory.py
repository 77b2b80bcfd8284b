"""Memory of big arrays, used again."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np


class Recycled:
  """Arrays on memory of earlier ones to which nothing refers any more.

  Fresh pages cost more than copying what is put on them. It keeps as much memory as there were
  arrays at once. Any thread may ask.
  """

  def __init__(self):
    self._free: dict[int, list[memoryview]] = {}  # by bytes

  def empty(self, shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """As np.empty: holds anything."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    free = self._free.setdefault(size, [])
    try:
      memory = free.pop()
    except IndexError:
      memory = np.empty(size, np.uint8).data
    # Every view of `whole` keeps it alive: NumPy looks no further, since `memory` is no array.
    whole = np.frombuffer(memory, np.uint8)
    weakref.finalize(whole, free.append, memory).atexit = False
    return whole.view(dtype).reshape(shape)

  def copy(self, values: np.ndarray) -> np.ndarray:
    copied = self.empty(values.shape, values.dtype)
    np.copyto(copied, values)
    return copied
