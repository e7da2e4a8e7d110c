"""One plain LoRA in the place of many draws: it learns, it serves without us, and nothing of its teacher changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gauss_lora import GaussLoraConfig
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from peft_calib import (
    BayesianLoraConfig,
    CurveLoraConfig,
    EnsembleLoraConfig,
    HyperLoraConfig,
    distill,
    distillation_of,
    predict_dataset,
)
from peft_calib.calibration import TemperatureScaling
from peft_calib.identity import adapter_digest
from peft_calib.methods.distillation import _parts

TARGETS = ["query", "value", "intermediate.dense", "output.dense"]
CONFIGS = {
    "members": lambda: EnsembleLoraConfig(task_type="SEQ_CLS", num_members=2, target_modules=TARGETS),
    "bayesian": lambda: BayesianLoraConfig(
        task_type="SEQ_CLS", target_modules=TARGETS, num_train_examples=50, init_sd=0.9, sample_seed=0
    ),
    "curve": lambda: CurveLoraConfig(task_type="SEQ_CLS", target_modules=TARGETS),
    "gauss": lambda: GaussLoraConfig(task_type="SEQ_CLS", target_modules=TARGETS, num_train_examples=50),
}


def rows_of(count: int, seed: int = 0, **more) -> list[dict]:
    ids = torch.randint(3, 64, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, **more} for row in ids]


def moved(model: PeftModel, by: float = 0.3) -> PeftModel:
    """The adapter and its head far from where they began: draws and members disagree."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "var" not in name and "sd" not in name and "rho" not in name:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_student_comes_close_to_the_mean_of_the_draws(tiny_classifier, kind):
    teacher = moved(get_peft_model(tiny_classifier(), CONFIGS[kind]()))
    rows, draws = rows_of(160), None if kind == "members" else 4
    student = distill(teacher, rows, num_samples=draws, arguments={"num_train_epochs": 12, "learning_rate": 3e-3})
    assert type(student.peft_config["default"]) is LoraConfig
    assert not student.training and not any(p.requires_grad and p.grad is not None for p in teacher.parameters())
    found = distillation_of(student)
    assert (found.num_rows, found.num_held_out, found.num_samples) == (144, 16, draws or 2)
    # these rows were in no part of the training at all
    fresh = rows_of(64, seed=5)
    p = predict_dataset(teacher, fresh, "sample", draws, progress=False).probabilities
    q = predict_dataset(student, fresh, "mean", progress=False).probabilities
    mean = predict_dataset(teacher, fresh, "mean", progress=False).probabilities
    apart = 0.5 * (p - q).abs().sum(1).mean()
    start = 0.5 * (p - mean).abs().sum(1).mean()
    assert apart < 0.05
    if start > 0.02:  # where the deterministic function is something else
        assert apart < 0.7 * start
        assert found.divergence < found.start_divergence


def test_what_it_measures_is_what_the_two_answer(tiny_classifier):
    teacher = moved(get_peft_model(tiny_classifier(), CONFIGS["members"]()))
    rows = rows_of(40)
    student = distill(teacher, rows, seed=3, arguments={"num_train_epochs": 1})
    held = [rows[i] for i in _parts(rows, 3)[0]]
    p = predict_dataset(teacher, held, "sample", progress=False).probabilities.double()
    q = predict_dataset(student, held, "mean", progress=False).probabilities.double()
    found = distillation_of(student)
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum(1).mean()), abs=1e-6)
    assert found.distance == pytest.approx(float(0.5 * (p - q).abs().sum(1).mean()), abs=1e-6)
    assert found.agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert f"{found.divergence:.4f} nats" in str(found)


def test_teacher_generators_and_labels_are_left_alone(tiny_classifier):
    teacher = moved(get_peft_model(tiny_classifier(), CONFIGS["members"]()))
    teacher.train()
    before, digest = {k: v.clone() for k, v in teacher.state_dict().items()}, adapter_digest(teacher)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    arguments = {"num_train_epochs": 1}
    one = distill(teacher, rows_of(40, labels=0), arguments=arguments)
    two = distill(teacher, rows_of(40, labels=1), arguments=arguments)
    other = distill(teacher, rows_of(40), arguments=arguments, seed=1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert teacher.training and adapter_digest(teacher) == digest
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    weights = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (one, two, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())
    shared = one.get_base_model().bert.embeddings.word_embeddings.weight
    assert shared.data_ptr() == teacher.get_base_model().bert.embeddings.word_embeddings.weight.data_ptr()


def test_saved_it_serves_with_stock_peft(tiny_classifier, tmp_path):
    teacher = moved(get_peft_model(tiny_classifier(), CONFIGS["members"]()))
    student = distill(teacher, rows_of(40), arguments={"num_train_epochs": 1})
    student.save_pretrained(tmp_path / "student")
    again = PeftModel.from_pretrained(tiny_classifier(), tmp_path / "student").eval()
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows_of(8, seed=2)])}
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, student(**batch).logits, atol=1e-6)
    assert distillation_of(tmp_path / "student") == distillation_of(student)
    (tmp_path / "student" / "distillation.json").write_text('{"num_rows": 3.5}')
    with pytest.raises(ValueError, match="num_rows"):
        distillation_of(tmp_path / "student")
    with pytest.raises(ValueError, match="was not made by"):
        distillation_of(teacher)


