"""The plugin of vLLM without vLLM: what it makes of draws, requests and folders. With it: tests/serving."""

import asyncio
import json
import re
import runpy
import subprocess
import sys
import threading
import types
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from test_predictor import temperature

import peft_calib_vllm as plugin
from peft_calib.calibration import ConformalSets, SelectiveThreshold
from peft_calib.calibration.recalibrate import load_state
from peft_calib.files import file_hash
from peft_calib.json_files import Fields, sealed
from peft_calib.prediction import Prediction
from peft_calib.predictor import CalibratedPrediction
from peft_calib_vllm import Asked, Counts, Engine, Served, answer, combined, respond
from peft_calib_vllm_rules import FILES, NONE
from peft_calib_vllm_rules import Sets as ServedSets
from peft_calib_vllm_rules import Threshold as ServedThreshold


@pytest.fixture
def folder(tmp_path):
    """The index and the description of two draws, as an export writes them."""
    stored = {
        "format_version": 1,
        "classes": ["no", "yes"],
        "label_tokens": [7, 9],
        "inputs": {"max_length": 4},
        "ways": {"sample": {"num_samples": 2, "method": "TemperatureScaling", "parameters": {"temperature": 2.0}}},
    }
    (tmp_path / "draws.json").write_text(json.dumps({"draws": ["draw-0", "draw-1"]}))
    (tmp_path / "predictor.json").write_text(json.dumps(stored))
    return tmp_path


def paths(folder) -> dict[str, str]:
    return {name: str(folder / name) for name in ("mean", "draw-1", "draw-0")}


def test_nothing_of_ours_and_no_torch_is_imported():
    code = "import sys, peft_calib_vllm as p; print({'torch', 'vllm', 'peft', 'peft_calib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("value", [None, 0.4, 1.0, 3.0])
def test_draws_are_combined_as_a_predictor_does(value):
    generator = torch.Generator().manual_seed(0)
    draws = (6 * torch.randn(5, 40, 3, generator=generator)).softmax(-1)
    draws[0, 0] = torch.tensor([1.0, 0.0, 0.0])  # a probability of zero has a logarithm here and there
    draws[:, 1] = torch.tensor([0.0, 1.0, 0.0])
    method = None if value is None else load_state(Fields(temperature(value), "here"))
    made = Prediction(sample_probabilities=draws, num_forwards=5.0)
    ours = CalibratedPrediction.of(made, method, label_names=("a", "b", "c"))
    found = combined(draws.numpy(), value)
    for name, values in found.items():
        expected = getattr(ours, name)
        torch.testing.assert_close(torch.from_numpy(values), expected.double(), rtol=0, atol=1e-6, msg=name)


