"""A short, seeded run of the fuzzer; the long one is `python -m benchmarks.fuzz`."""

import os
import time

import numpy as np
import pytest

from benchmarks import fuzz


def test_mutated_files_of_every_format_decode_validly_or_are_refused():
  inputs = fuzz.Inputs(seed=1)
  outcomes = {}
  for i in range(600):
    format, data = inputs(i)
    outcome, detail = fuzz.judge(data)
    assert outcome in ("decoded", "damaged"), f"input {i} ({format}): {outcome}: {detail}"
    outcomes.setdefault(format, set()).add(outcome)
  formats = {format for format, _ in fuzz.real_files()}
  assert outcomes == {f: {"decoded", "damaged"} for f in formats} | {"random": {"damaged"}}


def test_files_that_are_mutated_are_valid_themselves():
  assert {fuzz.judge(data)[0] for _, data in fuzz.real_files()} == {"decoded"}
  assert fuzz.Inputs(3)(7) == fuzz.Inputs(3)(7)


def test_what_is_no_valid_canvas_is_a_finding(monkeypatch):
  def judged(image, extent):
    monkeypatch.setattr(fuzz, "decode", lambda data, canvas: (image(), np.array(extent)))
    return fuzz.judge(b"")[0]

  def blank():
    return np.zeros((48, 48, 3), np.uint8)

  assert judged(blank, (4, 4)) == "decoded"
  assert judged(blank, (0, 4)) == "invalid"
  assert judged(lambda: blank() + np.uint8(1), (4, 4)) == "invalid"
  random = np.random.default_rng(0)
  assert judged(lambda: random.integers(0, 9, (48, 48, 3), np.uint8), (48, 48)) == "unstable"
  assert judged(None, (4, 4)) == "error"


def numbered(i):
  return "random", bytes([i])


def crash_or_hang(data):
  if data == b"\x01":
    os.abort()
  if data == b"\x03":
    time.sleep(600)
  return "decoded", ""


@pytest.mark.slow
def test_crash_and_hang_are_seen_and_the_next_input_is_tried():
  found = list(fuzz.verdicts(numbered, 5, judge=crash_or_hang, hung=5.0))
  assert [i for i, _ in found] == [0, 1, 2, 3, 4]
  outcomes = [verdict.outcome for _, verdict in found]
  assert outcomes == ["decoded", "crash", "decoded", "hang", "decoded"]
  assert found[1][1].detail == "exit code -6"
