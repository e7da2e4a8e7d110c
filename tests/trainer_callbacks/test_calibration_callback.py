"""The callback in the stock Trainer, by each way of wiring it."""

import json
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, Trainer, TrainingArguments

from peft_calib.calibration import calibration_report
from peft_calib.trainer_callbacks import CalibrationCallback, preprocess_logits_for_calibration
from peft_calib.trainer_callbacks.preprocess import labelled_rows

NUM_ROWS, NUM_CLASSES = 37, 3


class Rows(torch.utils.data.Dataset):
    """Random token rows, whose labels have nothing to do with them."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 50, (NUM_ROWS, 6), generator=generator)
        self.labels = torch.randint(0, NUM_CLASSES, (NUM_ROWS,), generator=generator)

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def _model() -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=3,
        )
        model = BertForSequenceClassification(config)
        # Logits large enough to matter.
        torch.nn.init.normal_(model.classifier.weight, std=3.0)
    return model


def _arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_eval_batch_size=8, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip


def _expected(model) -> dict[str, float]:
    rows = Rows()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=rows.tokens).logits
    return calibration_report(logits, rows.labels, input="logits", confidence_level=None).scores


WIRINGS = ["alone", "compute_metrics", "batched"]


def _trainer(wiring: str, folder, callback: CalibrationCallback, **options) -> Trainer:
    wired = wiring != "alone"
    return Trainer(
        _model(),
        _arguments(folder, batch_eval_metrics=wiring == "batched", **options),
        train_dataset=Rows(1),
        eval_dataset=Rows(),
        callbacks=[callback],
        compute_metrics=callback.compute_metrics if wired else None,
        preprocess_logits_for_metrics=preprocess_logits_for_calibration if wired else None,
    )


@pytest.mark.parametrize("wiring", WIRINGS)
def test_evaluation_gets_the_numbers_of_the_report(tmp_path, wiring):
    callback = CalibrationCallback()
    trainer = _trainer(wiring, tmp_path, callback)
    metrics = trainer.evaluate()
    expected = _expected(trainer.model)
    for key in callback.scores:
        assert metrics[f"eval_{key}"] == pytest.approx(expected[key], abs=1e-5), key
    logged = trainer.state.log_history[-1]
    assert {f"eval_{key}" for key in callback.scores} <= set(logged)
    assert all(isinstance(value, (int, float)) for value in logged.values())


@pytest.mark.parametrize("wiring", WIRINGS)
def test_report_and_diagram_are_saved(tmp_path, wiring):
    from matplotlib.image import imread

    _trainer(wiring, tmp_path, CalibrationCallback()).evaluate()
    picture = imread(tmp_path / "reliability_eval_step_0.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.05
    saved = json.loads((tmp_path / "calibration_eval_step_0.json").read_text())
    assert saved["settings"]["num_rows"] == NUM_ROWS


@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_evaluation_of_a_training_run(tmp_path, wiring):
    callback = CalibrationCallback(diagram=False)
    trainer = _trainer(
        wiring, tmp_path, callback, eval_strategy="epoch", num_train_epochs=2, metric_for_best_model="eval_nll"
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_ece" in entry]
    assert len(evaluations) == 2
    assert len({entry["eval_nll"] for entry in evaluations}) == 2
    assert sorted(path.name for path in tmp_path.glob("calibration_*.json")) == [
        "calibration_eval_step_10.json",
        "calibration_eval_step_5.json",
    ]


def test_predict_gets_the_numbers_too(tmp_path):
    callback = CalibrationCallback()
    trainer = _trainer("alone", tmp_path, callback)
    metrics = trainer.predict(Rows()).metrics
    assert metrics["test_ece"] == pytest.approx(_expected(trainer.model)["ece"], abs=1e-5)


def test_forwards_outside_the_evaluation_are_not_counted(tmp_path):
    callback = CalibrationCallback()
    trainer = _trainer("alone", tmp_path, callback)
    trainer.model.eval()
    rows = Rows()
    with torch.no_grad():
        trainer.model(input_ids=rows.tokens, labels=rows.labels)
    trainer.evaluate()
    assert callback.report.settings["num_rows"] == NUM_ROWS


def test_intervals_and_other_metrics_on_request(tmp_path):
    other = {"own_metric": 7.0}
    callback = CalibrationCallback(confidence_level=0.9, compute_metrics=lambda prediction: other, diagram=False)
    metrics = _trainer("compute_metrics", tmp_path, callback).evaluate()
    assert metrics["eval_own_metric"] == 7.0
    for key in ("accuracy", "nll", "brier", "ece"):
        assert metrics[f"eval_{key}_low"] < metrics[f"eval_{key}"] < metrics[f"eval_{key}_high"]
    assert metrics["eval_ece_floor"] > 0
    accuracy = metrics["eval_accuracy"]
    assert metrics["eval_accuracy_se"] == pytest.approx((accuracy * (1 - accuracy) / NUM_ROWS) ** 0.5)


def test_token_classification_ignores_padding():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(4, 7, 5)).astype(np.float32), generator.integers(0, 5, (4, 7))
    labels[:, 4:] = -100
    logits[:, 5:] = -100.0  # what the Trainer pads with
    callback = CalibrationCallback(diagram=False)
    metrics = callback.compute_metrics(EvalPrediction(logits, labels))
    expected = calibration_report(
        logits[:, :4].reshape(-1, 5), labels[:, :4].reshape(-1), input="logits", confidence_level=None
    )
    assert metrics["nll"] == pytest.approx(expected["nll"], abs=1e-12)
    assert callback.report.settings["num_rows"] == 16


def test_multiple_choice_by_a_causal_language_model():
    answers = [11, 42, 7]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 9, 2000, generator=generator).to(torch.bfloat16)
    classes = torch.tensor([0, 2, 1, 1, 0])
    labels = torch.full((5, 9), -100)
    position = [8, 4, 1, 6, 7]
    for row, at in enumerate(position):
        labels[row, at] = answers[classes[row]]
    kept = preprocess_logits_for_calibration(logits, labels, answer_token_ids=answers)
    manual = torch.stack([logits[row, at - 1, answers].float() for row, at in enumerate(position)])
    assert torch.equal(kept, manual)
    callback = CalibrationCallback(answer_token_ids=answers, diagram=False)
    metrics = callback.compute_metrics(EvalPrediction(kept.numpy(), labels.numpy()))
    expected = calibration_report(manual, classes, input="logits", confidence_level=None)
    assert metrics["nll"] == pytest.approx(expected["nll"], abs=1e-6)


def test_a_vocabulary_without_answers_is_refused():
    with pytest.raises(ValueError, match="answer_token_ids"):
        preprocess_logits_for_calibration(torch.zeros(1, 2, 5000), torch.zeros(1, 2, dtype=torch.long))
    wrong = EvalPrediction(np.zeros((2, 3), np.float32), np.array([[-100, 5], [-100, 9]]))
    with pytest.raises(ValueError, match="not one of answer_token_ids"):
        CalibrationCallback(answer_token_ids=[5, 6, 7]).compute_metrics(wrong)
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics"):
        CalibrationCallback().compute_metrics(wrong)


def test_unknown_scores_are_refused():
    with pytest.raises(ValueError, match="Unknown scores"):
        CalibrationCallback(scores=["ece", "accuracie"])


def test_regression_is_left_alone(tmp_path):
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
        )
    )

    class Targets(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.tokens[index], "labels": self.labels[index].float()}

    trainer = Trainer(model, _arguments(tmp_path), eval_dataset=Targets(), callbacks=[CalibrationCallback()])
    assert "eval_ece" not in trainer.evaluate()


def test_no_global_random_state_is_touched(tmp_path):
    callback = CalibrationCallback(confidence_level=0.95, diagram=True)
    prediction = EvalPrediction(np.random.default_rng(0).normal(size=(50, 3)), np.arange(50) % 3)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    callback.compute_metrics(prediction)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_partial_fits_the_trainer_signature():
    keep = partial(preprocess_logits_for_calibration, answer_token_ids=[1, 2])
    assert keep(torch.zeros(2, 4, 9), torch.tensor([[-100, 1, 2, -100]] * 2)).shape == (2, 2)


def test_many_rows_are_summed_up_and_few_kept():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(5000, 4)).astype(np.float32), generator.integers(0, 4, 5000)
    kept, summed = CalibrationCallback(diagram=False), CalibrationCallback(diagram=False, max_rows=100)
    for start in range(0, 5000, 50):
        batch = EvalPrediction(logits[start : start + 50], labels[start : start + 50])
        results = [each.compute_metrics(batch, compute_result=start == 4950) for each in (kept, summed)]
        assert len(summed._gathered._kept) <= 2
    exact, streamed = results
    for key in ("accuracy", "nll", "brier", "ece", "mce", "classwise_ece", "mean_confidence"):
        assert streamed[key] == pytest.approx(exact[key], abs=1e-6), key
    assert streamed["ace"] == pytest.approx(exact["ace"], abs=2e-3)
    assert exact["ece_low"] < exact["ece"] < exact["ece_high"]
    assert "ece_low" not in streamed
    assert summed.report.settings["num_rows"] == 5000
    # and the next evaluation begins anew
    assert summed.compute_metrics(EvalPrediction(logits[:50], labels[:50]))["nll"] > 0
    assert summed.report.settings["num_rows"] == 50


@pytest.mark.parametrize("wiring", WIRINGS)
def test_draws_are_those_of_predict(tmp_path, wiring, tiny_classifier):
    from peft import get_peft_model

    from peft_calib import BayesianLoraConfig, predict

    config = BayesianLoraConfig(r=4, lora_alpha=400, target_modules=["query", "value"], init_sd=0.5, max_sd=1.0)
    model = get_peft_model(tiny_classifier(), config)
    callback = CalibrationCallback(num_samples=3, seed=7, diagram=False)
    rows = Rows()
    trainer = _trainer(wiring, tmp_path, callback)
    watched = Trainer(
        model,
        trainer.args,
        eval_dataset=rows,
        callbacks=[callback],
        compute_metrics=trainer.compute_metrics,
        preprocess_logits_for_metrics=trainer.preprocess_logits_for_metrics,
    )
    metrics = watched.evaluate()
    sampled = predict(model, {"input_ids": rows.tokens}, "sample", 3, seed=7)
    expected = calibration_report(sampled.probabilities, rows.labels, confidence_level=None)
    mean = predict(model, {"input_ids": rows.tokens}, "mean")
    plain = calibration_report(mean.probabilities, rows.labels, confidence_level=None)
    for key in ("nll", "brier", "accuracy", "ece"):
        assert metrics[f"eval_sample_{key}"] == pytest.approx(expected[key], abs=1e-5), key
        assert metrics[f"eval_{key}"] == pytest.approx(plain[key], abs=1e-5), key
    assert metrics["eval_sample_nll"] != pytest.approx(metrics["eval_nll"], abs=1e-6)
    assert (tmp_path / "calibration_eval_sample_step_0.json").exists()


@pytest.mark.parametrize("law", ["curve", "members", "around members"])
def test_draws_one_by_one_are_those_of_predict(law, tiny_classifier):
    """Each draw has a forward of its own here: of a curve it must be the same point as among all of them."""
    from peft import get_peft_model

    from peft_calib import CurveLoraConfig, EnsembleLoraConfig, predict
    from peft_calib.trainer_callbacks.forwards import logits_of_rows, sampled_logits
    from peft_calib.tuners.laws import laws_of

    how = {"r": 2, "target_modules": ["query", "value"]}
    config = CurveLoraConfig(**how, num_anchors=2) if law == "curve" else EnsembleLoraConfig(**how, layers="all")
    config.moments = 2 if law == "around members" else 0
    model = get_peft_model(tiny_classifier(), config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    if law == "around members":
        (of_model,) = laws_of(model)
        for step in range(5):
            of_model.set_progress(step, 4)
            torch.nn.utils.vector_to_parameters(
                1.2 * torch.nn.utils.parameters_to_vector(of_model.parameters()), of_model.parameters()
            )
    rows, count = Rows(), 2 if law == "members" else 5
    inputs = {"input_ids": rows.tokens}
    expected = predict(model, inputs, "sample", count, seed=7).probabilities.double().log()
    drawn = sampled_logits(model, inputs, rows.labels, None, count, 7).double()
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    collate = torch.utils.data.default_collate
    fitted, _ = logits_of_rows(model, rows, collate, batch_size=8, num_samples=count, seed=7)
    np.testing.assert_allclose(fitted, expected.numpy(), atol=1e-4)


def test_pictures_and_numbers_in_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    arguments = _arguments(tmp_path, eval_strategy="steps", eval_steps=5, max_steps=10)
    arguments.report_to = ["tensorboard"]
    trainer = Trainer(
        _model(), arguments, train_dataset=Rows(1), eval_dataset=Rows(), callbacks=[CalibrationCallback()]
    )
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    assert [event.step for event in board.Images("reliability/eval")] == [5, 10]
    values = {event.step: event.value for event in board.Scalars("eval/nll")}
    logged = {log["step"]: log["eval_nll"] for log in trainer.state.log_history if "eval_nll" in log}
    assert values == pytest.approx(logged, rel=1e-5)


class Tracker(types.ModuleType):
    """What wandb and trackio are asked: `log`, `Image`, and whether a run is under way."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.logged, self.Image = [], lambda pixels: pixels
        run = types.SimpleNamespace(get=lambda: "a run")
        if name == "trackio":  # its `run` is a module, there or not
            self.run, self.context_vars = None, types.SimpleNamespace(current_run=run)
        else:
            self.run = run

    def log(self, content: dict) -> None:
        self.logged.append(content)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_pictures_and_numbers_in_other_trackers(name, tmp_path, monkeypatch):
    tracker = Tracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    arguments = _arguments(tmp_path, eval_strategy="steps", eval_steps=5, max_steps=10)
    trainer = Trainer(
        _model(), arguments, train_dataset=Rows(1), eval_dataset=Rows(), callbacks=[CalibrationCallback()]
    )
    trainer.args.report_to = [name]
    trainer.train()
    pictures = [content for content in tracker.logged if "reliability/eval" in content]
    assert [content["train/global_step"] for content in pictures] == [5, 10]
    for content in pictures:
        pixels = content["reliability/eval"]
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.std() > 0
    values = {content["train/global_step"]: content["eval/nll"] for content in tracker.logged if "eval/nll" in content}
    logged = {log["step"]: log["eval_nll"] for log in trainer.state.log_history if "eval_nll" in log}
    assert values == logged


