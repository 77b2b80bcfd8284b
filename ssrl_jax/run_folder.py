"""A run's folder: config.json, results.json, and what keeps two runs from mixing in one."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from ssrl_jax.config import HARMLESS, base_config, changed_keys, flatten
from ssrl_jax.data.damaged import read_damaged
from ssrl_jax.experiment import Experiment
from ssrl_jax.files import read_json, write_json
from ssrl_jax.metrics import read_metrics
from ssrl_jax.state import TrainState, state_digest


class Facts(NamedTuple):
  """What a run's pictures fixed; with it and config.json the run is loaded without them."""

  num_examples: int
  num_classes: int | None

  def __str__(self) -> str:
    return f"{self.num_examples} training pictures of {self.num_classes or 'no'} classes"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
  """Makes the folder, and refuses a second run in it; the kernel ends the lock with the process.

  For one process of a run. Of several hosts, those see each other's locks that share a file system
  which has locks: NFS does, gcsfuse does not.

  Raises:
    ValueError: another process works in the folder.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".lock").open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ValueError(
        f"another process ({file.read() or 'just started'}) is at work in {folder}; wait for it, "
        "stop it, or choose another --workdir"
      ) from None
    except OSError as error:
      logging.warning("%s cannot be locked (%s): start no second run in it", folder, error)
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}")
    file.flush()
    yield


def wait_until_free(folder: Path, say: Callable[[str], None]) -> None:
  """Returns when no process is at work in the folder, and says so if it has to wait."""
  with contextlib.suppress(OSError), (folder / ".lock").open() as file:
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      say(f"{folder}: waiting for the process {file.read()} that is at work in it")
      fcntl.flock(file, fcntl.LOCK_SH)


def check_run_folder(folder: Path, config: ConfigDict, facts: Facts, *, allow_change: bool) -> None:
  """Refuses a folder that holds another run, of which anything was saved.

  Raises:
    ValueError: the folder's config differs in keys that change the computation, or its pictures are
      not as many, or of as many classes, as they were.
  """
  begun = any((folder / "checkpoints").glob("[0-9]*")) or (folder / "results.json").exists()
  if not (begun and (folder / "config.json").exists()):
    return
  old = read_config(folder)
  if old["method"]["name"] != config.method.name:
    raise ValueError(
      f"{folder} holds a run of method {old['method']['name']!r}, not {config.method.name!r}; "
      "choose another --workdir"
    )
  fix = "Choose another --workdir, or pass --allow_config_change to go on with the new one"
  if allow_change:
    if not config.epochs and old.get("init_from", "") != config.init_from:
      raise ValueError(
        f"{folder} holds the encoder of {old.get('init_from')!r}, which would be judged as that of "
        f"{config.init_from!r}; choose another --workdir"
      )
    return
  if changed := changed_keys(load_config(folder), config):
    raise ValueError(f"{folder} holds a run with another config: {'; '.join(changed)}. {fix}")
  before = read_facts(folder) or facts
  if before != facts:
    raise ValueError(
      f"{folder} holds a run on {before}, and now {config.data.source} has {facts}: their order "
      f"and the schedules would be others. {fix}"
    )


def write_run(folder: Path, config: ConfigDict, facts: Facts) -> None:
  """config.json and data.json, which say what the checkpoints beside them are of."""
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "config.json", config.to_dict())
  write_json(folder / "data.json", facts._asdict())


def read_facts(folder: Path) -> Facts | None:
  """None for a run that is older than data.json."""
  path = folder / "data.json"
  return Facts(**read_json(path)) if path.exists() else None


def read_config(folder: Path) -> dict[str, Any]:
  path = folder / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{folder} is no run's folder: it has no config.json")
  with contextlib.suppress(ValueError, KeyError, TypeError):
    config = json.loads(path.read_text())
    if isinstance(config["method"]["name"], str):
      return config
  raise ValueError(f"{path} is no run's config; choose another --workdir")


def load_config(folder: Path) -> ConfigDict:
  """The config of a run, with the defaults of knobs that are newer than the run."""
  return with_newer_knobs(read_config(folder))


def with_newer_knobs(saved: dict[str, Any]) -> ConfigDict:
  """A saved config; knobs that it lacks have their default, which is how runs were without them."""
  config = base_config(saved["method"]["name"])
  config.update(ConfigDict(saved))
  return config


def write_results(
  folder: Path,
  experiment: Experiment,
  state: TrainState,
  results: dict[str, dict[str, float]],
  *,
  command: str,
  costs: dict[str, float],
) -> None:
  """results.json: every evaluation's figures and what they belong to."""
  digest = state_digest(state)
  if jax.process_index() != 0:
    return
  rates = [r["images_per_second"] for r in read_metrics(folder) if "images_per_second" in r]
  write_json(
    folder / "results.json",
    {
      "results": results,
      "step": int(state.step),
      "total_steps": experiment.total_steps,
      "state_digest": digest,
      "images_per_second": sorted(rates)[len(rates) // 2] if rates else None,
      **costs,
      "substituted": int(state.substituted),
      "damaged": len(read_damaged(folder)),
      "command": command,
      "devices": hardware(),
      "versions": versions(),
      "config": experiment.config.to_dict(),
    },
  )


def merge_evaluation(
  path: Path,
  results: dict[str, dict[str, float]],
  *,
  options: dict[str, Any],
  step: int,
  state_digest: str,
  num_pictures: Sequence[int] = (),
) -> None:
  """Adds figures to evaluation.json; those of another state, pictures or options are dropped.

  num_pictures: of the training and the test set, which may have grown; empty: not looked at.
  """
  if jax.process_index() != 0:
    return
  data = flatten(ConfigDict({"data": options["data"]}))
  data = {k.removeprefix("data."): v for k, v in data.items() if not k.startswith(HARMLESS)}
  same = {"step": step, "state_digest": state_digest, "data": data}
  same |= {"view": {name: options["evaluate"].get(name) for name in ("size", "crop")}}
  same |= {"num_pictures": list(num_pictures)} if num_pictures else {}
  record = same | {"results": {}, "options": {}}
  if path.exists():
    old = read_json(path)
    older = {k: v for k, v in old.get("data", {}).items() if not f"data.{k}".startswith(HARMLESS)}
    old = {**old, "data": older}
    other = [key for key, value in same.items() if old.get(key, value) != value]
    if other and old.get("results"):
      logging.warning(
        "%s: what it held was of another %s and is replaced; --out=NAME.json keeps both",
        path, " and ".join(other),
      )  # fmt: skip
    if not other:
      record = old | same  # older files have no "view", "num_pictures"
  new = {figure.split("/")[0] for figures in results.values() for figure in figures}
  for name in new:
    given = json.loads(json.dumps(options["evaluate"][name]))  # tuples as they come back
    if record["options"].get(name) != given:
      record["results"] = {
        encoder: {f: value for f, value in figures.items() if f.split("/")[0] != name}
        for encoder, figures in record["results"].items()
      }
    record["options"][name] = given
  for encoder, figures in results.items():
    kept = record["results"].get(encoder, {})
    again = {figure.split("/")[0] for figure in figures}
    kept = {f: value for f, value in kept.items() if f.split("/")[0] not in again}
    record["results"][encoder] = kept | figures
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, record)


def hardware() -> dict[str, Any]:
  devices = jax.devices()
  return {
    "platform": devices[0].platform,
    "kind": devices[0].device_kind,
    "count": len(devices),
    "processes": jax.process_count(),
    "host": platform.machine(),
    "host_cores": os.cpu_count(),
  }


def versions() -> dict[str, str]:
  names = ("ssrl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  found = {"python": platform.python_version()}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  return found
