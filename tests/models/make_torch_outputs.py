"""Makes torch_outputs.json: arrays and outputs of torchvision's and timm's encoders.

Run by hand, in an environment with torch, torchvision and timm, from the repository's root:
python tests/models/make_torch_outputs.py. Weights and images are drawn from their names, by
`tests.numeric.drawn`, so that the file holds names, shapes and outputs only.
"""

import json
import sys
from pathlib import Path

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

sys.path.insert(0, ".")
from tests.numeric import drawn

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
MODELS = {  # name -> model, side of its images
  "basic": (lambda: ResNet(BasicBlock, [2, 1, 1, 1]), 40),
  "bottleneck": (lambda: ResNet(Bottleneck, [1, 2, 1, 1]), 33),
  "vit": (lambda: VisionTransformer(img_size=32, **VIT), 32),
  "vit_scaled": (lambda: VisionTransformer(img_size=32, init_values=1e-5, **VIT), 32),
  "vit_registers": (
    lambda: VisionTransformer(img_size=32, reg_tokens=3, no_embed_class=True, **VIT),
    32,
  ),
}


def outputs(make, side):
  model = make().eval()
  state = model.state_dict()
  model.load_state_dict({k: torch.from_numpy(drawn(k, tuple(x.shape))) for k, x in state.items()})
  images = torch.from_numpy(drawn("images", (2, side, side, 3))).permute(0, 3, 1, 2)
  with torch.no_grad():
    if isinstance(model, ResNet):
      out = torch.nn.Sequential(*list(model.children())[:-1])(images).flatten(1)[:, ::64]
    else:
      out = model.forward_features(images)[:, [0, -1]].flatten(1)  # class token, last patch
  shapes = {k: list(x.shape) for k, x in state.items()}
  return {"side": side, "shapes": shapes, "outputs": out.double().numpy().tolist()}


if __name__ == "__main__":
  found = {name: outputs(*model) for name, model in MODELS.items()}
  versions = {m.__name__: m.__version__ for m in (torch, torchvision, timm)}
  text = json.dumps({"versions": versions, "models": found}, separators=(",", ":"))
  Path("tests/models/torch_outputs.json").write_text(text.replace('},"', '},\n"') + "\n")
