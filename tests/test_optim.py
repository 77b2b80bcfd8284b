import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssrl_jax.optim import decay_mask, describe_groups, make_optimizer, warmup_cosine

OPTIONS = {
  "name": "sgd",
  "learning_rate": 0.4,
  "scale_by_batch": False,
  "warmup_epochs": 0.2,
  "final_fraction": 0.1,
  "weight_decay": 0.05,
  "momentum": 0.8,
  "b1": 0.85,
  "b2": 0.98,
  "trust_coefficient": 0.01,
  "clip_ratio": False,
  "final_weight_decay": -1.0,
  "clip_norm": 0.0,
  "clip_each": False,
  "batch_size": 512,
  "steps_per_epoch": 10,
  "total_steps": 12,
}
SHAPES = {"conv": (3, 3, 2, 4), "dense": (4, 3), "bias": (3,), "scale": (4,)}
STEPS = 4


def trees(seed):
  rng = np.random.default_rng(seed)
  return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def updated(**changes):
  """Parameters after `STEPS` updates with fixed gradients, from the code under test."""
  rule, _ = make_optimizer(**(OPTIONS | changes))
  params = jax.tree.map(jnp.asarray, trees(0))
  state = rule.init(params)
  update = jax.jit(rule.update)
  for step in range(STEPS):
    updates, state = update(trees(step + 1), state, params)
    params = optax.apply_updates(params, updates)
  return params


def learning_rate64(step):
  """Two steps of warm-up from 0 to 0.4, then a cosine to a tenth of it at step 12."""
  if step < 2:
    return 0.4 * step / 2
  return 0.04 + 0.36 * (1 + np.cos(np.pi * (step - 2) / 10)) / 2


def apply64(rule, gradient_fn=lambda g: g):
  """Parameters after `STEPS` updates by `rule(p, g, memory, lr, step, decayed) -> p`, float64."""
  result = {}
  for name, p in trees(0).items():
    p, memory = p.astype(np.float64), {"m": np.zeros(p.shape), "v": np.zeros(p.shape)}
    for step in range(STEPS):
      g = gradient_fn({k: x.astype(np.float64) for k, x in trees(step + 1).items()})[name]
      p = rule(p, g, memory, learning_rate64(step), step, name in ("conv", "dense"))
    result[name] = p
  return result


def lars64(p, g, memory, learning_rate, step, decayed):
  """google-research/simclr lars_optimizer.py, classic_momentum: the rate is in the momentum."""
  ratio = 1.0
  if decayed:
    g = g + 0.05 * p
    ratio = 0.01 * np.sqrt((p**2).sum()) / np.sqrt((g**2).sum())
  memory["m"] = 0.8 * memory["m"] + learning_rate * ratio * g
  return p - memory["m"]


def sgd64(p, g, memory, learning_rate, step, decayed):
  """Decay in the gradient, heavy ball, the rate outside: torch.optim.SGD."""
  memory["m"] = 0.8 * memory["m"] + g + 0.05 * p * decayed
  return p - learning_rate * memory["m"]


def adamw64(p, g, memory, learning_rate, step, decayed):
  """Loshchilov & Hutter 2019, algorithm 2, the decay multiplied by the rate as in PyTorch."""
  memory["m"] = 0.85 * memory["m"] + 0.15 * g
  memory["v"] = 0.98 * memory["v"] + 0.02 * g**2
  m, v = memory["m"] / (1 - 0.85 ** (step + 1)), memory["v"] / (1 - 0.98 ** (step + 1))
  return p - learning_rate * (m / (np.sqrt(v) + 1e-8) + 0.05 * p * decayed)


def larc64(p, g, memory, learning_rate, step, decayed):
  """barlowtwins main.py, class LARS (BYOL's is the same): the rate outside the momentum."""
  if decayed:
    ratio = 0.01 * np.sqrt((p**2).sum()) / np.sqrt(((g + 0.05 * p) ** 2).sum())
    g = (g + 0.05 * p) * ratio
  memory["m"] = 0.8 * memory["m"] + g
  return p - learning_rate * memory["m"]


