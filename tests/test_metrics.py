import contextlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax import metrics
from ssrl_jax.metrics import Writer, collapse, read_metrics

health = jax.jit(metrics.health, static_argnames="unit_variance")
first_non_finite = jax.jit(metrics.first_non_finite)


def health64(z, targets):
  raw_std = np.sqrt(np.mean([np.mean((z[:, j] - z[:, j].mean()) ** 2) for j in range(z.shape[1])]))
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  targets = targets / np.linalg.norm(targets, axis=1, keepdims=True)
  b, p = z.shape
  deviations = [np.sqrt(np.mean((z[:, j] - z[:, j].mean()) ** 2)) for j in range(p)]
  cosines = [abs(z[i] @ z[j]) for i in range(b) for j in range(b) if i != j]
  eigenvalues = np.linalg.eigvalsh(np.cov(z.T, bias=True))
  return {
    "health/raw_std": raw_std,
    "health/std": np.mean(deviations) * np.sqrt(p),
    "health/cosine": np.mean(cosines),
    "health/rank": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
    "health/target_distance": np.mean(((z - targets) ** 2).sum(axis=1)),
  }


def sphere(b=512, p=128, seed=0):
  return np.random.default_rng(seed).normal(size=(b, p)).astype(np.float32)


@pytest.mark.parametrize(("b", "p"), [(9, 5), (5, 9)])
def test_health_is_what_it_says(b, p):
  z, targets = 3 * sphere(b, p) + 1, sphere(b, p, seed=1)
  figures = health(z, targets, unit_variance=True)
  expected = health64(z.astype(float), targets.astype(float))
  assert figures.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(figures[name], value, rtol=1e-4, err_msg=name)


def test_health_without_targets_has_no_distance_to_them():
  assert "health/target_distance" not in health(sphere(8, 4), None)


def test_health_of_an_evenly_filled_sphere():
  figures = health(
    np.tile(np.eye(8, dtype=np.float32), (2, 1)) * np.repeat([[1], [-1]], 8, 0), None
  )
  np.testing.assert_allclose(figures["health/std"], 1, rtol=1e-5)
  np.testing.assert_allclose(figures["health/rank"], 8, rtol=1e-5)


def planted(name):
  """Embeddings with a collapse, of several kinds and degrees."""
  z, rng = sphere(), np.random.default_rng(1)
  one, plane = sphere(1), sphere(2)
  return {
    "one point": np.tile(one, (512, 1)),
    "one point and a little noise": one + 0.02 * z,
    "one direction of any length": one * rng.uniform(1, 9, (512, 1)).astype(np.float32),
    "zeros": 0 * z,
    "a plane": rng.normal(size=(512, 2)).astype(np.float32) @ plane,
    "a plane and a little noise": rng.normal(size=(512, 2)).astype(np.float32) @ plane + 0.01 * z,
    "healthy": z,
    "healthy, far from the origin": z + 0.5,
    "healthy, ten directions": rng.normal(size=(512, 10)).astype(np.float32) @ sphere(10),
  }[name]


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("one point", "complete collapse"),
    ("one point and a little noise", "complete collapse"),
    ("one direction of any length", "complete collapse"),
    ("zeros", "complete collapse"),
    ("a plane", "dimensional collapse"),
    ("a plane and a little noise", "dimensional collapse"),
    ("healthy", None),
    ("healthy, far from the origin", None),
    ("healthy, ten directions", None),
  ],
)
def test_collapse_names_what_was_planted(name, expected):
  found = collapse({k: float(v) for k, v in health(planted(name), None).items()}, 128)
  assert found is None if expected is None else found.startswith(expected)


def test_collapse_to_a_point_matters_where_the_loss_asks_for_unit_variance():
  def found(scale, unit_variance):
    figures = health(scale * sphere(), None, unit_variance=unit_variance)
    return collapse({k: float(v) for k, v in figures.items()}, 128)

  assert found(0.05, False) is None
  assert found(0.05, True).startswith("complete collapse")
  assert found(0.2, True) is None