def test_a_tracker_without_a_run_is_left_alone(tmp_path, monkeypatch):
    tracker = Tracker("wandb")
    tracker.run = None
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    arguments = _arguments(tmp_path)
    trainer = Trainer(_model(), arguments, eval_dataset=Rows(), callbacks=[CalibrationCallback()])
    trainer.args.report_to = ["wandb"]
    trainer.evaluate()
    assert tracker.logged == []


def test_unlabelled_tail_of_token_rows_is_not_kept():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 9, 4, generator=generator), torch.full((3, 9), -100)
    labels[0, 1:4], labels[2, 2] = torch.tensor([0, 3, 1]), 2
    kept = preprocess_logits_for_calibration(logits, labels)
    assert torch.equal(kept, logits[:, :4])
    metrics = CalibrationCallback(diagram=False).compute_metrics(EvalPrediction(kept.numpy(), labels.numpy()))
    keep = labels != -100
    expected = calibration_report(logits[keep], labels[keep], input="logits", confidence_level=None)
    assert metrics["nll"] == pytest.approx(expected["nll"], abs=1e-6)
    assert preprocess_logits_for_calibration(logits, torch.full((3, 9), -100)).shape == (3, 1, 4)


@pytest.mark.parametrize("shift", [-3, 0, 2])
def test_logits_that_are_shorter_or_longer_than_the_labels(shift):
    """`logits_to_keep` cuts the front off, prompt tuning puts virtual tokens before."""
    answers, generator = [11, 42], torch.Generator().manual_seed(0)
    whole = torch.randn(2, 9, 50, generator=generator)
    labels = torch.full((2, 9), -100)
    labels[0, 6], labels[1, 8] = 11, 42
    front = torch.randn(2, max(shift, 0), 50, generator=generator)
    logits = torch.cat([front, whole[:, max(-shift, 0) :]], dim=1)
    kept = preprocess_logits_for_calibration(logits, labels, answer_token_ids=answers)
    assert torch.equal(kept, torch.stack([whole[0, 5, answers], whole[1, 7, answers]]))
    with pytest.raises(ValueError, match="logits_to_keep"):
        preprocess_logits_for_calibration(whole[:, -2:], labels, answer_token_ids=answers)
    with pytest.raises(ValueError, match="vocabulary has 50"):
        preprocess_logits_for_calibration(whole, labels, answer_token_ids=[50])