@pytest.mark.parametrize(
  ("name", "rule"), [("lars", lars64), ("larc", larc64), ("sgd", sgd64), ("adamw", adamw64)]
)
def test_update_rule_is_the_reference_with_norms_and_biases_left_alone(name, rule):
  params = updated(name=name)
  for key, expected in apply64(rule).items():
    np.testing.assert_allclose(params[key], expected, rtol=2e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("trust_coefficient", [0.01, 1.0])  # below the rate, and clipped
def test_larc_clips_its_ratio_at_the_rate(trust_coefficient):
  params = updated(name="larc", clip_ratio=True, trust_coefficient=trust_coefficient)

  def rule(p, g, memory, learning_rate, step, decayed):
    if decayed:
      g = g + 0.05 * p
      ratio = trust_coefficient * np.sqrt((p**2).sum()) / np.sqrt((g**2).sum())
      g = g * (min(ratio / learning_rate, 1) if learning_rate else 1)
    memory["m"] = 0.8 * memory["m"] + g
    return p - learning_rate * memory["m"]

  for key, expected in apply64(rule).items():
    np.testing.assert_allclose(params[key], expected, rtol=2e-5, atol=1e-6, err_msg=key)
  if trust_coefficient == 1.0:  # no faster than plain SGD with the same decay
    for key, expected in apply64(sgd64).items():
      np.testing.assert_allclose(params[key], expected, rtol=2e-5, atol=1e-6, err_msg=key)


def test_larc_differs_from_lars_by_the_rate_inside_the_momentum():
  # The first step is the same, and later ones while the rate stays: not on a schedule.
  larc, lars = updated(name="larc"), updated(name="lars")
  assert np.abs(np.asarray(larc["dense"]) - np.asarray(lars["dense"])).max() > 1e-5
  flat = {"warmup_epochs": 0.0, "final_fraction": 1.0}
  larc, lars = updated(name="larc", **flat), updated(name="lars", **flat)
  np.testing.assert_allclose(larc["dense"], lars["dense"], rtol=1e-5)


@pytest.mark.parametrize("step", [0, 3, 6, 12])
def test_weight_decay_goes_from_one_value_to_the_other_as_half_a_cosine(step):
  """DINO's cosine_scheduler(0.04, 0.4): by hand at the ends and in the middle."""
  rule, schedule = make_optimizer(
    **OPTIONS | {"name": "adamw", "weight_decay": 0.04, "final_weight_decay": 0.4}
  )
  params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
  still = jax.tree.map(jnp.zeros_like, params)  # what moves is the decay alone
  state, update = rule.init(params), jax.jit(rule.update)
  for _ in range(step + 1):
    updates, state = update(still, state, params)
  decay = 0.4 + (0.04 - 0.4) * (1 + np.cos(np.pi * step / 12)) / 2
  assert step not in (0, 6, 12) or round(decay, 9) == {0: 0.04, 6: 0.22, 12: 0.4}[step]
  expected = -float(schedule(step)) * decay * 3
  np.testing.assert_allclose(updates["kernel"], np.full((2, 2), expected), rtol=1e-5, atol=1e-9)
  np.testing.assert_array_equal(updates["bias"], np.zeros(2))


@pytest.mark.parametrize("name", ["sgd", "lars", "larc"])
def test_weight_decay_schedule_of_other_rules_is_refused(name):
  with pytest.raises(ValueError, match=rf"for adamw only.*{name}"):
    make_optimizer(**OPTIONS | {"name": name, "final_weight_decay": 0.4})


def test_constant_lr_keeps_the_peak_for_the_named_path_and_no_other():
  """SimSiam's predictor: fix_lr. A path is whole names from the top, not a prefix of one."""
  rule, schedule = make_optimizer(
    **OPTIONS | {"momentum": 0.0, "weight_decay": 0.0}, constant_lr=("predictor", "simsiam/head")
  )
  names = ("predictor", "predictor2", "encoder")
  params = {name: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for name in names}
  params["encoder"]["predictor"] = jnp.ones((2, 2))  # not at the top
  params["simsiam"] = {"head": jnp.ones(2), "other": jnp.ones(2)}
  gradients = jax.tree.map(jnp.ones_like, params)
  state, update = rule.init(params), jax.jit(rule.update)
  for step in range(8):
    updates, state = update(gradients, state, params)
    for path, u in jax.tree_util.tree_leaves_with_path(updates):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      constant = name in ("predictor/kernel", "predictor/bias", "simsiam/head")
      rate = 0.4 if constant else learning_rate64(step)
      np.testing.assert_allclose(u, np.full(u.shape, -rate), rtol=1e-5, atol=1e-9, err_msg=name)
  np.testing.assert_allclose(schedule(7), learning_rate64(7), rtol=1e-6)  # what is reported


@pytest.mark.parametrize("name", ["lars", "larc"])
def test_layerwise_rates_take_the_plain_rate_where_a_norm_is_zero(name):
  rule, _ = make_optimizer(**(OPTIONS | {"name": name, "warmup_epochs": 0.0}))
  params = {"zero": jnp.zeros((2, 2)), "still": jnp.ones((2, 2))}
  grads = {"zero": jnp.ones((2, 2)), "still": -0.05 * jnp.ones((2, 2))}  # what the decay adds
  updates, _ = rule.update(grads, rule.init(params), params)
  np.testing.assert_allclose(updates["zero"], np.full((2, 2), -0.4), rtol=1e-6)
  np.testing.assert_allclose(updates["still"], np.zeros((2, 2)), atol=1e-9)


def test_clip_cuts_the_norm_of_the_whole_gradient_before_the_rule():
  def clipped(grads):
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {k: g * min(1, 0.5 / norm) for k, g in grads.items()}

  params = updated(clip_norm=0.5)
  for key, expected in apply64(sgd64, clipped).items():
    np.testing.assert_allclose(params[key], expected, rtol=2e-5, atol=1e-6, err_msg=key)


def test_clip_leaves_small_gradients_as_they_are():
  with jax.disable_jit():  # two compiled programs may round differently
    jax.tree.map(np.testing.assert_array_equal, updated(clip_norm=1e3), updated())


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7, 12, 20])
def test_schedule_points(step):
  _, schedule = make_optimizer(**OPTIONS)
  expected = learning_rate64(min(step, 12))
  np.testing.assert_allclose(schedule(step), expected, rtol=1e-6, atol=1e-9)


