"""What a compiled program sends between devices, read from the program's text.

Bytes are those that one device sends in a ring: of n devices that share a whole of s bytes, each
sends 2 s (n - 1) / n for an all-reduce and s (n - 1) / n for the other kinds. The wholes are what
the compiler made of the program, whatever network or algorithm carries them afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*?)\)(.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:body|condition|calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)"
  r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
  r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)
# Between TPU slices the compiler leaves what is sent to the hosts.
_BETWEEN_HOSTS = re.compile(
  r'_xla_megascale_target="\{(.*?)\}x\{(.*?)\}".*?_xla_megascale_transfer_type="(\w+)"'
)
_HOSTS_KINDS = {
  "ALL_REDUCE": "all-reduce",
  "ALL_GATHER": "all-gather",
  "REDUCE_SCATTER": "reduce-scatter",
  "ALL_TO_ALL": "all-to-all",
  "ONE_TO_ONE": "collective-permute",
}
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


class Collective(NamedTuple):
  kind: str  # one of KINDS
  whole: int  # bytes of what a group shares: the sum, the gathered, the scattered
  groups: tuple[tuple[int, ...], ...]  # places in the mesh that share; of a permute, from and to
  times: int  # in one call of the program
  source: str  # the operation of the program that it came from

  @property
  def sent(self) -> float:
    """Bytes that a device sends in one call of the program."""
    n = max(map(len, self.groups))
    share = 1 if self.kind == "collective-permute" else (n - 1) / n
    return self.times * self.whole * share * (2 if self.kind == "all-reduce" else 1)

  def crosses(self, slice_size: int) -> bool:
    """Whether it leaves a slice of so many devices."""
    return any(len({place // slice_size for place in group}) > 1 for group in self.groups)


class _Instruction(NamedTuple):
  name: str
  shape: str
  op: str
  operands: list[str]  # names; of a parameter, its number
  rest: str  # its attributes


class _Computation(NamedTuple):
  instructions: list[_Instruction]
  users: dict[str, list[_Instruction]]  # of each value


def collectives(text: str) -> list[Collective]:
  """Every collective of a compiled program's text (`compiled.as_text()`), one for each array.

  A loop's count as often as it runs, once where the compiler does not know; of the branches of a
  condition all count. An all-reduce of which each device keeps only its own part is listed as the
  reduce-scatter that it is: compilers for accelerators make one of it, that for CPUs does not.
  """
  computations, entry = _parse(text)
  everyone = int(re.search(r"num_partitions=(\d+)", text).group(1)) if "num_part" in text else 1
  found = _walk(computations, entry, 1, everyone)
  return [c for c in found if max(map(len, c.groups), default=1) > 1]


def summary(found: Iterable[Collective]) -> dict[str, float]:
  """{kind: bytes that a device sends in one call}, of the kinds that occur."""
  found = list(found)
  sums = {kind: sum(c.sent for c in found if c.kind == kind) for kind in KINDS}
  return {kind: total for kind, total in sums.items() if total}


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  computations, entry, current = {}, "", None
  for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[2], _Computation([], {}))
      entry = header[2] if header[1] else entry
    elif match := _INSTRUCTION.match(line):
      name, shape, op, operands, rest = match.groups()
      used = re.findall(r"[\w.\-]+", operands)
      instruction = _Instruction(name, shape, op, used, rest)
      current.instructions.append(instruction)
      for operand in dict.fromkeys(used):
        current.users.setdefault(operand, []).append(instruction)
  return computations, entry


def _walk(computations: dict, name: str, times: int, everyone: int) -> Iterator[Collective]:
  if name not in computations:
    return
  for instruction in computations[name].instructions:
    kind = instruction.op.removesuffix("-start")
    if kind in KINDS:
      yield from _of_instruction(instruction, kind, times, everyone, computations, name)
      continue
    if kind == "send" and (between := _BETWEEN_HOSTS.search(instruction.rest)):
      yield _of_send(instruction, times, *between.groups())
      continue
    trips = _TRIPS.search(instruction.rest)
    for one, several in _CALLED.findall(instruction.rest):
      for called in [one] if one else re.findall(r"[\w.\-]+", several):
        yield from _walk(computations, called, times * int(trips[1] if trips else 1), everyone)


def _of_instruction(
  instruction: _Instruction, kind: str, times: int, everyone: int, computations: dict, inside: str
) -> Iterator[Collective]:
  sizes = [math.prod(dims) * bits // 8 for bits, dims in _arrays(instruction.shape)]
  if instruction.op.endswith("-start") and kind != "all-reduce":
    k = len(instruction.operands)  # what goes in, what comes out, and flags
    sizes = sizes[k : 2 * k]
  groups = _groups(instruction.rest, everyone)
  source = _SOURCE.search(instruction.rest)
  for i, size in enumerate(sizes):
    if kind == "reduce-scatter":
      size *= len(groups[0])
    parts = kind == "all-reduce" and _kept_in_part(
      instruction, i, len(sizes), computations[inside].users, computations
    )
    yield Collective(
      "reduce-scatter" if parts else kind, size, groups, times, source[1] if source else ""
    )


def _of_send(
  instruction: _Instruction, times: int, slices: str, devices: str, kind: str
) -> Collective:
  """Of each device with those at its place in the other slices."""
  num_slices, slice_size = _count(slices), _count(devices)
  bits, dims = _arrays(instruction.shape)[0]
  whole, kind = math.prod(dims) * bits // 8, _HOSTS_KINDS[kind]
  groups = np.arange(num_slices * slice_size).reshape(num_slices, slice_size).T
  return Collective(
    kind,
    whole * (num_slices if kind == "all-gather" else 1),
    _rows(groups),
    times,
    "",
  )


def _count(numbers: str) -> int:
  """ "1,2" -> 2; "0:7", both ends being in it, -> 8."""
  ranges = [[int(n) for n in part.split(":")] for part in numbers.split(",")]
  return sum(r[-1] - r[0] + 1 for r in ranges)


def _arrays(shape: str) -> list[tuple[int, list[int]]]:
  """(bits of an element, lengths of the axes) of each array of a shape's text."""
  return [
    (8 if kind == "pred" else int(width), [int(n) for n in dims.split(",") if n])
    for kind, width, dims in _ARRAY.findall(shape)
    if width or kind == "pred"
  ]


