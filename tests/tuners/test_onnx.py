"""A model is exported with its adapter in place: no operation that ONNX does not know, and the same logits."""

import pytest
import torch
from families import FAMILIES, logits, perturb
from methods import METHODS
from torch import nn

from peft_calib.tuners.bayesian_lora.inducing import whiten

BERT = FAMILIES["bert"]
# a random A is drawn in evaluation too, which no graph can: such an adapter is merged first
CASES = {name: (name, {}) for name in METHODS if name != "hyper-random"} | {
    "flow": ("bayesian", {"flow": "maf"}),
    "shared": ("bayesian", {"init": "random", "share_inducing": True}),
    "partly": ("bayesian", {"bayesian_modules": ["query"]}),
    "learned kernels": ("bayesian", {"learn_d": True, "inducing_rows": 6}),
}


#: Rows and tokens are free in each input.
DYNAMIC = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) * 2


def other_batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 18).reshape(3, 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def adapted(case: str) -> nn.Module:
    name, fields = CASES[case]
    return perturb(METHODS[name].adapt(BERT, **fields), scale=0.2).eval()


@pytest.mark.parametrize("case", CASES)
def test_exported_graph_has_no_factorisation_and_follows_the_parameters(case):
    model, batch = adapted(case), BERT.batch()
    expected = logits(model, batch)
    with torch.no_grad():
        exported = torch.export.export(Logits(model), tuple(batch.values()), dynamic_shapes=DYNAMIC, strict=False)
        names = {str(node.target) for node in exported.graph.nodes}
        assert not any("linalg" in name or "triangular" in name for name in names)
        torch.testing.assert_close(exported.module()(*batch.values()), expected, rtol=1e-4, atol=1e-5)
        other = other_batch()
        got = exported.module()(*other.values())
    torch.testing.assert_close(got, logits(model, other), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, batch), expected)  # nothing is left behind


@pytest.mark.parametrize("case", ["hyper", "bayesian", "curve", "ensemble"])
def test_onnxruntime_gives_the_logits(case, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, batch, place = adapted(case), BERT.batch(), str(tmp_path / "model.onnx")
    with torch.no_grad():
        given = tuple(batch.values())
        torch.onnx.export(Logits(model), given, place, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    session = runtime.InferenceSession(place, providers=["CPUExecutionProvider"])
    for asked in (batch, other_batch()):
        named = zip(session.get_inputs(), asked.values(), strict=True)
        got = torch.from_numpy(session.run(None, {node.name: tensor.numpy() for node, tensor in named})[0])
        torch.testing.assert_close(got, logits(model, asked), rtol=1e-4, atol=1e-4)


def test_elimination_is_the_factorisation(monkeypatch):
    Z = torch.randn(5, 8, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance = torch.full((1, 1), 0.1, dtype=torch.float64)
    expected = whiten(Z, variance, 1e-5)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for ours, theirs in zip(whiten(Z, variance, 1e-5), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
