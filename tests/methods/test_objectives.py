"""The objective that each method closes over, on embeddings that are given, not computed.

The "views" are the embeddings: the encoder hands its input on, and so do projector and predictor.
What remains of `Method.loss` is the objective, compared with loops transcribed from papers and
official code. What the objective is made of has tests of its own in tests/losses.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses.distribution import koleo
from ssrl_jax.losses.masked import patchify
from ssrl_jax.method import Features, Run, ViewSpec, linear_warmup, normalise
from ssrl_jax.methods import (
  barlow_twins,
  byol,
  dcl,
  densecl,
  dino,
  dinov2,
  finegrained,
  fusion,
  hybrid,
  ibot,
  ijepa,
  jigsaw,
  lejepa,
  mae,
  mmcr,
  moco_v2,
  moco_v3,
  msn,
  nnclr,
  ressl,
  rotation,
  simclr,
  simmim,
  simsiam,
  supcon,
  supervised,
  swav,
  tico,
  vicreg,
  vicregl,
  w_mse,
)
from ssrl_jax.models.attention import AttentionEncoder
from ssrl_jax.models.fusion import FusionEncoder
from ssrl_jax.models.vit import ViT
from tests.methods.common import random_like
from tests.numeric import differences, softmax64, unit

B, P, K = 6, 4, 5
RUN = Run(batch_size=B, steps_per_epoch=10, total_steps=100, num_classes=10)


class Given(nn.Module):
  """[N, h, w, C] -> these as the map, their first place as the pooled vector."""

  def __call__(self, images, train, keep_BK=None):
    return Features(images[:, 0, 0], {4: images})


class Same(nn.Module):
  def __call__(self, x, train):
    return x


def views(num_global=2):
  return (ViewSpec("global", count=num_global),)


def embeddings(num_views, b=B, p=P, seed=0):
  """[B, V, P]: views of one image are closer than images."""
  rng = np.random.default_rng(seed)
  z = rng.normal(size=(b, 1, p)) + 0.6 * rng.normal(size=(b, num_views, p))
  return z.astype(np.float32)


def make(monkeypatch, module, *, num_global=2, run=RUN, **options):
  if hasattr(module, "MLP"):
    monkeypatch.setattr(module, "MLP", lambda **kw: Same())
  return module.make(encoder=Given(), views=views(num_global), run=run, **options)


def loss_of(method, z_BVP, *, params=None, state=None, local_BVP=None, step=0, **more):
  """value, aux of the objective on these embeddings of global (and local) views."""
  given = {"global": z_BVP[:, :, None, None], "label": jnp.zeros(len(z_BVP), jnp.int32), **more}
  if local_BVP is not None:
    given["local"] = local_BVP[:, :, None, None]
  state = {"batch_stats": {}} | (state or {})
  return jax.jit(method.loss)(
    {"encoder": {}, **(params or {})}, state, given, jax.random.key(3), step
  )


def target(params=None):
  return {"target": {"params": {"encoder": {}, **(params or {})}, "batch_stats": {}}}


def value_and_gradient(method, **options):
  loss = lambda z: loss_of(method, z, **options)[0]  # noqa: E731
  return jax.jit(jax.value_and_grad(loss))


def cosine_distance64(x, y):
  return sum((a - b) ** 2 for a, b in zip(unit(x), unit(y)))


def check(method, z, reference, *, rtol=1e-4, atol=2e-5, **options):
  """Value and gradient; `reference` is a function of what is to get gradient."""
  compiled = value_and_gradient(method, **options)
  value, gradient = compiled(z)
  assert value.shape == ()
  np.testing.assert_allclose(value, reference(z.astype(np.float64)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient, differences(reference, z), rtol=rtol, atol=atol)
  for scale in (1e-6, 1e4):
    value, gradient = compiled(np.float32(scale) * z)
    assert np.isfinite(value), scale
    assert np.all(np.isfinite(gradient)), scale


def cross_entropy64(logits, label):
  return -np.log(softmax64(logits)[label])


# --- What tells images apart.


@pytest.mark.parametrize("block", [0, 4])
def test_simclr_dcl_and_supcon_are_means_over_images(monkeypatch, block):
  z, label = embeddings(2), np.array([0, 1, 0, 2, -1, 1], np.int32)

  def one(z, kind, label=None):
    rows = unit(np.concatenate([z[:, 0], z[:, 1]]))
    total = 0.0
    for i in range(2 * B):
      mate = (i + B) % (2 * B)
      others = [j for j in range(2 * B) if j != i and not (kind == "dcl" and j == mate)]
      positives = [mate]
      if label is not None and label[i % B] >= 0:
        positives = [j for j in range(2 * B) if j != i and label[j % B] == label[i % B]]
      log_sum = np.log(sum(np.exp(rows[i] @ rows[j] / 0.2) for j in others))
      total += sum(log_sum - rows[i] @ rows[j] / 0.2 for j in positives) / len(positives)
    return total / (2 * B)

  options = {"temperature": 0.2, "block": block}
  check(make(monkeypatch, simclr, **options), z, lambda z: one(z, "simclr"))
  check(make(monkeypatch, dcl, **options), z, lambda z: one(z, "dcl"))
  supervised = make(monkeypatch, supcon, **options)
  check(supervised, z, lambda z: one(z, "supcon", label), label=label)


def test_moco_v3_multiplies_each_direction_by_twice_the_temperature(monkeypatch):
  """moco/builder.py: ctr_loss(q1, k2) + ctr_loss(q2, k1), each a mean times 2 T; keys are fixed."""
  z, temperature = embeddings(2), 0.2
  keys = unit(z)

  def reference(z):
    total = 0.0
    for own, other in ((0, 1), (1, 0)):
      q = unit(z[:, own])
      losses = [cross_entropy64(keys[:, other] @ q[i] / temperature, i) for i in range(B)]
      total += sum(losses) / B * (2 * temperature)
    return total

  method = make(monkeypatch, moco_v3, temperature=temperature)
  check(method, z, reference, state=target())
  # Alike embeddings: 2 T log B of each direction.
  value, aux = loss_of(method, np.ones((B, 2, P), np.float32), state=target())
  np.testing.assert_allclose(value, 2 * 2 * temperature * np.log(B), rtol=1e-5)
  np.testing.assert_allclose(aux.metrics["info_nce"], np.log(B), rtol=1e-5)


def test_moco_v3_predictor_ends_in_batchnorm_for_vits_only():
  """moco/builder.py: MoCo_ResNet's predictor is `_build_mlp(2, dim, mlp_dim, dim, False)`."""
  for norm in (False, True):
    method = moco_v3.make(
      encoder=Given(), views=views(), run=RUN, hidden_dim=4, out_dim=P, predictor_norm=norm
    )
    shown = {"global": jnp.zeros((B, 2, 1, 1, P))}
    _, state = jax.eval_shape(method.init, jax.random.key(0), shown)
    assert len(state["batch_stats"]["predictor"]) == 1 + norm


def test_moco_v2_asks_with_view_0_and_answers_with_view_1(monkeypatch):
  z, rng = embeddings(2), np.random.default_rng(1)
  queue = unit(rng.normal(size=(2 * B, P))).astype(np.float32)
  keys = unit(z[:, 1])

  def reference(z):
    losses = []
    for i in range(B):
      q = unit(z[i, 0])
      losses.append(cross_entropy64(np.array([q @ keys[i], *(queue @ q)]) / 0.2, 0))
    return sum(losses) / B

  method = make(monkeypatch, moco_v2, queue_size=2 * B, out_dim=P)
  state = {"queue": jnp.asarray(queue), **target()}
  check(method, z, reference, state=state)
  after = loss_of(method, z, state=state)[1].method_state["queue"]
  np.testing.assert_allclose(after, np.concatenate([keys, queue[:B]]), rtol=1e-5, atol=1e-6)


