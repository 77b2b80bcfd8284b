"""Every knob of a run, once, with its meaning. A recipe in configs/ states what it decides.

Values are primitives; what follows from them (steps from epochs, the learning rate from the batch)
is derived in code, so one override moves everything that depends on it. The groups `method`,
`encoder` and `evaluate.PROTOCOL` are filled from the factories' and protocols' own keyword
arguments: a knob that exists there exists here, and nowhere else.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssrl_jax.evaluate import EVALS
from ssrl_jax.method import ViewSpec
from ssrl_jax.methods import METHODS
from ssrl_jax.models.attention import AttentionEncoder
from ssrl_jax.models.fusion import FusionEncoder
from ssrl_jax.models.resnet import make_resnet
from ssrl_jax.models.vit import make_vit
from ssrl_jax.options import keyword_defaults, nearest, nearest_key

# What may change between a run and its continuation. It cannot change what a step computes, but for
# `epochs` and `steps`: a run that is made longer goes on with the schedules of the longer run; and
# for `accumulate` where the encoder drops at random: other draws.
HARMLESS = ("log.", "checkpoint.", "evaluate.", "mesh.", "epochs", "steps", "data.workers",
            "data.threads", "data.cache", "data.steps_ahead", "data.max_bad_fraction",
            "data.dry_run", "accumulate", "encoder.remat", "watchdog.")  # fmt: skip


def view_group(**changes: Any) -> ConfigDict:
  """A ViewSpec's fields as a config group; see ssrl_jax/method.py for their meaning."""
  fields = {k: v for k, v in ViewSpec._field_defaults.items() if k not in ("mean", "std")}
  unknown = changes.keys() - fields.keys()
  if unknown:
    raise ValueError(nearest(min(unknown), fields, "field of a view"))
  return ConfigDict({**fields, **changes})