def test_schedule_by_hand():
  schedule = warmup_cosine(peak=2.0, warmup_steps=4, total_steps=12, final_fraction=0.0)
  points = {0: 0.0, 2: 1.0, 4: 2.0, 6: 1 + np.sqrt(0.5), 8: 1.0, 12: 0.0}
  for step, value in points.items():
    np.testing.assert_allclose(schedule(step), value, atol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
  schedule = warmup_cosine(peak=2.0, warmup_steps=0, total_steps=1, final_fraction=0.0)
  np.testing.assert_allclose(schedule(0), 2.0)


@pytest.mark.parametrize(("batch_size", "factor"), [(512, 2.0), (64, 0.25)])
def test_learning_rate_scales_with_the_batch_when_asked(batch_size, factor):
  for scale, expected in ((True, 0.4 * factor), (False, 0.4)):
    _, schedule = make_optimizer(**OPTIONS | {"scale_by_batch": scale, "batch_size": batch_size})
    np.testing.assert_allclose(schedule(2), expected, rtol=1e-6)


def test_decay_mask_leaves_vectors_and_scalars_alone():
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scalar": jnp.ones(())}
  assert decay_mask(params) == {"kernel": True, "bias": False, "scalar": False}


def test_groups_are_described_with_their_sizes():
  params = {"a": {"kernel": jnp.ones((30, 40)), "bias": jnp.ones(40)}, "b": {"scale": jnp.ones(3)}}
  assert describe_groups(params).splitlines() == [
    "weight decay: 1 arrays, 1,200 parameters (kernel)",
    "no weight decay: 2 arrays, 43 parameters (bias, scale)",
  ]


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"'adam'.*adamw, larc, lars, sgd"):
    make_optimizer(**OPTIONS | {"name": "adam"})


