import numpy as np
import pytest

from ssrl_jax.evaluate import finetune as tuning
from ssrl_jax.evaluate import linear, low_label
from ssrl_jax.evaluate.labels import choose_ids
from tests.evaluate.tiny import Tints, evaluation

QUICK = {"fractions": (0.25,), "draws": 2, "steps": 20, "learning_rates": (0.1, 1.0),
         "weight_decays": (1e-3,)}  # fmt: skip
TUNING = {"finetune_epochs": 2, "finetune_warmup_epochs": 0.0, "finetune_layer_decay": 1.0}


@pytest.fixture(scope="module")
def judged():
  return evaluation()


def test_figures_are_the_mean_and_deviation_of_the_probe_on_each_draw(judged):
  found = low_label.run(judged, **QUICK | {"draws": 3})
  grid = {"learning_rates": (0.1, 1.0), "weight_decays": (1e-3,), "held_out": 0.2}
  test, expected = judged.features("test"), []
  for seed in range(3):
    ids = choose_ids(judged.train, label_fraction=0.25, seed=seed)
    probe = linear.fit_probe(judged, **grid, epochs=20, seed=seed, ids=ids)
    expected.append(100 * np.mean(probe.logits(test.features).argmax(1) == test.labels))
  assert found["low_label/25pct/accuracy"] == pytest.approx(np.mean(expected))
  assert found["low_label/25pct/std"] == pytest.approx(np.std(expected, ddof=1))
  assert found["low_label/25pct/labels"] == 16
  assert len(set(expected)) > 1  # the draws differ


def test_probe_sees_no_other_labels(judged):
  ids = choose_ids(judged.train, label_fraction=0.25, seed=0)
  expected = low_label.probe_accuracy(
    judged, ids, steps=20, batch_size=256, seed=0, learning_rates=(1.0,), weight_decays=(0.0,),
    held_out=0.2,
  )  # fmt: skip
  wrong = evaluation()
  rows = wrong.features("train")
  others = ~np.isin(rows.ids, ids)
  rows.labels[others] = (rows.labels[others] + 1) % 4
  found = low_label.probe_accuracy(
    wrong, ids, steps=20, batch_size=256, seed=0, learning_rates=(1.0,), weight_decays=(0.0,),
    held_out=0.2,
  )  # fmt: skip
  assert found == expected


def test_one_picture_a_class_needs_no_held_out_part(judged):
  found = low_label.run(judged, **QUICK | {"fractions": (), "nums_per_class": (1, 2)})
  assert found["low_label/1_per_class/labels"] == 4
  assert found["low_label/2_per_class/labels"] == 8
  assert 25 < found["low_label/1_per_class/accuracy"] <= 100


def test_list_is_one_draw_and_excludes_other_settings(judged, tmp_path):
  path = tmp_path / "list.txt"
  path.write_text("\n".join(map(str, range(12))))
  found = low_label.run(judged, **QUICK | {"labels_file": str(path)})
  assert found.keys() == {"low_label/file/accuracy", "low_label/file/labels"}
  assert found["low_label/file/labels"] == 12


def test_finetuned_is_finetune_on_the_same_pictures(judged):
  found = low_label.run(judged, **QUICK | TUNING | {"finetuned": True, "draws": 1})
  alone = tuning.run(
    judged, epochs=2, warmup_epochs=0.0, layer_decay=1.0, label_fraction=0.25, seed=0
  )
  assert found["low_label/25pct/finetuned"] == alone["finetune/accuracy"]
  assert "low_label/25pct/finetuned_std" not in found


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"fractions": (0.001,)}, "fraction 0.001 leaves class 0 of 16 pictures without a label"),
    ({"nums_per_class": (17,)}, "num_per_class is 17, but class 0 has 16"),
    ({"nums_per_class": (0,)}, r"nums_per_class is \(0,\)"),
    ({"fractions": ()}, "fractions and nums_per_class are empty"),
    ({"draws": 0}, "draws is 0"),
  ],
)
def test_option_out_of_range_is_an_error_of_one_line(judged, options, match):
  with pytest.raises(ValueError, match=match) as error:
    low_label.run(judged, **QUICK | options)
  assert "\n" not in str(error.value)


def test_unlabelled_training_pictures_are_an_error():
  with pytest.raises(ValueError, match="no labels to choose from"):
    low_label.run(evaluation(Tints(8, unlabelled=range(8))), **QUICK)
