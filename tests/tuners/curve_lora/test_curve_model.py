"""CurveLoRA in a real model: limits, points, saving, merging, export, conversion, PEFT's entry points."""

import json

import pytest
import torch
from curve_models import adapt, anchored, save_loras
from families import FAMILIES, logits, perturb
from operations import Operations
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_calib import CurveLoraConfig, HyperLoraConfig, curve_at, export_lora, predict
from peft_calib.tuners import Sample, Train


def at(model, batch, t):
    with curve_at(model, t):
        return logits(model, batch)


def law_of(model):
    return model.base_model.get_law()


# ----------------------------------------------------------------- limits


@pytest.mark.parametrize("t_sampling", ["uniform", "arc_length"])
def test_a_free_curve_starts_at_the_base_model_everywhere(family, t_sampling):
    model, batch = adapt(family, moved=False, t_sampling=t_sampling), family.batch()
    expected = logits(family.build(), batch)
    for t in (0.0, 0.3, 1.0, 1.77, 2.0):
        assert torch.equal(at(model, batch, t), expected)
    assert torch.equal(model.train()(**batch).logits, expected)


def test_a_curve_of_one_point_is_lora(family):
    model, batch = adapt(family, num_anchors=1, num_handles=0), family.batch()
    lora = get_peft_model(family.build(), LoraConfig(r=4, lora_alpha=16, target_modules=list(family.targets)))
    modules = dict(lora.base_model.model.named_modules())
    with torch.no_grad():
        for slot, A, B in model.base_model.get_factors():
            modules[slot.name].lora_A["default"].weight.copy_(A)
            modules[slot.name].lora_B["default"].weight.copy_(B)
    torch.testing.assert_close(logits(model, batch), logits(lora, batch), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in lora.parameters() if p.requires_grad
    )


def test_initial_factors_are_loras_for_every_control_point():
    model = adapt(moved=False, num_anchors=3, num_handles=2)
    for group, (A, B) in law_of(model).control_points().items():
        bound = group.in_features**-0.5
        assert A.abs().max() <= bound and A.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not B.any()
        assert not torch.equal(A[0], A[1]) and not torch.equal(A[:, 0], A[:, -1])


# ----------------------------------------------------------------- points


def test_the_point_of_evaluation_is_the_middle_and_a_choice(bert):
    model, batch = adapt(), bert.batch()
    assert torch.equal(logits(model, batch), at(model, batch, 1.0))
    other = adapt(eval_t=0.4)
    assert torch.equal(logits(other, batch), at(other, batch, 0.4))
    assert not torch.equal(logits(other, batch), at(other, batch, 1.0))
    assert torch.equal(logits(other, batch), logits(other, batch))


def test_without_a_point_of_evaluation_one_must_be_chosen(bert, tmp_path):
    model, batch = adapt(eval_t=None), bert.batch()
    for call in (
        lambda: logits(model, batch),
        model.merge_adapter,
        lambda: export_lora(model, tmp_path / "x"),
        model.base_model.get_factors,
    ):
        with pytest.raises(ValueError, match="eval_t=None"):
            call()
    assert not (tmp_path / "x").exists()
    expected = at(model, batch, 0.5)
    export_lora(model, tmp_path / "x", t=0.5)
    predict(model, batch)
    with curve_at(model, 0.5):
        export_lora(model, tmp_path / "y")
        model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    stock = [PeftModel.from_pretrained(bert.build(), tmp_path / name) for name in "xy"]
    for exported in stock:
        torch.testing.assert_close(logits(exported, batch), expected, rtol=0, atol=1e-5)


def test_several_points_in_one_forward_are_those_points(family):
    model, batch, points = adapt(family), family.batch(3), [0.0, 0.4, 1.0, 1.3, 2.0]
    together = at(model, batch, points)
    one_by_one = torch.cat([at(model, batch, t) for t in points])
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-5)
    assert (together[:3] - together[3:6]).abs().max() > 1e-5