def test_choosing_the_worst_or_the_useless_checkpoint_is_noticed(tmp_path):
    options = dict(save_strategy="no", metric_for_best_model="eval_nll", lr_scheduler_type="reduce_lr_on_plateau")

    def make(**changes):
        arguments = TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, eval_strategy="epoch", **options | changes
        )
        return Trainer(
            _model(), arguments, train_dataset=Rows(1), eval_dataset=Rows(), callbacks=[CalibrationCallback()]
        )

    with pytest.raises(ValueError, match="greater_is_better=False"):
        make()
    make(greater_is_better=False)
    with pytest.raises(ValueError, match="greater_is_better=True"):
        make(metric_for_best_model="accuracy", greater_is_better=False)
    with pytest.warns(UserWarning, match="perfectly calibrated"):
        make(metric_for_best_model="ece", greater_is_better=False)
    with pytest.raises(KeyError, match="eval_nnl"):
        make(metric_for_best_model="nnl", greater_is_better=False).train()


def test_choosing_the_worst_checkpoint_by_one_of_several_sets_is_noticed(tmp_path):
    """Their names are not known before the first evaluation, which comes before any choice."""
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="far_nll",
    )  # fmt: skip
    callback = CalibrationCallback(confidence_level=None, diagram=False)
    sets = {"near": Rows(2), "far": Rows(2)}
    run = Trainer(_model(), arguments, train_dataset=Rows(2), eval_dataset=sets, callbacks=[callback])
    with pytest.raises(ValueError, match=r"metric_for_best_model='far_nll' .* greater_is_better=False"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("virtual", [0, 3])
def test_logits_of_virtual_tokens_stand_before_those_of_the_labelled_ones(virtual):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 3, generator=generator), torch.tensor([[0, 2, 1, 0, 1], [2, 2, 0, -100, -100]])
    front = torch.full((2, virtual, 3), 9.0)
    longer = torch.cat([front, logits], dim=1)
    kept = preprocess_logits_for_calibration(longer, labels)
    rows, classes = labelled_rows(kept.numpy(), labels.numpy())
    keep = labels != -100
    np.testing.assert_array_equal(rows, logits[keep].numpy())
    np.testing.assert_array_equal(classes, labels[keep].numpy())


def test_an_evaluation_without_a_label_says_so():
    empty = EvalPrediction(np.zeros((2, 3), np.float32), np.full(2, -100))
    with pytest.raises(ValueError, match="no labelled row"):
        CalibrationCallback().compute_metrics(empty)
