"""What every method must do in the one train step: exact, finite in bfloat16, blind to labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.methods import METHODS
from ssrl_jax.state import named_leaves, state_digest
from ssrl_jax.step import make_train_step, trained_loss
from tests.methods.common import (
  BATCH,
  READS_LABELS,
  VIT,
  make_experiment,
  make_state,
  make_views,
  random_state,
)

# Crop and flip only: the views have tests of their own, and their colours compile slowly.
PLAIN_VIEWS = {f"global_views.{name}": 0.0 for name in ("jitter", "greyscale")}

HYBRID = {name: {"hidden_dim": 8, "out_dim": 4} for name in ("moco_v3", "simclr")}


@pytest.fixture(scope="module", params=METHODS)
def stepped(request):
  """Two whole train steps in bfloat16, with these labels and this added to the probe's weights."""
  experiment = make_experiment(request.param, {"encoder.dtype": "bfloat16", **PLAIN_VIEWS})
  step = jax.jit(make_train_step(experiment))
  # On its device for good, as what a checkpoint restores is: so the step is compiled once.
  start = jax.device_put(random_state(experiment), jax.devices()[0])
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8),
    "extent": np.full((BATCH, 2), 16, np.int32),
    "id": np.stack([np.arange(BATCH), np.zeros(BATCH)], axis=1).astype(np.uint32),
    "substituted": np.zeros(BATCH, np.bool_),
  }

  def run(labels, weights):
    """The state after each step, and what the last one gave."""
    probe = start.probe._replace(params=jax.tree.map(lambda x: x + weights, start.probe.params))
    first, _, _ = step(start._replace(probe=probe), batch | {"label": labels})
    return first, *step(first, batch | {"label": labels})

  labels = np.arange(BATCH, dtype=np.int32) // 2
  again = lambda state: step(state, batch | {"label": labels})[0]  # noqa: E731
  return (
    request.param,
    again,
    run(labels, 0.0),
    run(np.arange(BATCH, dtype=np.int32) % 4 - 1, np.float32(5)),
  )


def test_bfloat16_stays_finite_and_keeps_parameters_in_float32(stepped):
  _, _, (_, state, metrics, watched), _ = stepped
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
  assert int(state.step) == 2
  for name, x in named_leaves((state._replace(key=()), metrics, watched)):
    assert np.all(np.isfinite(np.asarray(x, np.float32))), name


def test_labels_and_probe_cannot_influence_the_encoder(stepped):
  """Other labels and other weights of the probe: the same bytes of everything else."""
  name, _, (_, one, metrics_one, _), (_, two, metrics_two, _) = stepped
  assert metrics_one["probe/loss"] != metrics_two["probe/loss"]
  assert state_digest(one.probe) != state_digest(two.probe)
  same = state_digest(one._replace(probe=())) == state_digest(two._replace(probe=()))
  assert same != (name in READS_LABELS)


def test_resumed_step_gives_the_same_bytes(stepped, tmp_path):
  """Saved after the first step and restored, queues, centres and targets included."""
  _, again, (first, second, _, _), _ = stepped
  checkpoints = Checkpoints(tmp_path, keep=1, keep_best=0)
  checkpoints.finish(first, step=1, score=0.0)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first
  )
  restored = checkpoints.restore(shapes)
  checkpoints.close()
  assert state_digest(again(restored)) == state_digest(second)


@pytest.mark.parametrize(
  ("method", "changes"),
  [
    ("moco_v3", {}),
    ("moco_v3", {"encoder.fusion.enabled": True}),
    ("moco_v3", {"encoder.fusion.enabled": True, "encoder.attention.enabled": True}),
    ("hybrid", {"method.terms": ("moco_v3", "simclr"), "method.options": HYBRID}),
  ],
  ids=["vit", "vit within fusion", "vit within both", "term of hybrid"],
)
def test_moco_v3_leaves_the_patch_projection_as_it_is(method, changes):
  """Section 4.2 of its paper: no decay and no LARS on it either."""
  optim = {"optim.name": "larc", "optim.weight_decay": 0.1, "optim.warmup_epochs": 0.0}
  experiment = make_experiment(method, {**VIT, **optim, **changes})
  params = random_state(experiment).params
  opt_state, after = experiment.optimizer.init(params), params
  for _ in range(2):
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, opt_state = experiment.optimizer.update(gradients, opt_state, after)
    after = optax.apply_updates(after, updates)
  moved = dict(named_leaves(jax.tree.map(lambda a, b: np.any(a != b), params, after)))
  still = {name for name, has in moved.items() if not has}
  assert still == {name for name in moved if "/patches/" in name} != set()


def test_targets_of_a_hybrid_pass_by_what_another_term_adds_to_the_encoder():
  """ibot's mask token, which byol's target has not."""
  small = {"hidden_dim": 8, "out_dim": 4}
  options = {"byol": small, "ibot": {**small, "num_prototypes": 8}}
  changes = {"method.terms": ("byol", "ibot"), "method.options": options}
  experiment = make_experiment("hybrid", {**VIT, **changes})
  state = jax.eval_shape(lambda: make_state(experiment))
  after = jax.eval_shape(
    experiment.method.after_update, state.params, state.method_state, state.step
  )
  assert jax.tree.structure(after) == jax.tree.structure((state.params, state.method_state))
  assert "mask_token" in after[0]["encoder"]
  assert "mask_token" not in after[1]["byol"]["target"]["params"]["encoder"]


def test_no_gradient_of_what_is_never_trained():
  """So it counts in no norm, and is not sent between devices (tests/test_collectives.py)."""
  experiment = make_experiment("moco_v3", VIT)
  state, views = random_state(experiment), make_views(experiment)
  inputs = state.params, state.method_state, views, state.key, state.step
  whole, kept = (
    dict(named_leaves(jax.jit(jax.grad(loss, has_aux=True))(*inputs)[0]))
    for loss in (experiment.method.loss, trained_loss(experiment.method))
  )
  stopped = {name for name in whole if np.any(whole[name]) and not np.any(kept[name])}
  assert stopped == {name for name in whole if "/patches/" in name} != set()
  for name in whole.keys() - stopped:
    np.testing.assert_array_equal(kept[name], whole[name], err_msg=name)