def test_nnclr_asks_with_neighbours_and_answers_with_predictions(monkeypatch):
  """The paper's equation 3 and its pseudocode: L(NN(z1), p2) / 2 + L(NN(z2), p1) / 2."""
  z, rng = embeddings(2), np.random.default_rng(1)
  queue = unit(rng.normal(size=(3 * B, P))).astype(np.float32)
  near = [[queue[np.argmax(queue @ unit(z[i, v]))] for i in range(B)] for v in range(2)]

  def reference(z):
    total = 0.0
    for view, other in ((0, 1), (1, 0)):
      predictions = unit(z[:, other])
      logits = [predictions @ near[view][i] / 0.1 for i in range(B)]
      total += sum(cross_entropy64(logits[i], i) for i in range(B)) / B / 2
    return total

  method = make(monkeypatch, nnclr, queue_size=3 * B, out_dim=P)
  state = {"queue": jnp.asarray(queue)}
  check(method, z, reference, state=state)
  after = loss_of(method, z, state=state)[1].method_state["queue"]
  np.testing.assert_allclose(
    after, np.concatenate([unit(z[:, 0]), queue[: 2 * B]]), rtol=1e-5, atol=1e-6
  )


# --- What pulls views together.


@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 2), (3, 0)])
def test_byol_objective(monkeypatch, num_global, num_local):
  """Equations 2 and 3: two views, the sum of both directions; more, twice the mean over pairs."""
  z, local = embeddings(num_global), embeddings(num_local, seed=1) if num_local else None
  fixed = z.astype(np.float64)

  def reference(z):
    online = z if local is None else np.concatenate([z, local], axis=1)
    pairs = [(v, t) for v in range(online.shape[1]) for t in range(num_global) if v != t]
    values = [
      sum(cosine_distance64(online[i, v], fixed[i, t]) for i in range(B)) / B for v, t in pairs
    ]
    return sum(values) if (num_global, num_local) == (2, 0) else 2 * sum(values) / len(values)

  method = make(monkeypatch, byol, num_global=num_global)
  check(method, z, reference, state=target(), local_BVP=local)


def test_byol_objective_by_hand():
  q = np.float32([[[1, 0], [0, 2]]])
  # Cosines of q1 with t2 and of q2 with t1: 1 and -1, so 0 + 4.
  np.testing.assert_allclose(byol.objective(q, np.float32([[[0, -1], [3, 0]]])), 4, atol=1e-6)
  np.testing.assert_allclose(byol.objective(q, q[:, ::-1]), 0, atol=1e-6)
  np.testing.assert_allclose(byol.objective(q, -q[:, ::-1]), 8, rtol=1e-6)


def test_simsiam_is_the_mean_negative_cosine_without_gradient_to_the_target(monkeypatch):
  """main_simsiam.py: -(cos(p1, z2) + cos(p2, z1)) / 2, z1 and z2 detached."""
  z = embeddings(2)
  fixed = unit(z)

  def reference(z):
    cosines = [unit(z[i, v]) @ fixed[i, 1 - v] for i in range(B) for v in range(2)]
    return -sum(cosines) / B / 2

  method = make(monkeypatch, simsiam)
  check(method, z, reference)
  free = make(monkeypatch, simsiam, stop_gradient=False)
  whole, half = value_and_gradient(free)(z)[1], value_and_gradient(method)(z)[1]
  np.testing.assert_allclose(whole, 2 * half, rtol=1e-4, atol=1e-6)


def test_barlow_twins_is_scaled(monkeypatch):
  z = embeddings(2, b=9)
  plain = loss_of(make(monkeypatch, barlow_twins, scale=1.0, off_diagonal_weight=0.1), z)[0]
  released = loss_of(make(monkeypatch, barlow_twins, off_diagonal_weight=0.1), z)
  np.testing.assert_allclose(released[0], 0.024 * plain, rtol=1e-6)
  np.testing.assert_allclose(released[1].metrics["barlow_twins"], plain, rtol=1e-6)


def vicreg_terms64(x, y):
  """mse; and of each branch the mean hinge and the off-diagonal squares over the dimensions."""
  n, dims = x.shape
  mse = sum((x[i, j] - y[i, j]) ** 2 for i in range(n) for j in range(dims)) / (n * dims)
  hinges, squares = [], []
  for z in (x, y):
    cov = np.cov(z.T, ddof=1)
    hinges.append(sum(max(0, 1 - np.sqrt(cov[j, j] + 1e-4)) for j in range(dims)) / dims)
    squares.append(sum(cov[j, k] ** 2 for j in range(dims) for k in range(dims) if j != k) / dims)
  return mse, hinges, squares


def test_vicreg_halves_the_variance_and_not_the_covariance(monkeypatch):
  """main_vicreg.py: std_loss is the mean over the branches, cov_loss their sum; 25, 25, 1."""
  z = 0.5 * embeddings(2)

  def reference(z):
    mse, hinges, squares = vicreg_terms64(z[:, 0], z[:, 1])
    return 25 * mse + 25 * (hinges[0] / 2 + hinges[1] / 2) + 1 * (squares[0] + squares[1])

  check(make(monkeypatch, vicreg), z, reference)


