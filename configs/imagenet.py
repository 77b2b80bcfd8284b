"""ImageNet-1k with ResNet-50 at 224 px: the setting of the paper's linear-evaluation table.

Command   python -m ssrl_jax.main --config=configs/imagenet.py:METHOD
          --dry_run [--devices=N] prints parameters, shapes, memory, FLOPs and cost first
Hardware  a TPU pod slice or several GPUs
Settings  each paper's or its official code's for 100 epochs, where it has one (docs/methods.md)
Expected  77.8 % linear is the claim of Zhang 2026 (ISTAER2616) for its system. Linear % of others
          after 100 epochs, their claims: simclr 64.5 (batch 4096), moco_v3 68.9, simsiam 68.1,
          swav 72.1 (with 6 local views), ViT-S dino 73.8
Status    not run
"""

from ml_collections import ConfigDict

from ssrl_jax.config import base_config, change, view_group

# BYOL's views: blur on all of the first and a tenth of the second, solarised a fifth of the second.
BYOL_VIEWS = {
  "global_views.brightness": 0.4,
  "global_views.contrast": 0.4,
  "global_views.saturation": 0.2,
  "global_views.hue": 0.1,
  "global_views.blur": (1.0, 0.1),
  "global_views.solarise": (0.0, 0.2),
}
MOCO_VIEWS = {
  "global_views.area": (0.2, 1.0),
  "global_views.brightness": 0.4,
  "global_views.contrast": 0.4,
  "global_views.saturation": 0.4,
  "global_views.hue": 0.1,
}
PLAIN_VIEW = {
  "global_views.count": 1,
  "global_views.jitter": 0.0,
  "global_views.greyscale": 0.0,
  "global_views.blur": (0.0,),
}
DINO_VIEWS = {
  **BYOL_VIEWS,
  "global_views.area": (0.4, 1.0),
  "local_views.count": 8,
  "local_views.size": 96,
  "local_views.area": (0.05, 0.4),
  "local_views.saturation": 0.2,
  "local_views.blur": (0.5,),
}
# SGD at batch 256.
MOCO = {
  **MOCO_VIEWS,
  "batch_size": 256,
  "optim.name": "sgd",
  "optim.learning_rate": 0.03,
  "optim.weight_decay": 1e-4,
  "optim.warmup_epochs": 0.0,
}
# Learning rate outside the momentum, as BYOL, Barlow Twins and VICReg have it.
LARC = {"optim.name": "larc", "optim.weight_decay": 1e-6}
ADAMW = {"optim.name": "adamw", "optim.warmup_epochs": 10.0}
METHODS = {
  "fusion": {
    "encoder.fusion.enabled": True,
    "encoder.fusion.width": 256,
    "method.place_weight": 1.0,
    "method.hidden_dim": 4096,
    "method.out_dim": 256,
  },
  "finegrained": {**MOCO, "encoder.attention.enabled": True, "encoder.attention.width": 256},
  "simclr": {},
  "moco_v2": MOCO,
  "moco_v3": {
    **LARC,
    **BYOL_VIEWS,
    "global_views.area": (0.2, 1.0),
    "optim.learning_rate": 0.6,
  },
  "nnclr": {},
  "dcl": {"batch_size": 256, "optim.learning_rate": 0.3},
  "byol": {**LARC, **BYOL_VIEWS, "optim.learning_rate": 0.45},
  "simsiam": {**MOCO, "batch_size": 512, "optim.learning_rate": 0.05},
  "barlow_twins": {**LARC, **BYOL_VIEWS, "batch_size": 2048, "optim.learning_rate": 0.2},
  "vicreg": {**LARC, **BYOL_VIEWS, "batch_size": 512, "optim.learning_rate": 0.3},
  # Lightly's benchmark, but for its batch of 256.
  "tico": {**LARC, **BYOL_VIEWS, "optim.learning_rate": 0.2, "optim.weight_decay": 1.5e-6},
  "w_mse": {
    **ADAMW,
    **MOCO_VIEWS,
    "batch_size": 1024,
    "method.out_dim": 128,
    "method.slice_size": 256,
    "method.iterations": 4,
    "optim.learning_rate": 2e-3,
    "optim.scale_by_batch": False,
    "optim.weight_decay": 1e-6,
  },
  "lejepa": {
    **ADAMW,
    **BYOL_VIEWS,
    "global_views.area": (0.3, 1.0),
    "global_views.blur": (0.5,),
    "global_views.solarise": (0.2,),
    "local_views.count": 6,
    "local_views.size": 98,
    "local_views.area": (0.05, 0.3),
    "local_views.saturation": 0.2,
    "local_views.blur": (0.5,),
    "local_views.solarise": (0.2,),
    "batch_size": 1024,
    "method.sigreg_weight": 0.05,
    "method.num_directions": 1024,
    "method.out_dim": 64,
    "optim.learning_rate": 5e-4,
    "optim.scale_by_batch": False,
    "optim.weight_decay": 5e-4,
  },
  "mmcr": {
    **LARC,
    **BYOL_VIEWS,
    "global_views.count": 8,
    "global_views.blur": (1.0, 0.1) * 4,
    "global_views.solarise": (0.0, 0.2) * 4,
    "batch_size": 2048,
    "method.momentum": True,
    "optim.learning_rate": 0.8,
    "optim.final_fraction": 1e-3,
  },
  "swav": {
    **LARC,
    "global_views.area": (0.14, 1.0),
    "local_views.count": 6,
    "local_views.size": 96,
    "local_views.area": (0.05, 0.14),
    "local_views.brightness": 0.8,
    "local_views.contrast": 0.8,
    "local_views.saturation": 0.8,
    "local_views.hue": 0.2,
    "local_views.blur": (0.5,),
    "optim.learning_rate": 0.3,
    "optim.final_fraction": 1e-3,
  },
  "ressl": {
    **MOCO,
    "global_views.count": 1,
    "optim.learning_rate": 0.05,
    "optim.warmup_epochs": 5.0,
  },
  "dino": {
    **ADAMW,
    **DINO_VIEWS,
    "batch_size": 1024,
    "encoder.name": "vit_s",
    "encoder.vit.drop_path": 0.1,
    "optim.learning_rate": 5e-4,  # x batch / 256
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
    "optim.clip_norm": 3.0,
    "optim.clip_each": True,
  },
  "ibot": {
    **ADAMW,
    **DINO_VIEWS,
    "batch_size": 1024,
    "encoder.name": "vit_s",
    "encoder.vit.drop_path": 0.1,
    "optim.learning_rate": 5e-4,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
    "optim.clip_norm": 3.0,
    "optim.clip_each": True,
  },
  "dinov2": {
    **ADAMW,
    **DINO_VIEWS,
    "global_views.area": (0.32, 1.0),
    "local_views.area": (0.05, 0.32),
    "batch_size": 1024,
    "encoder.name": "vit_s",
    "encoder.vit.drop_path": 0.1,
    "optim.learning_rate": 1e-3,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
    "optim.clip_norm": 3.0,
  },
  "msn": {
    **ADAMW,
    "global_views.area": (0.3, 1.0),
    "global_views.brightness": 0.4,
    "global_views.contrast": 0.4,
    "global_views.saturation": 0.4,
    "global_views.hue": 0.1,
    "local_views.count": 10,
    "local_views.size": 96,
    "local_views.area": (0.05, 0.3),
    "local_views.blur": (0.5,),
    "batch_size": 1024,
    "encoder.name": "vit_s",
    "optim.learning_rate": 1e-3,
    "optim.scale_by_batch": False,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
    "optim.warmup_epochs": 15.0,
    "optim.clip_norm": 3.0,
  },
  "mae": {
    **ADAMW,
    **PLAIN_VIEW,
    "global_views.area": (0.2, 1.0),
    "encoder.name": "vit_b",
    "encoder.vit.position": "sincos",
    "optim.learning_rate": 1.5e-4,
    "optim.b2": 0.95,
    "optim.weight_decay": 0.05,
    "optim.warmup_epochs": 40.0,
  },
  "simmim": {
    **ADAMW,
    **PLAIN_VIEW,
    "global_views.area": (0.67, 1.0),
    "encoder.name": "vit_b",
    "encoder.vit.pool": "mean",
    "encoder.vit.drop_path": 0.1,
    "batch_size": 2048,
    "optim.learning_rate": 5e-5,
    "optim.weight_decay": 0.05,
    "optim.clip_norm": 5.0,
  },
  "ijepa": {
    **ADAMW,
    **PLAIN_VIEW,
    "global_views.area": (0.3, 1.0),
    "global_views.flip": 0.0,
    "batch_size": 2048,
    "encoder.name": "vit_b",
    "encoder.vit.position": "sincos",
    "encoder.vit.pool": "mean",
    "method.predictor_depth": 6,
    "optim.learning_rate": 1e-3,
    "optim.scale_by_batch": False,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
    "optim.warmup_epochs": 40.0,
  },
  "densecl": MOCO,
  "vicregl": {**LARC, **BYOL_VIEWS, "batch_size": 2048, "optim.learning_rate": 0.2},
  "rotation": {
    **MOCO,
    "global_views.count": 4,
    "global_views.area": (0.08, 1.0),
    "global_views.jitter": 0.0,
    "global_views.greyscale": 0.0,
    "global_views.blur": (0.0,),
    "optim.learning_rate": 0.1,
  },
  "jigsaw": {
    **MOCO,
    "global_views.count": 1,
    "global_views.size": 255,
    "global_views.area": (0.6, 1.0),
    "global_views.aspect": (1.0, 1.0),
    "global_views.jitter": 0.0,
    "global_views.greyscale": 0.66,
    "global_views.blur": (0.0,),
    "optim.learning_rate": 0.1,
  },
  "hybrid": {
    "method.terms": ("simclr", "barlow_twins"),
    "method.weights": (1.0, 0.1),
  },
  "supcon": {},
  "supervised": {
    "batch_size": 1024,
    "global_views.jitter": 0.0,
    "global_views.greyscale": 0.0,
    "global_views.blur": (0.0,),
    "global_views.count": 1,
    "optim.name": "sgd",
    "optim.learning_rate": 0.1,
    "optim.weight_decay": 1e-4,
    "optim.warmup_epochs": 5.0,
  },
}


def get_config(method: str = "fusion") -> ConfigDict:
  c = base_config(method)
  c.batch_size = 4096
  c.epochs = 100.0
  c.encoder.name = "resnet50"
  c.encoder.dtype = "bfloat16"
  c.data.source = "tfds:imagenet2012"
  c.data.test = "validation"  # not "test": TFDS' split of that name has no labels
  c.data.canvas = 384  # a 3:2 picture keeps a shorter side of 256 pixels
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
  if method not in METHODS:
    raise ValueError(f"configs/imagenet.py has no settings for {method!r}; add them to its METHODS")
  change(c, METHODS[method])
  return c
