"""What the tests of objectives share."""

import math
import re
import zlib

import numpy as np


def differences(f, x, eps=1e-6):
  """Central differences of a scalar function, float64, one element at a time."""
  x = np.asarray(x, np.float64)
  gradient = np.zeros(x.shape)
  for i in np.ndindex(*x.shape):
    step = np.zeros(x.shape)
    step[i] = eps
    gradient[i] = (f(x + step) - f(x - step)) / (2 * eps)
  return gradient


def unit(x):
  """Rows at unit length, float64."""
  x = np.asarray(x, np.float64)
  return x / np.sqrt((x**2).sum(axis=-1, keepdims=True))


def softmax64(x):
  x = np.exp(np.asarray(x, np.float64) - np.max(x))
  return x / x.sum()


def sizes(jaxpr):
  """Number of elements of every array that a jaxpr and those inside it compute."""
  for eqn in jaxpr.eqns:
    yield from (int(np.prod(out.aval.shape)) for out in eqn.outvars)
    for value in eqn.params.values():
      for sub in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(sub, "jaxpr", sub)
        if hasattr(inner, "eqns"):
          yield from sizes(inner)


def lapack_shapes(program: str) -> list[tuple[int, ...]]:
  """The shapes of what LAPACK's kernels give in a compiled program's text."""
  calls = [line for line in program.splitlines() if 'custom_call_target="lapack' in line]
  of_call = lambda line: re.findall(r"f\d\d\[([\d,]+)\]", line.split("custom-call(")[0])  # noqa: E731
  return [tuple(map(int, shape.split(","))) for line in calls for shape in of_call(line)]


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Float32 that depend on name and shape only: of a network's array, near what training leaves."""
  np_rng = np.random.default_rng(zlib.crc32(name.encode()))
  if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
    return np_rng.uniform(0.5, 1.5, shape).astype(np.float32)
  fan_in = math.prod(shape[1:]) if name.endswith("weight") else 4
  return np_rng.normal(0, max(fan_in, 1) ** -0.5, shape).astype(np.float32)