def _kept_in_part(
  instruction: _Instruction, index: int, num_results: int, users: dict, computations: dict
) -> bool:
  """Whether all that is done with a result is to cut a part out of it."""
  if num_results == 1:
    return _only_cut(instruction.name, users, computations)
  taken = users.get(instruction.name, [])
  mine = [i.name for i in taken if re.search(rf"index={index}\b", i.rest)]
  return bool(mine) and all(_only_cut(name, users, computations) for name in mine)


def _only_cut(name: str, users: dict, computations: dict) -> bool:
  for user in users.get(name, []):
    if user.op in ("bitcast", "copy", "transpose", "reshape", "all-reduce-done"):
      if not _only_cut(user.name, users, computations):
        return False
    elif user.op == "fusion":
      fused = computations[_CALLED.search(user.rest)[1]]
      numbers = [str(i) for i, operand in enumerate(user.operands) if operand == name]
      parameters = [i for i in fused.instructions if i.op == "parameter"]
      mine = [i.name for i in parameters if i.operands[0] in numbers]
      if not all(_only_cut(p, fused.users, computations) for p in mine):
        return False
    elif user.op != "dynamic-slice":
      return False
  return name in users


def _groups(attributes: str, everyone: int) -> tuple[tuple[int, ...], ...]:
  """The devices that share, of each of the ways in which a program's text says it."""
  numbers = lambda text: [int(n) for n in re.findall(r"\d+", text or "")]  # noqa: E731
  if match := _LISTED.search(attributes):
    return tuple(tuple(numbers(group)) for group in match[1].split("},"))
  if match := _COUNTED.search(attributes):
    shape, order, transposed = map(numbers, match.groups())
    return _rows(_places(order, transposed).reshape(shape))
  if match := _MESH.search(attributes):
    axes, order, transposed, named = match.groups()
    lengths = {name: int(n) for name, n in _MESH_AXIS.findall(axes)}
    order = numbers(order) or list(lengths.values())
    grid, parts, chosen = _places(order, numbers(transposed)), [], []
    for name, n in lengths.items():
      # A group may take a part of an axis, written 'name':(devices before it)its own length.
      part = {a: (int(b), int(c)) for a, b, c in _GROUP_AXIS.findall(named) if b}.get(name, (1, n))
      if f"'{name}'" in named:
        chosen.append(len(parts) + 1)
      parts += [part[0], part[1], n // part[0] // part[1]]
    others = [i for i in range(len(parts)) if i not in chosen]
    size = math.prod(parts[i] for i in chosen)
    return _rows(grid.reshape(parts).transpose(others + chosen).reshape(-1, size))
  return (tuple(range(everyone)),)


def _places(order: list[int], transposed: list[int]) -> np.ndarray:
  """All places of a mesh, laid out as order, then with its axes transposed."""
  grid = np.arange(math.prod(order)).reshape(order)
  return grid.transpose(transposed) if transposed else grid


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(row) for row in groups.tolist())