def base_config(method: str) -> ConfigDict:
  """The config of `method` with every knob at its default."""
  if method not in METHODS:
    raise ValueError(nearest(method, METHODS, "method"))
  c = ConfigDict()
  c.seed = 0  # of initialisation, data order and views
  c.init_from = ""  # a run's folder or FILE.safetensors, with whose encoder this run begins
  c.batch_size = 256  # images per step over all devices
  c.accumulate = 1  # parts in which a batch is computed: the same gradient, less memory
  c.epochs = 100.0  # passes over the training set
  c.steps = 0  # if > 0: this many steps, whatever `epochs` says
  c.method = ConfigDict({"name": method, **keyword_defaults(METHODS[method])})

  c.encoder = ConfigDict()
  c.encoder.name = "resnet18"  # resnet6 to resnet101, vit_pico to vit_l: a key of models.ENCODERS
  c.encoder.dtype = "float32"  # of the computation: float32 or bfloat16; parameters are float32
  c.encoder.norm = "batch"  # batch | group; of ResNets, fusion and attention (a ViT has layer norm)
  c.encoder.remat = False  # True: blocks are computed again in the backward pass: less memory
  c.encoder.resnet = ConfigDict(keyword_defaults(make_resnet, leave_out=("dtype", "norm", "remat")))
  c.encoder.vit = ConfigDict(keyword_defaults(make_vit, leave_out=("dtype", "remat")))
  rest = ("dtype", "norm", "parent", "name")
  c.encoder.fusion = ConfigDict(keyword_defaults(FusionEncoder, leave_out=rest))
  c.encoder.fusion.enabled = False  # True: its maps are fused across scales
  c.encoder.attention = ConfigDict(keyword_defaults(AttentionEncoder, leave_out=rest))
  c.encoder.attention.enabled = False  # True: its coarsest maps are attended to

  c.data = ConfigDict()
  c.data.source = "digit_scenes"  # digit_scenes | KIND:PATH | mixture; docs/data.md lists kinds
  c.data.mixture = ()  # of source "mixture": its sources, e.g. ("folder:A", "arrayrecord:B")
  c.data.mixture_weights = ()  # each one's share of an epoch's draws; () = every example once
  c.data.data_dir = ""  # of tfds; empty: its own default
  c.data.train = "train"  # split to train on, and the bank of k-NN and linear
  c.data.test = "test"  # split to evaluate on
  c.data.canvas = 32  # side in pixels of the square that a decoded picture is put on
  c.data.num_train = 0  # this many training images, drawn with `seed_subset`; 0 = all
  c.data.num_test = 0  # this many test images; 0 = all
  c.data.seed_subset = 0  # of the choice of num_train images: the same for every seed of a run
  c.data.frames = 1  # of clips: frames an example, of which view v shows the (v % frames)-th
  c.data.frame_span = 0  # of clips: window of frames to draw from, anywhere; 0 = whole clip
  c.data.sampling = "uniform"  # uniform: each once an epoch | class: balanced | weights | clusters
  c.data.sampling_file = ""  # .npy of one weight or cluster number for each training example
  c.data.sampling_power = 1.0  # 1 = fully balanced, 0 = uniform: n examples weigh n^(1 - power)
  c.data.cache = ""  # "device": pictures are decoded once and kept there; "": anew each epoch
  c.data.cache_mib = 4096.0  # most that the cache may take of one device
  c.data.steps_ahead = 8  # with the cache: steps given to the devices before metrics are awaited
  c.data.workers = 0  # reader processes; 0 = threads of this one
  c.data.threads = 2  # reader threads in each process
  c.data.max_bad_fraction = 0.01  # of the examples seen; more damaged ones stop; 0 = one does
  c.data.mean = (0.485, 0.456, 0.406)  # subtracted from pixels in [0, 1]
  c.data.std = (0.229, 0.224, 0.225)  # pixels are divided by it, after the mean
  c.data.dry_run_examples = 50_000  # what --dry_run takes for the size of the training set
  c.data.dry_run_classes = 10  # what --dry_run takes for the number of classes

  c.global_views = view_group()
  c.local_views = view_group(count=0)  # 0 = none; only methods that know what to do with them
  c.views_ramp = ConfigDict()  # crops, colours and blur that grow stronger while training
  c.views_ramp.start = 1.0  # strength at step 0, from 0 (largest crops and flips alone) to 1 = off
  c.views_ramp.epochs = 0.0  # over which the strength grows linearly to 1

  c.optim = ConfigDict()
  c.optim.name = "adamw"  # adamw | lars | larc | sgd
  c.optim.learning_rate = 1e-3  # at the peak
  c.optim.scale_by_batch = False  # True: learning_rate is for batch 256 and scales with the batch
  c.optim.warmup_epochs = 10.0  # over which the learning rate rises linearly from 0
  c.optim.final_fraction = 0.0  # of the peak, at the end of the cosine
  c.optim.weight_decay = 1e-4  # of kernels; the run says which arrays have none
  c.optim.final_weight_decay = -1.0  # adamw: at the end of a cosine; -1 = stays the same
  c.optim.momentum = 0.9  # sgd, lars, larc
  c.optim.b1 = 0.9  # adamw
  c.optim.b2 = 0.999  # adamw
  c.optim.trust_coefficient = 1e-3  # lars, larc
  c.optim.clip_ratio = False  # larc
  c.optim.clip_norm = 0.0  # the gradient's norm is cut to this; 0 = off
  c.optim.clip_each = False  # clip_norm is of each array by itself (DINO), not of all together

  c.probe = ConfigDict()
  c.probe.learning_rate = 1e-2  # of the online linear probe (Adam)

  c.mesh = ConfigDict()
  c.mesh.devices = 0  # 0 = all
  c.mesh.slices = 0  # groups of devices with a slow network between them; 0 = as the devices say
  c.mesh.fsdp = 1  # devices of a slice over which the state is cut; 1 = replicated, 0 = all
  c.mesh.min_size = 2**16  # elements; smaller arrays of the state are never cut

  c.watchdog = ConfigDict()  # a process that waits longer ends, for the scheduler to start it again
  c.watchdog.start_minutes = 5.0  # for all processes of the job to come
  c.watchdog.first_minutes = 30.0  # for the first step: restoring and compiling; 0 = for ever
  c.watchdog.minutes = 10.0  # for any other step; 0 = waits for ever, also for the first
  c.watchdog.evaluation_minutes = 60.0  # between two batches of an evaluation; 0 = for ever

  c.checkpoint = ConfigDict()
  c.checkpoint.every_steps = 500  # steps between two; and always one at the end
  c.checkpoint.keep = 2  # newest ones kept
  c.checkpoint.keep_best = 1  # kept beside them, of the highest online-probe accuracy
  c.checkpoint.retries = 5  # of a failed save or read, in a row, before the run stops
  c.checkpoint.retry_seconds = 1.0  # before the first retry; each waits twice as long

  c.guard = ConfigDict()  # of steps with a NaN or infinity, or a spike of the loss
  c.guard.on_bad_step = "stop"  # stop | skip: without this update the run goes on
  c.guard.spike = 0.0  # standard deviations above the losses' moving mean; 0 = off; e.g. 8
  c.guard.patience = 10  # with skip: so many bad steps in a row stop the run after all
  c.guard.keep = 5  # newest bad batches kept in bad_steps/, for ssrl_jax.replay

  c.log = ConfigDict()
  c.log.every_steps = 20  # steps between two lines on the screen and in metrics.jsonl
  c.log.tensorboard = True  # write events for it, too

  c.evaluate = ConfigDict()
  c.evaluate.evals = "knn,linear"  # protocols after training; empty = none
  c.evaluate.controls = True  # also evaluate the untrained encoder and raw pixels
  c.evaluate.batch_size = 256  # pictures at once over all devices
  c.evaluate.size = 32  # side of the evaluation view, pixels
  c.evaluate.crop = 1.0  # that view's share of the shorter side; 0.875: 256, then crop 224
  for name, protocol in EVALS.items():
    c.evaluate[name] = ConfigDict(keyword_defaults(protocol.run))
  c.evaluate.report = True  # write report.html
  c.evaluate.during = ConfigDict()  # the same while training: figures in metrics.jsonl
  c.evaluate.during.every_steps = 0  # steps between two; 0 = never
  c.evaluate.during.evals = "knn"  # protocols, as in `evals`
  c.evaluate.during.num_train = 0  # training pictures to judge by; 0 = all
  c.evaluate.during.figure = "knn/accuracy"  # the higher, the better: what `patience` is about
  c.evaluate.during.patience = 0  # > 0: so many evaluations without a new best end the run
  return c


