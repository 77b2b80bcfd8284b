"""CIFAR-10 with ResNet-18 (3x3 stem): the field's usual small benchmark, for one GPU.

Command   python -m ssrl_jax.main --config=configs/cifar10.py:METHOD
          (python -m ssrl_jax.data.prepare_tfds cifar10 once before; or with
          --config.data.source=cifar:PATH, the unpacked binary version)
Hardware  one GPU
Settings  solo-learn's for CIFAR and 1000 epochs (scripts/pretrain/cifar), where it has the method;
          its LARS is our larc with clip_ratio. Epochs are 200 here: --config.epochs=1000 for theirs
Expected  linear % after 1000 epochs, solo-learn's claims: simclr 90.7, moco_v2 92.9, moco_v3 93.1,
          nnclr 91.9, byol 92.6, simsiam 90.5, barlow_twins 92.1, vicreg 92.1, w_mse 88.7,
          swav 89.2, ressl 90.6, dino 89.5, supcon 93.8; SIGReg 91.0 after 300 (eb_jepa's claim)
Status    not run on a GPU; configs/cifar10_cpu.py is this data at a budget for two CPU cores, run
"""

from ml_collections import ConfigDict

from ssrl_jax.config import base_config, change, view_group

# BYOL's asymmetric views.
ASYMMETRIC = {"global_views.saturation": 0.2, "global_views.solarise": (0.0, 0.2)}
SGD = {"optim.name": "sgd"}
ADAM = {"optim.name": "adamw", "optim.scale_by_batch": False}
VIT = {
  **ADAM,
  "encoder.name": "vit_ti",
  "encoder.vit.patch": 4,
  "encoder.vit.position": "sincos",
  "optim.learning_rate": 1e-3,
  "optim.weight_decay": 0.05,
  "optim.b2": 0.95,
}
PLAIN_VIEW = {
  "global_views.count": 1,
  "global_views.jitter": 0.0,
  "global_views.greyscale": 0.0,
  "global_views.area": (0.2, 1.0),
}
CONTRASTIVE = {"method.temperature": 0.2, "method.hidden_dim": 2048, "method.out_dim": 256}
QUEUE = {"method.queue_size": 32768, "method.tau": 0.99, "optim.learning_rate": 0.3}
METHODS = {
  "fusion": {
    "encoder.fusion.enabled": True,
    "method.place_weight": 1.0,
    "method.hidden_dim": 2048,
    "method.out_dim": 256,
    "optim.learning_rate": 0.3,
  },
  "finegrained": {**SGD, **QUEUE, "encoder.attention.enabled": True, "method.hidden_dim": 512},
  "simclr": {**CONTRASTIVE, "optim.learning_rate": 0.4, "optim.weight_decay": 1e-5},
  "moco_v2": {**SGD, **QUEUE, "method.hidden_dim": 512, "method.out_dim": 256},
  "moco_v3": {**ASYMMETRIC, **CONTRASTIVE, "optim.learning_rate": 0.3, "optim.weight_decay": 1e-6},
  "nnclr": {
    "method.temperature": 0.2,
    "method.queue_size": 65536,
    "method.predictor_dim": 4096,
    "optim.learning_rate": 0.4,
    "optim.weight_decay": 1e-5,
  },
  "dcl": {**CONTRASTIVE, "optim.learning_rate": 0.4, "optim.weight_decay": 1e-5},
  "byol": {
    **ASYMMETRIC,
    "method.hidden_dim": 4096,
    "method.tau": 0.99,
    "optim.learning_rate": 1.0,
    "optim.weight_decay": 1e-5,
  },
  "simsiam": {
    **SGD,
    "method.num_layers": 2,
    "optim.learning_rate": 0.5,
    "optim.weight_decay": 1e-5,
  },
  "barlow_twins": {
    **ASYMMETRIC,
    "method.hidden_dim": 2048,
    "method.out_dim": 2048,
    "method.scale": 0.1,
    "optim.learning_rate": 0.3,
  },
  "vicreg": {
    **ASYMMETRIC,
    "method.hidden_dim": 2048,
    "method.out_dim": 2048,
    "optim.learning_rate": 0.3,
  },
  # As byol: nobody's for CIFAR are known.
  "tico": {
    **ASYMMETRIC,
    "optim.learning_rate": 1.0,
    "optim.weight_decay": 1e-5,
  },
  "w_mse": {
    **ADAM,
    "method.iterations": 4,
    "optim.learning_rate": 2e-3,
    "optim.weight_decay": 1e-6,
  },
  "lejepa": {
    **ADAM,
    "method.out_dim": 64,
    "optim.learning_rate": 2e-3,
    "optim.weight_decay": 5e-4,
  },
  "mmcr": {  # the official CIFAR run's but for its 500 epochs, constant rate and L2 decay
    **ADAM,
    "batch_size": 32,
    "global_views.count": 40,
    "method.hidden_dim": 512,
    "method.out_dim": 128,
    "method.num_layers": 2,
    "optim.learning_rate": 1e-3,
    "optim.weight_decay": 1e-6,
  },
  "swav": {
    "method.queue_size": 3840 // 512 * 512,
    "method.queue_start": 50.0,
    "method.freeze_epochs": 2.0,
    "optim.learning_rate": 0.6,
    "optim.weight_decay": 1e-6,
  },
  # Of solo-learn but for the queue, of 4096 as in the paper: its own holds more than the set.
  "ressl": {
    **SGD,
    "global_views.count": 1,
    "global_views.saturation": 0.2,
    "global_views.blur": (0.5,),
    "method.queue_size": 4096,
    "method.tau": 0.99,
    "method.out_dim": 256,
    "optim.learning_rate": 0.05,
  },
  "dino": {
    **ASYMMETRIC,
    "method.num_prototypes": 4096,
    "method.tau": 0.9995,
    "method.warmup_epochs": 10.0,
    "optim.learning_rate": 0.3,
    "optim.weight_decay": 1e-6,
  },
  "ibot": {
    **VIT,
    **ASYMMETRIC,
    "method.num_prototypes": 4096,
    "method.warmup_epochs": 10.0,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
    "optim.clip_norm": 3.0,
    "optim.clip_each": True,
  },
  "dinov2": {
    **VIT,
    **ASYMMETRIC,
    "method.num_prototypes": 4096,
    "method.warmup_epochs": 10.0,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
    "optim.clip_norm": 3.0,
  },
  "msn": {  # none known; the official ImageNet run's heads and decay
    **VIT,
    "global_views.area": (0.3, 1.0),
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
    "optim.clip_norm": 3.0,
  },
  "mae": {**VIT, **PLAIN_VIEW, "method.decoder_dim": 192, "method.decoder_depth": 4},
  "simmim": {**VIT, **PLAIN_VIEW, "encoder.vit.pool": "mean", "method.mask_size": 8},
  "ijepa": {
    **VIT,
    **PLAIN_VIEW,
    "encoder.vit.pool": "mean",
    "method.predictor_dim": 96,
    "method.predictor_depth": 6,
    "method.predictor_heads": 3,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
  },
  "densecl": {**SGD, **QUEUE, "method.hidden_dim": 512},
  "vicregl": {
    **ASYMMETRIC,
    "method.hidden_dim": 2048,
    "method.out_dim": 2048,
    "optim.learning_rate": 0.3,
  },
  "rotation": {
    **SGD,
    "global_views.count": 4,
    "global_views.jitter": 0.0,
    "global_views.greyscale": 0.0,
    "optim.learning_rate": 0.1,
    "optim.weight_decay": 5e-4,
  },
  "jigsaw": {
    **SGD,
    "global_views.count": 1,
    "global_views.jitter": 0.0,
    "method.num_permutations": 1000,
    "method.tile_dim": 256,
    "method.hidden_dim": 1024,
    "optim.learning_rate": 0.1,
    "optim.weight_decay": 5e-4,
  },
  "hybrid": {
    "method.terms": ("simclr", "barlow_twins"),
    "method.weights": (1.0, 0.1),
    "method.options": {
      "simclr": {"temperature": 0.2, "hidden_dim": 2048, "out_dim": 256},
      "barlow_twins": {"hidden_dim": 2048, "out_dim": 2048, "scale": 0.1},
    },
    "optim.learning_rate": 0.3,
  },
  "supcon": {**CONTRASTIVE, "optim.learning_rate": 0.4, "optim.weight_decay": 1e-5},
  "supervised": {**SGD, "optim.learning_rate": 0.1, "optim.weight_decay": 5e-4},
}


def get_config(method: str = "fusion") -> ConfigDict:
  c = base_config(method)
  c.batch_size = 512
  c.epochs = 200.0
  c.encoder.name = "resnet18"
  c.encoder.dtype = "bfloat16"
  c.encoder.resnet.stem = "cifar"
  c.data.source = "tfds:cifar10"
  c.data.canvas = 32
  c.data.threads = 8
  c.data.mean = (0.4914, 0.4822, 0.4465)
  c.data.std = (0.2470, 0.2435, 0.2616)
  # SimCLR's CIFAR views: jitter of strength 0.5, no blur.
  c.global_views = view_group(
    size=32, area=(0.08, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
  )
  c.optim.update({"name": "larc", "clip_ratio": True, "trust_coefficient": 0.02})
  c.optim.update({"scale_by_batch": True, "weight_decay": 1e-4, "warmup_epochs": 10.0})
  c.checkpoint.every_steps = 1000
  c.log.every_steps = 50
  c.evaluate.update({"size": 32, "crop": 1.0, "batch_size": 512})
  if method not in METHODS:
    raise ValueError(f"configs/cifar10.py has no settings for {method!r}; add them to its METHODS")
  change(c, METHODS[method])
  return c
