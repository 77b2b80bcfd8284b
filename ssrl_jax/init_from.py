"""A run that begins with the encoder of another one: `init_from` of its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ssrl_jax.evaluate.suite import load_run
from ssrl_jax.experiment import Experiment, create_state
from ssrl_jax.state import TrainState, named_leaves

OWN = "mask_token"  # of masked methods alone: stays as it is where the other run has none


def first_state(experiment: Experiment) -> TrainState:
  """The state at step 0: random, or with the encoder of the run in `init_from`.

  That is the encoder which the other run is judged by, a target's for DINO and the like, with its
  batch statistics; here network and target begin with it. All else begins anew.

  Raises:
    FileNotFoundError: there is no such run, or it has no checkpoint yet.
    ValueError: its encoder has other arrays.
  """
  if not experiment.config.init_from:
    return create_state(experiment)
  folder = Path(experiment.config.init_from).expanduser()
  other, state = load_run(folder, mesh=experiment.config.mesh), create_state(experiment)
  taken = other.experiment.method.encoder.weights(other.state.params, other.state.method_state)
  given = dict(named_leaves(taken))
  mine = (state.params, state.method_state)
  check_alike(dict(named_leaves(experiment.method.encoder.weights(*mine))), given, folder)

  def take(path, x):
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if "encoder" not in names:
      return x
    at = names.index("encoder")
    kind = "batch_stats" if "batch_stats" in names[:at] else "params"
    return given.get("/".join([kind, *names[at + 1 :]]), x)

  # Copied: network and target would be one buffer, which a step cannot be given twice.
  copy = jax.jit(
    lambda tree: jax.tree.map(jnp.copy, tree),
    out_shardings=jax.tree.map(lambda x: x.sharding, mine),
  )
  params, method_state = copy(jax.tree_util.tree_map_with_path(take, mine))
  return state._replace(params=params, method_state=method_state)


def check_alike(mine: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
  """Raises ValueError where names or shapes of the encoders' arrays differ."""
  shapes = [{k: x.shape for k, x in e.items() if OWN not in k} for e in (mine, given)]
  wrong = [k for k in shapes[0] | shapes[1] if shapes[0].get(k) != shapes[1].get(k)]
  if wrong:
    told = ", ".join(f"{k} {shapes[1].get(k, '-')} -> {shapes[0].get(k, '-')}" for k in wrong[:3])
    raise ValueError(
      f"init_from: the encoder of {folder} is another one: {len(wrong)} arrays differ, e.g. "
      f"{told}; give this run the config.encoder of that one, and for a ViT views of that size"
    )