def check_file(path: str, *, folders: Sequence[str] = ("configs", "configs/tables")) -> None:
  """Raises FileNotFoundError if there is no such file, and names the nearest, there or in these."""
  if Path(path).is_file():
    return
  places = dict.fromkeys((Path(path).parent, *map(Path, folders)))
  known = {f.stem: f for place in reversed(places) for f in place.glob("[!_]*.py")}
  close = difflib.get_close_matches(Path(path).stem, known, n=1, cutoff=0.5)
  hint = f" did you mean {known[close[0]]}?" if close else ""
  where = "recipes are in configs/, tables in configs/tables/"
  raise FileNotFoundError(f"no file {path};{hint} {where}")


def load_file(path: str) -> Any:
  """The module of a recipe or of a table, which are files and no part of the package."""
  check_file(path)
  spec = importlib.util.spec_from_file_location(Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def change(config: ConfigDict, changes: dict[str, Any]) -> None:
  """Sets {path: value} in a recipe; a path that does not exist is refused."""
  known = flatten(config)
  groups = {key.rsplit(".", n)[0] for key in known for n in range(1, key.count(".") + 1)}
  for path, value in changes.items():
    if path not in known and path not in groups:
      raise ValueError(nearest_key(path, known, "config key"))
    config.update_from_flattened_dict({path: value})


def flatten(config: ConfigDict) -> dict[str, Any]:
  """{"optim.name": "adamw", ...}, tuples as lists, as they come back from JSON."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, (ConfigDict, dict)) and value:
      flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
    else:
      flat[key] = list(value) if isinstance(value, tuple) else value
  return flat


def changed_keys(old: ConfigDict | dict, new: ConfigDict | dict) -> list[str]:
  """`key: old -> new` for each key whose change would change the computation."""
  old, new = flatten(old), flatten(new)
  absent = "absent"
  return [
    f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key, absent) != new.get(key, absent) and not key.startswith(HARMLESS)
  ]
