"""Fitting, what is written and read, and what is refused."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from classifiers import classifier, rows
from drawn import copied, drawn
from peft import PeftModel
from safetensors.torch import load_file

from peft_calib.provenance.splits import record_split
from peft_calib.uncertainty_head import HeadSettings, UncertaintyHead, extract_features
from peft_calib.uncertainty_head.selection import aurocs, folds_of, held_part

SMALL = {"lr": (1e-2, 1e-3), "epochs": 4, "alpha": (0.1,), "beta": (0.01,), "folds": 2}


@pytest.fixture(scope="module")
def fitted():
    model, data = classifier("bert"), rows(150, seed=1)
    return model, data, UncertaintyHead.fit(model, None, data, keep_base=False, **SMALL)


@pytest.mark.parametrize("split", ["cross", "train", "validation"])
def test_a_head_that_can_help_does(split):
    """The frozen head is off by as much as it is right: on new rows a trained one ranks its errors better."""
    options = {"lr": (1e-2,), "beta": (0.01,), "alpha": (0.1, 1.0), "epochs": 10, "held_out": 0.3}
    head = UncertaintyHead.fit_features(drawn(800), drawn(800, seed=1), copied(), split=split, **options)
    new = drawn(4000, seed=2)
    found, errors = head.predict_features(new), new.errors.numpy()
    before, after = aurocs(torch.stack([found.base_uncertainty, found.error_probability]).numpy(), errors)
    assert after > before + 0.01
    assert found.error_probability.mean() == pytest.approx(errors.mean(), abs=0.05)
    assert (
        head.report.split == split and head.report.trials[head.report.chosen].error_auroc >= head.report.verdict.head
    )
    assert str(head.report.num_fit_errors) in str(head.report)


def test_on_the_rows_that_chose_it_a_head_is_never_worse_than_the_base_score():
    for seed in range(4):
        features = drawn(200, seed=seed)
        noise = torch.randint(4, (200,), generator=torch.Generator().manual_seed(seed))
        features = replace(features, labels=noise)  # nothing to learn
        head = UncertaintyHead.fit_features(drawn(200, seed=9), features, copied(), split="train", **SMALL)
        if head.report.chosen is None:
            assert head.stored.deltas is None and "no trial ranks" in head.report.why_base
        else:
            assert head.report.verdict.head > head.report.verdict.base


def test_functions_share_one_distance():
    """Of three functions; the score of their mean probabilities, and the mean of their scores."""
    for aggregate in ("bma", "mean_u"):
        features = drawn(600, functions=3)
        head = UncertaintyHead.fit_features(None, features, copied(), aggregate=aggregate, **SMALL)
        found = head.predict_features(drawn(300, seed=5, functions=3))
        assert found.error_probability.shape == (300,) and found.probabilities.shape == (300, 4)


def test_the_papers_have_their_grids():
    v1, v2 = HeadSettings.of(paper="v1"), HeadSettings.of(paper="v2")
    assert len(v1.trials) == 144 and v1.score == "sr_raw" and v1.split == "train" and v1.patience is None
    assert len(v2.trials) == 27 and v2.score == "entropy" and v2.split == "train"
    assert v1.head_dropout and v2.head_dropout and not (v1.keep_base or v2.keep_base or v1.balance or v2.balance)
    assert HeadSettings.of("sr_norm", "v2").score == "sr_norm"
    assert len(HeadSettings().trials) == 18


def test_folds_and_parts_share_the_errors_out_and_keep_a_row_together():
    features = drawn(200)
    for items in (None, torch.stack([torch.arange(200) // 4, torch.arange(200) % 4], dim=1)):
        some = replace(features, items=items)
        folds, held = folds_of(some, HeadSettings()), held_part(some, HeadSettings(held_out=0.25)).numpy()
        assert np.bincount(folds).min() >= 36
        assert 40 <= held.sum() <= 60
        if items is not None:
            assert all(len(set(folds[row * 4 : row * 4 + 4])) == 1 for row in range(50))
            assert all(len(set(held[row * 4 : row * 4 + 4])) == 1 for row in range(50))
    per_fold = [int(features.errors[folds_of(features, HeadSettings()) == fold].sum()) for fold in range(5)]
    assert max(per_fold) - min(per_fold) <= 1


def test_it_travels_with_the_adapter(fitted, tmp_path):
    model, data, head = fitted
    head.attach(model)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"uncertainty_head.json", "uncertainty_head.safetensors", "adapter_model.safetensors"} <= names
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    again = PeftModel.from_pretrained(classifier("bert", adapt=False), tmp_path).eval()
    loaded = UncertaintyHead.from_pretrained(tmp_path, again)
    assert torch.equal(loaded.predict(again, data).error_probability, head.predict(model, data).error_probability)


def test_only_numbers_and_names_are_written(fitted, tmp_path):
    _, _, head = fitted
    head.save_pretrained(tmp_path, name="other")
    tensors = load_file(tmp_path / "uncertainty_head.other.safetensors")
    assert tensors.keys() == head.stored.deltas.keys()
    assert json.loads((tmp_path / "uncertainty_head.other.json").read_text())["settings"]["score"] == "entropy"
    with pytest.raises(FileNotFoundError, match="holds no uncertainty head 'default'"):
        UncertaintyHead.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="name of a head"):
        head.save_pretrained(tmp_path, name="../x")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format_version": 7}, "format_version is 7"),
        ({"settings": {"score": "margin"}}, "settings: score must be one of"),
        ({"prior": 2}, "prior is 2"),
        ({"calibration": {"method": "PlattScaling"}}, "format version|missing"),
        ({"weights": "0"}, "damaged, or is that of another head"),
        ({"trained": 1}, "trained is 1, but must be true or false"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(fitted, tmp_path, change, told):
    _, _, head = fitted
    head.save_pretrained(tmp_path)
    path = tmp_path / "uncertainty_head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=told):
        UncertaintyHead.from_pretrained(tmp_path)


def test_a_head_beside_another_adapter_is_refused(fitted, tmp_path):
    model, _, head = fitted
    classifier("bert", seed=3).save_pretrained(tmp_path)
    head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fitted for another adapter than lies there now.*allow_other=True"):
        UncertaintyHead.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="another adapter than lies there"):
        UncertaintyHead.from_pretrained(tmp_path, allow_other=True)
    model.save_pretrained(tmp_path)
    UncertaintyHead.from_pretrained(tmp_path)


def test_it_is_uploaded_in_one_commit(fitted, monkeypatch):
    _, _, head = fitted
    asked = {}

    class Api:
        def __init__(self, token=None):
            asked["token"] = token

        def file_exists(self, repo_id, name, revision):
            asked["looked"] = repo_id, name, revision
            return False

        def create_repo(self, repo_id, **options):
            asked["repo"] = repo_id, options

        def create_commit(self, repo_id, operations, **options):
            asked["commit"] = repo_id, {o.path_in_repo: o.path_or_fileobj for o in operations}, options
            return "done"

    monkeypatch.setattr("peft_calib.uncertainty_head.stored.HfApi", Api)
    assert head.push_to_hub("me/adapter", token="t", revision="main") == "done"
    assert asked["token"] == "t" and asked["repo"] == ("me/adapter", {"private": None, "exist_ok": True})
    repo, files, options = asked["commit"]
    assert repo == "me/adapter" and files == head.stored.files() and options["revision"] == "main"
    assert asked["looked"] == ("me/adapter", "adapter_model.safetensors", "main")


def test_labels_out_of_range_are_refused(fitted):
    features = drawn(100)
    for wrong, told in ((4, "from 0 to 4"), (-100, "from -100 to")):
        labels = features.labels.clone()
        labels[0] = wrong
        with pytest.raises(ValueError, match=f"validation labels run {told}.*classes 0 to 3"):
            UncertaintyHead.fit_features(None, replace(features, labels=labels), copied())
    model, data, _ = fitted
    with pytest.raises(ValueError, match="no class of the model, which has 3"):
        UncertaintyHead.fit(model, None, [{**row, "labels": 3} for row in data])


def test_features_of_another_head_are_refused():
    features = drawn(100)
    with pytest.raises(ValueError, match="not the features it reads"):
        UncertaintyHead.fit_features(None, replace(features, features=features.features + 1), copied())
    with pytest.raises(ValueError, match=r"logits of shape .1, 64, 4., but .* .1, 64, 3."):
        UncertaintyHead.fit_features(None, drawn(100, classes=3), copied())
    with pytest.raises(ValueError, match=r"cannot take the validation features of shape \(1, 100, 8\)"):
        UncertaintyHead.fit_features(None, replace(features, features=features.features[..., :8]), copied())


def test_rows_that_would_flatter_are_refused():
    features = drawn(100)
    hashes = np.arange(100, dtype=np.uint64)
    features = replace(features, hashes=hashes)
    other = replace(drawn(100, seed=1), hashes=hashes + np.uint64(50))
    with pytest.raises(ValueError, match="50% of the validation items are among the training items"):
        UncertaintyHead.fit_features(features, other, copied(), split="train")
    model, data = classifier("bert"), rows(150, seed=1)
    record_split(model, trained_on=data)
    with pytest.raises(ValueError, match="choose an uncertainty head by are among the 150 that the adapter was"):
        UncertaintyHead.fit(model, None, data)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"learning_rate": 1}, "Unknown option 'learning_rate' .* there are score, "),
        ({"lr": -1.0}, "lr must be a number of at least 0"),
        ({"epochs": 2.5}, "epochs must be a whole number of at least 1"),
        ({"score": "margin"}, "score must be one of 'entropy'"),
        ({"paper": "v3"}, "paper must be one of 'v1', 'v2'"),
        ({"split": "test"}, "split must be one of"),
        ({"balance": 1}, "balance must be True or False"),
        ({"split": "train"}, "split='train' fits on the training rows: give them"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        UncertaintyHead.fit_features(None, drawn(100), copied(), **options)


def test_rows_without_labels_or_without_a_head_are_refused(fitted):
    with pytest.raises(ValueError, match="have no labels, so that errors are unknown"):
        UncertaintyHead.fit_features(None, replace(drawn(100), labels=None), copied())
    with pytest.raises(ValueError, match="Validation rows are needed"):
        UncertaintyHead.fit_features(drawn(100), None, copied())
    head = UncertaintyHead.fit_features(None, drawn(100), copied(), **SMALL)
    with pytest.raises(ValueError, match=r"fitted to features.*Use predict_features"):
        head.predict(fitted[0], {})
    with pytest.raises(ValueError, match=re.escape("Give head=copy_head(model)")):
        UncertaintyHead(head.stored).predict_features(drawn(10))


@pytest.mark.parametrize("mark", [-1, -100, 7, 0.5])
def test_labels_do_not_matter_where_errors_are_predicted(fitted, mark):
    """Test sets mark rows without a label, as those of GLUE do by -1; a fit refuses them."""
    model, data, head = fitted
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in data[:6]]
    wanted = head.predict(model, bare)
    marked = [row | {"labels": mark} for row in bare]
    some = [row | {"labels": mark if place else 0} for place, row in enumerate(bare)]
    batch = {name: torch.tensor([row[name] for row in marked]) for name in marked[0]}
    for given in (marked, some, batch):
        assert torch.equal(head.predict(model, given, batch_size=6).error_probability, wanted.error_probability)
    with pytest.raises(ValueError, match=r"no class of the model|one class id an item"):
        UncertaintyHead.fit(model, None, marked)
    options = torch.tensor([[True, True, False]]).expand(6, 3)
    head.predict(model, [row | {"labels": 2} for row in bare], options=options)


def test_rows_that_cannot_be_read_are_refused_in_words(fitted):
    model, data, _ = fitted
    ragged = [row | {"input_ids": row["input_ids"][: 3 + place % 3]} for place, row in enumerate(data)]
    with pytest.raises(ValueError, match="as tokenizer=, a collator as collate_fn="):
        UncertaintyHead.fit(model, None, [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ragged])
    with pytest.raises(TypeError, match=r"rows are texts. Tokenise them first"):
        UncertaintyHead.fit(model, None, ["abc"] * 40)
    with pytest.raises(ValueError, match=r"None of the columns \['text', 'label'\] is an input of .*Tokenise"):
        UncertaintyHead.fit(model, None, [{"text": "abc", "label": 1}] * 40)
    with pytest.raises(TypeError, match=r"A row must be a mapping of input names to values, .*got tuple"):
        UncertaintyHead.fit(model, None, [([2, 3], 1)] * 40)


def test_numbers_of_numpy_and_torch_are_numbers(fitted, tmp_path):
    model, data, _ = fitted
    grid = {
        "lr": np.array([1e-3, 1e-2]),
        "epochs": np.int64(2),
        "alpha": torch.tensor([0.1]),
        "beta": [np.float32(0.5)],
    }
    head = UncertaintyHead.fit(model, None, data, seed=np.int64(3), keep_base=np.bool_(False), **grid)
    same = HeadSettings(
        lr=(1e-3, 1e-2), epochs=2, alpha=(float(torch.tensor(0.1)),), beta=0.5, seed=3, keep_base=False
    )
    assert head.settings == same
    head.save_pretrained(tmp_path)
    assert UncertaintyHead.from_pretrained(tmp_path).settings == same
    with pytest.raises(ValueError, match="seed must be a whole number"):
        UncertaintyHead.fit(model, None, data, seed=np.array([1, 2]))


def test_a_merged_adapter_is_refused(fitted):
    """Its base model would be another one, and the head that of no model that can be loaded."""
    model, data, head = fitted
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    for asked in (
        lambda: UncertaintyHead.fit(merged, None, data),
        lambda: extract_features(merged, data),
        lambda: head.predict(merged, data),
    ):
        with pytest.raises(ValueError, match=r"merged into the base weights.*unmerge_adapter\(\)"):
            asked()
    merged.unmerge_adapter()
    extract_features(merged, data[:4])
