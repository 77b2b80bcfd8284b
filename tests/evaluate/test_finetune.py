import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.evaluate import finetune as tuning
from ssrl_jax.evaluate import pictures
from ssrl_jax.evaluate.finetune import layer_factors, mean_class_accuracy
from ssrl_jax.evaluate.labels import choose_ids
from ssrl_jax.method import Features, apply_encoder
from ssrl_jax.models import make_encoder
from ssrl_jax.optim import decay_mask
from ssrl_jax.state import named_leaves
from tests.evaluate.tiny import SIZE, Tints, evaluation, little

QUICK = {"epochs": 6, "batch_size": 16, "learning_rate": 0.1, "warmup_epochs": 1.0,
         "layer_decay": 1.0}  # fmt: skip
RESNET = {"width": 4, "stem": "cifar", "zero_init": True}
VIT = {"patch": 4, "registers": 1, "position": "learned", "drop_path": 0.0, "pool": "class"}


def abstract_params(name, **wrappers):
  groups = {
    "fusion": {"enabled": False, "width": 4, "pooled": "backbone_scales", "coarsen": 0,
               "conv": "pointwise"},
    "attention": {"enabled": False, "width": 4, "heads": 2, "levels": 2, "reduction": 2},
  }  # fmt: skip
  for wrapper in wrappers:
    groups[wrapper]["enabled"] = True
  encoder = make_encoder(
    name=name, dtype="float32", norm="batch", remat=False, resnet=RESNET, vit=VIT, **groups
  )
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  return jax.eval_shape(
    lambda x: encoder.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, False),
    images,
  )["params"]


def factors(params):
  """{path: layers before the head} of every array, decay being 1/2."""
  return {
    name: round(-np.log2(factor)) for name, factor in named_leaves(layer_factors(params, 0.5))
  }


@pytest.fixture(scope="module")
def judged():
  return evaluation()


@pytest.fixture(scope="module")
def figures(judged):
  return tuning.run(judged, **QUICK)


def test_finetuning_learns_and_says_what_it_did(figures):
  assert 70 < figures["finetune/accuracy"] <= 100
  assert {k: figures[f"finetune/{k}"] for k in ("epochs", "labels", "label_noise")} == {
    "epochs": 6, "labels": 64, "label_noise": 0,
  }  # fmt: skip
  assert figures["finetune/mean_class_accuracy"] == pytest.approx(figures["finetune/accuracy"])
  assert "finetune/top5" not in figures


def test_pretrained_weights_are_left_alone(judged, figures):
  _, untouched = little()
  for ours, theirs in zip(jax.tree.leaves(judged.weights), jax.tree.leaves(untouched)):
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.fixture
def trained(monkeypatch):
  """What the last training gave: {"encoder", "head"}, batch statistics."""
  real, found = tuning.fit, {}

  def fit(*args, **kwargs):
    found["params"], found["stats"] = real(*args, **kwargs)
    return found["params"], found["stats"]

  monkeypatch.setattr(tuning, "fit", fit)
  return found


def test_every_array_and_batch_norms_moments_move(judged, trained):
  tuning.run(judged, **QUICK | {"epochs": 2})
  before = judged.weights
  for (name, old), (_, new) in zip(
    named_leaves(before), named_leaves({"params": trained["params"]["encoder"],
                                        "batch_stats": trained["stats"]}), strict=True
  ):  # fmt: skip
    assert np.abs(np.asarray(new) - np.asarray(old)).max() > 1e-5, name


def test_decay_leaves_the_head_s_bias_alone(judged, trained):
  tuning.run(judged, **QUICK | {"epochs": 2})
  assert decay_mask(trained["params"]["head"]) == {"kernel": True, "bias": False}


def test_weights_agree_on_1_and_8_devices(trained):
  options = QUICK | {"epochs": 1, "optimizer": "sgd", "warmup_epochs": 0.0, "learning_rate": 0.5}
  found = []
  for num_devices in (1, 8):
    tuning.run(evaluation(num_devices=num_devices), **options)
    found.append((trained["params"], trained["stats"]))
  for one, eight in zip(*map(jax.tree.leaves, found)):
    np.testing.assert_allclose(one, eight, rtol=1e-3, atol=1e-5)


