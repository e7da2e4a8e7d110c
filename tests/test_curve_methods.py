"""Diagnostics of a curve: loss profile, barrier, lengths, bound, likelihood weights."""

import math
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

import peft_calib
from peft_calib import (
    CurveLoraConfig,
    arc_length,
    control_polygon_length,
    curve_at,
    curve_weights,
    lipschitz_bound,
    loss_profile,
)

sys.path[:0] = [str(Path(__file__).parent / "tuners"), str(Path(__file__).parent / "tuners" / "curve_lora")]
from curve_models import BERT, adapt, anchored, save_loras  # noqa: E402
from families import logits  # noqa: E402


@pytest.fixture
def data():
    batch = BERT.batch(12)
    return Dataset.from_dict({"input_ids": batch["input_ids"].tolist(), "labels": [i % 3 for i in range(12)]})


def test_profile_is_the_loss_of_single_points(data):
    model = adapt(num_handles=1)
    profile = loss_profile(model, data, [0.0, 0.4, 1.7], batch_size=5)
    assert profile.t.tolist() == [0.0, 0.4, 1.0, 1.7, 2.0] and profile.anchors == (0, 2, 4)
    inputs, labels = {"input_ids": torch.tensor(data["input_ids"])}, torch.tensor(data["labels"])
    for i, t in enumerate(profile.t.tolist()):
        with curve_at(model, t):
            z = logits(model, inputs)
        assert float(profile.nll[i]) == pytest.approx(float(torch.nn.functional.cross_entropy(z, labels)), abs=1e-5)
        assert float(profile.accuracy[i]) == pytest.approx(float((z.argmax(-1) == labels).float().mean()))
    assert len(loss_profile(model, data).t) == 9
    assert len(loss_profile(model, data, 41).t) == 41


def test_loss_of_rows_that_are_hopelessly_wrong_is_not_inflated():
    """float32 probabilities end near 1e-38; what they round to nothing must not count as e-300."""
    base = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with torch.no_grad():
        base[0].weight.copy_(torch.tensor([[60.0, 0.0], [-60.0, 0.0]]))
        base[0].bias.zero_()
    model = get_peft_model(base, CurveLoraConfig(r=1, target_modules=["0"]))
    rows = [{"input": torch.tensor([1.0, 0.0]), "labels": 1}]
    assert 87 < float(loss_profile(model, rows, 3).nll.max()) < 120  # 120 is the loss of the logits


def test_barrier_is_measured_from_the_worst_anchor(tmp_path, data):
    """Between an adapter and the same one in the opposite gauge the straight line passes the base model."""
    from safetensors.torch import load_file, save_file

    folders = save_loras(tmp_path, 1)
    (tmp_path / "mirror").mkdir()
    config = (tmp_path / "lora-0" / "adapter_config.json").read_text()
    (tmp_path / "mirror" / "adapter_config.json").write_text(config)
    tensors = load_file(tmp_path / "lora-0" / "adapter_model.safetensors")
    save_file({k: -v for k, v in tensors.items()}, tmp_path / "mirror" / "adapter_model.safetensors")
    model = anchored([*folders, str(tmp_path / "mirror")], num_handles=0)
    profile = loss_profile(model, data, 21)
    base = logits(BERT.build(), {"input_ids": torch.tensor(data["input_ids"])})
    at_base = float(torch.nn.functional.cross_entropy(base, torch.tensor(data["labels"])))
    assert float(profile.nll[10]) == pytest.approx(at_base, abs=1e-5)
    assert float(profile.nll[0]) == pytest.approx(float(profile.nll[-1]), abs=1e-5)
    assert profile.barrier == pytest.approx(float(profile.nll.max() - profile.nll[[0, -1]].max()), abs=1e-9)
    aligned = anchored([*folders, str(tmp_path / "mirror")], num_handles=0, gauge_align="procrustes")
    assert loss_profile(aligned, data, 21).barrier == pytest.approx(0.0, abs=1e-5)  # one point: a gauge artefact


