"""From a config to the parts of a run: what training, evaluation, the dry run and tests share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ssrl_jax import guard, optim, parallel
from ssrl_jax.accumulate import accumulated
from ssrl_jax.config import base_config, flatten
from ssrl_jax.data import sources
from ssrl_jax.data.damaged import check_fraction
from ssrl_jax.data.sampling import Sampling, make_sampling
from ssrl_jax.method import Array, Method, Run, ViewSpec
from ssrl_jax.methods import METHODS
from ssrl_jax.models import make_encoder
from ssrl_jax.options import check_numbers, nearest
from ssrl_jax.probe import init_probe
from ssrl_jax.state import TrainState
from ssrl_jax.views import abstract_views, check_ramp, check_specs

LEAST = {
  "seed": 0,
  "data.workers": 0,
  "data.threads": 1,
  "data.steps_ahead": 1,
  "log.every_steps": 1,
  "checkpoint.every_steps": 1,
}


@dataclass(frozen=True, eq=False)  # so that what is traced for one can be kept
class Experiment:
  """Everything that follows from a config and the size of its training set; holds no arrays."""

  config: ConfigDict
  mesh: Mesh
  method: Method
  optimizer: optax.GradientTransformation
  schedule: Callable[[Any], Any]
  num_classes: int | None
  steps_per_epoch: int
  total_steps: int


def view_specs(config: ConfigDict) -> tuple[ViewSpec, ...]:
  """The ViewSpecs "global" and "local" of the config's two groups, if their count is not 0."""
  groups = {"global": config.global_views, "local": config.local_views}
  specs = tuple(
    ViewSpec(name=name, mean=config.data.mean, std=config.data.std, **group)
    for name, group in groups.items()
    if group.count
  )
  check_specs(specs)
  most = max((spec.count for spec in specs), default=1)
  if not 1 <= config.data.frames <= most:
    raise ValueError(
      f"data.frames is {config.data.frames}; expected 1 to {most}, the most views of a kind: each "
      "shows one frame, and further frames would be read and never seen"
    )
  return specs


def open_split(config: ConfigDict, split: str) -> sources.Source:
  """The training ("train") or test ("test") pictures of a config's source."""
  data = config.data
  return sources.open_source(
    data.source,
    split=data[split],
    data_dir=data.data_dir,
    size=data.canvas,
    limit=data.num_train if split == "train" else data.num_test,
    seed=data.seed_subset,
    mixture=data.mixture,
  )


def training_sampling(config: ConfigDict, source: sources.Source) -> Sampling | None:
  """How often each training example is drawn; None: once an epoch.

  Raises:
    ValueError: the source cannot be sampled, or its examples have no frames, as `data` asks.
  """
  data = config.data
  sources.check_frames(source, data.frames, data.frame_span)
  return make_sampling(
    source,
    sampling=data.sampling,
    file=data.sampling_file,
    power=data.sampling_power,
    mixture_weights=data.mixture_weights if data.source == "mixture" else (),
  )


def build(
  config: ConfigDict,
  *,
  num_examples: int,
  num_classes: int | None,
  devices: Sequence[Any] | None = None,
) -> Experiment:
  """Builds the method, optimizer and mesh; allocates nothing.

  Args:
    devices: to make the mesh of; None: those that are there.

  Raises:
    ValueError: an unknown name, a batch that the devices cannot share, a set smaller than a batch.
  """
  mesh = parallel.make_mesh(
    config.mesh.devices, slices=config.mesh.slices, fsdp=config.mesh.fsdp, devices=devices
  )
  batch_size = config.batch_size
  parallel.check_batch_size(batch_size, mesh)
  if num_examples < batch_size:
    raise ValueError(
      f"the training set has {num_examples} images, fewer than one batch of {batch_size}; lower "
      "batch_size"
    )
  steps_per_epoch = num_examples // batch_size
  if not 0 <= config.epochs < math.inf:
    raise ValueError(f"epochs is {config.epochs}; expected a number of 0 or more")
  check_numbers("", flatten(config), LEAST)
  total_steps = config.steps or round(config.epochs * steps_per_epoch)
  judged = bool(config.init_from) and config.epochs == 0  # an encoder as it came
  if total_steps < 1 and not judged:
    raise ValueError(
      f"epochs {config.epochs} and steps {config.steps} leave nothing to train; epochs=0 is for an "
      "encoder that init_from names, to be judged as it is"
    )
  check_ramp(**config.views_ramp)
  check_fraction(config.data.max_bad_fraction)
  guard.check_options(**config.guard)
  if config.data.cache not in ("", "device"):
    raise ValueError(f"data.cache is {config.data.cache!r}; expected '' (streamed) or 'device'")
  planned, options = max(total_steps, 1), config.optim.to_dict()
  if not total_steps:
    options["warmup_epochs"] = 0.0
  run = Run(batch_size, steps_per_epoch, planned, num_classes)
  method = accumulated(
    make_method(config, run), config.accumulate, batch_size=batch_size, num_devices=mesh.size
  )
  optimizer, schedule = optim.make_optimizer(
    **options,
    batch_size=batch_size,
    steps_per_epoch=steps_per_epoch,
    total_steps=planned,
    constant_lr=method.constant_lr,
    frozen=method.frozen,
  )
  return Experiment(
    config, mesh, method, optimizer, schedule, num_classes, steps_per_epoch, total_steps
  )