def test_layer_decay_slows_what_comes_early(judged, trained):
  options = QUICK | {"epochs": 1, "optimizer": "sgd", "warmup_epochs": 0.0, "weight_decay": 0.0,
                     "learning_rate": 20.0}  # fmt: skip
  moved = {}
  for decay in (1.0, 0.1):
    tuning.run(judged, **options | {"layer_decay": decay, "batch_size": 32})
    difference = jax.tree.map(
      lambda new, old: np.abs(np.asarray(new) - np.asarray(old)).max(),
      trained["params"]["encoder"], judged.weights["params"],
    )  # fmt: skip
    moved[decay] = dict(named_leaves(difference)) | {"head": trained["params"]["head"]["kernel"]}
  # Of two steps the first moves the head only, which was zero, the second the encoder too.
  np.testing.assert_allclose(moved[0.1]["head"], moved[1.0]["head"], rtol=1e-5)
  for name, factor in (("stem_conv/kernel", 0.01), ("stage1_block1/scale", 0.1)):
    assert moved[0.1][name] == pytest.approx(factor * moved[1.0][name], rel=0.02)


def test_layer_factors_of_a_resnet():
  found = factors(abstract_params("resnet18"))
  expected = {"stem_conv/kernel": 9, "stem_norm/scale": 9, "stage1_block1/Conv_0/kernel": 8,
              "stage1_block2/Conv_0/kernel": 7, "stage2_block1/shortcut_conv/kernel": 6,
              "stage4_block2/BatchNorm_1/bias": 1}  # fmt: skip
  assert {k: found[k] for k in expected} == expected
  assert set(found.values()) == set(range(1, 10))


def test_layer_factors_of_a_vit():
  found = factors(abstract_params("vit_nano"))
  expected = {"patches/kernel": 7, "position": 7, "class_token": 7, "class_position": 7,
              "registers": 7, "block1/norm1/scale": 6, "block6/mlp_out/kernel": 1,
              "norm/scale": 0}  # fmt: skip
  assert {k: found[k] for k in expected} == expected
  assert sorted(set(found.values())) == list(range(8))


@pytest.mark.parametrize(("name", "depth"), [("resnet6", 2), ("vit_pico", 2)])
@pytest.mark.parametrize("wrapper", ["fusion", "attention"])
def test_layer_factors_of_a_wrapped_encoder_are_the_backbones_and_one(name, depth, wrapper):
  found = factors(abstract_params(name, **{wrapper: True}))
  alone = factors(abstract_params(name))
  inside = {k.removeprefix("backbone/"): v for k, v in found.items() if k.startswith("backbone/")}
  assert inside == alone
  assert max(inside.values()) == depth + 1
  own = {v for k, v in found.items() if not k.startswith("backbone/")}
  assert own == {0}


def test_layer_decay_of_ten_blocks_keeps_their_order():
  params = {f"block{i}": np.zeros(1) for i in range(1, 12)}
  assert factors(params) == {f"block{i}": 12 - i for i in range(1, 12)}


def test_layer_decay_without_blocks_is_an_error():
  with pytest.raises(ValueError, match=r"layer_decay is 0\.5, but the encoder has no blocks"):
    layer_factors({"dense": np.zeros(1)}, 0.5)
  assert layer_factors({"dense": np.zeros(1)}, 1.0) == {"dense": 1.0}


@pytest.fixture
def batches(monkeypatch):
  """The first epoch of batches, by id; nothing is trained."""
  found = {}

  def fit(loss, params, stats, batches, *, num_steps, **options):
    for _ in range(num_steps):
      batch = next(batches)
      found.update(zip(batch["id"].tolist(), zip(batch["label"].tolist(), batch["image"])))
    batches.close()
    return params, stats

  monkeypatch.setattr(tuning, "fit", fit)
  return found


def test_label_noise_reaches_the_training_pictures_and_no_others(judged, batches):
  clean = judged.train.labels.copy()
  noisy = tuning.run(judged, **QUICK | {"epochs": 2, "label_noise": 0.5})
  assert noisy["finetune/label_noise"] == 50
  assert np.sum(np.array([batches[i][0] for i in range(64)]) != clean) == 32
  for i in range(64):
    np.testing.assert_array_equal(batches[i][1], judged.train.images[i])
  np.testing.assert_array_equal(judged.train.labels, clean)
  np.testing.assert_array_equal(judged.features("test").labels, judged.test.labels)


def test_tolerant_loss_with_sgd_and_label_noise_learns(judged):
  options = {"optimizer": "sgd", "learning_rate": 10.0, "loss": "generalised", "label_noise": 0.2}
  found = tuning.run(judged, **QUICK | options | {"epochs": 12})
  assert found["finetune/accuracy"] > 60
  assert found["finetune/label_noise"] == pytest.approx(100 * 13 / 64)


def test_labels_in_use_are_those_of_the_choice(judged, batches):
  options = QUICK | {"num_per_class": 4, "seed": 5}
  assert tuning.run(judged, **options)["finetune/labels"] == 16
  ids = choose_ids(judged.train, num_per_class=4, seed=5)
  for i in range(16):
    label, image = batches[i]
    assert label == judged.train.labels[ids[i]]
    np.testing.assert_array_equal(image, judged.train.images[ids[i]])


