"""python -m ssrl_jax.export --workdir=RUN --out=encoder.safetensors

Writes the encoder of a checkpoint of a run, the one that the run is judged by, with the names and
layouts of timm (ResNets: torchvision's too), so that PyTorch can load it. Of an encoder inside
fusion or attention the backbone only. A run may begin with such a file: --config.init_from=FILE.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags
from safetensors.numpy import save

from ssrl_jax.command_line import define_step, print_line, run_command
from ssrl_jax.evaluate.suite import load_run
from ssrl_jax.files import check_folder, whole
from ssrl_jax.models.torch_names import PLACES, backbone_names, to_torch
from ssrl_jax.run_folder import load_config
from ssrl_jax.state import named_leaves


def run(folder: Path, out: Path, *, step: int | None = None) -> int:
  if out.suffix != ".safetensors":
    raise ValueError(f"--out={out}: expected a name that ends with .safetensors")
  check_folder(folder, "--workdir")
  check_folder(out.parent, "--out")
  config = load_config(folder)
  config.mesh.update({"devices": 1, "slices": 0, "fsdp": 1})
  experiment, state = load_run(folder, mesh=config.mesh, step=step)
  weights = jax.device_get(experiment.method.encoder.weights(state.params, state.method_state))
  arrays = {name: np.asarray(x) for name, x in named_leaves(weights)}
  encoder, data, size = config.encoder, config.data, config.evaluate.size
  own = backbone_names(arrays)
  if PLACES in own:  # learned, of the views' grid
    size = encoder.vit.patch * arrays[own[PLACES]].shape[0]
  tensors = to_torch(arrays, (size // encoder.vit.patch,) * 2)
  left = sorted(set(arrays) - set(own.values()))
  told = {
    "format": "pt",
    "encoder": encoder.to_json(),
    "image_size": str(size),
    "mean": json.dumps(list(data.mean)),
    "std": json.dumps(list(data.std)),
    "step": str(int(state.step)),
    "method": config.method.name,
  }
  out.parent.mkdir(parents=True, exist_ok=True)
  with whole(out) as partial:
    partial.write_bytes(file_bytes(tensors, told))
  count = sum(x.size for x in tensors.values())
  print_line(
    f"{out}: {len(tensors)} arrays, {count:,} numbers, of {encoder.name} at {size} px, step "
    f"{int(state.step)}"
  )
  if left:
    print_line(f"left out: {len(left)} arrays that are not the backbone's, e.g. {left[0]}")
  print_line(
    'in PyTorch: print(model.load_state_dict(safetensors.torch.load_file("FILE"), strict=False)), '
    "which may miss the classifier and nothing else"
  )
  return 0


def file_bytes(tensors: dict[str, np.ndarray], facts: dict[str, str]) -> bytes:
  """A safetensors file; of equal arrays and facts equal bytes, which its own library does not give.

  Eight bytes say how long the header is, a JSON object; the numbers come behind it.
  """
  alone = save(tensors)
  start = 8 + int.from_bytes(alone[:8], "little")
  header = {"__metadata__": facts, **json.loads(alone[8:start])}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text + alone[start:]


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string("workdir", "", "The run's folder.", values)
  flags.DEFINE_string("out", "", "The file to write, NAME.safetensors.", values)
  define_step(values)


def cli(argv: list[str]) -> int:
  def program(values: flags.FlagValues) -> int:
    folder, out = (Path(p).expanduser() for p in (values.workdir, values.out))
    return run(folder, out, step=values.step)

  return run_command(argv, __doc__, define_flags, program, needed=("workdir", "out"))


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
