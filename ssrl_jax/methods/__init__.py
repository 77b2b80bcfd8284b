"""Every method by name. A new one is a file beside this, a line here, and an entry in a recipe."""

from ssrl_jax.methods import (
  barlow_twins,
  byol,
  dcl,
  densecl,
  dino,
  dinov2,
  finegrained,
  fusion,
  hybrid,
  ibot,
  ijepa,
  jigsaw,
  lejepa,
  mae,
  mmcr,
  moco_v2,
  moco_v3,
  msn,
  nnclr,
  ressl,
  rotation,
  simclr,
  simmim,
  simsiam,
  supcon,
  supervised,
  swav,
  tico,
  vicreg,
  vicregl,
  w_mse,
)

METHODS = {
  "fusion": fusion.make,
  "finegrained": finegrained.make,
  # contrastive
  "simclr": simclr.make,
  "moco_v2": moco_v2.make,
  "moco_v3": moco_v3.make,
  "nnclr": nnclr.make,
  "dcl": dcl.make,
  # negative-free
  "byol": byol.make,
  "simsiam": simsiam.make,
  "barlow_twins": barlow_twins.make,
  "vicreg": vicreg.make,
  "tico": tico.make,
  "w_mse": w_mse.make,
  "lejepa": lejepa.make,
  "mmcr": mmcr.make,
  # prototypes and distillation
  "swav": swav.make,
  "ressl": ressl.make,
  "dino": dino.make,
  "ibot": ibot.make,
  "dinov2": dinov2.make,
  "msn": msn.make,
  # masked
  "mae": mae.make,
  "simmim": simmim.make,
  "ijepa": ijepa.make,
  # dense
  "densecl": densecl.make,
  "vicregl": vicregl.make,
  # pretext
  "rotation": rotation.make,
  "jigsaw": jigsaw.make,
  # a weighted sum of others
  "hybrid": hybrid.make,
  # upper controls, which read the labels
  "supcon": supcon.make,
  "supervised": supervised.make,
}