def test_the_prediction_is_the_average_over_the_grid(bert):
    model, batch = adapt(), bert.batch(3)
    prediction = predict(model, batch)
    grid = torch.linspace(0, 2, 13, dtype=torch.float64).tolist()
    expected = torch.stack([at(model, batch, t).softmax(-1) for t in grid])
    torch.testing.assert_close(prediction.sample_probabilities, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(prediction.probabilities, expected.mean(0), rtol=0, atol=1e-6)
    assert predict(adapt(eval_points=4), batch).num_samples == 4
    assert prediction.num_forwards == 13
    again = predict(model, batch, num_samples=13, memory_budget=1, seed=99)
    torch.testing.assert_close(again.sample_probabilities, expected, rtol=0, atol=1e-6)


def test_weights_of_points_weigh_everything(bert):
    model, batch = adapt(num_handles=0), bert.batch(3)
    plain = predict(model, batch)
    w = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    weighted = predict(model, batch, weights=w)
    p, share = plain.sample_probabilities.double(), (w / w.sum()).double()
    mean = torch.einsum("k,knc->nc", share, p)
    torch.testing.assert_close(weighted.probabilities.double(), mean, rtol=0, atol=1e-6)
    expected_entropy = torch.einsum("k,kn->n", share, torch.special.entr(p).sum(-1))
    torch.testing.assert_close(weighted.expected_entropy, expected_entropy)
    total = weighted.expected_entropy + weighted.mutual_information
    torch.testing.assert_close(weighted.entropy, total, rtol=0, atol=1e-6)
    for bad in ([1.0] * 4, [1.0, -1.0, 1.0, 1.0, 1.0], [0.0] * 5, [float("nan")] * 5):
        with pytest.raises(ValueError, match="weights must be"):
            predict(model, batch, weights=bad)
    with pytest.raises(ValueError, match="weights must be"):
        predict(model, batch, num_samples="auto", weights=[1.0] * 16)


def test_information_is_bounded_and_zero_for_one_point(bert):
    model, batch = adapt(), bert.batch(3)
    information = predict(model, batch).mutual_information
    assert (information >= 0).all() and (information <= torch.tensor(3.0).log()).all()
    assert float(information.max()) > 1e-7
    assert not predict(model, batch, num_samples=1).mutual_information.any()
    still = adapt(num_anchors=1)
    assert predict(still, batch, num_samples=4).mutual_information.abs().max() < 1e-9


def test_averaged_likelihood_is_at_least_the_mean_of_the_points(bert):
    prediction, labels = predict(adapt(), bert.batch(8)), torch.arange(8) % 3
    of_points = prediction.sample_probabilities.double().log()[:, torch.arange(8), labels].mean(1)
    averaged = prediction.probabilities.double().log()[torch.arange(8), labels].mean()
    assert averaged >= of_points.mean()


@pytest.mark.parametrize("t", [-0.01, 2.01, float("nan"), [0.0, 3.0]])
def test_points_off_the_curve_are_refused(bert, t, tmp_path):
    model = adapt()
    with pytest.raises(ValueError, match=r"\[0, 2\]"), curve_at(model, t):
        pass
    if not isinstance(t, list):
        with pytest.raises(ValueError, match=r"\[0, 2\]"):
            export_lora(model, tmp_path / "x", t=t)
    assert torch.isfinite(logits(model, bert.batch())).all()  # the context left nothing behind


def test_curve_at_needs_a_curve(bert, tmp_path):
    hyper = get_peft_model(bert.build(), HyperLoraConfig(r=4, target_modules=["query"]))
    with pytest.raises(TypeError, match="no active CurveLoRA"), curve_at(hyper, 0.5):
        pass
    with pytest.raises(ValueError, match="CurveLoRA"):
        export_lora(hyper, tmp_path / "x", t=0.5)
    with pytest.raises(TypeError, match="no adapter of peft_calib"), curve_at(bert.build(), 0.5):
        pass


# ----------------------------------------------------------------- saving, merging, export


@pytest.mark.parametrize("fields", [{}, {"num_anchors": 4, "num_handles": 1}, {"num_anchors": 1, "num_handles": 0}])
def test_saved_and_loaded_is_bit_equal(family, fields, tmp_path):
    model, batch = adapt(family, **fields), family.batch()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.build(), tmp_path, adapter_name="other")
    points = [0.0, 0.37 * (model.peft_config["default"].num_anchors - 1)]
    for t in points:
        assert torch.equal(at(model, batch, t), at(again, batch, t))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "CURVELORA" and saved["num_anchors"] == fields.get("num_anchors", 3)


