"""Jigsaw: name the permutation of the nine tiles of an image (Noroozi & Favaro 2016).

A pretext task. Tiles are cut with a random gap, so that their edges do not give the answer away, go
through one encoder each, and the nine vectors together are classified. As VISSL's jigsaw recipe
(255 px, tiles of 64 in cells of 85, 2,000 permutations of largest mean Hamming distance).
Departures: permutations are chosen greedily among 20,000 random ones, not among all 362,880; each
tile is standardised by itself, as in the paper, so that colour statistics do not help.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  encode_with,
  forward,
  global_spec,
  init_network,
  keep,
)

GRID = 3
TILES = GRID * GRID
CANDIDATES = 20_000


class Network(nn.Module):
  """Tiles [N * 9, t, t, 3], those of an image together -> pooled [N * 9, D], logits [N * 9, K].

  The logits of an image stand at each of its tiles.
  """

  encoder: nn.Module
  tile_dim: int
  hidden_dim: int
  num_permutations: int

  @nn.compact
  def __call__(self, tiles_MHWC: Array, train: bool):
    h_MD = self.encoder(tiles_MHWC, train).pooled
    x_ME = nn.relu(nn.Dense(self.tile_dim, name="tile")(h_MD))
    x_NF = nn.relu(
      nn.Dense(self.hidden_dim, name="hidden")(x_ME.reshape(-1, TILES * self.tile_dim))
    )
    logits_NK = nn.Dense(self.num_permutations, name="classifier")(x_NF)
    return h_MD, logits_NK.repeat(TILES, axis=0)


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  num_permutations: int = 2000,
  gap: float = 0.25,
  tile_dim: int = 1024,
  hidden_dim: int = 4096,
) -> Method:
  """Jigsaw's Method.

  Args:
    encoder: called as encoder(images, train) -> Features, on tiles in training.
    views: one spec named "global" with count 1; its size decides the tiles'.
    run: unused, the objective has no schedule.
    num_permutations: to tell apart, at most 20,000.
    gap: share of a cell's side that a tile leaves free, in [0, 1): 21 of 85 in the paper.
    tile_dim: of each tile's vector before they are joined.
    hidden_dim: of the layer on the joined vectors.
  """
  del run
  size = global_spec(views, method="jigsaw", count=1).size
  if not 0 <= gap < 1:
    raise ValueError(f"jigsaw: gap is {gap}; expected 0 <= gap < 1, e.g. 0.25")
  most = CANDIDATES // 2  # some candidates come twice
  if not 2 <= num_permutations <= most:
    raise ValueError(f"jigsaw: num_permutations is {num_permutations}; expected 2 to {most}")
  cell = size // GRID
  tile = max(round(cell * (1 - gap)), 1)
  order_KT = far_permutations(num_permutations)
  network = Network(encoder, tile_dim, hidden_dim, num_permutations)

  def cut(view_HWC, start_T2):
    """[9, tile, tile, 3]: tile (r, c) at its place within its cell."""
    corners = [(r * cell, c * cell, 0) for r in range(GRID) for c in range(GRID)]
    tiles = [
      jax.lax.dynamic_slice(
        view_HWC, (corner[0] + start[0], corner[1] + start[1], 0), (tile, tile, 3)
      )
      for corner, start in zip(corners, start_T2)
    ]
    x_THWC = jnp.stack(tiles)
    mean = jnp.mean(x_THWC, axis=(1, 2, 3), keepdims=True)
    return (x_THWC - mean) / (jnp.std(x_THWC, axis=(1, 2, 3), keepdims=True) + 1e-6)

  def init(key, views):
    tiles = jnp.zeros((TILES, tile, tile, 3), views["global"].dtype)
    params, stats = init_network(network, key, tiles)
    return params, {"batch_stats": stats}

  def loss(params, method_state, views, key, step):
    del step
    keys, view_BHWC = jax.random.split(key, 3), views["global"][:, 0]
    b = view_BHWC.shape[0]
    start_BT2 = jax.random.randint(keys[0], (b, TILES, 2), 0, cell - tile + 1)
    which_B = jax.random.randint(keys[1], (b,), 0, num_permutations)
    tiles_BTHWC = jax.vmap(cut)(view_BHWC, start_BT2)
    place_BT = jnp.asarray(order_KT)[which_B]
    tiles_BTHWC = jnp.take_along_axis(tiles_BTHWC, place_BT.reshape(b, TILES, 1, 1, 1), axis=1)
    (h_BTD, logits_BTK), stats = forward(
      network, params, method_state["batch_stats"], tiles_BTHWC, keys[2]
    )
    logits_BK = logits_BTK[:, 0]
    value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BK, which_B))
    h_BD = jax.lax.stop_gradient(jnp.mean(h_BTD, axis=1))
    aux = Aux(
      method_state={"batch_stats": stats},
      metrics={
        "cross_entropy": value,
        "accuracy": 100 * jnp.mean(jnp.argmax(logits_BK, axis=-1) == which_B),
      },
      features=h_BD,
      embeddings=h_BD,
    )
    return value, aux

  return Method(views, init, loss, keep, encode_with(encoder))


@functools.cache
def far_permutations(num: int) -> np.ndarray:
  """int32 [num, 9]: each the candidate of largest summed Hamming distance to those before."""
  np_rng = np.random.default_rng(0)
  candidates = np.argsort(np_rng.random((CANDIDATES, TILES)), axis=1).astype(np.int32)
  _, first = np.unique(candidates, axis=0, return_index=True)  # some come twice
  candidates = candidates[np.sort(first)]
  chosen, distance = [0], np.zeros(len(candidates), np.int64)
  while len(chosen) < num:
    distance += np.sum(candidates != candidates[chosen[-1]], axis=1)
    distance[chosen[-1]] = -(2**40)
    chosen.append(int(np.argmax(distance)))
  return candidates[chosen]
