import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses import contrastive
from tests.numeric import differences, sizes, unit

nt_xent = jax.jit(contrastive.nt_xent)
decoupled = jax.jit(contrastive.decoupled)
info_nce = jax.jit(contrastive.info_nce, static_argnames="block")
info_nce_queue = jax.jit(contrastive.info_nce_queue)
supervised_contrastive = jax.jit(contrastive.supervised_contrastive)


@jax.jit
def sum_and_gradients(z1, z2, temperature):
  def total(*z):
    return jnp.sum(contrastive.nt_xent(*z, temperature=temperature))

  return jax.value_and_grad(total, argnums=(0, 1))(z1, z2)


def nt_xent64(z1, z2, temperature):
  """SimCLR's equation 1 over the 2B rows of both views, one pair at a time."""
  z = np.concatenate([z1, z2]).astype(np.float64)
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  b = len(z1)

  def one_way(i, j):
    others = [np.exp(z[i] @ z[k] / temperature) for k in range(2 * b) if k != i]
    return -np.log(np.exp(z[i] @ z[j] / temperature) / sum(others))

  return np.array([(one_way(i, i + b) + one_way(i + b, i)) / 2 for i in range(b)])


def pair(b=6, p=4):
  rng = np.random.default_rng(b)
  z1 = rng.normal(size=(b, p))
  return z1.astype(np.float32), (z1 + 0.5 * rng.normal(size=(b, p))).astype(np.float32)


@pytest.mark.parametrize(("b", "p"), [(2, 9), (6, 4)])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_is_equation_1(b, p, temperature):
  z1, z2 = pair(b, p)
  loss = nt_xent(z1, z2, temperature=temperature)
  assert loss.shape == (b,)
  np.testing.assert_allclose(loss, nt_xent64(z1, z2, temperature), rtol=2e-5, atol=2e-6)


def test_nt_xent_by_hand():
  # Two images at right angles, views alike: of the 3 others, one at cosine 1 and two at cosine 0.
  z = np.eye(2, dtype=np.float32)
  np.testing.assert_allclose(nt_xent(z, z, temperature=1.0), np.log(np.e + 2) - 1, rtol=1e-6)
  np.testing.assert_allclose(nt_xent(z, z, temperature=0.5), np.log(np.e**2 + 2) - 2, rtol=1e-5)


def test_nt_xent_limits():
  ones = np.ones((6, 4), np.float32)  # nothing to tell apart: chance among 11 candidates
  np.testing.assert_allclose(nt_xent(ones, ones, temperature=0.1), np.log(11), rtol=1e-6)
  apart = np.eye(6, dtype=np.float32)
  assert np.all(nt_xent(apart, apart, temperature=0.05) < 1e-6)
  z1, z2 = pair(1, 4)  # the only candidate is the right one
  np.testing.assert_allclose(nt_xent(z1, z2, temperature=0.1), [0], atol=1e-6)


def test_nt_xent_follows_the_images_and_not_the_order_of_views_or_the_scale():
  z1, z2 = pair()
  loss = nt_xent(z1, z2, temperature=0.2)
  order = np.array([3, 1, 5, 0, 2, 4])
  np.testing.assert_allclose(nt_xent(z1[order], z2[order], temperature=0.2), loss[order], rtol=1e-5)
  np.testing.assert_allclose(nt_xent(z2, z1, temperature=0.2), loss, rtol=1e-5)
  np.testing.assert_allclose(nt_xent(1e4 * z1, 1e-2 * z2, temperature=0.2), loss, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 0.1])  # 1e-4: logits of +-1e4
@pytest.mark.parametrize("case", ["random", "large", "zero", "identical", "opposite"])
def test_nt_xent_and_its_gradient_stay_finite(case, temperature):
  z1, z2 = pair()
  cases = {
    "random": (z1, z2),
    "large": (1e4 * z1, 1e4 * z2),
    "zero": (0 * z1, 0 * z2),
    "identical": (0 * z1 + 1, 0 * z2 + 1),
    "opposite": (z1, -z1),
  }
  total, gradients = sum_and_gradients(*cases[case], temperature)
  assert np.isfinite(total)
  assert total >= 0
  assert all(np.all(np.isfinite(g)) for g in gradients)