def test_another_number_of_control_points_is_refused(bert, tmp_path):
    adapt(num_handles=2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, "num_handles": 1}))
    with pytest.raises(ValueError, match="num_handles is 1, but the adapter was saved with 2"):
        PeftModel.from_pretrained(bert.build(), tmp_path)


@pytest.mark.parametrize("t", [0.0, 0.61, 1.0, 2.0])
def test_export_at_any_point_is_the_model_there(family, t, tmp_path):
    model, batch = adapt(family), family.batch()
    export_lora(model, tmp_path / "t", t=t)
    stock = PeftModel.from_pretrained(family.build(), tmp_path / "t")
    torch.testing.assert_close(logits(stock, batch), at(model, batch, t), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "t" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_merged_at_a_point(family):
    model, batch = adapt(family), family.batch()
    expected, other = at(model, batch, 0.3), logits(model, batch)
    with curve_at(model, 0.3):
        model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), other, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), other, rtol=0, atol=1e-5)


# ----------------------------------------------------------------- anchored


def test_an_anchored_curve_passes_through_its_adapters(family, tmp_path):
    folders, batch = save_loras(tmp_path, family=family), family.batch()
    model = anchored(folders, family)
    for i, folder in enumerate(folders):
        lora = PeftModel.from_pretrained(family.build(), folder)
        torch.testing.assert_close(at(model, batch, float(i)), logits(lora, batch), rtol=0, atol=1e-5)
        modules = dict(lora.base_model.model.named_modules())
        with curve_at(model, float(i)):
            for slot, A, B in model.base_model.get_factors():  # a scaling of 4 on both sides: nothing to fold
                torch.testing.assert_close(A, modules[slot.name].lora_A["default"].weight.data, rtol=0, atol=1e-7)
                torch.testing.assert_close(B, modules[slot.name].lora_B["default"].weight.data, rtol=0, atol=1e-7)
    assert len(model.peft_config["default"].anchor_hashes) == 3


def test_scaling_is_folded_and_ranks_are_padded(bert, tmp_path):
    folders = [
        *save_loras(tmp_path / "a", 1, r=2, lora_alpha=3),
        *save_loras(tmp_path / "b", 1, r=4, lora_alpha=5, use_rslora=True),
    ]
    model, batch = anchored(folders, num_handles=1), bert.batch()
    for i, folder in enumerate(folders):
        lora = PeftModel.from_pretrained(bert.build(), folder)
        torch.testing.assert_close(at(model, batch, float(i)), logits(lora, batch), rtol=0, atol=1e-5)