def test_mean_class_accuracy_of_a_hand_case():
  logits = np.eye(3)[[0, 0, 0, 1]]
  assert mean_class_accuracy(logits, np.array([0, 0, 0, 2])) == 50
  assert mean_class_accuracy(logits, np.array([0, 0, 1, 1])) == pytest.approx(75)


def test_top5_appears_with_many_classes(batches):
  many = evaluation(Tints(40, num_classes=20), Tints(40, num_classes=20, seed=1), num_classes=20)
  found = tuning.run(many, **QUICK)
  assert found["finetune/accuracy"] == 5  # the head is zero: class 0 and, of five, 0 to 4
  assert found["finetune/top5"] == 25


def test_fewer_pictures_than_devices_come_several_times(batches):
  assert pictures.fit_batch_size(16, 5, 8) == (8, 2)
  assert pictures.fit_batch_size(16, 64, 8) == (16, 1)
  assert pictures.fit_batch_size(256, 70, 8) == (64, 1)
  few = evaluation(Tints(4), num_devices=8)
  assert tuning.run(few, **QUICK)["finetune/labels"] == 4
  assert [batches[i][0] for i in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
  for i in range(8):
    np.testing.assert_array_equal(batches[i][1], few.train.images[i % 4])


def test_relabelled_pictures_are_the_source_s_one_by_one_and_together():
  class Together(Tints):
    def read_together(self, positions):
      return {i: self[i] for i in positions}

  given = pictures.Relabelled(Together(9), np.array([7, 2, 7]), np.array([0, 3, 0]))
  assert len(given) == 3
  assert given.labels.tolist() == [0, 3, 0]
  together = given.read_together([0, 1, 2])
  assert together.keys() >= {1}  # of a picture that comes twice one is enough
  for i, example in [(i, given[i]) for i in range(3)] + list(together.items()):
    assert example["label"] == given.labels[i]
    np.testing.assert_array_equal(example["image"], Tints(9).images[given.positions[i]])


class Picture(nn.Module):
  @nn.compact
  def __call__(self, images, train):
    return Features(pooled=images.reshape(images.shape[0], -1), maps={})


def test_training_view_is_a_crop_or_its_mirror_image():
  source = Tints(4)
  judge = evaluation(
    source, encoder=(functools.partial(apply_encoder, Picture()), {"batch_stats": {}})
  )
  whole = judge.features("train").features.reshape(4, SIZE, SIZE, 3)
  batch = {"image": source.images, "extent": np.full((4, 2), SIZE, np.int32),
           "id": np.stack([np.arange(4), np.zeros(4)], 1).astype(np.uint32)}  # fmt: skip
  make = jax.jit(functools.partial(pictures.crop_and_flip, judge, smallest_crop=0.9999))
  flips = 0
  for seed in range(8):
    views = make(jax.random.key(seed), batch)
    for view, picture in zip(np.asarray(views), whole):
      mirrored = np.abs(view - picture[:, ::-1]).max() < 1e-4
      assert mirrored or np.abs(view - picture).max() < 1e-4
      flips += mirrored
  assert 6 <= flips <= 26


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"epochs": 0}, "epochs is 0"),
    ({"warmup_epochs": 6.0}, r"epochs is 6 and warmup_epochs 6\.0"),
    ({"optimizer": "lars"}, "unknown optimizer 'lars'; known: adamw, sgd"),
    ({"loss": "mae"}, "unknown loss 'mae'; known: cross_entropy, generalised, symmetric"),
    ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0"),
    ({"label_smoothing": 0.1, "loss": "symmetric"}, "but the loss is symmetric; set it to 0"),
    ({"layer_decay": 0.0}, r"layer_decay is 0\.0"),
    ({"label_fraction": 0.01}, "leaves class 0 of 16 pictures without a label"),
    ({"num_per_class": 17}, "num_per_class is 17, but class 0 has 16"),
    ({"loss": "generalised", "q": 2.0}, r"q is 2\.0"),
  ],
)
def test_option_out_of_range_is_an_error_of_one_line(judged, options, match):
  with pytest.raises(ValueError, match=match) as error:
    tuning.run(judged, **QUICK | options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_unlabelled_split_is_an_error_before_training(split, monkeypatch):
  monkeypatch.setattr(tuning, "fit", None)
  nothing = {split: Tints(16, unlabelled=range(16))}
  with pytest.raises(ValueError, match="no labels"):
    tuning.run(evaluation(**nothing), **QUICK)