def test_tico_meets_the_target_and_keeps_away_from_the_covariance(monkeypatch):
  """lightly's tico_loss.py: 1 - cos to the other view + rho z' C z, C with this batch in it."""
  z, rng = embeddings(2), np.random.default_rng(1)
  earlier = unit(rng.normal(size=(3 * B, P)))
  past, fixed = earlier.T @ earlier / len(earlier), unit(z[:, 1])

  def covariance(z):
    rows = [unit(z[i, 0]) for i in range(B)]
    return 0.9 * past + (1 - 0.9) * sum(np.outer(x, x) for x in rows) / B

  def reference(z):
    c, loss = covariance(z), 0.0
    for i in range(B):
      x = unit(z[i, 0])
      loss += (1 - x @ fixed[i] + 20 * x @ c @ x) / B
    return loss

  method = make(monkeypatch, tico, out_dim=P)
  state = {"covariance": jnp.asarray(past, jnp.float32), **target()}
  check(method, z, reference, rtol=1e-3, state=state)
  _, aux = loss_of(method, z, state=state)
  after = aux.method_state["covariance"]
  np.testing.assert_allclose(after, covariance(z.astype(np.float64)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(aux.targets, z[:, 1])


def test_tico_s_covariance_begins_at_0():
  method = tico.make(encoder=Given(), views=views(), run=RUN, hidden_dim=4, out_dim=P)
  _, state = method.init(jax.random.key(0), {"global": jnp.zeros((B, 2, 1, 1, P))})
  np.testing.assert_array_equal(state["covariance"], np.zeros((P, P)))


def test_w_mse_whitens_each_view_of_each_slice(monkeypatch):
  """methods/w_mse.py: random slices; of unit vectors; the mean over examples and slicings."""
  run, z = RUN._replace(batch_size=12), embeddings(2, b=12, p=3)
  options = {"out_dim": 3, "eps": 0.0}

  def whitened64(x):
    x = x - x.mean(axis=0)
    return np.linalg.solve(np.linalg.cholesky(np.cov(x.T, ddof=1)), x.T).T

  def distance(z):
    pair = whitened64(z[:, 0]), whitened64(z[:, 1])
    return sum(cosine_distance64(x, y) for x, y in zip(*pair)) / len(z)

  whole = make(monkeypatch, w_mse, run=run, slice_size=12, **options)
  check(whole, z, distance, rtol=1e-3)
  # Two slices and two slicings, with the program's own permutations.
  orders = []
  permutation = jax.random.permutation

  def record(key, n):
    order = permutation(key, n)
    jax.debug.callback(lambda x: orders.append(np.asarray(x)), order)
    return order

  monkeypatch.setattr(jax.random, "permutation", record)
  sliced = make(monkeypatch, w_mse, run=run, slice_size=6, iterations=2, **options)
  value, _ = loss_of(sliced, z)
  jax.effects_barrier()
  assert len(orders) == 2
  assert np.any(orders[0] != orders[1])
  z = z.astype(np.float64)
  expected = [distance(z[order[half]]) for order in orders for half in (slice(6), slice(6, 12))]
  np.testing.assert_allclose(value, np.mean(expected), rtol=1e-4)


def test_lejepa_meets_the_centre_of_the_global_views(monkeypatch):
  z, local = embeddings(2), embeddings(3, seed=1)
  monkeypatch.setattr(lejepa, "sigreg", lambda z_BP, key, num_directions: jnp.mean(z_BP**4))

  def reference(z):
    everything, centre = np.concatenate([z, local], axis=1), z.mean(axis=1)
    distance = np.mean([(everything[:, v] - centre) ** 2 for v in range(5)])
    gaussian = np.mean([np.mean(everything[:, v] ** 4) for v in range(5)])
    return (1 - 0.1) * distance + 0.1 * gaussian

  check(make(monkeypatch, lejepa, sigreg_weight=0.1), z, reference, local_BVP=local, rtol=1e-3)


# --- Places of maps.


def dense_maps(b=B, side=2, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(b, 2, side, side, P)).astype(np.float32)


def maps_loss(method, maps, **options):
  given = {"global": maps, "label": jnp.zeros(len(maps), jnp.int32), **options.pop("given", {})}
  state = {"batch_stats": {}} | options.pop("state", {})
  return jax.jit(method.loss)({"encoder": {}}, state, given, jax.random.key(3), 0)


def test_densecl(monkeypatch):
  """densecl.py: whole and dense terms weighed 1 - lambda and lambda, with a queue of each.

  The dense queue gets the pooled key map at unit length, pooled before any place is normalised:
  the official neck pools, the model normalises what comes out.
  """
  maps, rng = dense_maps(), np.random.default_rng(1)
  maps *= rng.uniform(0.2, 5, (B, 2, 2, 2, 1)).astype(np.float32)  # lengths that differ
  queue = {n: unit(rng.normal(size=(2 * B, P))).astype(np.float32) for n in ("global", "dense")}
  places = maps.reshape(B, 2, 4, P)

  def reference(places):
    whole = dense = 0.0
    for i in range(B):
      q, k = unit(places[i, 0, 0]), unit(fixed[i, 1, 0])
      whole += cross_entropy64(np.array([q @ k, *(queue["global"] @ q)]) / 0.2, 0) / B
      for n in range(4):
        q, keys = unit(places[i, 0, n]), unit(fixed[i, 1])
        k = keys[np.argmax(keys @ unit(fixed[i, 0, n]))]
        dense += cross_entropy64(np.array([q @ k, *(queue["dense"] @ q)]) / 0.2, 0) / (4 * B)
    return 0.7 * whole + 0.3 * dense

  fixed = places.astype(np.float64)
  method = make(monkeypatch, densecl, queue_size=2 * B, out_dim=P, dense_weight=0.3)
  state = {"queue": {n: jnp.asarray(q) for n, q in queue.items()}, **target()}
  value, aux = maps_loss(method, maps, state=state)
  np.testing.assert_allclose(value, reference(fixed), rtol=1e-5)
  gradient = jax.grad(lambda m: maps_loss(method, m, state=state)[0])(maps).reshape(B, 2, 4, P)
  np.testing.assert_allclose(gradient, differences(reference, fixed), rtol=1e-3, atol=2e-5)
  pooled = unit(fixed[:, 1].mean(axis=1))
  after = aux.method_state["queue"]["dense"]
  np.testing.assert_allclose(after, np.concatenate([pooled, queue["dense"][:B]]), rtol=1e-5)


def test_vicregl(monkeypatch):
  """main_vicregl.py, but for its division by a number of pairs that it does not sum over.

  Of each direction the closest places, by features and by position; each place has statistics of
  its own over the batch; variance and covariance both are means over the two branches.
  """
  maps = 0.6 * dense_maps()
  rng = np.random.default_rng(2)
  corner = rng.uniform(0, 0.5, (B, 2, 2))
  side = rng.uniform(0.3, 0.5, (B, 2, 2))  # of different sizes, else distances would be equal
  box = np.concatenate([corner, corner + side], axis=-1).astype(np.float32)
  box[::2, 1] = box[::2, 1][:, [0, 3, 2, 1]]
  num = 3

  def criterion(x, y):
    mse, hinges, squares = vicreg_terms64(x, y)
    return 25 * mse + 25 * sum(hinges) / 2 + sum(squares) / 2

  def centres(box):
    top, left, bottom, right = box
    rows = [top + (bottom - top) * (r + 0.5) / 2 for r in range(2)]
    return np.array([(y, left + (right - left) * (c + 0.5) / 2) for y in rows for c in range(2)])

  def matched(x, y, x_at, y_at):
    """[B, num, P] of each, in the order of x's places: it decides which share statistics."""
    out = []
    for i in range(B):
      far = np.sqrt(((x_at[i][:, None] - y_at[i][None]) ** 2).sum(-1))
      order = np.sort(np.argsort(far.min(axis=1))[:num])
      out.append((x[i][order], y[i][far.argmin(axis=1)[order]]))
    return (np.stack(z) for z in zip(*out))

  def reference(places):
    x, y = places[:, 0], places[:, 1]
    at = [[centres(box[i, v].astype(np.float64)) for i in range(B)] for v in range(2)]
    local = 0.0
    for a, b, a_at, b_at in ((x, y, *at), (y, x, *at[::-1])):
      choices = ((fixed[:, 0], fixed[:, 1]) if a is x else (fixed[:, 1], fixed[:, 0]), (a_at, b_at))
      for a_by, b_by in choices:
        here, there = matched(a, b, a_by, b_by)
        local += np.mean([criterion(here[:, n], there[:, n]) for n in range(num)]) / 2
    return 0.75 * criterion(x[:, 0], y[:, 0]) + 0.25 * local

  fixed = maps.reshape(B, 2, 4, P).astype(np.float64)
  method = make(monkeypatch, vicregl, num_matches=num)
  given = {"global_box": jnp.asarray(box)}
  value, _ = maps_loss(method, maps, given=given)
  np.testing.assert_allclose(value, reference(fixed), rtol=1e-5)
  gradient = jax.grad(lambda m: maps_loss(method, m, given=given)[0])(maps)
  expected = differences(reference, fixed).reshape(maps.shape)
  np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_global", [2, 3])
@pytest.mark.parametrize("within_weight", [0.0, 0.4])
@pytest.mark.parametrize("momentum", [False, True])
def test_mmcr_is_the_nuclear_norm_of_the_means(monkeypatch, num_global, within_weight, momentum):
  """loss_mmcr.py: lmbda * local_nuc / batch_size - global_nuc; loss_mmcr_momentum.py's means."""
  z = embeddings(num_global)
  fixed = unit(z).mean(axis=1)  # the target's, which here is as the online network
  singular = lambda x: np.linalg.svd(x, compute_uv=False)  # noqa: E731

  def reference(z):
    z = unit(z)
    means = np.stack([sum(views) / num_global for views in z])
    if momentum:
      means = (means + fixed) / 2
    within = sum(sum(singular(views)) for views in z) / B
    return within_weight * within - sum(singular(means))

  options = {"within_weight": within_weight, "momentum": momentum}
  method = make(monkeypatch, mmcr, num_global=num_global, **options)
  check(method, z, reference, state=target() if momentum else None)


def test_mmcr_is_least_where_views_agree_and_images_are_orthogonal(monkeypatch):
  method = make(monkeypatch, mmcr)
  apart = np.tile(np.eye(B, dtype=np.float32)[:, None], (1, 2, 1))
  np.testing.assert_allclose(loss_of(method, 3 * apart)[0], -B, rtol=1e-6)
  apart[1] = apart[0]  # two images alike
  np.testing.assert_allclose(loss_of(method, apart)[0], -(B - 2 + np.sqrt(2)), rtol=1e-6)
  one = np.ones((B, 2, P), np.float32)
  value, gradient = value_and_gradient(method)(one)
  np.testing.assert_allclose(value, -np.sqrt(B), rtol=1e-6)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)
  z = embeddings(2)
  disagree = np.stack([z[:, 0], -z[:, 0]], axis=1)
  np.testing.assert_allclose(loss_of(method, disagree)[0], 0, atol=1e-6)


# --- Prototypes.


def kernel(seed=5):
  return unit(np.random.default_rng(seed).normal(size=(K, P))).astype(np.float32)


def log_softmax64(x):
  return np.log(softmax64(x))


def sinkhorn64(scores, eps=0.05):
  q = np.exp(scores.astype(np.float64) / eps)
  for _ in range(3):
    q = q / q.sum(axis=0)
    q = q / q.sum(axis=1, keepdims=True)
  return q


@pytest.mark.parametrize("num_local", [0, 3])
def test_swav_codes_come_from_two_crops_and_are_predicted_from_all_others(monkeypatch, num_local):
  """main_swav.py: for each of crops_for_assign the sum over other crops / (crops - 1); the mean."""
  z, local, proto = embeddings(2), embeddings(num_local, seed=1) if num_local else None, kernel()
  codes = [sinkhorn64(unit(z[:, t]) @ proto.T) for t in range(2)]

  def reference(z):
    crops = z if local is None else np.concatenate([z, local], axis=1)
    num, loss = crops.shape[1], 0.0
    for t in range(2):
      for v in range(num):
        if v != t:
          for i in range(B):
            scores = proto @ unit(crops[i, v]) / 0.1
            loss -= codes[t][i] @ log_softmax64(scores) / B / (num - 1) / 2
    return loss

  method = make(monkeypatch, swav, num_prototypes=K, out_dim=P, freeze_epochs=0.0)
  options = {
    "params": {"predictor": {"kernel": jnp.asarray(proto)}},
    "state": {"queue": jnp.zeros((2, 0, P))},
    "local_BVP": local,
  }
  check(method, z, reference, rtol=1e-3, atol=1e-4, **options)


@pytest.mark.parametrize(("queue_start", "first"), [(1.0, 10), (0.0, 2)])
def test_swav_codes_from_the_queue(monkeypatch, queue_start, first):
  """Once it is in use, each crop's codes share the prototypes with that crop's queue.

  From its epoch of 10 steps on, and not before two batches have filled it.
  """
  z, proto, rng = embeddings(2), kernel(), np.random.default_rng(4)
  queue = unit(rng.normal(size=(2, 2 * B, P))).astype(np.float32)
  options = {"num_prototypes": K, "out_dim": P, "queue_size": 2 * B, "queue_start": queue_start}
  method = make(monkeypatch, swav, **options)
  given = {
    "params": {"predictor": {"kernel": jnp.asarray(proto)}},
    "state": {"queue": jnp.asarray(queue)},
  }
  for step, rows in ((first - 1, 0), (first, 2 * B)):
    loss = 0.0
    for t in range(2):
      scores = np.concatenate([unit(z[:, t]) @ proto.T, queue[t, :rows] @ proto.T])
      codes = sinkhorn64(scores)[:B]
      for i in range(B):
        loss -= codes[i] @ log_softmax64(proto @ unit(z[i, 1 - t]) / 0.1) / B / 2
    value, aux = loss_of(method, z, step=step, **given)
    np.testing.assert_allclose(value, loss, rtol=1e-4)
  after = aux.method_state["queue"]
  for t in range(2):
    expected = np.concatenate([unit(z[:, t]), queue[t, :B]])
    np.testing.assert_allclose(after[t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_local", [0, 2])
def test_ressl_likens_the_student_s_views_to_the_queue_as_the_teacher_s_weak_one(
  monkeypatch, num_local
):
  """ressl.py: 0.1 for the student, 0.04 for the teacher, the queue of before this batch."""
  z, local = embeddings(2), embeddings(num_local, seed=1) if num_local else None
  weak, rng = embeddings(1, seed=2), np.random.default_rng(1)
  queue = unit(rng.normal(size=(2 * B, P))).astype(np.float32)

  def reference(z):
    student, loss = z if local is None else np.concatenate([z, local], axis=1), 0.0
    for i in range(B):
      relations = softmax64(queue @ unit(weak[i, 0]) / 0.04)
      for v in range(student.shape[1]):
        likeness = log_softmax64(queue @ unit(student[i, v]) / 0.1)
        loss -= relations @ likeness / B / student.shape[1]
    return loss

  method = make(monkeypatch, ressl, queue_size=2 * B, out_dim=P)
  state = {"queue": jnp.asarray(queue), **target()}
  options = {"state": state, "local_BVP": local, "weak": weak[:, :, None, None]}
  check(method, z, reference, rtol=1e-3, **options)
  _, aux = loss_of(method, z, **options)
  pushed = np.concatenate([unit(weak[:, 0]), queue[:B]])
  np.testing.assert_allclose(aux.method_state["queue"], pushed, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(aux.targets, unit(weak[:, 0]), rtol=1e-5, atol=1e-6)


def test_ressl_s_teacher_sees_a_crop_and_a_flip_of_the_student_s_kind(monkeypatch):
  """data/augmentation.py: target_aug is moco_aug without jitter, greyscale and blur."""
  strong = ViewSpec(
    "global", count=3, size=24, area=(0.2, 1.0), blur=(0.5,), solarise=(0.0, 0.1, 0.2), noise=(0.3,)
  )
  method = ressl.make(encoder=Given(), views=(strong,), run=RUN, queue_size=B)
  plain = ViewSpec("weak", count=1, size=24, area=(0.2, 1.0), jitter=0.0, greyscale=0.0)
  assert method.views == (strong, plain)
  options = {"ressl": {"queue_size": B}, "byol": {}}
  both = hybrid.make(
    encoder=Given(), views=(strong,), run=RUN, terms=("byol", "ressl"), options=options
  )
  assert both.views == (strong, plain)


@pytest.mark.parametrize("module", [swav, dino])
def test_prototypes_are_frozen_at_first(monkeypatch, module):
  method = make(monkeypatch, module, num_prototypes=K, out_dim=P, freeze_epochs=1.5)
  assert method.frozen == {"predictor": 15}


@pytest.mark.parametrize("num_local", [0, 2])
def test_dino(monkeypatch, num_local):
  """DINOLoss.forward: the teacher with the centre of before this step; update_center after it."""
  z, local, proto = embeddings(2), embeddings(num_local, seed=1) if num_local else None, kernel()
  centre = np.random.default_rng(6).normal(size=K).astype(np.float32) / 10
  outputs = np.array([[proto @ unit(z[i, t]) for t in range(2)] for i in range(B)])
  step, warm = 150, 300  # half way from 0.04 to 0.07, 30 epochs of 10 steps

  def reference(z):
    student = z if local is None else np.concatenate([z, local], axis=1)
    pairs = [(t, v) for t in range(2) for v in range(student.shape[1]) if v != t]
    loss = 0.0
    for t, v in pairs:
      for i in range(B):
        teacher = softmax64((outputs[i, t] - centre) / (0.04 + 0.03 * step / warm))
        loss -= teacher @ log_softmax64(proto @ unit(student[i, v]) / 0.1) / B
    return loss / len(pairs)

  method = make(monkeypatch, dino, num_prototypes=K, out_dim=P)
  params = {"predictor": {"kernel": jnp.asarray(3 * proto)}}  # weight norm: at length 1
  options = {
    "params": params,
    "state": {"centre": jnp.asarray(centre), **target(params)},
    "local_BVP": local,
    "step": step,
  }
  check(method, z, reference, rtol=1e-3, atol=1e-4, **options)
  _, aux = loss_of(method, z, **options)
  mean = sum(outputs[i, t] for i in range(B) for t in range(2)) / (2 * B)
  expected = 0.9 * centre + (1 - 0.9) * mean
  np.testing.assert_allclose(aux.method_state["centre"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_local", [0, 2])
@pytest.mark.parametrize("balance", [False, True])
def test_msn(monkeypatch, num_local, balance):
  """losses.py: targets sharpened, then Sinkhorn, without gradient; their CE, me-max, entropy."""
  z, local, proto = embeddings(3), embeddings(num_local, seed=1) if num_local else None, kernel()
  weights = {"mean_entropy_weight": 0.7, "entropy_weight": 0.2}
  sharp = []
  for i in range(B):
    p = softmax64(proto.astype(np.float64) @ unit(z[i, 0]) / 0.1) ** (1 / 0.25)
    sharp.append(p / p.sum())
  wanted = sinkhorn64(np.log(sharp), 1.0) if balance else np.stack(sharp)

  def reference(z, proto=proto):
    anchors = z[:, 1:] if local is None else np.concatenate([z[:, 1:], local], axis=1)
    num, avg, loss = anchors.shape[1], 0.0, 0.0
    for i in range(B):
      for anchor in anchors[i]:
        p = softmax64(unit(proto) @ unit(anchor) / 0.1)
        loss -= wanted[i] @ np.log(p) / (B * num)
        loss -= 0.2 * p @ np.log(p) / (B * num)
        avg = avg + p / (B * num)
    return loss + 0.7 * (avg @ np.log(avg) + np.log(K))

  monkeypatch.setattr(msn, "check_vit", lambda name, encoder: 4)
  options = {"num_prototypes": K, "out_dim": P, "balance": balance, **weights}
  method = make(monkeypatch, msn, num_global=3, **options)
  given = {"state": target(), "local_BVP": local}

  def params(proto):
    return {"prototypes": {"kernel": 3 * proto}}  # used at length 1

  check(method, z, reference, rtol=1e-3, atol=1e-4, params=params(jnp.asarray(proto)), **given)
  of_prototypes = jax.grad(lambda proto: loss_of(method, z, params=params(proto), **given)[0])
  expected = differences(lambda proto: reference(z.astype(np.float64), proto), proto)
  np.testing.assert_allclose(of_prototypes(proto), expected, rtol=1e-3, atol=1e-4)


# --- Masked images.


def test_mae_is_the_error_of_hidden_patches_only(monkeypatch):
  """models_mae.py: squared error, mean over a patch, then over the masked patches of the batch."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(3, 1, 8, 8, 3)).astype(np.float32)
  predicted = rng.normal(size=(3, 16, 12)).astype(np.float32)
  seen = {}

  class Fake(nn.Module):
    num_visible: int

    def __call__(self, images, train, order_BN):
      seen["order"] = np.asarray(order_BN)
      return images[:, 0, 0], jnp.asarray(predicted)

  monkeypatch.setattr(mae, "check_vit", lambda name, encoder: 2)
  monkeypatch.setattr(mae, "Network", lambda encoder, num_visible, *a: Fake(num_visible))
  for standardise in (True, False):
    spec = ViewSpec("global", count=1, size=8)
    method = mae.make(encoder=Given(), views=(spec,), run=RUN, standardise=standardise)
    given = {"global": images}
    value, _ = method.loss({}, {"batch_stats": {}}, given, jax.random.key(0), 0)
    errors = []
    for b in range(3):
      for n in seen["order"][b, 4:]:  # a quarter of 16 patches is visible
        r, c = divmod(n, 4)
        patch = images[b, 0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1).astype(np.float64)
        if standardise:
          patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        errors.append(np.mean((predicted[b, n] - patch) ** 2))
    assert len(errors) == 3 * 12
    np.testing.assert_allclose(value, np.mean(errors), rtol=1e-5)


def test_simmim_is_the_absolute_error_of_the_masked_squares(monkeypatch):
  """simmim.py: |x - x'| summed over masked pixels, over their number and that of channels."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(6, 1, 16, 16, 3)).astype(np.float32)
  predicted = rng.normal(size=(6, 64, 12)).astype(np.float32)
  seen = {}

  class Fake(nn.Module):
    def __call__(self, images, train, mask_BN):
      seen["mask"] = np.asarray(mask_BN)
      return images[:, 0, 0], jnp.asarray(predicted)

  monkeypatch.setattr(simmim, "check_vit", lambda name, encoder: 2)
  monkeypatch.setattr(simmim, "Network", lambda encoder: Fake())
  spec = ViewSpec("global", count=1, size=16)
  method = simmim.make(encoder=Given(), views=(spec,), run=RUN, mask_size=4)
  value, _ = method.loss({}, {"batch_stats": {}}, {"global": images}, jax.random.key(0), 0)
  total = pixels = 0.0
  for b, mask in enumerate(seen["mask"].reshape(6, 8, 8)):
    squares = mask.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4)
    assert np.all(squares.any(axis=1) == squares.all(axis=1))  # 2 x 2 patches each
    assert squares.all(axis=1).sum() == 10  # of 16, 0.6 rounded up
    for r, c in np.argwhere(mask):
      there = images[b, 0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1)
      total += np.sum(np.abs(predicted[b, 8 * r + c].astype(np.float64) - there))
      pixels += 4
  assert len({tuple(mask) for mask in seen["mask"]}) == 6
  np.testing.assert_allclose(value, total / pixels / 3, rtol=1e-5)


def test_ijepa_is_smooth_l1_to_normalised_features_of_the_target_blocks(monkeypatch):
  rng, side = np.random.default_rng(0), 4
  predicted = (2 * rng.normal(size=(3, 4, 16, 5))).astype(np.float32)  # 4 target blocks
  wanted = rng.normal(size=(3, 16, 5)).astype(np.float32)
  seen = {}

  class Fake(nn.Module):
    def __call__(self, images, train, hide_Bn, target_BMn):
      seen["hide"], seen["target"] = np.asarray(hide_Bn), np.asarray(target_BMn)
      return images[:, 0, 0], jnp.asarray(predicted)

    def teach(self, images, train):
      return images[:, 0, 0], jnp.asarray(wanted)

  monkeypatch.setattr(ijepa, "check_vit", lambda name, encoder: 2)
  monkeypatch.setattr(ijepa, "Network", lambda *a: Fake())
  spec = ViewSpec("global", count=1, size=2 * side)
  method = ijepa.make(encoder=Given(), views=(spec,), run=RUN, context_area=(0.25, 0.25))
  given = {"global": rng.normal(size=(3, 1, 8, 8, 3)).astype(np.float32)}
  state = {"batch_stats": {}, **target()}
  value, _ = method.loss({}, state, given, jax.random.key(0), 0)
  per_block = []
  assert np.all(np.sum(~seen["hide"], axis=1) <= 4)  # the context is a quarter of 16 patches
  for b in range(3):
    for m in range(4):
      places = np.flatnonzero(seen["target"][b, m])
      assert seen["hide"][b, places].all()  # the context never contains a target
      difference = np.abs(predicted[b, m, places] - wanted[b, places]).astype(np.float64)
      errors = [d**2 / 2 if d < 1 else d - 0.5 for d in difference.reshape(-1)]
      per_block.append(np.mean(errors))
  np.testing.assert_allclose(value, np.mean(per_block), rtol=1e-5)


TINY_VIT = ViT(8, 1, 2, patch=2, position="sincos", pool="mean")


def test_mae_puts_each_patch_back_in_its_place():
  """Without blocks in the decoder a place shows its own patch, or, hidden, no image at all."""
  n, num_visible = 16, 6
  network = mae.Network(TINY_VIT, num_visible, 12, 0, 2)
  rng = np.random.default_rng(0)
  order_BN = np.stack([rng.permutation(n) for _ in range(3)])
  images = rng.normal(size=(2, 3, 8, 8, 3)).astype(np.float32)
  shapes = jax.eval_shape(
    lambda x: network.init(jax.random.key(0), x, False, jnp.asarray(order_BN)), images[0]
  )
  apply = jax.jit(lambda x, order: network.apply(random_like(shapes), x, False, order)[1])
  one, other = (np.asarray(apply(x, order_BN)) for x in images)
  shows = np.any(one != other, axis=2)
  for b in range(3):
    assert set(np.flatnonzero(shows[b])) == set(order_BN[b, :num_visible])
  # The order within what is seen is no other picture.
  turned_BN = np.concatenate([order_BN[:, num_visible - 1 :: -1], order_BN[:, num_visible:]], 1)
  np.testing.assert_allclose(apply(images[0], turned_BN), one, rtol=1e-3, atol=1e-4)


def test_ijepa_sees_nothing_of_what_is_hidden():
  """Neither the pooled features nor a prediction where its block is; of the rest each patch."""
  n, network = 16, ijepa.Network(TINY_VIT, 12, 1, 2)
  rng = np.random.default_rng(0)
  target_BMn = np.zeros((1, 2, n), bool)
  target_BMn[0, 0, [1, 2]] = target_BMn[0, 1, [6, 10]] = True
  hide_Bn = target_BMn.any(axis=1)
  hide_Bn[0, [12, 13]] = True  # outside of the context block
  image = rng.normal(size=(1, 8, 8, 3)).astype(np.float32)
  shapes = jax.eval_shape(
    lambda x: network.init(jax.random.key(0), x, False, jnp.asarray(hide_Bn), target_BMn), image
  )

  @jax.jit
  def outputs(image):
    pooled, predicted_BMnD = network.apply(random_like(shapes), image, False, hide_Bn, target_BMn)
    return pooled, predicted_BMnD[target_BMn]

  for place in range(n):
    row, column = divmod(place, 4)
    changed = image.copy()
    changed[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    same = [np.array_equal(x, y) for x, y in zip(outputs(changed), outputs(image))]
    assert same == [hide_Bn[0, place]] * 2, place


def test_msn_sees_of_an_anchor_what_is_kept_and_the_target_whole(monkeypatch):
  """deit.py keeps floor(16 * (1 - 0.3)) = 11 patches of an anchor, and all of small views."""
  rng, n = np.random.default_rng(0), 16
  order = np.stack([rng.permutation(n) for _ in range(2 * B)])
  monkeypatch.setattr(msn, "random_order", lambda key, batch, num: jnp.asarray(order))
  specs = (ViewSpec("global", count=3, size=8), ViewSpec("local", count=1, size=4))
  tiny = {"num_prototypes": K, "hidden_dim": 6, "out_dim": P, "mask_ratio": 0.3}
  method = msn.make(encoder=TINY_VIT, views=specs, run=RUN, **tiny)
  given = {
    "global": rng.normal(size=(B, 3, 8, 8, 3)).astype(np.float32),
    "local": rng.normal(size=(B, 1, 4, 4, 3)).astype(np.float32),
  }
  params, state = random_like(jax.eval_shape(method.init, jax.random.key(0), given))
  loss = lambda views: method.loss(params, state, views, jax.random.key(1), 0)[0]  # noqa: E731
  seen = jax.jit(jax.grad(loss))(given)
  patches = lambda x: np.any(patchify(x, 2), axis=-1)  # noqa: E731
  for i in range(B):
    for v in (0, 1):
      kept = np.flatnonzero(patches(seen["global"][i : i + 1, 1 + v])[0])
      assert set(kept) == set(order[2 * i + v, :11])
  assert not np.any(seen["global"][:, 0])  # no gradient goes through the target
  assert np.all(patches(seen["local"][:, 0]))
  value, changed = jax.jit(loss)(given), given["global"].copy()
  for place in (0, n - 1):
    r, c = divmod(place, 4)
    changed[0, 0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] += 1
    before, value = value, jax.jit(loss)(given | {"global": changed})
    assert before != value, place


def test_smooth_l1_is_torchs_with_beta_1():
  x = np.float32([-3, -1, -0.5, 0, 0.5, 1, 3, 1e4])
  np.testing.assert_allclose(
    ijepa.smooth_l1(x), [2.5, 0.5, 0.125, 0, 0.125, 0.5, 2.5, 1e4 - 0.5], rtol=1e-6
  )
  gradient = jax.vmap(jax.grad(ijepa.smooth_l1))(x)
  np.testing.assert_allclose(gradient, np.clip(x, -1, 1), atol=1e-6)


def test_ijepa_targets_are_layer_normalised_without_parameters():
  x = np.random.default_rng(0).normal(2, 3, (2, 4, 6)).astype(np.float32)
  x64 = x.astype(np.float64)
  expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(ijepa.standardise(x), expected, rtol=1e-4, atol=1e-5)


def test_ibot_adds_the_masked_patches_of_the_same_view(monkeypatch):
  """main_ibot.py, iBOTLoss: class tokens across views, patches within one, over its masked ones."""
  rng, n = np.random.default_rng(0), 16
  shape = {"class": (B, 2, K), "patches": (B, 2, n, K)}
  student, teacher = (
    {k: rng.normal(size=s).astype(np.float32) for k, s in shape.items()} for _ in range(2)
  )
  centre = {k: (rng.normal(size=K) / 3).astype(np.float32) for k in shape}
  seen = {}

  class Fake(nn.Module):
    def __call__(self, images, train, mask_BN=None):
      if mask_BN is not None:
        seen["mask"] = np.asarray(mask_BN)
      scores = teacher if mask_BN is None else student
      fold = lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:])  # noqa: E731
      return images[:, 0, 0], fold(scores["class"]), fold(scores["patches"])

  monkeypatch.setattr(ibot, "check_vit", lambda name, encoder: 2)
  monkeypatch.setattr(ibot, "Network", lambda *a: Fake())
  spec = ViewSpec("global", count=2, size=8)
  method = ibot.make(encoder=Given(), views=(spec,), run=RUN, patch_weight=0.7)
  assert method.frozen == {"prototypes": 10}
  given = {"global": rng.normal(size=(B, 2, 8, 8, 3)).astype(np.float32)}
  state = {"batch_stats": {}, "centre": jax.tree.map(jnp.asarray, centre), **target()}
  value, aux = method.loss({}, state, given, jax.random.key(1), 0)
  mask = seen["mask"].reshape(B, 2, n)
  assert 0 < mask.any(axis=2).mean() < 1  # some views are masked, others not
  whole = patches = 0.0
  for i in range(B):
    for v in range(2):
      wanted = softmax64((teacher["class"][i, v] - centre["class"]) / 0.04)
      whole -= wanted @ log_softmax64(student["class"][i, 1 - v] / 0.1) / (2 * B)
      errors = []
      for place in np.flatnonzero(mask[i, v]):
        wanted = softmax64((teacher["patches"][i, v, place] - centre["patches"]) / 0.04)
        errors.append(-wanted @ log_softmax64(student["patches"][i, v, place] / 0.1))
      patches += sum(errors) / max(len(errors), 1) / (2 * B)
  np.testing.assert_allclose(value, whole + 0.7 * patches, rtol=1e-5)
  for k, x in teacher.items():
    mean = x.reshape(-1, K).mean(axis=0)
    after = 0.9 * centre[k] + 0.1 * mean
    np.testing.assert_allclose(aux.method_state["centre"][k], after, rtol=1e-4, atol=1e-6)


def test_dinov2_is_dino_ibot_and_koleo(monkeypatch):
  """ssl_meta_arch.py: Sinkhorn over all class tokens, over all masked patches, KoLeo in a view."""
  rng, n = np.random.default_rng(0), 16
  shape = {"class": (B, 2, K), "patches": (B, 2, n, K)}
  student, teacher = (
    {k: rng.normal(size=s).astype(np.float32) for k, s in shape.items()} for _ in range(2)
  )
  tokens = rng.normal(size=(B, 2, P)).astype(np.float32)
  seen = {}

  class Fake(nn.Module):
    def __call__(self, images, train, mask_BN=None):
      if mask_BN is not None:
        seen["mask"] = np.asarray(mask_BN)
      scores = teacher if mask_BN is None else student
      fold = lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:])  # noqa: E731
      return images[:, 0, 0], fold(tokens), fold(scores["patches"]), fold(scores["class"])

    def score_patches(self, patches):
      return patches

  monkeypatch.setattr(dinov2, "check_vit", lambda name, encoder: 2)
  monkeypatch.setattr(dinov2, "Network", lambda *a: Fake())
  spec = ViewSpec("global", count=2, size=8)
  weights = {"patch_weight": 0.7, "koleo_weight": 0.3}
  method = dinov2.make(encoder=Given(), views=(spec,), run=RUN, **weights)
  assert method.frozen == {"prototypes": 10, "patch_prototypes": 10}
  given = {"global": rng.normal(size=(B, 2, 8, 8, 3)).astype(np.float32)}
  value, aux = method.loss({}, {"batch_stats": {}, **target()}, given, jax.random.key(1), 0)
  mask = seen["mask"].reshape(B, 2, n)
  assert np.all(mask.any(axis=2).sum(axis=1) == 1)  # half of an image's views
  assert 0 < mask.any(axis=2)[:, 0].sum() < B  # not always the same
  assert len(set(mask.sum(axis=(1, 2)))) > 1
  codes = sinkhorn64(teacher["class"].reshape(-1, K), 0.04).reshape(B, 2, K)
  whole = 0.0
  for i in range(B):
    for v in range(2):
      whole -= codes[i, v] @ log_softmax64(student["class"][i, 1 - v] / 0.1) / (2 * B)
  places = np.argwhere(mask)
  codes, patches = sinkhorn64(teacher["patches"][mask], 0.04), 0.0
  for code, (i, v, place) in zip(codes, places, strict=True):
    error = -code @ log_softmax64(student["patches"][i, v, place] / 0.1)
    patches += error / mask[i, v].sum() / (2 * B)
  spread = sum(float(koleo(tokens[:, v])) for v in range(2))
  np.testing.assert_allclose(aux.metrics["class"], whole, rtol=1e-4)
  np.testing.assert_allclose(aux.metrics["patches"], patches, rtol=1e-4)
  np.testing.assert_allclose(value, whole + 0.7 * patches + 0.3 * spread, rtol=1e-4)


# --- Pretext tasks and pieces.


def test_far_permutations():
  order = jigsaw.far_permutations(100)
  assert order.shape == (100, 9)
  np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(9), (100, 1)))
  assert len({tuple(row) for row in order}) == 100

  def mean_distance(rows):
    return np.mean([np.sum(a != b) for i, a in enumerate(rows) for b in rows[:i]])

  rng = np.random.default_rng(1)
  random = np.stack([rng.permutation(9) for _ in range(100)])
  assert mean_distance(random) < 8.1  # 8 expected
  assert mean_distance(order) > 8.05 + mean_distance(random) - 8.0
  # The first few are as far apart as can be: no tile at the same place twice.
  assert all(np.all(a != b) for i, a in enumerate(order[:4]) for b in order[:i])
  np.testing.assert_array_equal(jigsaw.far_permutations(20), order[:20])
  assert len(np.unique(jigsaw.far_permutations(2000), axis=0)) == 2000


