"""Files beside an adapter, changed behind its back: a reader gives what was saved, or an error that names it.

Each example is a change drawn by hypothesis, of a field, of the text, or of the bytes of a file of tensors.
`COMPANION_MUTATIONS=100` tries as many of each file; the suite tries a few.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from peft_calib.artefact import ARTEFACT_FILE, Artefact, Inputs, read_artefact
from peft_calib.calibration import (
    AnswerCalibration,
    ConformalInterval,
    ConformalSets,
    LabelThresholds,
    SampleSets,
    SelectiveThreshold,
    TemperatureScaling,
    Watch,
    load_decision,
)
from peft_calib.calibration.recalibrate import VectorScaling
from peft_calib.calibration.recalibrate.fitted import load_state
from peft_calib.draws_index import read_draws_index, write_draws_index
from peft_calib.json_files import read_json
from peft_calib.methods.distillation import DISTILLATION_FILE, Distillation, distillation_of
from peft_calib.provenance.stored_decision import FittedTo, StoredDecision
from peft_calib.splits import SPLIT_FILE, read_split, record_split
from peft_calib.uncertainty_head import CopiedHead, FeatureSet, UncertaintyHead
from peft_calib.uncertainty_head.asked import Asked, Belonging
from peft_calib.uncertainty_head.stored import StoredHead

COUNT = int(os.environ.get("COMPANION_MUTATIONS", "25"))
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 300)
LOGITS = RNG.normal(size=(300, 3)) + 2 * np.eye(3)[LABELS]
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
P_LABELS = RNG.random((600, 2))
HELD = (RNG.random(P_LABELS.shape) < P_LABELS).astype(int)
SAID = {"mean_log_probability": -RNG.exponential(1.0, 200)}
RIGHT = RNG.random(200) < np.exp(SAID["mean_log_probability"])
MANY_RIGHT = RNG.random((200, 8)) < 0.5
ASKED = RNG.normal(size=(40, 3))
WRONG = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    0.5,
    -0.5,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [1],
    {"x": 2},
]


def ways_of(folder: Path) -> Any:
    """All that a `predictor.json` says. One whose digest was taken out was changed on purpose."""
    found = read_artefact(folder)
    if "digest" not in json.loads((folder / ARTEFACT_FILE).read_text()):
        raise ValueError(f"{ARTEFACT_FILE} has no digest")
    found.check_belongs(folder)
    if len(found.ways) < 2:
        raise ValueError(f"{ARTEFACT_FILE} has no temperature for one way, of which peft_calib.load warns")
    ways = {how: applied(load_state(state)) for how, state in found.ways.items()}
    return [ways, found.classes, found.label_tokens, found.inputs, found.seed, found.base, found.adapters]


def applied(method: Any) -> Any:
    return [method.transform(ASKED).tolist(), method.fitted_on]


def thresholds(file: Path) -> Any:
    rule = load_decision(file)
    return [rule.accept(PROBABILITIES[:40]).tolist(), rule.threshold, rule.fitted_on]


def sets(file: Path) -> Any:
    rule = load_decision(file)
    return [rule.predict(PROBABILITIES[:40]).tolist(), rule.fitted_on]


def saved_rule(file: Path) -> Any:
    return load_decision(file).state()


def saved_again(kind: type) -> Callable[[Path], Any]:
    """What is read, as it would be saved: all of it counts."""

    def read(file: Path) -> Any:
        again = file.with_suffix(".again")
        kind.load(file).save(again)
        return json.loads(again.read_text())

    return read


def write_decision(folder: Path) -> Path:
    rule = SelectiveThreshold(risk=0.2).fit(PROBABILITIES, LABELS)
    to = FittedTo(how="sample", num_samples=4, seed=0, recalibration=None)
    return StoredDecision(rule, to, ("sha256:0",), None, {}, ("a", "b", "c")).write(folder)


def recalibrated(file: Path) -> Any:
    return applied(load_state(read_json(file, "Fit it again")))


def write_predictor(folder: Path) -> Path:
    state = TemperatureScaling().fit(LOGITS, LABELS).state()
    artefact = Artefact(classes=("a", "b", "c"), label_tokens=(7, 8, 9), inputs=Inputs(max_length=64), seed=1)
    artefact = artefact.with_way("mean", 1, 0, state).with_way("sample", 4, 0, state)
    artefact.write(folder)
    return folder / "predictor.json"


def write_index(folder: Path) -> Path:
    for index in range(3):
        (folder / f"draw-{index}.gguf").write_bytes(bytes([index]))
    write_draws_index(folder, [f"draw-{index}.gguf" for index in range(3)], None, seed=1)
    return folder / "draws.json"


def write_distillation(folder: Path) -> Path:
    file = folder / DISTILLATION_FILE
    file.write_text(Distillation(90, 10, 8, 3, 0.01, 0.2, 0.9, 0.05).to_json())
    return file


def write_split(folder: Path) -> Path:
    record_split(folder, trained_on=[{"text": f"trained {i}"} for i in range(9)])
    record_split(folder, trained_on=[{"input_ids": [i]} for i in range(9)], calibrated_on=[{"text": "held out"}])
    return folder / SPLIT_FILE


def write_head(folder: Path) -> Path:
    """A head that trains; of an adapter and a way of asking that the record names."""
    generator = torch.Generator().manual_seed(0)
    frozen, features = nn.Linear(4, 3).requires_grad_(False), torch.randn(1, 200, 4, generator=generator)
    frozen.weight.copy_(torch.randn(3, 4, generator=generator))
    logits = frozen(features)
    labels = (logits[0] * torch.tensor([1.0, -1.0, 2.0])).argmax(-1)  # one class is always mistaken
    small = {"lr": (1e-2,), "epochs": 2, "alpha": (0.1,), "beta": (0.01,), "folds": 2, "keep_base": False}
    copied = CopiedHead(frozen, [dict(frozen.named_parameters())])
    head = UncertaintyHead.fit_features(None, FeatureSet(features, logits, labels), copied, **small)
    belongs = Belonging(("sha256:a",), "float32:b", "sha256:c", ("float32:d",))
    head.stored = replace(head.stored, asked=Asked("next_token", (7, 8, 9), "score", 4), belongs=belongs)
    assert head.stored.deltas and head.stored.calibration  # nothing that a record can hold is left out
    head.save_pretrained(folder)
    return folder / "uncertainty_head.json"


def read_head(file: Path) -> dict[str, bytes]:
    return StoredHead.read(file.parent).files()


def written(name: str, make: Callable[[], Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        make().save(folder / name)
        return folder / name

    return write


FILES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "predictor": (write_predictor, lambda file: ways_of(file.parent)),
    "draws": (write_index, lambda file: read_draws_index(file.parent)),
    "temperature": (written("t.json", lambda: TemperatureScaling().fit(LOGITS, LABELS)), recalibrated),
    "vector": (written("v.json", lambda: VectorScaling().fit(LOGITS, LABELS)), recalibrated),
    "threshold": (written("d.json", lambda: SelectiveThreshold(risk=0.2).fit(PROBABILITIES, LABELS)), thresholds),
    "sets": (written("s.json", lambda: ConformalSets(alpha=0.1).fit(PROBABILITIES, LABELS)), sets),
    "labels": (written("l.json", lambda: LabelThresholds(risk=0.2, miss=0.2).fit(P_LABELS, HELD)), saved_rule),
    "interval": (written("i.json", lambda: ConformalInterval(0.1).fit(LOGITS[:, 0], 1.0, LOGITS[:, 1])), saved_rule),
    "beside": (write_decision, lambda file: json.loads(StoredDecision.read(file).text())),
    "answers": (written("a.json", lambda: AnswerCalibration().fit(SAID, RIGHT)), saved_again(AnswerCalibration)),
    "samples": (written("n.json", lambda: SampleSets(alpha=0.2).fit(MANY_RIGHT)), saved_again(SampleSets)),
    "distillation": (write_distillation, lambda file: distillation_of(file.parent)),
    "split": (write_split, lambda file: read_split(file.parent).to_json()),
    "head": (write_head, read_head),
    "watch": (written("w.json", lambda: Watch().start(PROBABILITIES, LABELS)), saved_again(Watch)),
}


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something can be changed: every entry of every mapping, and of the first few of every list."""
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value[:4]))
    found = [(*path, key) for key, _ in inside]
    return found + [
        place for key, part in inside if isinstance(part, (dict, list)) for place in places(part, (*path, key))
    ]


