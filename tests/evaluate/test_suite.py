"""What a run's pictures lack leaves out the protocols that need it, and no others."""

import pytest

from configs import smoke
from ssrl_jax.evaluate import EVALS
from ssrl_jax.evaluate.suite import open_test, runs
from ssrl_jax.experiment import build


class Pictures:
  def __init__(self, num_classes):
    self.num_classes = num_classes
    self.class_names = tuple(str(i) for i in range(num_classes or 0))


def able(num_classes, has_test):
  return {n for n, p in EVALS.items() if runs(p, Pictures(num_classes), has_test)}


def test_protocols_run_where_their_needs_are_met():
  own = {"detection", "segmentation"}
  assert able(10, True) == set(EVALS)
  assert able(None, True) == own | {"geometry", "attention"}
  assert able(10, False) == able(None, False) == own


@pytest.mark.parametrize(
  ("evals", "opened", "said"),
  [("knn,geometry", True, "knn will not be run"), ("knn", False, "knn will not"),
   ("detection", False, ""), ("geometry", True, "")],
)  # fmt: skip
def test_test_pictures_of_an_unlabelled_run_are_opened_where_they_are_of_use(
  evals, opened, said, caplog
):
  config = smoke.get_config("simclr")
  experiment = build(config, num_examples=128, num_classes=None)
  assert (open_test(experiment, Pictures(None), evals) is not None) == opened
  assert said in caplog.text
  assert bool(caplog.records) == bool(said)