def test_linear_warmup_by_hand():
  for step, expected in ((0, 2.0), (5, 3.0), (10, 4.0), (25, 4.0)):
    assert linear_warmup(2.0, 4.0, jnp.int32(step), 10) == expected
  assert linear_warmup(2.0, 4.0, jnp.int32(0), 0) == 4.0


def test_fusion_pieces():
  x = np.random.default_rng(0).normal(size=(2, 3, 2, 4)).astype(np.float32)
  others = fusion.mean_of_others(x)
  for v in range(3):
    rest = [x[:, w] for w in range(3) if w != v]
    np.testing.assert_allclose(others[:, v], sum(rest) / 2, rtol=1e-5, atol=1e-6)
  z = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32) / 2
  _, hinges, squares = vicreg_terms64(z.astype(np.float64), z.astype(np.float64))
  # 25 times the mean over two branches is the official 25 * mean and 1 * sum.
  np.testing.assert_allclose(25 * fusion.vicreg(z), 25 * hinges[0] + 2 * squares[0], rtol=1e-5)
  z = np.stack([z, 2 * z], axis=1)[:, :, None]
  value = fusion.constrain(z, "variance_covariance", 0.2, jax.random.key(0))
  expected = (fusion.vicreg(z[:, 0, 0]) + fusion.vicreg(z[:, 1, 0])) / 2
  np.testing.assert_allclose(value, [expected], rtol=1e-5)