def labelled(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of four classes with labels drawn by them; some rows are equal, and some have ties and zeros."""
    generator = np.random.default_rng(seed)
    p = generator.dirichlet([0.3] * 4, count)
    p[:6] = p[0]
    p[6], p[7], p[8] = [0.25] * 4, [0.5, 0.5, 0, 0], [0, 0, 1, 0]
    return p, np.array([generator.choice(4, p=row) for row in p])


def stored(rule) -> dict:
    """What its file holds."""
    return json.loads(json.dumps(rule.state()))


@pytest.mark.parametrize(
    "rule",
    [
        SelectiveThreshold(risk=0.3),
        SelectiveThreshold(risk=0.28, per_class=True, temperature=1.5),
        SelectiveThreshold(target_coverage=0.7),
        ConformalSets(0.1),
        ConformalSets(0.1, "aps", temperature=0.7),
        ConformalSets(0.2, "raps", penalty=0.1, free_ranks=1, allow_empty=False),
        ConformalSets(0.2, "lac", groups="label"),
        ConformalSets(0.2, "aps", groups="predicted"),
        ConformalSets(0.4, "lac", randomized=True, seed=3),
        ConformalSets(0.4, "lac", randomized=True, groups="label", allow_empty=False),
        ConformalSets(0.2, "aps", randomized=True),
        ConformalSets(0.2, "raps", randomized=True, confidence=0.9, penalty=0.2, free_ranks=1),
    ],
    ids=lambda rule: "-".join(f"{value}" for value in (type(rule).__name__, *rule._settings().values())),
)
def test_rules_decide_as_the_package_does(rule):
    rule.fit(*labelled(800, 0))
    rows, _ = labelled(400, 1)
    if isinstance(rule, SelectiveThreshold):
        found, expected = ServedThreshold.of(stored(rule)).decide(rows), rule.accept(rows)
    else:
        found, expected = ServedSets.of(stored(rule)).decide(rows), rule.predict(rows)
    np.testing.assert_array_equal(found, expected)
    assert 0 < found.mean() < 1


def test_rules_that_ask_for_more_than_a_request_says_are_told():
    p, labels = labelled(400, 0)
    grouped = ConformalSets(0.2).fit(p, labels, groups=["a", "b"] * 200)
    assert "does not name" in ServedSets.of(stored(grouped))
    weighted = ConformalSets(0.2).fit(p, labels, sample_weight=np.linspace(1, 2, 400))
    assert "weights" in ServedSets.of(stored(weighted))
    few = p.argmax(1) < 3
    missing = ConformalSets(0.2, groups="predicted").fit(p[few], labels[few])
    assert "no cut for some" in ServedSets.of(stored(missing))


def test_draws_whose_weights_are_not_those_of_their_index_end_the_start(folder):
    for name in ("draw-0", "draw-1"):
        (folder / name).mkdir()
        (folder / name / "adapter_model.safetensors").write_bytes(name.encode())
    weights = {name: file_hash(folder / name / "adapter_model.safetensors") for name in ("draw-0", "draw-1")}
    (folder / "draws.json").write_text(json.dumps({"draws": list(weights), "weights": weights}))
    assert Served.of(paths(folder)).names == ("draw-0", "draw-1")
    (folder / "draw-1" / "adapter_model.safetensors").write_bytes(b"of another export")
    with pytest.raises(ValueError, match=r"draw-1.* is not the draw that was written there.*export_lora"):
        Served.of(paths(folder))


def test_labels_and_numbers_are_refused(folder):
    stored = json.loads((folder / "predictor.json").read_text()) | {"kind": "labels", "format_version": 2}
    (folder / "predictor.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="answers with labels; /v1/uncertainty answers with one of some classes"):
        Served.of(paths(folder))


def with_rules(folder, kind="threshold", **to):
    """A rule beside the draws of the folder, as an export writes it."""
    index = {"draws": ["draw-0", "draw-1"], "digests": {"draw-0": "a", "draw-1": "b", "mean": "c"}}
    (folder / "draws.json").write_text(json.dumps(index))
    p, labels = labelled(200, 0)
    p, labels = p[:, :2] / p[:, :2].sum(1, keepdims=True).clip(1e-9), labels % 2
    p[8] = [0.5, 0.5]
    rule = {"threshold": SelectiveThreshold(risk=0.6), "sets": ConformalSets(0.3)}[kind].fit(p, labels)
    way = {"method": "TemperatureScaling", "parameters": {"temperature": 2.0}}
    fitted = {"how": "sample", "num_samples": 2, "seed": None, "recalibration": way, "by": "probability"}
    content = {"format_version": 1, "promise": rule.promise(), "rule": stored(rule), "adapters": ["a", "b"]}
    content["fitted_to"] = fitted | {"head": None, "label_tokens": [7, 9]} | to
    (folder / FILES[kind]).write_text(json.dumps(content))
    return rule


def test_an_answer_has_the_decision_of_rules_beside_the_draws(folder):
    rules = with_rules(folder), with_rules(folder, "sets")
    served = Served.of(paths(folder))
    draws = np.random.default_rng(0).dirichlet([0.5, 0.5], (2, 50))
    content = answer(Asked({"texts": ["a"] * 50}, served), served, draws)
    assert content["decision"] == " ".join(rule.promise() for rule in rules)
    p = np.array([row["probabilities"] for row in content["data"]])
    assert [row["answered"] for row in content["data"]] == rules[0].accept(p).tolist()
    held = [{("no", "yes")[k] for k in np.flatnonzero(row)} for row in rules[1].predict(p)]
    assert [set(row["label_set"]) for row in content["data"]] == held
    assert all(row["label_set"][0] == row["label"] for row in content["data"] if len(row["label_set"]) == 2)
    other = answer(Asked({"texts": ["a"] * 50, "label_tokens": [3, 4]}, served), served, draws)
    assert "this request names others" in other["decision"] and "answered" not in other["data"][0]
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize(
    ("to", "why"),
    [
        ({"num_samples": 3}, "another way of predicting"),
        ({"how": "mean", "num_samples": 1}, "another way of predicting"),
        ({"recalibration": None}, "another recalibration"),
        ({"by": "head"}, "an uncertainty head"),
        ({"label_tokens": [7, 8]}, "other label tokens"),
    ],
)
def test_a_rule_that_is_not_for_these_draws_is_told_in_one_line(folder, to, why):
    with_rules(folder, **to)
    rules = Served.of(paths(folder)).rules
    assert rules.threshold is None and why in rules.told and "\n" not in rules.told
    assert rules.rows(np.array([[0.2, 0.8]]), ("no", "yes")) == [{}]


def test_rules_of_other_draws_and_damaged_ones(folder):
    assert Served.of(paths(folder)).rules.told == NONE
    with_rules(folder)
    place = folder / FILES["threshold"]
    content = json.loads(place.read_text())
    place.write_text(json.dumps(content | {"adapters": ["a", "x"]}))
    assert "other weights than these draws" in Served.of(paths(folder)).rules.told
    other = content["rule"] | {"rule": "SomeOtherRule"}
    place.write_text(json.dumps(content | {"rule": other}))
    assert "is a SomeOtherRule" in Served.of(paths(folder)).rules.told
    place.write_text(json.dumps(sealed(content)))
    assert Served.of(paths(folder)).rules.threshold is not None
    place.write_text(json.dumps(sealed(content) | {"promise": "Nothing is wrong."}))
    with pytest.raises(ValueError, match="was changed after"):
        Served.of(paths(folder))
    place.write_text(json.dumps(content | {"format_version": 2}))
    assert "does not read" in Served.of(paths(folder)).rules.told
    for damage in ({"rule": {}}, {"fitted_to": None}, {"rule": content["rule"] | {"num_classes": 2, "fitted": {}}}):
        place.write_text(json.dumps(content | damage))
        with pytest.raises(ValueError, match=r"decision.threshold.json is damaged") as caught:
            Served.of(paths(folder))
        assert "\n" not in str(caught.value)


def test_what_was_answered_is_counted(monkeypatch):
    counted = {}

    def figure(name, _, labels=()):
        def add(value=1.0, key=name):
            counted[key] = counted.get(key, 0.0) + value

        return types.SimpleNamespace(
            inc=add, observe=add, labels=lambda label: types.SimpleNamespace(inc=lambda: add(key=f"{name} {label}"))
        )

    fake = types.SimpleNamespace(Counter=figure, Summary=figure)
    monkeypatch.setitem(sys.modules, "prometheus_client", fake)
    counts, row = Counts(), {"entropy": 0.25, "mutual_information": 0.5}
    counts.add({"data": [row | {"answered": True}, row | {"answered": False}]})
    counts.add({"data": [row, row | {"answered": False}]})
    assert counted == {
        "peft_calib_prompts": 4,
        "peft_calib_entropy_nats": 1.0,
        "peft_calib_mutual_information_nats": 2.0,
        "peft_calib_decided answered": 1,
        "peft_calib_decided passed_on": 2,
    }


def test_the_folder_of_the_draws_is_read(folder):
    served = Served.of(paths(folder))
    assert (served.names, served.labels, served.label_tokens) == (("draw-0", "draw-1"), ("no", "yes"), (7, 9))
    assert (served.temperature, served.max_length) == (2.0, 4)
    (folder / "predictor.json").unlink()
    assert Served.of(paths(folder)).temperature is None


def edited(folder, **changes) -> None:
    place = folder / "predictor.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))


def test_what_cannot_be_applied_ends_the_start(folder, tmp_path):
    def refused(message, given=None):
        with pytest.raises(ValueError, match=message) as caught:
            Served.of(paths(folder) if given is None else given)
        assert "\n" not in str(caught.value)

    refused("draw-0, draw-1 ... without a gap", {"mean": "x"})
    refused("without a gap", {"draw-0": "x", "draw-2": "y"})
    refused("several folders", {"draw-0": "a/draw-0", "draw-1": "b/draw-1"})
    refused(r"names \['draw-0', 'draw-1'\]", {**paths(folder), "draw-2": str(folder / "draw-2")})
    way = {"method": "VectorScaling", "parameters": {}}
    edited(folder, ways={"sample": way})
    refused("stores a VectorScaling")
    edited(folder, ways={"sample": {"method": "TemperatureScaling", "parameters": {"temperature": -1}}})
    refused("holds the temperature -1")
    edited(folder, format_version=2)
    refused("reads 1")
    (folder / "predictor.json").write_text("{")
    refused("is damaged")
    (folder / "predictor.json").write_text("[]")
    refused("holds no mapping")


SERVED = Served(("draw-0", "draw-1"), ("no", "yes"), (7, 9), 2.0, 4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "must be an object"),
        ({}, "must hold texts"),
        ({"texts": ["a"], "prompts": ["a"]}, "must hold texts"),
        ({"texts": ["a"], "temperature": 1}, "must hold texts"),
        ({"texts": "a"}, "1 to 1024"),
        ({"texts": []}, "1 to 1024"),
        ({"texts": ["a"] * 1025}, "1 to 1024"),
        ({"texts": ["a", ""]}, "Text 1"),
        ({"texts": [["a", "b"]]}, "Text 0"),
        ({"texts": [[1, -2]]}, "Text 0"),
        ({"texts": [[True]]}, "Text 0"),
        ({"texts": [[]]}, "Text 0"),
        ({"texts": ["a"], "label_tokens": [3]}, "at least two different"),
        ({"texts": ["a"], "label_tokens": [3, 3]}, "at least two different"),
        ({"texts": ["a"], "label_tokens": "yes"}, "at least two different"),
        ({"texts": ["a"], "labels": "ab"}, "list of names"),
        ({"texts": ["a"], "labels": [1, 2]}, "list of names"),
    ],
)
def test_a_bad_request_is_told(body, message):
    with pytest.raises(ValueError, match=message):
        Asked(body, SERVED)


def test_other_answers_have_no_temperature():
    own = Asked({"prompts": ["a"], "label_tokens": [7, 9]}, SERVED)
    assert (own.temperature, own.labels) == (2.0, ("no", "yes"))
    other = Asked({"prompts": ["a"], "label_tokens": [7, 8], "labels": ["a", "b"]}, SERVED)
    assert (other.temperature, other.labels) == (None, ["a", "b"])


class Tokenizer:
    """One token a letter, and an end mark."""

    eos_token_id = 0
    truncation_side = "right"

    def decode(self, ids):
        return "".join(f" {chr(token)}" for token in ids)

    def __call__(self, text, truncation=False, max_length=None):
        ids = [ord(letter) for letter in text]
        if truncation and len(ids) >= max_length:
            ids = ids[1 - max_length :] if self.truncation_side == "left" else ids[: max_length - 1]
        return {"input_ids": [*ids, 0]}


@dataclass
class Chosen:
    logprob: float


class Client:
    """vLLM's engine: a draw's answer follows from its name and the last token, so that a mix-up shows."""

    def __init__(self):
        self.asked, self.cancelled = [], 0

    async def generate(self, prompt, params, name, lora_request):
        self.asked.append((lora_request, prompt["prompt_token_ids"], params.logprob_token_ids))
        try:
            await asyncio.sleep(0)
            if prompt["prompt_token_ids"][0] == ord("!"):
                raise ValueError("too long\nfor vLLM")
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        logprobs = {t: Chosen(-0.1 * t * (1 + lora_request)) for t in params.logprob_token_ids}
        yield types.SimpleNamespace(outputs=[types.SimpleNamespace(logprobs=[logprobs])])

    async def encode(self, prompt, params, name, lora_request):
        self.asked.append((lora_request, prompt["prompt_token_ids"], params.task))
        data = np.array([0.2, 0.8]) if lora_request else np.array([0.6, 0.4])
        yield types.SimpleNamespace(outputs=types.SimpleNamespace(data=data))


@pytest.fixture
def client(monkeypatch):
    fake = types.SimpleNamespace(SamplingParams=types.SimpleNamespace, PoolingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return Client()


def draws_of(client, asked, served=SERVED):
    engine = Engine(client, lambda: {"draw-0": 0, "draw-1": 1}, Tokenizer())
    return asyncio.run(engine.draws(asked, served))


def test_every_draw_is_asked_about_every_text(client):
    asked = Asked({"texts": ["ab", "uvwxyz"]}, SERVED)
    draws = draws_of(client, asked)
    assert draws.shape == (2, 2, 2)
    expected = torch.tensor([[-0.7, -0.9], [-1.4, -1.8]], dtype=torch.float64).softmax(-1)
    np.testing.assert_allclose(draws, expected[:, None].expand(2, 2, 2).numpy(), atol=1e-12)
    assert [ids for _, ids, _ in client.asked[::2]] == [[97, 98], [120, 121, 122]]  # a prompt keeps its end
    content = answer(asked, SERVED, draws)
    assert (content["labels"], content["temperature"], content["draws"]) == (["no", "yes"], 2.0, 2)
    assert [row["index"] for row in content["data"]] == [0, 1]
    assert content["data"][0]["label"] == "no"
    json.dumps(content, allow_nan=False)


def test_answers_without_names_are_called_by_their_tokens(client):
    asked = Asked({"texts": ["ab"], "label_tokens": [65, 66]}, SERVED)
    engine = Engine(client, lambda: {"draw-0": 0, "draw-1": 1}, Tokenizer())
    assert asyncio.run(respond(engine, asked, SERVED))["labels"] == ["A", "B"]
    named = Asked({"texts": ["ab"]}, SERVED)
    assert asyncio.run(respond(engine, named, SERVED))["labels"] == ["no", "yes"]


def test_many_labels_take_several_requests(client):
    asked = Asked({"texts": ["a"], "label_tokens": list(range(1, 301))}, SERVED)
    assert draws_of(client, asked).shape == (2, 1, 300)
    assert [len(ids) for _, _, ids in client.asked].count(44) == 2


def test_a_classifier_gives_its_classes(client):
    served = Served(("draw-0", "draw-1"), max_length=4)
    draws = draws_of(client, Asked({"texts": ["uvwxyz"]}, served), served)
    np.testing.assert_allclose(draws[:, 0], [[0.6, 0.4], [0.2, 0.8]])
    assert client.asked[0][1:] == ([117, 118, 119, 0], "classify")  # a text keeps its beginning, and the mark
    content = answer(Asked({"texts": ["a"]}, served), served, draws)
    assert (content["labels"], content["temperature"]) == (["LABEL_0", "LABEL_1"], None)
    with pytest.raises(ValueError, match="2 classes, and 3 are named"):
        answer(Asked({"texts": ["a"], "labels": ["a", "b", "c"]}, served), served, draws)


def test_texts_of_a_classifier_lose_what_their_tokenizer_cuts(client):
    """As `peft_calib.load` has them cut, also where prompts were cut in front before."""
    tokenizer, served = Tokenizer(), Served(("draw-0",), max_length=4)
    for side, kept in (("right", [117, 118, 119, 0]), ("left", [120, 121, 122, 0])):
        tokenizer.truncation_side = side
        engine = Engine(client, lambda: {"draw-0": 0}, tokenizer)
        assert engine.tokens("uvwxyz", served, is_prompt=True) == [120, 121, 122]
        assert engine.tokens("uvwxyz", served, is_prompt=False) == kept


def test_the_first_error_ends_the_others(client):
    with pytest.raises(ValueError, match="too long"):
        draws_of(client, Asked({"texts": ["!", "ab", "cd"]}, SERVED))
    assert client.cancelled >= 2


def test_a_draw_that_left_the_server_is_told(client):
    engine = Engine(client, lambda: {"draw-0": 0}, Tokenizer())
    with pytest.raises(ValueError, match="draw-1 left the server"):
        asyncio.run(engine.draws(Asked({"texts": ["ab"]}, SERVED), SERVED))


def test_the_page_shows_an_answer(client, folder):
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    shown = json.loads(page.partition('```json\n{"object"')[2].partition("```")[0].join(['{"object"', ""]))
    with_rules(folder), with_rules(folder, "sets")
    served = Served.of(paths(folder))
    asked = Asked({"texts": ["ab"]}, served)
    content = answer(asked, served, draws_of(client, asked, served))
    assert shown.keys() == content.keys() and shown["data"][0].keys() == content["data"][0].keys()


def test_the_example_asks_it(client, folder, monkeypatch, capsys):
    with_rules(folder), with_rules(folder, "sets")
    served = Served.of(paths(folder))

    class Handler(BaseHTTPRequestHandler):
        """The route, without vLLM's application around it."""

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                assert self.path == plugin.PATH
                asked = Asked(body, served)
                status, content = 200, answer(asked, served, draws_of(client, asked, served))
            except ValueError as error:
                status, content = 400, {"error": {"message": str(error)}}
            sent = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = str(Path(__file__).parents[1] / "hub_examples" / "ask_uncertainty.py")
    try:
        asked = ["--url", f"http://127.0.0.1:{server.server_port}/v1"]
        monkeypatch.setattr(sys, "argv", [script, "ab", *asked])
        runpy.run_path(script, run_name="__main__")
        assert re.search(
            r"ab\n  no 0.\d{3}, yes 0.\d{3}; entropy 0.\d{3}, disagreement 0.\d{3}\n  (answered|passed on)\n"
            r"  one of {(no|yes|no, yes|yes, no|)}\nOf what is answered at most 60 % is wrong",
            capsys.readouterr().out,
        )
        for arguments, message in (([""], "answered 400"), (["a", "--url", "http://127.0.0.1:9/v1"], "be reached")):
            monkeypatch.setattr(sys, "argv", [script, *asked, *arguments])
            with pytest.raises(SystemExit, match=message):
                runpy.run_path(script, run_name="__main__")
    finally:
        server.shutdown()
        server.server_close()


def test_its_format_is_that_of_the_artefact():
    import peft_calib_vllm_rules as rules_of_plugin
    from peft_calib.artefact import ARTEFACT_FILE, DECISION_FILES, FORMAT_VERSION
    from peft_calib.calibration.answers import SMALLEST_MEAN_PROBABILITY
    from peft_calib.draws_index import DRAWS_INDEX
    from peft_calib.prediction.serving import MOST_IDS
    from peft_calib.provenance.stored_decision import FORMAT_VERSION as RULES_VERSION

    source = Path(plugin.__file__).read_text()
    assert ARTEFACT_FILE in source and DRAWS_INDEX in source and FORMAT_VERSION == RULES_VERSION == 1
    assert rules_of_plugin.SMALLEST == SMALLEST_MEAN_PROBABILITY and plugin.MOST_IDS == MOST_IDS
    assert rules_of_plugin.FILES.items() <= DECISION_FILES.items()  # it knows those of classes