def test_anchors_do_not_move_when_handles_train(bert, tmp_path):
    model, batch = anchored(save_loras(tmp_path)), {**bert.batch(), "labels": torch.tensor([0, 2])}
    before = {name: buffer.clone() for name, buffer in law_of(model).named_buffers() if "anchor" in name}
    handles = [p.detach().clone() for p in law_of(model).parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(5):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, buffer in law_of(model).named_buffers():
        assert "anchor" not in name or torch.equal(buffer, before[name])
    assert before and all(not torch.equal(p, old) for p, old in zip(law_of(model).parameters(), handles, strict=True))


def test_handles_start_fresh_or_on_the_chord(bert, tmp_path):
    folders, batch = save_loras(tmp_path, 2), bert.batch()
    fresh = anchored(folders, num_handles=1)
    control = law_of(fresh).control_points()
    assert all(not B[1].any() and A[1].any() for A, B in control.values())
    chord, straight = anchored(folders, num_handles=2, handle_init="linear"), anchored(folders, num_handles=0)
    for t in (0.2, 0.5, 0.9):
        torch.testing.assert_close(at(chord, batch, t), at(straight, batch, t), rtol=0, atol=1e-5)


def test_an_anchored_curve_is_saved_whole(bert, tmp_path):
    folders, batch = save_loras(tmp_path / "loras"), bert.batch()
    model = perturb(anchored(folders))
    model.save_pretrained(tmp_path / "curve")
    for folder in folders:
        (tmp_path / "loras" / folder.rpartition("/")[2] / "adapter_model.safetensors").unlink()
    again = PeftModel.from_pretrained(bert.build(), tmp_path / "curve")
    for t in (0.0, 0.3, 1.0, 2.0):
        assert torch.equal(at(again, batch, t), at(model, batch, t))
    config = again.peft_config["default"]
    assert config.anchor_adapters is None  # they are with the weights, and where they lay is nobody's business
    assert config.anchor_hashes == model.peft_config["default"].anchor_hashes


def test_anchors_may_stay_where_they_are(bert, tmp_path):
    folders, batch = save_loras(tmp_path / "loras", task_type="SEQ_CLS", one_head=False), bert.batch()
    model = perturb(anchored(folders, save_anchors=False, task_type="SEQ_CLS", curve_modules_to_save=True))
    model.save_pretrained(tmp_path / "curve")
    saved = load_file(tmp_path / "curve" / "adapter_model.safetensors")
    assert saved and not any("anchor" in key for key in saved)
    assert str(tmp_path) not in (tmp_path / "curve" / "adapter_config.json").read_text()
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(bert.build(), tmp_path / "curve", low_cpu_mem_usage=low_cpu_mem_usage)
        for t in (0.0, 0.3, 2.0):
            assert torch.equal(at(again, batch, t), at(model, batch, t))
    changed = load_file(tmp_path / "loras" / "lora-1" / "adapter_model.safetensors")
    save_file({k: v * 1.01 for k, v in changed.items()}, tmp_path / "loras" / "lora-1" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has changed since"):
        PeftModel.from_pretrained(bert.build(), tmp_path / "curve")


HEADS = {"none": {}, "shared": {"task_type": "SEQ_CLS"}}
HEADS["curved"] = {**HEADS["shared"], "curve_modules_to_save": True}


@pytest.mark.parametrize("head", HEADS)
def test_free_and_anchored_convert_without_loss(bert, head, tmp_path):
    model, batch = adapt(**HEADS[head]), bert.batch()
    control, expected = law_of(model).control_points(), at(model, batch, [0.0, 0.3, 1.0, 1.9])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def check(converted):
        for group, stacks in law_of(converted).control_points().items():
            assert all(torch.equal(new, old) for new, old in zip(stacks, control[group], strict=True))
        torch.testing.assert_close(at(converted, batch, [0.0, 0.3, 1.0, 1.9]), expected, rtol=0, atol=1e-6)

    model.base_model.set_curve_mode("anchored")
    check(model)
    fewer = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < fewer < trainable
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert.build(), tmp_path, is_trainable=True)
    check(again)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == fewer
    again.base_model.set_curve_mode("free")
    check(again)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == trainable
    with pytest.raises(ValueError, match="curve_mode"):
        again.base_model.set_curve_mode("closed")


def test_the_gauge_changes_the_line_between_but_not_the_anchors(bert, tmp_path):
    folders, batch = save_loras(tmp_path, 2), bert.batch()
    raw = anchored(folders, num_handles=0)
    aligned = anchored(folders, num_handles=0, gauge_align="procrustes")
    for t in (0.0, 1.0):
        torch.testing.assert_close(at(aligned, batch, t), at(raw, batch, t), rtol=0, atol=1e-5)
    assert (at(aligned, batch, 0.5) - at(raw, batch, 0.5)).abs().max() > 1e-3


# ----------------------------------------------------------------- heads


def test_anchors_with_one_head_share_it_frozen(bert, tmp_path):
    folders, batch = save_loras(tmp_path, task_type="SEQ_CLS"), bert.batch()
    model = anchored(folders, task_type="SEQ_CLS")
    for i, folder in enumerate(folders):
        lora = PeftModel.from_pretrained(bert.build(), folder)
        torch.testing.assert_close(at(model, batch, float(i)), logits(lora, batch), rtol=0, atol=1e-5)
    model.set_adapter("default")  # which unfreezes parameters
    assert all("calib_curve" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "curve")
    again = PeftModel.from_pretrained(bert.build(), tmp_path / "curve", is_trainable=True)
    assert torch.equal(at(again, batch, 0.5), at(model, batch, 0.5))
    assert all("calib_curve" in name for name, p in again.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["bert", "roberta", "vit"])
def test_anchors_with_different_heads_are_refused_or_joined_too(name, tmp_path):
    family = FAMILIES[name]
    folders, batch = save_loras(tmp_path, family=family, one_head=False, task_type="SEQ_CLS"), family.batch(3)
    with pytest.raises(ValueError, match="different heads"):
        anchored(folders, family, task_type="SEQ_CLS")
    model = anchored(folders, family, task_type="SEQ_CLS", curve_modules_to_save=True)
    for i, folder in enumerate(folders):
        lora = PeftModel.from_pretrained(family.build(), folder)
        torch.testing.assert_close(at(model, batch, float(i)), logits(lora, batch), rtol=0, atol=1e-5)
    points = [0.0, 0.3, 1.5]
    one_by_one = torch.cat([at(model, batch, t) for t in points])
    torch.testing.assert_close(at(model, batch, points), one_by_one, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "curve")
    again = PeftModel.from_pretrained(family.build(), tmp_path / "curve")
    assert torch.equal(at(again, batch, 0.3), at(model, batch, 0.3))
    export_lora(model, tmp_path / "t", t=0.3)
    stock = PeftModel.from_pretrained(family.build(), tmp_path / "t")
    torch.testing.assert_close(logits(stock, batch), at(model, batch, 0.3), rtol=0, atol=1e-5)
    expected = logits(model, batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-5)
    assert not any("Curved" in type(module).__name__ for module in merged.modules())


def test_a_curved_head_trains_at_every_control_point(bert):
    model = adapt(task_type="SEQ_CLS", curve_modules_to_save=True)
    model.train()(**bert.batch(), labels=torch.tensor([0, 1])).loss.backward()
    points = law_of(model).heads.points
    assert points and all(p.grad is not None and p.grad.any() for p in points.values())


# ----------------------------------------------------------------- bad input


def test_bad_anchors(bert, tmp_path):
    folders = save_loras(tmp_path / "good", 2)
    with pytest.raises(ValueError, match="holds no adapter_model"):
        anchored([folders[0], str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match=r"num_anchors = 3 folders"):
        CurveLoraConfig(num_anchors=3, curve_mode="anchored", anchor_adapters=folders)
    with pytest.raises(ValueError, match="a free curve has none"):
        CurveLoraConfig(num_anchors=2, anchor_adapters=folders)
    for fields, message in (
        ({"use_dora": True}, "not a plain LoRA"),
        ({"bias": "all"}, "biases"),
        ({"init_lora_weights": "pissa"}, "start was taken"),
        ({"target_modules": ["query"]}, "no factors for"),
        ({"r": 8}, "rank"),
    ):
        bad = save_loras(tmp_path / message.split()[0], 1, **fields)
        with pytest.raises(ValueError, match=message):
            anchored([folders[0], *bad])
    with pytest.raises(ValueError, match="also adapts"):
        anchored(folders, target_modules=["query"])


def test_anchors_of_another_base_model_are_refused(bert, tmp_path):
    folders = save_loras(tmp_path, 2)
    config_file = tmp_path / "lora-1" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "base_model_name_or_path": "org/another-model"}))
    base = bert.build()
    base.name_or_path = "org/this-model"
    settings = {"num_anchors": 2, "curve_mode": "anchored", "anchor_adapters": folders}
    with pytest.raises(ValueError, match="another-model"):
        get_peft_model(base, CurveLoraConfig(r=4, target_modules=list(bert.targets), **settings))
    assert not any("calib" in name for name, _ in base.named_modules())  # left as it was


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_anchors": 0}, "num_anchors"),
        ({"num_handles": -1}, "num_handles"),
        ({"curve_mode": "closed"}, "curve_mode"),
        ({"eval_t": 2.5}, "eval_t"),
        ({"eval_t": "start"}, "eval_t"),
        ({"jsd_weight": -1.0}, "jsd_weight"),
        ({"flat_rho": float("inf")}, "flat_rho"),
        ({"eval_points": 0}, "eval_points"),
        ({"jsd_label_tokens": [3]}, "jsd_label_tokens"),
        ({"curve_mode": "anchored"}, "anchor_adapters"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        CurveLoraConfig(**fields)


def test_presets():
    paper = CurveLoraConfig.paper(num_anchors=9)
    assert (paper.r, paper.lora_alpha, paper.flat_rho, paper.flat_rho_cycles) == (8, 16, 0.25, 50)
    assert paper.shape.num_control_points == 25
    assert paper.target_modules == {"q_proj", "v_proj", "lm_head"}


def test_fewer_draws_than_one_are_refused():
    with pytest.raises(ValueError, match="num_samples"):
        law_of(adapt())(Sample(num_samples=0))


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_late_and_adaptive_predictions(name):
    family = FAMILIES[name]
    model, batch = adapt(family, layers_to_transform=[1] if name != "t5" else None), family.batch(3)
    options = {"task": "next_token"} if name != "bert" else {}
    sampled = predict(model, batch, **options)
    late = predict(model, batch, "late", **options)
    torch.testing.assert_close(late.sample_probabilities, sampled.sample_probabilities, rtol=0, atol=1e-5)
    auto = predict(model, batch, num_samples="auto", tolerance=0.5, seed=4, **options)
    assert auto.num_samples == 4 < sampled.num_samples
    torch.testing.assert_close(auto.probabilities, sampled.probabilities, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_and_autocast(bert, dtype):
    base = bert.build().to(dtype)
    model = perturb(get_peft_model(base, CurveLoraConfig(r=4, target_modules=["query"], jsd_weight=1.0)), scale=0.1)
    batch = bert.batch(3)
    together, single = (
        at(model, batch, [0.3, 1.7]).float(),
        torch.cat([at(model, batch, t) for t in (0.3, 1.7)]).float(),
    )
    torch.testing.assert_close(together, single, rtol=0, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.float().train()(**batch, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in law_of(model).parameters())


# ----------------------------------------------------------------- invariants of the house


@pytest.mark.parametrize("fields", [{}, {"num_handles": 0, "t_sampling": "arc_length"}, {"jsd_weight": 1.0}])
def test_operations_of_the_law_do_not_grow_with_depth(bert, fields):
    counts = []
    for layers in (2, 6, 12):
        config = CurveLoraConfig(target_modules="all-linear", **fields)
        law = law_of(get_peft_model(bert.build(num_hidden_layers=layers), config))
        with Operations() as counter:
            law(Train(law.train_samples)).per_slot(law.slots, law.train_samples)
        counts.append(len(counter.names))
    assert counts[0] == counts[1] == counts[2]


def test_inactive_is_inert(bert):
    model, batch = adapt(), bert.batch()
    model.add_adapter("second", CurveLoraConfig(r=2, target_modules=["query"]))
    law, second = model.base_model.get_law("default"), model.base_model.get_law("second")
    assert not any(p.requires_grad for p in second.parameters())
    first = logits(model, batch)
    model.set_adapter("second")
    assert not any(p.requires_grad for p in law.parameters()) and all(p.requires_grad for p in second.parameters())
    assert torch.equal(logits(model, batch), logits(bert.build(), batch))
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(bert.build(), batch))
        count = int(law.num_generations)
        model.train()(**batch)
        assert int(law.num_generations) == count
    model.eval()
    assert torch.equal(logits(model, batch), first)
    base = model.get_base_model()
    model.delete_adapter("second")
    model.delete_adapter("default")
    assert not any("calib_curve" in name for name, _ in base.named_parameters())
    assert not base._forward_pre_hooks


def test_mixed_batches_take_each_row_through_its_own_adapter(bert):
    model, batch = adapt(), bert.batch(3)
    model.add_adapter("second", CurveLoraConfig(r=4, target_modules=["query"], init_weights=False, sample_seed=3))
    with torch.no_grad():
        mixed = model.eval()(**batch, adapter_names=["default", "__base__", "second"]).logits
    first = logits(model, batch)
    model.set_adapter("second")
    second = logits(model, batch)
    expected = torch.stack([first[0], logits(bert.build(), batch)[1], second[2]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [True, torch.tensor(True), [0.5, False], "1", None, 1j])
def test_a_point_that_is_no_number_is_refused(t, tmp_path):
    model = get_peft_model(FAMILIES["bert"].build(), CurveLoraConfig(target_modules=["query"]))
    with pytest.raises((ValueError, TypeError)), curve_at(model, t):
        pass
    if t is not None:
        with pytest.raises((ValueError, TypeError)):
            export_lora(model, tmp_path / "out", t=t)


def test_a_model_with_a_head_on_the_curve_can_be_cast():
    model, batch = adapt(task_type="SEQ_CLS", curve_modules_to_save=True).eval(), FAMILIES["bert"].batch()
    expected = logits(model, batch)
    torch.testing.assert_close(logits(model.double(), batch), expected.double(), rtol=0, atol=1e-5)
    assert logits(model.merge_and_unload(), batch).dtype == torch.float64
