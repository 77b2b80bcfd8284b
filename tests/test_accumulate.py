"""Parts of a batch give the gradient of the whole, with less memory, or are refused."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssrl_jax import parallel
from ssrl_jax.accumulate import accumulated, cut_networks, in_parts
from ssrl_jax.experiment import abstract_state, split_name, view_specs
from ssrl_jax.flops import count_flops
from ssrl_jax.method import Features, Run
from ssrl_jax.methods import METHODS
from ssrl_jax.step import abstract_views, flops_per_step
from tests.methods.common import (
  LOCAL,
  VIT,
  assert_close,
  make_config,
  make_experiment,
  random_inputs,
  random_like,
)

IMAGE = 16 * 16 * 3  # numbers in a view


class Patches(nn.Module):
  """A small encoder that sees each image by itself, has maps, and compiles fast."""

  width: int = 12
  dropout: float = 0.0

  @nn.compact
  def __call__(self, images_BHWC, train):
    b, _, _, c = images_BHWC.shape
    x_BnM = images_BHWC.reshape(b, -1, 16 * c)
    x_BnD = nn.tanh(nn.Dense(self.width)(x_BnM))
    x_BnD = nn.Dropout(self.dropout, deterministic=not train)(x_BnD)
    x_BnD = nn.tanh(nn.Dense(self.width)(x_BnD))
    return Features(jnp.mean(x_BnD, axis=1), {4: x_BnD[:, None]})


def small_method(name, overrides, *, batch_size=8, encoder=None):
  config = make_config(name, overrides | {"encoder.fusion.enabled": False})
  config.batch_size = batch_size
  if "slice_size" in config.method:
    config.method.slice_size = batch_size
  name, options = split_name(config.method)
  run = Run(batch_size, 16, 20, 10)
  encoder = encoder or Patches()
  return METHODS[name](encoder=encoder, views=view_specs(config), run=run, **options)


def compiled_gradient(method, arguments, **options):
  gradient = jax.value_and_grad(method.loss, has_aux=True)
  return jax.jit(gradient, **options).lower(*arguments).compile()


# One of each family of losses, of each way in which a method applies its networks.
FAMILIES = {
  "simclr": {},  # all pairs of the batch; BatchNorm in the head
  "moco_v2": {},  # a queue and a target; no BatchNorm anywhere
  "swav": LOCAL | {"method.queue_size": 0},  # Sinkhorn over the batch; local views
  "vicreg": {},  # covariance over the batch
}


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_give_loss_gradient_and_state_of_the_whole_batch(name):
  whole = small_method(name, FAMILIES[name])
  arguments = random_inputs(whole)
  parts = accumulated(whole, 4, batch_size=8, num_devices=1)
  (loss, aux), gradient = compiled_gradient(whole, arguments)(*arguments)
  (loss_4, aux_4), gradient_4 = compiled_gradient(parts, arguments)(*arguments)
  np.testing.assert_allclose(loss_4, loss, rtol=1e-5)
  assert_close(aux_4, aux, scale=1.0)
  assert_close(gradient_4, gradient, scale=float(optax.tree.norm(gradient)))


@pytest.mark.parametrize("name", ["simclr", "moco_v2"])
def test_eight_devices_in_parts_agree_with_one_and_exchange_no_images(name):
  whole = small_method(name, {}, batch_size=16)
  arguments = random_inputs(whole, 16)
  (loss, _), gradient = compiled_gradient(whole, arguments)(*arguments)
  parts = accumulated(whole, 2, batch_size=16, num_devices=8)
  mesh = parallel.make_mesh(8)
  all_of, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
  shardings = {"in_shardings": (all_of, all_of, cut, all_of, all_of), "out_shardings": all_of}
  compiled = compiled_gradient(parts, arguments, **shardings)
  (loss_8, _), gradient_8 = compiled(*arguments)
  np.testing.assert_allclose(loss_8, loss, rtol=1e-5)
  assert_close(gradient_8, gradient, scale=float(optax.tree.norm(gradient)))
  moved = re.findall(
    r"= \S*?\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", compiled.as_text()
  )
  sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in moved]
  assert max(sizes, default=0) < IMAGE, sizes


def temporary_bytes(method, batch_size):
  return (
    compiled_gradient(method, random_inputs(method, batch_size))
    .memory_analysis()
    .temp_size_in_bytes
  )


def test_memory_falls_with_the_number_of_parts():
  whole = small_method("simclr", {}, batch_size=64, encoder=Patches(width=96))
  sizes = [
    temporary_bytes(accumulated(whole, n, batch_size=64, num_devices=1), 64) for n in (1, 4, 16)
  ]
  assert sizes[1] < 0.5 * sizes[0]
  assert sizes[2] < 0.5 * sizes[1]


def test_what_goes_along_with_an_image_is_cut_alike():
  """As the order of MAE's patches; and an example's rows stay together, as jigsaw's tiles."""
  image_N, order_NK = jnp.arange(16.0), jnp.arange(32).reshape(16, 2)

  def apply(part, args, kwargs):
    (image_M, flag), order_MK = args, kwargs["order_NK"]
    assert flag is True
    assert (image_M.shape, order_MK.shape) == ((4,), (4, 2))
    return {"same": image_M, "sum": image_M + order_MK.sum(1), "pair": image_M.reshape(2, 2)}

  out = in_parts(apply, 4, 8, (image_N, True), {"order_NK": order_NK, "mask": None})
  np.testing.assert_array_equal(out["same"], image_N)
  np.testing.assert_array_equal(out["sum"], image_N + order_NK.sum(1))
  np.testing.assert_array_equal(out["pair"], image_N.reshape(8, 2))