@pytest.mark.parametrize("warmup_epochs", [1.2, 5.0, -1.0])
def test_warmup_that_does_not_fit_is_an_error(warmup_epochs):
  with pytest.raises(ValueError, match=r"does not fit into 12 steps; lower optim.warmup_epochs"):
    make_optimizer(**OPTIONS | {"warmup_epochs": warmup_epochs})


@pytest.mark.parametrize("name", ["adamw", "larc", "lars", "sgd"])
def test_frozen_arrays_begin_when_they_are_trained_as_if_nothing_had_been(name):
  """As where PyTorch has no gradient: no decay, no moments; later the schedule's own rate."""
  options = OPTIONS | {"name": name, "clip_norm": 0.0}
  rule, _ = make_optimizer(**options, frozen={"conv": 2, "dense": float("inf"), "scale": 0})
  plain, _ = make_optimizer(**options)
  params = jax.tree.map(jnp.asarray, trees(0))
  state, plain_state, start, seen = rule.init(params), plain.init(params), params, params
  for step in range(STEPS):
    updates, state = rule.update(trees(step + 1), state, params)
    params = optax.apply_updates(params, updates)
    updates, plain_state = plain.update(trees(step + 1), plain_state, seen)
    seen = optax.apply_updates(seen, updates)
    assert np.array_equal(params["conv"], start["conv"]) == (step < 2)
  for same in ("bias", "scale"):
    np.testing.assert_array_equal(params[same], seen[same])
  np.testing.assert_array_equal(params["dense"], start["dense"])
  if name == "adamw":  # without decay the first step is as long as the rate
    rule, schedule = make_optimizer(**options | {"weight_decay": 0.0}, frozen={"conv": 2})
    state = rule.init(start)
    for step in range(3):
      updates, state = rule.update(trees(step + 1), state, start)
    np.testing.assert_allclose(np.abs(updates["conv"]), schedule(2), rtol=1e-4)


def test_each_array_may_be_clipped_by_itself():
  rule, _ = make_optimizer(**OPTIONS | {
    "clip_norm": 3.0, "clip_each": True, "weight_decay": 0.0, "momentum": 0.0, "warmup_epochs": 0.0,
  })  # fmt: skip
  params, gradients = trees(0), trees(1)
  updates, _ = rule.update(gradients, rule.init(params), params)
  clipped = 0
  for name, g in gradients.items():
    length = np.linalg.norm(g)
    clipped += length > 3
    np.testing.assert_allclose(updates[name], -0.4 * g * min(1, 3 / length), rtol=1e-5)
  assert 0 < clipped < len(gradients)


def test_decay_of_frozen_arrays_is_that_of_the_step_at_which_they_begin():
  """Without gradients what moves is the decay alone."""
  options = OPTIONS | {"name": "adamw", "weight_decay": 0.04, "final_weight_decay": 0.4}
  rule, schedule = make_optimizer(**options, frozen={"conv": 2})
  params = {name: trees(0)[name] for name in ("conv", "dense")}
  still = jax.tree.map(np.zeros_like, params)
  state, update = rule.init(params), jax.jit(rule.update)
  for step in range(4):
    updates, state = update(still, state, params)
    decay = 0.4 + (0.04 - 0.4) * (1 + np.cos(np.pi * step / 12)) / 2
    rate = float(schedule(step)) * decay
    for name, begins in (("conv", 2), ("dense", 0)):
      expected = -rate * params[name] if step >= begins else still[name]
      np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("clip_each", [False, True])
def test_clipping_may_begin_in_the_middle_of_a_run(clip_each):
  options = OPTIONS | {"name": "adamw", "clip_each": clip_each}
  states = [make_optimizer(**options | {"clip_norm": c})[0].init(trees(0)) for c in (0.0, 1.0)]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
