"""The number and names of an adapter's classes come from the folder beside it, for adapters of every method."""

import json

import pytest
from peft import (
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from peft_calib import BayesianLoraConfig, HyperLoraConfig
from peft_calib.artefact import Artefact
from peft_calib.classes import name_classes_of_adapters, read_class_names

NAMES = ["low", "fair", "good", "high", "007"]
KINDS = {
    TaskType.SEQ_CLS: (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification),
    TaskType.TOKEN_CLS: (AutoModelForTokenClassification, AutoPeftModelForTokenClassification),
}


@pytest.fixture
def adapter(tiny_model_folder, tmp_path):
    """Save an adapter for five classes, with or without their names beside it."""

    def save(config_class=LoraConfig, task=TaskType.SEQ_CLS, names=NAMES):
        base = KINDS[task][0].from_pretrained(tiny_model_folder, num_labels=5, ignore_mismatched_sizes=True)
        config = config_class(r=2, target_modules=["query", "value"], task_type=task)
        get_peft_model(base, config).save_pretrained(tmp_path)
        if names is not None:
            Artefact(classes=tuple(names)).write(tmp_path)
        return tmp_path

    return save


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("config_class", [LoraConfig, HyperLoraConfig, BayesianLoraConfig])
def test_an_adapter_alone_has_its_classes(adapter, config_class, task):
    config = KINDS[task][1].from_pretrained(adapter(config_class, task)).config
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: position for position, name in enumerate(NAMES)}
    assert config.num_labels == 5


def test_the_caller_knows_better(adapter):
    folder = adapter()
    classes = {position: f"class {position}" for position in range(5)}
    options = {"id2label": classes, "ignore_mismatched_sizes": True}
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder, **options)
    assert loaded.config.id2label == classes


def test_without_names_everything_is_as_in_peft(adapter):
    with pytest.raises(RuntimeError, match="size mismatch"):
        AutoPeftModelForSequenceClassification.from_pretrained(adapter(names=None))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        AutoPeftModelForSequenceClassification.from_pretrained("no such adapter")


def test_a_subclass_stays_itself(adapter):
    class Mine(AutoPeftModelForSequenceClassification):
        _target_class = None

    with pytest.raises(ValueError, match="specific class"):  # it is Mine that is asked
        Mine.from_pretrained(adapter())


def test_calling_it_again_changes_nothing():
    before = AutoPeftModelForSequenceClassification.from_pretrained.__func__
    name_classes_of_adapters()
    assert AutoPeftModelForSequenceClassification.from_pretrained.__func__ is before


def test_the_file_of_earlier_versions_is_read(adapter):
    folder = adapter(names=None)
    (folder / "classes.json").write_text(json.dumps({"names": NAMES}))
    assert read_class_names(folder) == NAMES
    assert AutoPeftModelForSequenceClassification.from_pretrained(folder).config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("content", ["{}", '{"names": []}', '{"names": ["a", "a"]}', '{"names": [1]}', "["])
def test_a_damaged_file_of_earlier_versions_is_named(adapter, content):
    folder = adapter(names=None)
    (folder / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=r"classes\.json"):
        AutoPeftModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("classes", []), ("classes", ["a", "a"]), ("classes", [1, 2]), ("format_version", 2), ("format_version", True)],
)
def test_a_damaged_file_is_named(adapter, field, value):
    folder = adapter()
    file = folder / "predictor.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"predictor\.json: {field} is "):
        read_class_names(folder)
    with pytest.raises(ValueError, match=r"predictor\.json"):
        AutoPeftModelForSequenceClassification.from_pretrained(folder)