def test_parts_draw_their_dropout_apart():
  network, key = Patches(dropout=0.5), jax.random.key(0)
  images = jnp.ones((8, 16, 16, 3))
  params = random_like(jax.eval_shape(lambda x: network.init(key, x, False), images)["params"])

  @jax.jit
  def pooled():
    with nn.intercept_methods(cut_networks(4, batch_size=8)):
      return network.apply({"params": params}, images, True, rngs={"dropout": key}).pooled

  assert len(np.unique(np.asarray(pooled()), axis=0)) == 8


def test_config_reaches_the_loss_and_counts_no_flop_twice():
  plain = make_experiment("simclr", VIT)
  parts = make_experiment("simclr", VIT | {"accumulate": 2, "encoder.remat": True})
  state = abstract_state(parts)
  arguments = state.params, state.method_state, abstract_views(parts), state.key, state.step
  counted = count_flops(jax.grad(parts.method.loss, has_aux=True), *arguments)
  # The encoder's forward pass twice more: of all parts, and of each block.
  assert flops_per_step(parts) == flops_per_step(plain) < counted


def test_terms_of_a_hybrid_are_cut_each_as_it_needs():
  """mae's network, which has no batch statistics, as a whole; of simclr's the encoder alone."""
  decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
  terms = {"method.terms": ("simclr", "mae"), "method.options": {"mae": decoder}}
  parts = make_experiment("hybrid", VIT | terms | {"accumulate": 2, "encoder.remat": True})

  def loss(key, views):
    return parts.method.loss(*parts.method.init(key, views), views, key, 0)[0]

  assert jax.eval_shape(loss, jax.random.key(0), abstract_views(parts)).shape == ()


def test_coupled_encoders_and_uneven_parts_are_refused():
  with pytest.raises(ValueError, match=r"accumulate is 4.*BatchNorm.*encoder.norm=group.*ViT"):
    make_experiment("simclr", {"accumulate": 4})
  make_experiment("fusion", {"accumulate": 4, "encoder.norm": "group"})
  with pytest.raises(ValueError, match=r"accumulate is 3: batch_size 8 on 1 .*nearest: 2"):
    make_experiment("simclr", VIT | {"accumulate": 3})
  with pytest.raises(ValueError, match=r"accumulate is 2: batch_size 8 on 8 .*nearest: 1"):
    make_experiment("simclr", VIT | {"accumulate": 2, "mesh.devices": 8})
  with pytest.raises(ValueError, match=r"accumulate is 0.*nearest: 1"):
    make_experiment("simclr", VIT | {"accumulate": 0})
