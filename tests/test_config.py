import importlib
import json
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from ssrl_jax.config import base_config, changed_keys, flatten, view_group
from ssrl_jax.experiment import abstract_state, build, check_effects, view_specs
from ssrl_jax.method import ViewSpec
from ssrl_jax.methods import METHODS
from ssrl_jax.options import keyword_defaults
from ssrl_jax.run_folder import Facts, check_run_folder, load_config, read_facts, write_run

RECIPES = sorted(
  p.stem
  for p in (pathlib.Path(__file__).resolve().parent.parent / "configs").glob("*.py")
  if p.stem != "__init__"
)


def recipe(name, method):
  return importlib.import_module(f"configs.{name}").get_config(method)


def test_recipes_are_found():
  assert {"smoke", "digits", "cifar10", "imagenet"} <= set(RECIPES)


def built(name, method):
  config = recipe(name, method)
  num_examples = config.data.num_train or config.data.dry_run_examples
  return build(config, num_examples=num_examples, num_classes=config.data.dry_run_classes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds(name, method):
  experiment = built(name, method)
  warmup = experiment.config.optim.warmup_epochs * experiment.steps_per_epoch
  assert experiment.total_steps > warmup


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["imagenette_cpu", "cifar10", "imagenet"])
def test_networks_of_a_recipe_fit_together(name, method):
  """The others change for a method what imagenette_cpu does."""
  experiment = built(name, method)
  state = abstract_state(experiment)
  assert state.probe.params["kernel"].shape[1] == experiment.num_classes
  assert {str(p.dtype) for p in jax.tree.leaves(state.params)} == {"float32"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_decides_only_knobs_that_exist(name, method):
  free = "method.options"  # of hybrid: its terms' options
  decided, known = (
    {key for key in flatten(c) if not key.startswith(free)}
    for c in (recipe(name, method), base_config(method))
  )
  assert decided == known


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_what_it_is(name):
  header = importlib.import_module(f"configs.{name}").__doc__
  for part in ("Command", f"configs/{name}.py", "Hardware", "Expected", "Status"):
    assert part in header


@pytest.mark.parametrize(("typo", "meant"), [("simclear", "simclr"), ("fuson", "fusion")])
def test_unknown_method_suggests_the_nearest(typo, meant):
  with pytest.raises(ValueError, match=f"unknown method '{typo}'; did you mean '{meant}'"):
    base_config(typo)


def test_unknown_method_lists_all_where_none_is_near():
  with pytest.raises(ValueError, match=r"unknown method 'q'; known: .*simclr"):
    base_config("q")


@pytest.mark.parametrize("method", METHODS)
def test_method_group_is_the_factory_s_own_arguments(method):
  assert base_config(method).method.to_dict() == {
    "name": method, **keyword_defaults(METHODS[method])
  }  # fmt: skip


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("seed", -1, "seed is -1; expected 0 or more"),
    ("data.threads", 0, "data.threads is 0; expected 1 or more"),
    ("data.workers", -1, "data.workers is -1; expected 0 or more"),
    ("epochs", float("nan"), "epochs is nan"),
    ("optim.learning_rate", -1.0, "learning_rate is -1.0; expected 0 or more"),
    ("optim.weight_decay", -1.0, "weight_decay is -1.0; expected 0 or more"),
    ("optim.momentum", 1.0, "momentum is 1.0; expected at least 0 and below 1"),
  ],
)
def test_numbers_out_of_range_are_refused_before_there_is_a_folder(key, value, message):
  config = recipe("smoke", "simclr")
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    build(config, num_examples=128, num_classes=10)


@pytest.mark.parametrize("key", ["method.temprature", "encoder.resnet.widht", "optim.rate"])
def test_key_that_nothing_reads_is_refused(key):
  config = recipe("smoke", "simclr")
  *groups, unknown = key.split(".")
  group = config
  for name in groups:
    group = group[name]
  group[unknown] = 1
  with pytest.raises(TypeError, match=f"unexpected keyword argument '{unknown}'"):
    build(config, num_examples=128, num_classes=10)


def test_value_of_another_type_is_refused():
  with pytest.raises(TypeError, match="batch_size"):
    base_config("simclr").batch_size = "many"


def test_view_group_names_the_nearest_field():
  assert view_group(size=8).size == 8
  with pytest.raises(ValueError, match="unknown field of a view 'sise'; did you mean 'size'"):
    view_group(sise=8)


def test_view_specs_are_those_with_a_count_and_carry_the_data_s_statistics():
  config = base_config("fusion")
  config.data.mean, config.data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
  statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
  assert view_specs(config) == (ViewSpec("global", **statistics),)
  config.local_views = view_group(count=3, size=16)
  assert view_specs(config)[1] == ViewSpec("local", count=3, size=16, **statistics)


@pytest.mark.parametrize("name", RECIPES)
def test_config_survives_json(name, tmp_path):
  config = recipe(name, "fusion")
  assert changed_keys(json.loads(json.dumps(config.to_dict())), config) == []
  write_run(tmp_path, config, Facts(9, 3))
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  loaded = load_config(tmp_path)
  assert flatten(loaded) == flatten(config)
  assert view_specs(loaded) == view_specs(config)  # tuples again, not JSON's lists
  check_run_folder(tmp_path, loaded, Facts(9, 3), allow_change=False)  # the same run