# A key, its value that switches others off, and how their names begin.
SWITCHES = (
  ("encoder.fusion.enabled", False, "encoder.fusion."),
  ("encoder.attention.enabled", False, "encoder.attention."),
  ("local_views.count", 0, "local_views."),
  ("views_ramp.start", 1.0, "views_ramp.epochs"),
  ("optim.clip_norm", 0.0, "optim.clip_each"),
  ("data.sampling", "uniform", "data.sampling_power"),
  ("data.cache", "", "data.cache_mib"),
  ("data.cache", "", "data.steps_ahead"),
  ("guard.on_bad_step", "stop", "guard.patience"),
  ("evaluate.during.every_steps", 0, "evaluate.during."),
)


def check_effects(config: ConfigDict, given: Iterable[str]) -> None:
  """Refuses a key that was given for this run and that nothing of it reads.

  One whose switch was turned off by the same command is passed by: who wrote that knows.

  Raises:
    ValueError: names the key, and what keeps it from having an effect.
  """
  family = "resnet" if config.encoder.name.startswith("resnet") else "vit"
  flat, given = flatten(config), set(given)
  known = (config.optim.name,)  # who has the options that all have; a wrong name is found elsewhere
  for key in given:
    *groups, name = key.split(".")
    why = None
    if key == "epochs" and config.steps:
      why = f"steps is {config.steps}, which decides; set steps=0"
    elif groups in (["encoder", "resnet"], ["encoder", "vit"]) and groups[1] != family:
      why = f"encoder.name is {config.encoder.name}"
    elif key in ("data.mixture", "data.mixture_weights") and config.data.source != "mixture":
      why = f"data.source is {config.data.source}, not mixture"
    elif groups == ["optim"] and config.optim.name not in optim.OPTIONS_OF.get(name, known):
      why = f"optim.name is {config.optim.name}"
    for switch, off, others in SWITCHES:
      if key.startswith(others) and switch not in given and flat[switch] == off:
        why = f"{switch} is {off!r}"
    if why:
      raise ValueError(f"{key} would have no effect: {why}")


def make_method(config: ConfigDict, run: Run) -> Method:
  """The method of a config, its loss in one part."""
  name, options = split_name(config.method)
  if name not in METHODS:
    raise ValueError(nearest(name, METHODS, "method"))
  check_sizes(config)
  encoder = make_encoder(**config.encoder.to_dict())
  return METHODS[name](encoder=encoder, views=view_specs(config), run=run, **options)


def check_sizes(config: ConfigDict) -> None:
  """As `check_numbers`, of encoder and method."""
  for group in ("encoder", "method"):
    defaults = flatten(base_config(config.method.name)[group])
    check_numbers(f"{group}.", flatten(config[group]), defaults)


def plain_method(experiment: Experiment) -> Method:
  """The experiment's method without what is computed twice to save memory: no model FLOPs."""
  config = experiment.config.copy_and_resolve_references()
  if config.accumulate == 1 and not config.encoder.remat and not config.method.get("block"):
    return experiment.method
  config.encoder.remat = False
  if "block" in config.method:
    config.method.block = 0
  steps = experiment.steps_per_epoch, experiment.total_steps
  return make_method(config, Run(config.batch_size, *steps, experiment.num_classes))


def split_name(group: ConfigDict) -> tuple[str, dict[str, Any]]:
  """{"name": n, **options} -> n, options."""
  options = group.to_dict()
  return options.pop("name"), options


def init_state(experiment: Experiment, key: Array) -> TrainState:
  """The state at step 0; pure, to be compiled or traced."""
  method, config = experiment.method, experiment.config
  views = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_views(method.views, 2))
  params, method_state = method.init(jax.random.fold_in(key, 0), views)
  probe = ()
  if experiment.num_classes:
    size = config.evaluate.size
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    num_features = jax.eval_shape(method.encode, params, method_state, images).pooled.shape[-1]
    probe = init_probe(num_features, experiment.num_classes, **config.probe)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    method_state=method_state,
    opt_state=experiment.optimizer.init(params),
    probe=probe,
    substituted=jnp.zeros((), jnp.int32),
    key=jax.random.fold_in(key, 1),
    guard=guard.init_guard(config.guard),
  )


@functools.lru_cache(maxsize=4)  # tracing takes longer than all else before the first step
def abstract_state(experiment: Experiment) -> TrainState:
  """Shapes, types and shardings of the train state; nothing is computed."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes = jax.eval_shape(lambda k: init_state(experiment, k), key)
  shardings = parallel.state_shardings(
    shapes, experiment.mesh, min_size=experiment.config.mesh.min_size
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def create_state(experiment: Experiment) -> TrainState:
  """The state at step 0, made by a compiled function on the devices where it will live."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(experiment))
  init = jax.jit(
    lambda k: init_state(experiment, k),
    out_shardings=shardings,
    compiler_options=parallel.quick_compile(),
  )
  return init(jax.random.key(experiment.config.seed))


def with_guard(experiment: Experiment, state: TrainState) -> TrainState:
  """With what steps are judged by, where the config wants it and the state has none yet."""
  wanted = abstract_state(experiment).guard
  if state.guard or not wanted:
    return state
  shardings = jax.tree.map(lambda x: x.sharding, wanted)
  return state._replace(guard=jax.jit(guard.new_guard, out_shardings=shardings)())


def abstract_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
  """The batch contract as shapes: what the compiled step is given."""
  data, b = experiment.config.data, experiment.config.batch_size
  frames = (data.frames,) if data.frames > 1 else ()
  sharding = parallel.batch_sharding(experiment.mesh)
  shapes = {
    "image": ((b, *frames, data.canvas, data.canvas, 3), np.uint8),
    "extent": ((b, 2), np.int32),
    "label": ((b,), np.int32),
    "id": ((b, 2), np.uint32),
    "substituted": ((b,), np.bool_),
  }
  return {k: jax.ShapeDtypeStruct(*v, sharding=sharding) for k, v in shapes.items()}
