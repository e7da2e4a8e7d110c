"""The best checkpoint by a proper score: chosen as if all were kept, put back, stopped early, resumed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from small_trainer import adapted, assert_equal, rows, trained, trainer
from transformers import TrainerCallback

from peft_calib.trainer_callbacks import BestCalibrationCallback, CalibrationCallback
from peft_calib.trainer_callbacks.best import FOLDER, choose, front

SHARE = st.integers(0, 20).map(lambda x: x / 20)


class Scripted:
    """`compute_metrics` that ignores the predictions and reads from a list."""

    def __init__(self, numbers):
        self.numbers = list(numbers)

    def __call__(self, prediction):
        return dict(zip(("nll", "accuracy"), self.numbers.pop(0), strict=True))


class Remember(TrainerCallback):
    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = trained(model)


@settings(deadline=None)
@given(st.lists(st.tuples(SHARE, SHARE), min_size=1, max_size=12), st.sampled_from([None, 0.0, 1.0, 3.0]))
def test_what_is_kept_is_enough_to_choose_as_if_all_were_kept(numbers, tolerance):
    everything, kept = [], []
    for step, (value, accuracy) in enumerate(numbers):
        se = math.sqrt(accuracy * (1 - accuracy) / 50)
        point = {"step": step, "value": value, "accuracy": accuracy, "accuracy_se": se}
        everything.append(point)
        kept = front([*kept, point])
        best, expected = choose(kept, tolerance), choose(everything, tolerance)
        assert best["value"] == expected["value"]
        if tolerance is not None:
            top = max(p["accuracy"] for p in everything)
            assert best["accuracy"] <= top
            assert expected["accuracy"] <= best["accuracy"]  # of equal values the more accurate is kept


def test_best_adapter_is_put_back(tiny_classifier, tmp_path):
    script = Scripted([(0.9, 0.70), (0.5, 0.80), (0.6, 0.90), (0.55, 0.89)])
    remember = Remember()
    model = adapted(tiny_classifier)
    best = BestCalibrationCallback("nll")
    trainer(model, tmp_path, [remember, best], compute_metrics=script, eval_strategy="steps", eval_steps=2).train()
    # 0.80 is below 0.90 by more than its standard error of 0.0375, and 0.55 beats 0.6
    assert best.best["step"] == 8
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"step-4", "step-6", "step-8"}
    script.numbers = [(0.5, 0.9), (0.6, 0.9), (0.7, 0.9), (0.8, 0.9)]
    model = adapted(tiny_classifier)
    run = trainer(model, tmp_path / "b", [remember, best], compute_metrics=script, eval_strategy="steps", eval_steps=2)
    run.train()
    assert best.best["step"] == 2
    assert_equal(trained(model), remember.weights[2])
    kept = [path.name for path in (tmp_path / "b" / FOLDER).iterdir()]
    assert kept == ["step-2"]
    again = PeftModel.from_pretrained(tiny_classifier(num_labels=2), tmp_path / "b" / FOLDER / "step-2")
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(again.eval()(**ids).logits, model.eval()(**ids).logits)


def test_the_last_adapter_stays_without_restore(tiny_classifier, tmp_path):
    remember, model = Remember(), adapted(tiny_classifier)
    best = BestCalibrationCallback("brier", accuracy_tolerance=None, restore=False)
    numbers = iter([0.1, 0.2])
    options = dict(eval_strategy="steps", eval_steps=4, compute_metrics=lambda _: {"brier": next(numbers)})
    trainer(model, tmp_path, [remember, best], **options).train()
    assert best.best["step"] == 4
    assert_equal(trained(model), remember.weights[8])


def test_patience(tiny_classifier, tmp_path):
    script = Scripted([(0.5, 0.9), (0.4, 0.9), (0.6, 0.9), (0.7, 0.9), (0.1, 0.9)])
    best = BestCalibrationCallback("nll", patience=2)
    run = trainer(
        adapted(tiny_classifier), tmp_path, [best], compute_metrics=script, eval_strategy="steps", eval_steps=1
    )
    run.train()
    assert run.state.global_step == 4
    assert best.best["step"] == 2


def test_a_collapsed_model_does_not_win(tiny_classifier, tmp_path):
    """Wrong labels make every accurate, sure model worse in NLL than the shares of the classes."""
    model = adapted(tiny_classifier)
    torch.nn.init.zeros_(model.base_model.model.classifier.modules_to_save["default"].weight)
    best = BestCalibrationCallback("nll")
    run = trainer(
        model,
        tmp_path,
        [CalibrationCallback(diagram=False, confidence_level=None), best],
        train=rows(256, 1),
        evaluation=rows(256, 2, flipped=0.25),
        max_steps=120,
        eval_strategy="steps",
        eval_steps=40,
        eval_on_start=True,
        per_device_train_batch_size=32,
        learning_rate=2e-2,
    )
    run.train()
    evaluations = {log["step"]: log for log in run.state.log_history if "eval_nll" in log}
    # the trap is real: the untrained model has the least NLL and the least ECE
    assert min(evaluations, key=lambda step: evaluations[step]["eval_ece"]) == 0
    assert min(evaluations, key=lambda step: evaluations[step]["eval_nll"]) == 0
    assert evaluations[0]["eval_accuracy"] < 0.6
    assert best.best["step"] > 0
    assert best.best["accuracy"] > 0.7
    assert run.evaluate()["eval_accuracy"] == pytest.approx(best.best["accuracy"])


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_resumes_with_what_it_knew(tiny_classifier, tmp_path):
    numbers = [(0.5, 0.9), (0.4, 0.9), (0.6, 0.95), (0.41, 0.95)]
    options = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4)
    whole = BestCalibrationCallback(patience=5)
    expected = adapted(tiny_classifier)
    trainer(expected, tmp_path / "whole", [whole], compute_metrics=Scripted(numbers), **options).train()
    first = BestCalibrationCallback(patience=5)
    script = Scripted(numbers)
    stopped = trainer(
        adapted(tiny_classifier), tmp_path / "cut", [first, StopAt(6)], compute_metrics=script, **options
    )
    stopped.train()
    second, model = BestCalibrationCallback(patience=5), adapted(tiny_classifier)
    run = trainer(model, tmp_path / "cut", [second], compute_metrics=Scripted(numbers[2:]), **options)
    run.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert second.points == whole.points
    assert len(whole.points) > 1
    assert_equal(trained(model), trained(expected))
    # a new training with the same object starts afresh
    second.on_train_begin(run.args, type(run.state)(), run.control)
    assert second.points == []


def test_joining_a_run_that_was_started_without_it(tiny_classifier, tmp_path):
    options = dict(save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4)
    metrics = Scripted([(0.5, 0.9)] * 8)
    trainer(adapted(tiny_classifier), tmp_path, [], compute_metrics=metrics, **options).train()
    best = BestCalibrationCallback()
    run = trainer(adapted(tiny_classifier), tmp_path, [best], compute_metrics=metrics, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert best.best["step"] == 8


@pytest.mark.parametrize("metric", ["ece", "eval_ece", "smooth_ece", "sample_ace", "confidence_gap"])
def test_calibration_errors_are_refused(metric):
    with pytest.raises(ValueError, match="perfectly calibrated"):
        BestCalibrationCallback(metric)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "must be one of"),
        ({"metric": "nnl"}, "must be one of"),
        ({"accuracy_tolerance": -1}, "standard errors"),
        ({"patience": 0}, "patience"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        BestCalibrationCallback(**options)


def test_evaluations_without_the_score_are_refused(tiny_classifier, tmp_path):
    options = dict(eval_strategy="steps", eval_steps=2)
    both = dict(load_best_model_at_end=True, save_strategy="steps", save_steps=2)
    for changes, message in (
        ({}, "CalibrationCallback"),
        ({"compute_metrics": lambda _: {"nll": 1.0}}, "accuracy_tolerance"),
        (both, "load_best_model_at_end"),
    ):
        run = trainer(adapted(tiny_classifier), tmp_path, [BestCalibrationCallback()], **options | changes)
        with pytest.raises(ValueError, match=message):
            run.train()


def test_a_training_without_evaluation_says_so(tiny_classifier, tmp_path):
    with pytest.warns(UserWarning, match="saw no evaluation"):
        trainer(adapted(tiny_classifier), tmp_path, [BestCalibrationCallback()], max_steps=1).train()


def test_evaluation_sets_by_name_are_told_apart(tiny_classifier, tmp_path):
    callbacks = [CalibrationCallback(diagram=False, confidence_level=None), BestCalibrationCallback()]
    run = trainer(adapted(tiny_classifier), tmp_path, callbacks, max_steps=1, eval_strategy="steps", eval_steps=1)
    run.eval_dataset = {"near": run.eval_dataset, "far": run.eval_dataset}
    with pytest.warns(UserWarning, match="no evaluation of 'eval', .* prefix= one of 'eval_far', 'eval_near'"):
        run.train()
