"""ImageNet-1k with ResNet-50 at 224 px: the setting of the paper's linear-evaluation table.

Command   python -m ssrl_jax.main --config=configs/imagenet.py:METHOD
          --dry_run [--devices=N] prints parameters, shapes, memory, FLOPs and cost first
Hardware  a TPU pod slice or several GPUs; batch 4096
Expected  77.8 % linear is the claim of Zhang 2026 (ISTAER2616) for its system; simclr 64.5 % after
          100 epochs at batch 4096 (SimCLR paper, their claim)
Status    not run
"""

from ml_collections import ConfigDict

from ssrl_jax.config import base_config, view_group

METHODS = {
  "fusion": {"hidden_dim": 4096, "out_dim": 256},
  "simclr": {"temperature": 0.1, "hidden_dim": 2048, "out_dim": 128},
}


def get_config(method: str = "fusion") -> ConfigDict:
  c = base_config(method)
  c.method.update(METHODS[method])
  c.batch_size = 4096
  c.epochs = 100.0
  c.encoder.name = "resnet50"
  c.encoder.dtype = "bfloat16"
  c.encoder.fusion.enabled = method == "fusion"
  c.encoder.fusion.width = 256
  c.data.source = "tfds:imagenet2012"
  c.data.test = "validation"
  c.data.canvas = 352  # a 4:3 picture keeps a shorter side of 264 pixels
  c.data.workers = 8
  c.data.threads = 4
  c.data.dry_run_examples = 1_281_167
  c.data.dry_run_classes = 1000
  # SimCLR's ImageNet views: jitter of strength 1, blur on half of them.
  c.global_views = view_group(
    size=224,
    area=(0.08, 1.0),
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    blur=(0.5,),
  )
  # SimCLR, appendix B.6: LARS, 0.3 x batch / 256, 10 epochs warm-up, weight decay 1e-6.
  c.optim.update({"name": "lars", "learning_rate": 0.3, "scale_by_batch": True})
  c.optim.update({"weight_decay": 1e-6, "warmup_epochs": 10.0})
  c.checkpoint.every_steps = 1000
  c.log.every_steps = 50
  c.evaluate.update({"size": 224, "crop": 0.875, "batch_size": 1024})
  return c
