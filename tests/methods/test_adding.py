"""docs/methods.md: every method has its page, and the method that it adds as an example works."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from ssrl_jax.experiment import build, init_state
from ssrl_jax.knobs import meanings
from ssrl_jax.methods import METHODS
from ssrl_jax.step import abstract_views

PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_method_has_its_section(name):
  (section,) = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", PAGE, flags=re.M | re.S)
  labels = ("Idea", "Objective", "Departures", "Curve", "Failure")
  assert re.findall(r"^\* \*\*(\w+)\*\*: .", section, flags=re.M) == list(labels)


def test_page_names_no_method_that_does_not_exist():
  assert set(re.findall(r"^### (\w+)$", PAGE, flags=re.M)) == METHODS.keys()


def test_method_of_the_page_trains_with_a_line_in_methods(monkeypatch):
  code = re.search(r"```python\n(.*?)```", PAGE, flags=re.S).group(1)
  namespace = {}
  exec(compile(code, "docs/methods.md", "exec"), namespace)
  monkeypatch.setitem(METHODS, "toy", namespace["make"])
  c = digits.get_config("toy")
  assert meanings("toy")["method.weight"] == "of the loss"
  c.update({"batch_size": 8, "epochs": 1.0})
  c.method.weight = 2.0
  experiment = build(c, num_examples=16, num_classes=10)
  state = init_state(experiment, jax.random.key(0))
  rng = np.random.default_rng(0)
  views = {
    name: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    for name, x in abstract_views(experiment).items()
  }
  arguments = (state.params, state.method_state, views, jax.random.key(0), jnp.int32(0))
  value, aux = experiment.method.loss(*arguments)
  assert aux.metrics["distance"] == value > 0
