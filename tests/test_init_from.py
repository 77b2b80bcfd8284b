"""A run may begin with the encoder of another."""

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from ssrl_jax.experiment import create_state
from ssrl_jax.init_from import first_state
from ssrl_jax.models.torch_names import backbone_names, to_torch
from ssrl_jax.run_folder import Facts
from ssrl_jax.state import named_leaves
from tests.methods.common import VIT, make_config, make_experiment
from tests.untrained import save_untrained


def begin(folder, name, overrides, *, given, given_overrides=None):
  """The other run, and the experiment and first state of one that begins with its encoder."""
  config = make_config(given, {"seed": 5, **(given_overrides or {})})
  save_untrained(folder, config, Facts(64, 10))
  other = make_experiment(given, {"seed": 5, **(given_overrides or {})})
  experiment = make_experiment(name, {"init_from": str(folder), **overrides})
  return other, experiment, first_state(experiment)


def judged(experiment, state):
  return dict(named_leaves(experiment.method.encoder.weights(state.params, state.method_state)))


@pytest.mark.parametrize(
  ("name", "overrides", "given"),
  [("byol", {}, "vicreg"), ("ibot", VIT, "simclr")],
)
def test_network_and_target_begin_with_it_and_all_else_anew(tmp_path, name, overrides, given):
  vit = {k: v for k, v in overrides.items() if k.startswith("encoder.")}
  other, experiment, state = begin(tmp_path, name, overrides, given=given, given_overrides=vit)
  wanted, alone = judged(other, create_state(other)), create_state(experiment)
  own = dict(named_leaves(alone))
  found = dict(named_leaves(state))
  assert found.keys() == own.keys()
  for path, x in found.items():
    _, inside, rest = path.partition("/encoder/")
    kind = "batch_stats" if "batch_stats" in path else "params"
    expected = wanted.get(f"{kind}/{rest}") if inside and "opt_state" not in path else None
    if path != "key":
      np.testing.assert_array_equal(x, own[path] if expected is None else expected, err_msg=path)
  changed = [p for p in found if "/encoder/" in p and p.endswith("kernel") and "opt" not in p]
  assert any("target" in p for p in changed)
  buffers = [x.unsafe_buffer_pointer() for p, x in named_leaves(state) if "/encoder/" in p]
  assert len(set(buffers)) == len(buffers)  # or the state could not be donated


def test_another_encoder_is_refused_with_what_differs(tmp_path):
  wider = {"encoder.resnet.width": 16}
  with pytest.raises(ValueError, match=r"init_from: the encoder of .* arrays differ, .* -> "):
    begin(tmp_path, "simclr", wider, given="simclr")


def test_a_run_that_is_not_there_is_said(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    first_state(make_experiment("simclr", {"init_from": str(tmp_path / "nowhere")}))


def test_backbone_of_a_file_and_the_rest_random(tmp_path):
  experiment = make_experiment("fusion", {"init_from": str(tmp_path / "encoder.safetensors")})
  own = judged(experiment, create_state(experiment))
  given = {k: np.asarray(x) + 1 for k, x in own.items()}
  save_file(to_torch(given, (1, 1)), tmp_path / "encoder.safetensors")
  found = judged(experiment, first_state(experiment))
  backbone = set(backbone_names(found).values())
  assert 0 < len(backbone) < len(found)
  for name, x in found.items():
    np.testing.assert_array_equal(x, (given if name in backbone else own)[name], err_msg=name)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("x.pth", b"", "x.pth is a pickle, which may run any code"),
    ("x.safetensors", b"no tensors at all", "x.safetensors is damaged, or no safetensors"),
    ("x.safetensors", save({"a": np.zeros(2)}), "x.safetensors: it has no bn1.bias"),
  ],
)
def test_files_that_hold_no_encoder_are_refused(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    first_state(make_experiment("simclr", {"init_from": str(tmp_path / name)}))


def test_a_file_that_is_not_there_is_said(tmp_path):
  missing = tmp_path / "nowhere.safetensors"
  with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors"):
    first_state(make_experiment("simclr", {"init_from": str(missing)}))