def bilinear64(grid_hwP, row, column):
  """The value between the centres of places; the outermost ones reach to the edge and beyond."""
  h, w, _ = grid_hwP.shape
  row, column = np.clip(row, 0, h - 1), np.clip(column, 0, w - 1)
  value = 0
  for i in range(h):
    for j in range(w):
      value = value + max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j)) * grid_hwP[i, j]
  return value


def coding_rate64(z_NP, eps):
  z = np.stack([unit(row) for row in z_NP])
  n, p = z.shape
  return -np.linalg.slogdet(np.eye(p) + p / (n * eps**2) * z.T @ z)[1] / (2 * p)


@pytest.mark.parametrize("target_of", ["views", "momentum"])
def test_fusion_compares_views_with_a_target_and_places_with_what_the_other_view_shows_there(
  target_of, monkeypatch
):
  rng, (h, w) = np.random.default_rng(0), (2, 3)
  z = rng.normal(size=(B, 1, h, w, P)) + 0.5 * rng.normal(size=(B, 2, h, w, P))
  z = z.astype(np.float32)
  box = np.sort(rng.uniform(size=(B, 2, 2, 2)), axis=2).reshape(B, 2, 4)  # top, left, bottom, right
  box[0, 0], box[0, 1] = (0, 0, 0.3, 0.3), (0.5, 0.5, 1, 1)  # which do not overlap
  box[::2, 1] = box[::2, 1][:, [0, 3, 2, 1]]  # mirrored
  box = box.astype(np.float32)

  def places(z, seen):
    """Mean distance of the places of each view to what the other one shows there."""
    means = []
    for v, u in ((0, 1), (1, 0)):
      distances = []
      for b in range(B):
        units = np.stack([[unit(x) for x in row] for row in seen[b, u]])
        (t, l, o, r), (top, left, bottom, right) = box[b, v].astype(float), box[b, u].astype(float)
        for i in range(h):
          for j in range(w):
            y = (t + (o - t) * (i + 0.5) / h - top) / (bottom - top)
            x = (l + (r - l) * (j + 0.5) / w - left) / (right - left)
            if 0 <= y <= 1 and 0 <= x <= 1:
              shown = bilinear64(units, y * h - 0.5, x * w - 0.5)
              distances.append(cosine_distance64(z[b, v, i, j], shown))
      means.append(np.mean(distances))
    return np.mean(means)

  def reference(z):
    # Without gradient: what a moving average, here of the same network, made of the views.
    seen = z0 if target_of == "momentum" else z
    whole, units = z[:, :, 0, 0], np.stack([[unit(x) for x in row] for row in seen[:, :, 0, 0]])
    mean = np.repeat(units.mean(axis=1, keepdims=True), 2, axis=1)
    centre = units[:, ::-1] if target_of == "momentum" else mean
    near = [cosine_distance64(whole[b, v], centre[b, v]) for b in range(B) for v in range(2)]
    spread = np.mean([coding_rate64(whole[:, v], 0.3) for v in range(2)])
    spread_of_places = np.mean([coding_rate64(z[:, v].reshape(-1, P), 0.3) for v in range(2)])
    return 1.5 * np.mean(near) + spread + 0.7 * (1.5 * places(z, seen) + spread_of_places)

  z0 = z.astype(np.float64)
  options = {"consistency_weight": 1.5, "eps": 0.3, "place_weight": 0.7, "target": target_of}
  method = make(monkeypatch, fusion, **options)

  def loss(z):
    given = {"global": z, "global_box": box}
    state = {"batch_stats": {}, **target()}
    return method.loss({"encoder": {}}, state, given, jax.random.key(0), 0)[0]

  value, gradient = jax.jit(jax.value_and_grad(loss))(z)
  np.testing.assert_allclose(value, reference(z.astype(np.float64)), rtol=1e-5)
  np.testing.assert_allclose(gradient, differences(reference, z), rtol=1e-3, atol=2e-5)