def test_calibrated_probabilities_can_be_what_it_learns(tiny_classifier):
    teacher = moved(get_peft_model(tiny_classifier(), CONFIGS["members"]()), by=0.6)
    rows, fresh = rows_of(160), rows_of(64, seed=5)
    labels = torch.randint(3, (400,), generator=torch.Generator().manual_seed(0))
    sure = predict_dataset(teacher, rows_of(400, seed=9), "sample", progress=False).probabilities
    scaling = TemperatureScaling().fit(sure, labels, input="probabilities")  # of labels that it knows nothing of
    arguments = {"num_train_epochs": 12, "learning_rate": 3e-3}
    student = distill(teacher, rows, recalibration=scaling, arguments=arguments)
    raw = predict_dataset(teacher, fresh, "sample", progress=False).probabilities
    calibrated = torch.as_tensor(scaling.transform(raw, input="probabilities"))
    q = predict_dataset(student, fresh, "mean", progress=False).probabilities
    assert (calibrated - q).abs().sum(1).mean() < 0.3 * (raw - q).abs().sum(1).mean()


def test_several_adapters_of_one_model_are_a_teacher(tiny_classifier):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(tiny_classifier(), config, adapter_name="first")
    model.add_adapter("second", config)
    moved(model, by=0.5)  # the active one
    arguments = {"num_train_epochs": 10, "learning_rate": 3e-3}
    student = distill(model, rows_of(120), adapter_names=["first", "second"], arguments=arguments)
    assert list(student.peft_config) == ["first"] and distillation_of(student).num_samples == 2
    assert distillation_of(student).divergence < distillation_of(student).start_divergence
    assert set(model.peft_config) == {"first", "second"}


def test_answers_of_a_language_model_on_rows_of_unequal_length(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    config = EnsembleLoraConfig(task_type="CAUSAL_LM", num_members=2, target_modules=["q_proj", "down_proj"])
    teacher = moved(get_peft_model(base, config), by=0.5)

    def collate(rows):
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row["input_ids"])] = row["input_ids"]
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    rows = [{"input_ids": row["input_ids"][: 3 + i % 4]} for i, row in enumerate(rows_of(120))]
    student = distill(
        teacher, rows, label_tokens=[5, 6, 7], collate_fn=collate,
        arguments={"num_train_epochs": 10, "learning_rate": 3e-3},
    )  # fmt: skip
    found = distillation_of(student)
    assert found.divergence < 0.7 * found.start_divergence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": rows_of(19)}, "19 rows are too few"),
        ({"rows": iter(rows_of(30))}, "rows must be"),
        ({"arguments": {"learning_rte": 1}}, "has no field learning_rte"),
        ({"num_samples": 3}, "3 draws were asked for, but there are 2"),
        ({"task": "token"}, "logits"),
        ({"task": "regression"}, "answers with classes"),
    ],
)
def test_refused(tiny_classifier, change, message):
    teacher = get_peft_model(tiny_classifier(), CONFIGS["members"]())
    asked = {"rows": rows_of(30), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        distill(teacher, asked.pop("rows"), **asked)


def test_arguments_of_the_trainer_itself(tiny_classifier, tmp_path):
    teacher = moved(get_peft_model(tiny_classifier(), CONFIGS["members"]()))
    given = TrainingArguments(tmp_path / "out", num_train_epochs=1, report_to=[], use_cpu=True, save_strategy="no")
    distill(teacher, rows_of(40), arguments=given)
    assert given.remove_unused_columns  # whoever gave it finds it as it was
    distill(teacher, rows_of(40), arguments={"num_train_epochs": 1, "remove_unused_columns": True})


def test_a_sure_student_has_a_record_that_can_be_read(tiny_classifier, tmp_path):
    teacher = moved(get_peft_model(tiny_classifier(), CONFIGS["members"]()))
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "classifier" in name:
                parameter.mul_(500)
    student = distill(teacher, rows_of(40), arguments={"num_train_epochs": 1})
    assert np.isfinite(distillation_of(student).divergence)
    student.save_pretrained(tmp_path)
    assert distillation_of(tmp_path) == distillation_of(student)


def test_equal_rows_stay_on_one_side():
    held, kept = _parts([row for row in rows_of(30) for _ in range(2)], seed=0)
    assert len(held) == 6 and len(held) + len(kept) == 60
    assert not {number // 2 for number in held} & {number // 2 for number in kept}
    with pytest.raises(ValueError, match="too much alike"):
        _parts(rows_of(1) * 30, seed=0)


def test_one_function_needs_no_student(tiny_classifier):
    config = HyperLoraConfig(task_type="SEQ_CLS", target_modules=TARGETS)
    with pytest.raises(ValueError, match="one function"):
        distill(get_peft_model(tiny_classifier(), config), rows_of(30))
