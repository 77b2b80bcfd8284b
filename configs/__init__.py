"""Recipes: one file is one experiment. `--config=configs/FILE.py[:METHOD]`.

A recipe's METHODS says what it changes for each method: {path in the config: value}. SMALL is that
for encoders of some 10,000 parameters on 32 px and a batch of about 100.
"""

HEADS = {"method.hidden_dim": 128, "method.out_dim": 64}
VIT = {
  "encoder.name": "vit_nano",
  "encoder.vit.patch": 4,
  "encoder.vit.position": "sincos",
  "optim.learning_rate": 1e-3,
  "optim.weight_decay": 0.05,
}
TEACHER = {
  **HEADS,
  "method.num_prototypes": 256,
  "method.warmup_epochs": 2.0,
  "method.tau": 0.99,
  "method.freeze_epochs": 0.5,
}
SMALL = {
  "fusion": {
    "encoder.fusion.enabled": True,
    "encoder.fusion.coarsen": 1,
    "method.place_weight": 1.0,
  },
  "finegrained": {
    **HEADS,
    "encoder.attention.enabled": True,
    "encoder.attention.width": 48,
    "method.queue_size": 1024,
    "method.tau": 0.99,
  },
  "simclr": {**HEADS, "method.temperature": 0.2},
  "moco_v2": {**HEADS, "method.queue_size": 1024, "method.tau": 0.99},
  "moco_v3": {**HEADS, "method.temperature": 0.2},
  "nnclr": {**HEADS, "method.queue_size": 1024, "method.predictor_dim": 128},
  "dcl": {**HEADS, "method.temperature": 0.2},
  "byol": {**HEADS},
  "simsiam": {
    "method.hidden_dim": 128,
    "method.out_dim": 128,
    "method.num_layers": 2,
    "method.predictor_dim": 32,
  },
  "barlow_twins": {"method.hidden_dim": 256, "method.out_dim": 256, "method.num_layers": 2},
  "vicreg": {"method.hidden_dim": 256, "method.out_dim": 256, "method.num_layers": 2},
  "tico": {**HEADS},
  "w_mse": {"method.hidden_dim": 128, "method.out_dim": 32, "method.slice_size": 64},
  "lejepa": {"method.hidden_dim": 128, "method.out_dim": 32, "method.num_layers": 2},
  "mmcr": {"method.hidden_dim": 128, "method.out_dim": 64, "method.num_layers": 2},
  "swav": {**HEADS, "method.num_prototypes": 128, "method.freeze_epochs": 0.5},
  "ressl": {
    **HEADS,
    "global_views.count": 1,
    "method.queue_size": 1024,
    "method.tau": 0.99,
  },
  "dino": TEACHER,
  "ibot": {**VIT, **TEACHER},
  "dinov2": {**VIT, **TEACHER},
  "msn": {**VIT, **HEADS, "method.num_prototypes": 256, "method.tau": 0.99},
  "mae": {
    **VIT,
    "global_views.count": 1,
    "global_views.jitter": 0.0,
    "global_views.greyscale": 0.0,
    "method.decoder_dim": 64,
    "method.decoder_depth": 2,
    "method.decoder_heads": 4,
  },
  "simmim": {
    **VIT,
    "encoder.vit.pool": "mean",
    "global_views.count": 1,
    "global_views.jitter": 0.0,
    "global_views.greyscale": 0.0,
    "method.mask_size": 8,
  },
  "ijepa": {
    **VIT,
    "encoder.vit.pool": "mean",
    "global_views.count": 1,
    "global_views.jitter": 0.0,
    "global_views.greyscale": 0.0,
    "method.predictor_dim": 48,
    "method.predictor_depth": 3,
    "method.predictor_heads": 3,
  },
  "densecl": {**HEADS, "method.queue_size": 1024, "method.tau": 0.99},
  "vicregl": {
    "method.hidden_dim": 256,
    "method.out_dim": 256,
    "method.num_layers": 2,
    "method.maps_dim": 64,
  },
  "rotation": {"global_views.count": 4},
  "jigsaw": {
    "global_views.count": 1,
    "method.num_permutations": 100,
    "method.tile_dim": 32,
    "method.hidden_dim": 256,
  },
  "hybrid": {
    "method.options": {
      "simclr": {"hidden_dim": 128, "out_dim": 64, "temperature": 0.2},
      "vicreg": {"hidden_dim": 256, "out_dim": 256, "num_layers": 2},
    }
  },
  "supcon": {**HEADS},
  "supervised": {},
}
