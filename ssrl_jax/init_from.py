"""A run that begins with the encoder of another one, or of a file: `init_from` of its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ssrl_jax.evaluate.suite import load_run
from ssrl_jax.experiment import Experiment, create_state
from ssrl_jax.models.torch_names import from_torch
from ssrl_jax.state import TrainState, named_leaves

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
FILES = (".safetensors", *PICKLES)
OWN = "mask_token"  # of masked methods alone: stays as it is where the other run has none


def first_state(experiment: Experiment) -> TrainState:
  """The state at step 0: random, or with the encoder that `init_from` names.

  Of a run's folder: the encoder which it is judged by, a target's for DINO and the like, with its
  batch statistics. Of a file NAME.safetensors: see `models.torch_names.from_torch`. Network and
  target begin with it, all else begins anew.

  Raises:
    FileNotFoundError: there is no such run or file, or the run has no checkpoint yet.
    ValueError: the encoder has other arrays.
  """
  state = create_state(experiment)
  if not experiment.config.init_from:
    return state
  path, mine = Path(experiment.config.init_from).expanduser(), (state.params, state.method_state)
  wanted = dict(named_leaves(experiment.method.encoder.weights(*mine)))
  if path.suffix.lower() in FILES and not path.is_dir():
    given = read_file(path, {k: x.shape for k, x in wanted.items()})
  else:
    other = load_run(path, mesh=experiment.config.mesh)
    weights = other.experiment.method.encoder.weights
    given = dict(named_leaves(weights(other.state.params, other.state.method_state)))
    check_alike(wanted, given, path)

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


def read_file(path: Path, wanted: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """The arrays of an encoder that a safetensors file of timm's or torchvision's names has.

  Args:
    wanted: the encoder's shapes by name.

  Raises:
    ValueError: it is a pickle, damaged, or another encoder's.
  """
  if path.suffix.lower() in PICKLES:
    raise ValueError(
      f"init_from: {path} is a pickle, which may run any code; where PyTorch is, make a file of "
      "tensors of it, NAME.safetensors: docs/evaluation.md, Encoders of others"
    )
  try:
    tensors = load_file(path)
  except SafetensorError as error:
    raise ValueError(f"init_from: {path} is damaged, or no safetensors: {error}") from error
  except (AttributeError, KeyError, TypeError) as error:  # how safetensors says so
    raise ValueError(
      f"init_from: {path} has numbers of a kind that NumPy lacks: {error}"
    ) from error
  try:
    return from_torch(tensors, wanted)
  except ValueError as error:
    raise ValueError(f"init_from: {path}: {error}") from error