def test_nt_xent_gradient_is_that_of_differences():
  z1, z2 = pair()
  gradients = sum_and_gradients(z1, z2, 0.3)[1]
  z1, z2 = z1.astype(np.float64), z2.astype(np.float64)
  expected1 = differences(lambda z: nt_xent64(z, z2, 0.3).sum(), z1)
  expected2 = differences(lambda z: nt_xent64(z1, z, 0.3).sum(), z2)
  np.testing.assert_allclose(gradients[0], expected1, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(gradients[1], expected2, rtol=1e-4, atol=1e-5)


def test_nt_xent_computes_in_float32():
  z1, z2 = (jnp.asarray(z, jnp.bfloat16) for z in pair())
  loss = nt_xent(z1, z2, temperature=0.1)
  assert loss.dtype == jnp.float32
  exact = nt_xent64(np.asarray(z1, np.float64), np.asarray(z2, np.float64), 0.1)
  np.testing.assert_allclose(loss, exact, rtol=2e-5, atol=2e-6)


def decoupled64(z1, z2, temperature):
  """DCL's equation 6, as the official dcl.py masks: self and positive out, one direction a row."""
  z = {1: unit(z1), 2: unit(z2)}
  b = len(z1)

  def one_way(i, own, other):
    positive = z[own][i] @ z[other][i] / temperature
    negatives = [
      np.exp(z[own][i] @ z[view][k] / temperature)
      for view in (own, other)
      for k in range(b)
      if k != i
    ]
    return -positive + np.log(sum(negatives))

  return np.array([(one_way(i, 1, 2) + one_way(i, 2, 1)) / 2 for i in range(b)])


def info_nce64(q, k, temperature):
  """Cross-entropy of row i's class i, as moco-v3's ctr_loss before its factor."""
  q, k = unit(q), unit(k)
  return np.array(
    [
      -np.log(
        np.exp(q[i] @ k[i] / temperature) / sum(np.exp(q[i] @ k_j / temperature) for k_j in k)
      )
      for i in range(len(q))
    ]
  )


def info_nce_queue64(q, k, queue, temperature):
  """MoCo's equation 1: one positive, and the queue's rows only as negatives."""
  q, k, queue = unit(q), unit(k), unit(queue)
  losses = []
  for q_i, k_i in zip(q, k):
    positive = np.exp(q_i @ k_i / temperature)
    negatives = sum(np.exp(q_i @ row / temperature) for row in queue)
    losses.append(-np.log(positive / (positive + negatives)))
  return np.array(losses)


def supervised64(z1, z2, label, temperature):
  """SupCon's equation 2 over the 2B rows; a label of -1 is nobody else's."""
  z, b = unit(np.concatenate([z1, z2])), len(z1)

  def same(i, j):
    return i % b == j % b or (label[i % b] == label[j % b] and label[i % b] >= 0)

  def one(i):
    others = [a for a in range(2 * b) if a != i]
    total = sum(np.exp(z[i] @ z[a] / temperature) for a in others)
    positives = [p for p in others if same(i, p)]
    logs = [np.log(np.exp(z[i] @ z[p] / temperature) / total) for p in positives]
    return -sum(logs) / len(positives)

  return np.array([(one(i) + one(i + b)) / 2 for i in range(b)])


LABELS = np.array([2, 0, 2, -1, 0, 2, -1], np.int32)
# name: (objective of arrays and temperature, the same in float64, number of arrays).
OBJECTIVES = {
  "nt_xent": (contrastive.nt_xent, nt_xent64, 2),
  "decoupled": (contrastive.decoupled, decoupled64, 2),
  "info_nce": (contrastive.info_nce, info_nce64, 2),
  "info_nce_queue": (contrastive.info_nce_queue, info_nce_queue64, 3),
  "supervised_contrastive": (
    lambda z1, z2, **kw: contrastive.supervised_contrastive(z1, z2, LABELS[: len(z1)], **kw),
    lambda z1, z2, temperature: supervised64(z1, z2, LABELS, temperature),
    2,
  ),
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


def arrays_for(name, b=7, p=4):
  queue = np.random.default_rng(1).normal(size=(9, p)).astype(np.float32)
  return (*pair(b, p), queue)[: OBJECTIVES[name][2]]


@functools.cache
def compiled(name, block):
  objective, _, num = OBJECTIVES[name]

  def total(*arrays_and_temperature):
    *z, temperature = arrays_and_temperature
    loss_B = objective(*z, temperature=temperature, block=block)
    return jnp.sum(loss_B), loss_B

  return jax.jit(jax.grad(total, tuple(range(num)), has_aux=True))


def values_and_gradients(name, arrays, temperature, block=0):
  """float32 [B], and the gradients of its sum."""
  gradients, loss_B = compiled(name, block)(*arrays, temperature)
  return loss_B, gradients


@each_objective
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_objective_and_gradients_are_those_of_the_equation(name, temperature):
  _, reference, _ = OBJECTIVES[name]
  arrays = arrays_for(name)
  loss_B, gradients = values_and_gradients(name, arrays, temperature)
  assert loss_B.shape == (7,)
  assert loss_B.dtype == jnp.float32
  np.testing.assert_allclose(loss_B, reference(*arrays, temperature), rtol=2e-5, atol=5e-6)
  for i, gradient in enumerate(gradients):

    def total(z, i=i):
      return reference(*arrays[:i], z, *arrays[i + 1 :], temperature).sum()

    np.testing.assert_allclose(gradient, differences(total, arrays[i]), rtol=2e-4, atol=2e-5)


@each_objective
@pytest.mark.parametrize("block", [1, 3, 5, 64])  # of 7, 9 or 14 keys
def test_blocks_change_neither_value_nor_gradient(name, block):
  arrays = arrays_for(name)
  loss_B, gradients = values_and_gradients(name, arrays, 0.1)
  blocked_B, blocked = values_and_gradients(name, arrays, 0.1, block)
  np.testing.assert_allclose(blocked_B, loss_B, rtol=1e-5, atol=2e-6)
  for got, expected in zip(blocked, gradients, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@each_objective
@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize("length", [1e-6, 1e4])
def test_value_and_gradient_stay_finite_at_extreme_lengths(name, block, length):
  arrays = [length * unit(z).astype(np.float32) for z in arrays_for(name)]
  loss_B, gradients = values_and_gradients(name, arrays, 0.01, block)
  assert np.all(np.isfinite(loss_B))
  assert all(np.all(np.isfinite(g)) for g in gradients)


@each_objective
def test_no_array_of_a_blocked_objective_is_batch_by_keys(name):
  """Of what the loss and its gradient compute; the sums carried from block to block are small."""
  b, p, block = 256, 4, 32
  objective, _, num = OBJECTIVES[name]
  if name == "supervised_contrastive":
    label_B = jnp.arange(b) % 10

    def objective(z1, z2, **kw):
      return contrastive.supervised_contrastive(z1, z2, label_B, **kw)

  keys = 2 * b if name in ("nt_xent", "decoupled", "supervised_contrastive") else b
  rows = keys  # where both views are keys, both ask

  def largest(block):
    def total(*z):
      return jnp.sum(objective(*z, temperature=0.1, block=block))

    shapes = [jax.ShapeDtypeStruct((b, p), jnp.float32)] * num
    return max(sizes(jax.make_jaxpr(jax.value_and_grad(total, tuple(range(num))))(*shapes).jaxpr))

  assert largest(0) == rows * keys
  assert largest(block) == rows * block


def test_blocked_program_needs_less_memory():
  z = jax.ShapeDtypeStruct((512, 4), jnp.float32)

  def temporary(block):
    def total(z1, z2):
      return jnp.sum(contrastive.nt_xent(z1, z2, temperature=0.1, block=block))

    program = jax.jit(jax.grad(total, (0, 1))).lower(z, z).compile()
    return program.memory_analysis().temp_size_in_bytes

  whole = 512 * 1024 * 4
  assert temporary(0) >= whole
  assert temporary(32) < whole / 4


def test_others_by_hand():
  z, eye = np.ones((3, 4), np.float32), np.eye(2, dtype=np.float32)
  alike = {
    "supervised_contrastive": np.log(5),
    "nt_xent": np.log(5),
    "decoupled": np.log(4),
    "info_nce": np.log(3),
    "info_nce_queue": np.log(3 + 1),
  }
  for name, expected in alike.items():  # nothing to tell apart: the logarithm of how many there are
    arrays = (z, z, z)[: OBJECTIVES[name][2]]
    loss = values_and_gradients(name, arrays, 0.1)[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-6, err_msg=name)
  # Two images at right angles: the positive at cosine 1, negatives at 0.
  loss = decoupled(eye, eye, temperature=0.5)
  np.testing.assert_allclose(loss, np.log(2) - 2, rtol=1e-6)
  loss = info_nce(eye, eye, temperature=0.5)
  np.testing.assert_allclose(loss, np.log(np.e**2 + 1) - 2, rtol=1e-5)
  loss = info_nce_queue(eye, eye, -eye, temperature=0.5)
  expected = np.log(np.e**2 + np.e**-2 + 1) - 2  # in the queue: one opposite, one at right angles
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_info_nce_queue_takes_no_negatives_from_the_batch():
  q, k = pair()
  queue = arrays_for("info_nce_queue")[2]
  one = info_nce_queue(q[:1], k[:1], queue, temperature=0.1)
  all_of_them = info_nce_queue(q, k, queue, temperature=0.1)
  np.testing.assert_allclose(one, all_of_them[:1], rtol=1e-5)


def test_supervised_contrastive_without_labels_is_nt_xent():
  z1, z2 = pair()
  for label_B in (np.full(6, -1), np.arange(6)):
    loss = supervised_contrastive(z1, z2, label_B, temperature=0.1)
    np.testing.assert_allclose(loss, nt_xent(z1, z2, temperature=0.1), rtol=1e-5)


def test_supervised_contrastive_of_one_class():
  # Everything alike is as good as it gets with the mean outside the logarithm: log of 2B - 1.
  z = np.ones((4, 3), np.float32)
  loss = supervised_contrastive(z, z, np.zeros(4, np.int32), temperature=0.1)
  np.testing.assert_allclose(loss, np.log(7), rtol=1e-6)
  # Two classes apart: 3 positives at cosine 1, 4 negatives at 0.
  z = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
  loss = supervised_contrastive(z, z, np.array([5, 5, 0, 0]), temperature=1.0)
  np.testing.assert_allclose(loss, np.log(3 * np.e + 4) - 1, rtol=1e-6)


@pytest.mark.parametrize("block", [0, 1, 2, 5])
def test_contrast_halves_are_log_sum_and_mean_of_positives(block):
  rng = np.random.default_rng(0)
  q, k = (unit(rng.normal(size=(n, 3))).astype(np.float32) for n in (3, 5))
  positive, skip = rng.random((3, 5)) < 0.4, rng.random((3, 5)) < 0.3
  positive[0, :], skip[0, 1] = False, False
  lse_B, own_B = contrastive.contrast(
    q,
    k,
    temperature=0.2,
    positive=lambda i, j: jnp.asarray(positive)[i, jnp.minimum(j, 4)],
    skip=lambda i, j: jnp.asarray(skip)[i, jnp.minimum(j, 4)],
    block=block,
  )
  for i in range(3):
    logits = [float(q[i].astype(np.float64) @ k[j]) / 0.2 for j in range(5)]
    lse = np.log(sum(np.exp(logits[j]) for j in range(5) if not skip[i, j]))
    own = [logits[j] for j in range(5) if positive[i, j]]
    np.testing.assert_allclose(lse_B[i], lse, rtol=1e-5)
    np.testing.assert_allclose(own_B[i], np.mean(own) if own else 0, rtol=1e-5, atol=1e-6)


def test_identical_keys_give_no_negative_loss():
  # Rounding of the own logit and of the sum is the same, as they come from one product.
  z = np.tile(pair(1, 16)[0], (8, 1))
  for block in (0, 3):
    assert np.all(info_nce(z, z, temperature=0.01, block=block) >= 0)
