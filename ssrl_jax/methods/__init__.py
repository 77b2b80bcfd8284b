"""Every method by name. A new one is a file beside this, a line here, and an entry in a recipe."""

from ssrl_jax.methods import fusion, simclr

METHODS = {
  "fusion": fusion.make,
  "simclr": simclr.make,
}