def test_collapse_of_few_dimensions_is_not_asked_for_a_rank():
  figures = {"health/std": 0.8, "health/cosine": 0.5, "health/rank": 1.0}
  assert collapse(figures, 4) is None
  assert collapse(figures, 8).startswith("dimensional")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("where", "index"), [([], -1), (["b"], 1), (["c"], 2), (["a", "c"], 0)])
def test_first_non_finite_is_the_first_in_the_tree_s_order(bad, where, index):
  tree = {"c": np.ones((2, 3)), "a": np.ones(4), "b": np.float32(1), "d": np.arange(3)}
  for name in where:
    tree[name] = np.array(tree[name], np.float32)
    tree[name].flat[-1] = bad
  found = first_non_finite(tree)
  assert int(found) == index
  assert found.dtype == jnp.int32


def test_first_non_finite_counts_what_float32_cannot_square():
  assert int(first_non_finite({"a": np.float32(1e18), "b": np.float32(1e20)})) == 1


def test_global_norm_is_that_of_one_long_vector():
  tree = {"a": sphere(5, 3), "b": np.arange(4, dtype=np.int32), "c": jnp.ones(2, jnp.bfloat16)}
  vector = np.concatenate([np.asarray(x, np.float64).ravel() for x in tree.values()])
  np.testing.assert_allclose(metrics.global_norm(tree), np.linalg.norm(vector), rtol=1e-6)


def lines(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder, steps, **options):
  writer = Writer(folder, **({"step": 0, "tensorboard": False} | options))
  for step in steps:
    writer.write(step, {"loss": step / 3})
  writer.close()


def test_writer_writes_one_object_a_line(tmp_path):
  written(tmp_path, [2, 4])
  assert lines(tmp_path) == [{"step": 2, "loss": 2 / 3}, {"step": 4, "loss": 4 / 3}]
  assert read_metrics(tmp_path) == lines(tmp_path)


def test_writer_on_resume_drops_what_came_after_the_checkpoint(tmp_path):
  written(tmp_path, [2, 4, 6, 8])
  written(tmp_path, [6, 7], step=4)
  assert [r["step"] for r in lines(tmp_path)] == [2, 4, 6, 7]


@pytest.mark.parametrize("cut", range(1, 12))
def test_writer_on_resume_drops_a_last_line_cut_short(tmp_path, cut):
  written(tmp_path, [2, 4])
  with (tmp_path / "metrics.jsonl").open("a") as f:
    f.write('{"step": 6, "loss": 2.0}'[:cut])
  assert [r["step"] for r in read_metrics(tmp_path)] == [2, 4]
  written(tmp_path, [6], step=4)
  assert [r["step"] for r in lines(tmp_path)] == [2, 4, 6]


def test_line_without_its_newline_does_not_swallow_the_next(tmp_path):
  written(tmp_path, [2, 4])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text()[:-1])
  written(tmp_path, [6], step=4)
  assert [r["step"] for r in lines(tmp_path)] == [2, 4, 6]


def test_damaged_line_in_the_middle_is_an_error(tmp_path):
  written(tmp_path, [2, 4, 6])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text().replace('"step": 4', '"step" 4'))
  with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
    read_metrics(tmp_path)


def test_metrics_of_an_empty_folder_are_none(tmp_path):
  assert read_metrics(tmp_path) == []


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  written(tmp_path, [2, 4, 6], tensorboard=True)
  time.sleep(1.1)  # tensorboardX names its files by the second
  written(tmp_path, [5, 6], step=4, tensorboard=True)
  events = EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  assert [e.step for e in events.Scalars("loss")] == [2, 4, 5, 6]


def test_full_disk_names_the_file_and_closing_does_not_hide_it(tmp_path):
  writer = metrics.Writer(tmp_path, step=0, tensorboard=False)
  writer.close()
  writer._file = open("/dev/full", "w")  # noqa: SIM115
  with contextlib.closing(writer), pytest.raises(OSError, match=r"metrics.jsonl \(No space left"):
    writer.write(1, {"loss": 1.0})