@st.composite
def changed(draw: st.DrawFn, text: str) -> str:
    """The text of a JSON file after a tired hand, a careless script or a bad disk."""
    content = json.loads(text)
    how = draw(
        st.sampled_from(["value", "value", "value", "scaled", "gone", "twice", "cut", "dropped", "put", "flipped"])
    )
    if how in ("cut", "dropped", "put", "flipped"):
        at = draw(st.integers(0, len(text) - 1))
        if how == "flipped":
            return text[:at] + chr(ord(text[at]) ^ (1 << draw(st.integers(0, 6)))) + text[at + 1 :]
        put = draw(st.sampled_from('0129-"x,{')) if how == "put" else ""
        return text[:at] + put + ("" if how == "cut" else text[at + (how == "dropped") :])
    *above, key = draw(st.sampled_from(places(content)))
    owner = content = copy.deepcopy(content)
    for step in above:
        owner = owner[step]
    if how == "gone":
        del owner[key]
    elif how == "scaled" and isinstance(owner[key], (int, float)):
        owner[key] = owner[key] * 2 + 1
    elif how == "twice":
        return json.dumps(content)[:-1] + f", {json.dumps(str(above[0] if above else key))}: 1}}"
    else:
        owner[key] = draw(st.sampled_from(WRONG))
    return json.dumps(content)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_read_as_it_was_or_refused_by_name(name, tmp_path):
    write, read = FILES[name]
    file = write(tmp_path)
    good, expected = file.read_text(), read(file)
    refused = []

    @settings(max_examples=COUNT, deadline=None, database=None, derandomize=COUNT < 100, print_blob=False,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(text=changed(good))
    def hold(text):
        nonlocal refused
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read(file)
        except (ValueError, FileNotFoundError) as error:
            found, message = None, str(error)
        assert found == expected if found is not None else file.name in message
        refused += [text] if found is None else []

    hold()
    assert len(refused) > COUNT / 3  # changes that change nothing show nothing


@settings(max_examples=COUNT, deadline=None, database=None, derandomize=COUNT < 100,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(data=st.data())
def test_a_changed_byte_of_a_heads_tensors_is_refused_by_name(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "head"
    if not folder.exists():
        folder.mkdir()
        write_head(folder)
        (folder / "good").write_bytes((folder / "uncertainty_head.safetensors").read_bytes())
    good = (folder / "good").read_bytes()
    at, how = data.draw(st.integers(0, len(good) - 1)), data.draw(st.sampled_from(["flipped", "cut", "longer"]))
    flipped = good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :]
    changed = {"flipped": flipped, "cut": good[:at], "longer": good + bytes(1 + at % 8)}[how]
    (folder / "uncertainty_head.safetensors").write_bytes(changed)
    with pytest.raises(ValueError, match=r"uncertainty_head\.safetensors is damaged, .*Fit the uncertainty head"):
        StoredHead.read(folder)


def test_swapped_class_names_are_refused_and_a_change_on_purpose_is_not(tmp_path):
    file = write_predictor(tmp_path)
    content = json.loads(file.read_text()) | {"classes": ["b", "a", "c"]}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"predictor\.json was changed after .*leave the field digest out") as caught:
        read_artefact(tmp_path)
    assert "\n" not in str(caught.value)
    del content["digest"]  # and so files of earlier versions, which have none
    file.write_text(json.dumps(content))
    assert read_artefact(tmp_path).classes == ("b", "a", "c")


@pytest.mark.parametrize(
    ("name", "setting"),
    [("threshold", {"risk": 1.4}), ("sets", {"alpha": 0}), ("samples", {"alpha": 0}), ("interval", {"alpha": 2})],
)
def test_a_setting_that_nobody_may_give_is_refused_in_the_name_of_the_file(name, setting, tmp_path):
    write, read = FILES[name]
    file = write(tmp_path)
    content = json.loads(file.read_text())
    content["settings"] |= setting
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file.name}: .*{next(iter(setting))}"):
        read(file)
