"""That --help can say of every knob what it means."""

import pytest

from ssrl_jax.config import base_config, flatten
from ssrl_jax.knobs import arguments, comments, help_lines, meanings
from ssrl_jax.methods import METHODS


def example(a: int, bc: int = 1, d: int = 2, e: int = 3):
  """Does nothing.

  Args:
    a: is a
      number. bc, d (both): are: two.
    others: as `another`.

  Returns:
    e: no argument.
  """
  f = 3  # a comment; = and # of it stay
  f_g = "x # y"
  return a, bc, d, e, f, f_g


def another(d: int, e: int):
  """Args stand below.

  Args:
    d: another's.
    e: the last.
  """
  return d, e


def test_arguments_are_read_alone_together_and_from_elsewhere():
  two = "are: two"
  assert arguments(example) == {"a": "is a number", "bc": two, "d": two, "e": "the last"}
  assert arguments(test_arguments_are_read_alone_together_and_from_elsewhere) == {}


def test_comments_are_those_of_assignments():
  assert comments(example, r"(\w+)") == {"f": "a comment; = and # of it stay"}


@pytest.mark.parametrize("method", METHODS)
def test_every_knob_has_a_meaning(method):
  told = meanings(method)
  assert flatten(base_config(method)).keys() - told.keys() == {"method.name"}
  for text in told.values():  # each is read alone, in another order
    assert text
    assert not text.startswith(("|", "or ", "others"))
    assert "see above" not in text


def test_meaning_stands_behind_the_value():
  values = {"optim.momentum": 0.9, "method.name": "byol", "no.knob": 1}
  lines = help_lines("config.", values, "byol")
  assert lines[0].split("  ", 2)[1:] == [
    "--config.optim.momentum [0.9]", f"{'':<15}  sgd, lars, larc"
  ]  # fmt: skip
  assert lines[1:] == ["  --config.method.name [byol]", "  --config.no.knob [1]"]
  assert help_lines("", {"KEY": "any"}, "") == ["  --KEY [any]"]
