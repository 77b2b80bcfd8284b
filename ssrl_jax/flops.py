"""Model FLOPs of a traced function, and the peak of the device they are measured against.

Convention: one multiply-accumulate is TWO floating-point operations. Only matrix products and
convolutions are counted, as the model asks for them: no views, no optimizer, nothing that a
compiler adds or saves. ("ResNet-50 is 4.1 GFLOP" counts multiply-accumulates: it is 8.2.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

# Dense bfloat16 peak of one JAX device, FLOP/s, from the makers' data sheets. Of the entries that
# a device's kind starts with the longest counts: "TPU v5 lite" before "TPU v5", which is a v5p.
PEAK_FLOPS = {
  "NVIDIA H200": 989e12,
  "NVIDIA H200 NVL": 835e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40": 181e12,
  "NVIDIA L40S": 362e12,
  "Tesla V100": 125e12,
  "TPU v3": 61.5e12,  # a device is a core, half a chip
  "TPU v4": 275e12,
  "TPU v4 lite": 138e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}


def count_flops(f: Callable, *args: Any) -> float:
  """Model FLOPs of one call f(*args); arguments may be `jax.ShapeDtypeStruct`s."""
  jaxpr = jax.make_jaxpr(f)(*args).jaxpr
  used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(used)


def _count(jaxpr: Any) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    if name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      total += 2 * math.prod(out.shape) * math.prod(lhs[i] for i in contract)
    elif name == "conv_general_dilated":
      total += _conv(eqn, out)
    elif name == "scan":
      total += eqn.params["length"] * _count(eqn.params["jaxpr"].jaxpr)
    elif name == "cond":
      counts = [_count(branch.jaxpr) for branch in eqn.params["branches"]]
      # Forms of one thing for several platforms: the default is as the model asks for it.
      platforms = eqn.params.get("branches_platforms") or ("all",)
      total += counts[-1] if platforms[-1] is None else max(counts)
    else:
      for value in eqn.params.values():
        for sub in value if isinstance(value, (tuple, list)) else (value,):
          inner = getattr(sub, "jaxpr", sub)
          if hasattr(inner, "eqns"):
            total += _count(inner)
  return total


def _conv(eqn: Any, out: Any) -> float:
  numbers = eqn.params["dimension_numbers"]
  rhs = eqn.invars[1].aval.shape
  kernel = math.prod(rhs[i] for i in numbers.rhs_spec[2:])
  in_features = rhs[numbers.rhs_spec[1]]  # per group
  # A strided convolution's input gradient convolves an input padded with zeros between its
  # elements (lhs_dilation): those products are no work of the model's.
  zeros = math.prod(eqn.params["lhs_dilation"])
  return 2 * math.prod(out.shape) * kernel * in_features / zeros


def peak_flops(device: Any) -> tuple[float, str]:
  """FLOP/s of one device and where the figure is from: a data sheet, or a measurement."""
  for kind in sorted(PEAK_FLOPS, key=len, reverse=True):
    if device.device_kind.startswith(kind):
      return PEAK_FLOPS[kind], f"{kind}, bfloat16 data sheet"
  # Devices of one CPU are its cores, which a product on one of them has all to itself.
  share = jax.local_device_count() if device.platform == "cpu" else 1
  measured = f"{device.device_kind}, float32 matrix product measured at start"
  return measured_matmul_flops() / share, measured


def measured_matmul_flops(n: int = 1024, repeats: int = 8) -> float:
  """FLOP/s of the best of some n x n float32 products on the default device."""
  x = jnp.ones((n, n))
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  best = math.inf
  for _ in range(repeats):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best