def test_folder_of_other_pictures_is_refused(tmp_path):
  config = base_config("simclr")
  check_run_folder(tmp_path, config, Facts(40, 2), allow_change=False)  # nothing there
  write_run(tmp_path, config, Facts(40, 2))
  check_run_folder(tmp_path, config, Facts(47, 2), allow_change=False)  # nothing was saved
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  for other in (Facts(47, 2), Facts(40, 3), Facts(40, None)):
    with pytest.raises(ValueError, match=r"on 40 training pictures of 2 classes, and now .* has"):
      check_run_folder(tmp_path, config, other, allow_change=False)
    check_run_folder(tmp_path, config, other, allow_change=True)
  assert read_facts(tmp_path) == Facts(40, 2)  # until the checkpoint is known to fit


@pytest.mark.parametrize(
  ("given", "changes", "why"),
  [
    ("epochs", {"steps": 8}, "steps is 8"),
    ("encoder.vit.patch", {}, "encoder.name is resnet50"),
    ("encoder.resnet.width", {"encoder.name": "vit_s"}, "encoder.name is vit_s"),
    ("encoder.fusion.width", {}, "encoder.fusion.enabled is False"),
    ("encoder.attention.width", {}, "encoder.attention.enabled is False"),
    ("local_views.size", {}, "local_views.count is 0"),
    ("views_ramp.epochs", {}, "views_ramp.start is 1.0"),
    ("optim.clip_each", {}, "optim.clip_norm is 0.0"),
    ("data.sampling_power", {}, "data.sampling is 'uniform'"),
    ("data.cache_mib", {}, "data.cache is ''"),
    ("guard.patience", {}, "guard.on_bad_step is 'stop'"),
    ("evaluate.during.num_train", {}, "evaluate.during.every_steps is 0"),
    ("data.mixture", {}, "data.source is digit_scenes, not mixture"),
    ("optim.momentum", {"optim.name": "adamw"}, "optim.name is adamw"),
    ("optim.b1", {"optim.name": "lars"}, "optim.name is lars"),
    ("optim.clip_ratio", {"optim.name": "lars"}, "optim.name is lars"),
  ],
)
def test_key_that_would_have_no_effect_is_refused(given, changes, why):
  config = base_config("simclr")
  config.encoder.name = "resnet50"
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=f"{given} would have no effect: {why}"):
    check_effects(config, ["seed", given])


def test_keys_that_have_an_effect_are_not_refused():
  config = base_config("fusion")
  config.encoder.name, config.optim.name = "resnet50", "larc"
  config.encoder.fusion.enabled = True
  keys = ["epochs", "encoder.name", "encoder.resnet.width", "encoder.fusion.width"]
  keys += ["encoder.attention.enabled", "optim.clip_ratio", "optim.momentum", "optim.weight_decay"]
  config.local_views.count, config.optim.clip_norm = 2, 3.0
  keys += ["local_views.count", "local_views.size", "optim.clip_each"]
  keys += ["evaluate.during.every_steps", "evaluate.during.num_train"]  # turned off by the command
  check_effects(config, keys)
  config.optim.name = "adm"
  check_effects(config, ["optim.name", "optim.weight_decay"])  # `make_optimizer` names it


@pytest.mark.parametrize(
  "change",
  [
    "log.every_steps", "checkpoint.every_steps", "checkpoint.keep", "evaluate.batch_size",
    "evaluate.knn.k", "mesh.devices", "epochs", "steps", "data.workers", "data.threads",
    "data.dry_run_examples",
  ],
)  # fmt: skip
def test_harmless_change_is_none(change):
  assert changed_keys(base_config("simclr"), with_change(change)) == []


@pytest.mark.parametrize(
  "change",
  [
    "seed", "batch_size", "data.canvas", "data.num_train", "data.seed_subset", "data.frames",
    "data.frame_span", "data.sampling_power",
    "optim.learning_rate", "optim.warmup_epochs", "probe.learning_rate", "method.temperature",
    "encoder.resnet.width", "global_views.size", "local_views.count", "views_ramp.start",
    "views_ramp.epochs",
  ],
)  # fmt: skip
def test_change_of_the_computation_is_named_with_both_values(change):
  old, new = base_config("simclr"), with_change(change)
  before, after = flatten(old)[change], flatten(new)[change]
  assert changed_keys(old, new) == [f"{change}: {before} -> {after}"]


def with_change(key):
  config = base_config("simclr")
  *groups, last = key.split(".")
  group = config
  for name in groups:
    group = group[name]
  group[last] = group[last] + 1
  return config


def test_key_that_only_one_config_has_is_a_change():
  old, new = ConfigDict({"a": 1}), ConfigDict({"a": 1, "b": {"c": 2}})
  assert changed_keys(old, new) == ["b.c: absent -> 2"]
  assert changed_keys(new, old) == ["b.c: 2 -> absent"]