def test_profile_is_drawn(tmp_path, data):
    figure = loss_profile(adapt(), data, 5).plot(str(tmp_path / "profile.png"))
    assert (tmp_path / "profile.png").stat().st_size > 5000
    assert figure.axes[0].get_xlabel() == "t" and len(figure.axes[0].get_lines()) >= 2


def test_lengths():
    straight = adapt(num_anchors=3, num_handles=0)
    assert arc_length(straight) == pytest.approx(control_polygon_length(straight), rel=1e-9)
    law = straight.base_model.get_law()
    steps = torch.zeros(2, dtype=torch.float64)
    for stacks in law.control_points().values():
        for stack in stacks:
            steps += (stack[1:] - stack[:-1]).double().flatten(1).square().sum(1)
    assert control_polygon_length(straight) == pytest.approx(float(steps.sqrt().sum()), rel=1e-5)
    bent = adapt(num_anchors=3, num_handles=2)
    points = torch.linspace(0, 2, 4001, dtype=torch.float64)
    c, total = bent.base_model.get_law().shape.coefficients(points), torch.zeros(4000, dtype=torch.float64)
    for stacks in bent.base_model.get_law().control_points().values():
        for stack in stacks:
            total += torch.tensordot(c, stack.double(), 1).diff(dim=0).flatten(1).square().sum(1)
    assert arc_length(bent) == pytest.approx(float(total.sqrt().sum()), rel=1e-4)
    assert arc_length(bent) < control_polygon_length(bent)
    assert arc_length(adapt(num_anchors=1)) == control_polygon_length(adapt(num_anchors=1)) == 0.0


def test_the_speed_of_the_weights_stays_below_the_bound():
    model = adapt(num_anchors=3, num_handles=1, rank_pattern={"query": 2})
    law = model.base_model.get_law()
    control = law.control_points()
    for segment in range(2):
        fastest = 0.0
        for t in torch.linspace(segment, segment + 1 - 1e-9, 200, dtype=torch.float64):
            c, velocity, square = law.shape.coefficients(t[None]), law.velocity(t[None]), 0.0
            for group, indices in law.slots.groups.items():
                A, B = (torch.tensordot(c, stack.double(), 1)[0] for stack in control[group])
                dA, dB = (part[0].double() for part in velocity[group])
                scaling = torch.tensor([law.slots[i].scaling for i in indices]).view(-1, 1, 1)
                square += float((scaling * (dB @ A + B @ dA)).square().sum())
            fastest = max(fastest, math.sqrt(square))
        assert 0 < fastest <= lipschitz_bound(model, segment)
        assert lipschitz_bound(model, segment, 2.5) == pytest.approx(2.5 * lipschitz_bound(model, segment))
    with pytest.raises(ValueError, match="segment"):
        lipschitz_bound(model, 2)


def test_likelihood_weights(data):
    model = adapt(num_handles=1)
    equal = curve_weights(model, data, temperature=math.inf)
    assert torch.equal(equal, torch.full((9,), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(curve_weights(model, data, temperature=1e12, progress=False), equal, rtol=0, atol=1e-6)
    profile = loss_profile(model, data, 9)
    one = curve_weights(model, data, progress=False)
    torch.testing.assert_close(one, (-12 * profile.nll).softmax(0), rtol=1e-3, atol=1e-5)
    more = Dataset.from_dict({name: list(data[name]) * 40 for name in data.column_names})
    sharper = curve_weights(model, more, progress=False)
    assert float(sharper.max()) > float(one.max()) and int(sharper.argmax()) == int(profile.nll.argmin())
    batch = {"input_ids": torch.tensor(data["input_ids"])}
    weighted = peft_calib.predict(model, batch, weights=one)
    p = peft_calib.predict(model, batch).sample_probabilities
    expected = torch.einsum("k,knc->nc", one.float(), p)
    torch.testing.assert_close(weighted.probabilities, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="temperature"):
        curve_weights(model, data, temperature=0.0)


def test_labels_are_needed(data):
    with pytest.raises(ValueError, match="no labels"):
        loss_profile(adapt(), data.remove_columns("labels"))
    with pytest.raises(TypeError, match="no adapter of peft_calib"):
        loss_profile(BERT.build(), data)