def test_fusion_adds_the_objectives_of_all_scales_with_their_weight(monkeypatch):
  class Scales(nn.Module):
    def __call__(self, images, train):
      return Features(images[:, 0, 0], {4: images}, scales=images[:, 0, 1:])

  z = np.random.default_rng(0).normal(size=(B, 2, 1, 4, P))  # the whole and 3 scales
  monkeypatch.setattr(fusion, "MLP", lambda **kw: Same())
  method = fusion.make(
    encoder=Scales(), views=views(), run=RUN, consistency_weight=1.5, eps=0.3, scale_weight=0.7
  )
  objectives = []
  for e in range(4):
    centre = unit(z[:, :, 0, e]).mean(axis=1)
    near = [cosine_distance64(z[b, v, 0, e], centre[b]) for b in range(B) for v in range(2)]
    spread = np.mean([coding_rate64(z[:, v, 0, e], 0.3) for v in range(2)])
    objectives.append(1.5 * np.mean(near) + spread)
  given = {"global": z.astype(np.float32)}
  value, _ = jax.jit(method.loss)({}, {"batch_stats": {}}, given, jax.random.key(0), 0)
  np.testing.assert_allclose(value, objectives[0] + 0.7 * sum(objectives[1:]), rtol=1e-5)


@pytest.mark.parametrize(
  ("grid", "chosen"), [(8, (8, 8)), (7, (4, 4)), (15, (8, 8)), (16, (16, 16)), (1, (2, 2))]
)
def test_fusion_takes_the_finest_map_that_is_not_too_large(grid, chosen):
  class Encoder(nn.Module):
    def __call__(self, images, train):
      maps = {32 // n: jnp.zeros((len(images), n, n, 3)) for n in (16, 8, 4, 2)}
      return Features(images[:, 0, 0], maps)

  network = fusion.Network(Encoder(), 4, P, 2, False, grid, False)
  shape = jax.ShapeDtypeStruct((B, 32, 32, 3), jnp.float32)
  (*_, places), _ = jax.eval_shape(
    lambda x: network.init_with_output(jax.random.key(0), x, True), shape
  )
  assert places.shape == (B, *chosen, P)


def test_nearest_is_the_row_of_largest_cosine():
  rng = np.random.default_rng(0)
  z, queue = (normalise(jnp.asarray(rng.normal(size=(n, 3)), jnp.float32)) for n in (5, 9))
  got = nnclr.nearest(z, queue)
  for i in range(5):
    np.testing.assert_array_equal(got[i], queue[np.argmax([q @ z[i] for q in np.asarray(queue)])])


def test_rotation_is_the_cross_entropy_of_the_number_of_turns(monkeypatch):
  """A view of one pixel is the same in every position, so view v's logits are those given."""
  z = embeddings(4, p=4)

  def reference(z):
    return np.mean([cross_entropy64(z[b, v], v) for b in range(B) for v in range(4)])

  check(make(monkeypatch, rotation, num_global=4), z, reference)


def test_rotation_turns_view_v_by_v_quarter_turns(monkeypatch):
  """The encoder sees the top left pixel, to which v turns to the left bring another corner."""
  corners = np.array([[0, 1], [3, 2]])
  logits_HWK = 30 * np.eye(4, dtype=np.float32)[corners]
  given = {"global": jnp.asarray(np.tile(logits_HWK, (B, 4, 1, 1, 1)))}
  method = make(monkeypatch, rotation, num_global=4)
  _, aux = method.loss({"encoder": {}}, {"batch_stats": {}}, given, jax.random.key(0), 0)
  assert aux.metrics["accuracy"] == 100


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_supervised_is_the_cross_entropy_of_the_known_labels(monkeypatch, smoothing):
  z, label = embeddings(2), np.array([0, 3, -1, 1, 2, -1])
  method = make(monkeypatch, supervised, run=RUN._replace(num_classes=P), label_smoothing=smoothing)

  def reference(z):
    losses = []
    for b in np.flatnonzero(label >= 0):
      target = np.full(P, smoothing / P)
      target[label[b]] += 1 - smoothing
      for v in range(2):
        losses.append(-np.sum(target * np.log(softmax64(z[b, v]))))
    return np.mean(losses)

  check(method, z, reference, label=jnp.asarray(label))


class GivenAttention(nn.Module):
  """As Given, with attention that is the same everywhere; a view of one pixel is its own part."""

  backbone: nn.Module

  def __call__(self, images, train):
    attention = jnp.ones((images.shape[0], 1, 1, images.shape[1] * images.shape[2]))
    return Features(images[:, 0, 0], {4: images}, attention)


@pytest.mark.parametrize("encode_parts", [False, True])
@pytest.mark.parametrize("num_parts", [0, 2])
def test_finegrained_is_info_nce_of_the_whole_and_of_each_part(
  monkeypatch, num_parts, encode_parts
):
  monkeypatch.setattr(finegrained, "AttentionEncoder", GivenAttention)
  monkeypatch.setattr(finegrained, "MLP", lambda **kw: Same())
  method = finegrained.make(
    encoder=GivenAttention(Given()),
    views=views(),
    run=RUN,
    queue_size=2 * B,
    num_parts=num_parts,
    part_weight=0.5,
    encode_parts=encode_parts,
    temperature=0.3,
  )
  z, queue = embeddings(2), unit(np.random.default_rng(1).normal(size=(2 * B, P)))
  state = target() | {"queue": jnp.asarray(queue, jnp.float32)}
  key = unit(z[:, 1].astype(float))

  def reference(z):
    losses = []
    for q, k in zip(unit(z[:, 0]), key):
      logits = np.array([q @ k, *(queue @ q)]) / 0.3
      losses.append(cross_entropy64(logits, 0))
    return np.mean(losses) * (1.5 if num_parts else 1)

  value, aux = loss_of(method, z, state=state)
  np.testing.assert_allclose(value, reference(z.astype(float)), rtol=1e-5)
  np.testing.assert_allclose(aux.method_state["queue"][:B], key, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(aux.method_state["queue"][B:], queue[:B], rtol=1e-6)
  assert aux.features.shape == (B, P * (2 if num_parts and encode_parts else 1))


def test_finegrained_cuts_whole_patches_for_a_vit_inside_of_whatever():
  """Of 16 pixels 0.4 are 6.4, which is no multiple of 4."""
  encoder = AttentionEncoder(FusionEncoder(ViT(8, 1, 2, patch=4), 4), 4, levels=1)
  spec, options = ViewSpec("global", size=16), {"num_parts": 1, "part_fraction": 0.4}
  method = finegrained.make(encoder=encoder, views=(spec,), run=RUN, queue_size=B, **options)

  def loss(key, images):
    given = {"global": images}
    return method.loss(*method.init(key, given), given, key, 0)[0]

  assert jax.eval_shape(loss, jax.random.key(0), jnp.zeros((B, 2, 16, 16, 3))).shape == ()


def test_hybrid_is_the_weighted_sum_of_its_terms(monkeypatch):
  z, weights = embeddings(2), (0.5, 2.0)
  options = {"simclr": {"temperature": 0.3}, "vicreg": {"covariance_weight": 3.0}}
  parts = [
    make(monkeypatch, module, **options[name])
    for name, module in (("simclr", simclr), ("vicreg", vicreg))
  ]
  method = make(monkeypatch, hybrid, weights=weights, options=options)
  state = {"batch_stats": {"encoder": {}, "simclr": {}, "vicreg": {}}, "simclr": {}, "vicreg": {}}
  value, aux = loss_of(method, z, params={"simclr": {}, "vicreg": {}}, state=state)
  own = [loss_of(part, z)[0] for part in parts]
  np.testing.assert_allclose(value, sum(w * x for w, x in zip(weights, own)), rtol=1e-6)
  np.testing.assert_allclose([aux.metrics["simclr"], aux.metrics["vicreg"]], own, rtol=1e-6)


def test_hybrid_freezes_what_its_terms_freeze_under_their_names(monkeypatch):
  options = {"swav": {"freeze_epochs": 1.5}}
  method = make(monkeypatch, hybrid, terms=("simclr", "swav"), options=options)
  assert method.frozen == {"swav/predictor": 15}


class Solver(nn.Module):
  """Reads each tile's number off its brightest pixel, and names the permutation by comparison."""

  encoder: nn.Module
  tile_dim: int
  hidden_dim: int
  num_permutations: int

  def __call__(self, tiles_MHWC, train):
    pixels = tiles_MHWC[..., 0].reshape(len(tiles_MHWC), 9)
    order_NT = jnp.argmax(pixels, axis=1).reshape(-1, 9)
    known_KT = jnp.asarray(jigsaw.far_permutations(self.num_permutations))
    logits_NK = 10.0 * jnp.sum(order_NT[:, None] == known_KT[None], axis=-1)
    return pixels, logits_NK.repeat(9, axis=0)


def test_jigsaw_names_the_permutation_in_which_the_tiles_are_seen(monkeypatch):
  """Tile t of 3 x 3 pixels has a bright pixel at place t; without gaps, tiles lie side by side."""
  monkeypatch.setattr(jigsaw, "Network", Solver)
  tiles = np.eye(9).reshape(3, 3, 3, 3)  # row and column of the tile, then of the pixel
  image = tiles.transpose(0, 2, 1, 3).reshape(9, 9)
  view = np.tile(image[None, None, :, :, None], (B, 1, 1, 1, 3)).astype(np.float32)
  method = jigsaw.make(
    encoder=Given(),
    views=(ViewSpec("global", count=1, size=9),),
    run=RUN,
    gap=0.0,
    num_permutations=20,
  )
  given = {"global": jnp.asarray(view)}
  value, aux = jax.jit(method.loss)(
    {"encoder": {}}, {"batch_stats": {}}, given, jax.random.key(0), 0
  )
  assert aux.metrics["accuracy"] == pytest.approx(100)
  assert value < 1e-3
