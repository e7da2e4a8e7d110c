"""The callback has the stock numbers wherever the loss is formed and whatever the model answers, or says why not."""

import copy
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset, Value
from transformers.modeling_outputs import ModelOutput

from peft_calib.calibration import calibration_report
from peft_calib.trainer_callbacks import (
    BestCalibrationCallback,
    CalibrationCallback,
    RegularizedLossMixin,
    preprocess_logits_for_calibration,
)

NUM_ROWS, CLASSES = 21, 3
SIZES = dict(
    vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=CLASSES
)


class Answering(tf.BertForSequenceClassification):
    """A classifier that answers in the form `answer` says."""

    answer = "plain"

    def forward(self, input_ids=None, attention_mask=None, labels=None, target=None, domain=None, **kwargs):
        labels = target if labels is None else labels
        hidden = self.bert(input_ids, attention_mask=attention_mask)
        embedding, logits = hidden.pooler_output, self.classifier(hidden.pooler_output)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels.view(-1))
        fields = {
            "plain": {"logits": logits},
            "after an auxiliary loss, an embedding and auxiliary logits": {
                "router_loss": embedding.square().mean(),
                "embedding": embedding,
                "aux_logits": logits.flip(-1),
                "logits": logits,
            },
            "under another name": {"embedding": embedding, "prediction_logits": logits, "states": hidden[0]},
            "a tuple": {0: hidden[0], 1: logits},
        }[self.answer]
        if self.answer == "a tuple":
            return (loss, *fields.values()) if loss is not None else tuple(fields.values())
        return {"loss": loss, **fields} if loss is not None else ModelOutput(**fields)


def model(answer="plain"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = Answering(tf.BertConfig(**SIZES))
        torch.nn.init.normal_(found.classifier.weight, std=3.0)
    found.answer = answer
    return found


def rows(label="labels", labelled=True):
    draw = np.random.default_rng(5)
    ids, labels = draw.integers(1, 50, (NUM_ROWS, 6)), draw.integers(0, CLASSES, NUM_ROWS)
    return Dataset.from_dict({"input_ids": ids.tolist()} | ({label: labels.tolist()} if labelled else {}))


def expected(label="labels"):
    data = rows(label)
    with torch.no_grad():
        logits = model().eval()(torch.tensor(data["input_ids"][:])).logits
    return calibration_report(logits, data[label][:], input="logits", confidence_level=None).scores


# --------------------------------------------------------------------- ways to form the loss


class Pops(tf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        loss = torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 2.0, 5.0]))
        return (loss, outputs) if return_outputs else loss


class PopsInItsStep(tf.Trainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model(**inputs)["logits"]
        return torch.nn.functional.cross_entropy(logits, labels), logits, labels


class Smoothed(RegularizedLossMixin, tf.Trainer):
    pass


def focal(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels) ** 2


TRAINERS = {
    "stock": (tf.Trainer, {}, {}),
    "labels popped": (Pops, {}, {}),
    "labels popped in prediction_step": (PopsInItsStep, {}, {}),
    "compute_loss_func": (tf.Trainer, {"compute_loss_func": focal}, {}),
    "label smoothing": (tf.Trainer, {}, {"label_smoothing_factor": 0.2}),
    "label smoothing, mixin": (Smoothed, {}, {"label_smoothing_factor": 0.2}),
}
WIRINGS = {
    "alone": ((), {}),
    "alone, the loss only": ((), {"prediction_loss_only": True}),
    "compute_metrics": (("compute_metrics",), {}),
    "both": (("compute_metrics", "preprocess_logits_for_metrics"), {}),
    "both, batch by batch": (("compute_metrics", "preprocess_logits_for_metrics"), {"batch_eval_metrics": True}),
    "both, not put together": (
        ("compute_metrics", "preprocess_logits_for_metrics"),
        {"eval_do_concat_batches": False},
    ),
    "not put together, moved early": (
        ("compute_metrics",),
        {"eval_do_concat_batches": False, "eval_accumulation_steps": 2},
    ),
    "with inputs and losses": (("compute_metrics",), {"include_for_metrics": ["inputs", "loss"]}),
}


def make(folder, answer="plain", trainer="stock", wiring="alone", callback=None, data=None, found=None, **options):
    callback = callback or CalibrationCallback(diagram=False, confidence_level=None)
    kind, given, settings = TRAINERS[trainer]
    methods, more = WIRINGS[wiring]
    settings = tf.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_eval_batch_size=8,
        **settings | more | options,
    )  # fmt: skip
    return kind(
        found or model(answer),
        settings,
        train_dataset=rows() if data is None else data,
        eval_dataset=rows() if data is None else data,
        callbacks=[callback],
        **given,
        **{name: getattr(callback, name) for name in methods},
    )


def assert_stock_numbers(metrics, wanted):
    for key in ("nll", "accuracy", "brier", "ece"):
        assert metrics[f"eval_{key}"] == pytest.approx(wanted[key], abs=1e-5), key


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("wiring", ["alone", "alone, the loss only", "both", "not put together, moved early"])
def test_wherever_the_loss_is_formed(tmp_path, trainer, wiring):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_stock_numbers(make(tmp_path, trainer=trainer, wiring=wiring).evaluate(), expected())


@pytest.mark.parametrize("answer", [
    "after an auxiliary loss, an embedding and auxiliary logits", "under another name", "a tuple",
])  # fmt: skip
@pytest.mark.parametrize("wiring", WIRINGS)
def test_whatever_the_model_answers(tmp_path, answer, wiring):
    assert_stock_numbers(make(tmp_path, answer, wiring=wiring).evaluate(), expected())


@pytest.mark.parametrize("answer", ["under another name", "a tuple"])
def test_outputs_and_loss_elsewhere_together(tmp_path, answer):
    trainer = {"under another name": "stock", "a tuple": "labels popped"}[answer]
    assert_stock_numbers(make(tmp_path, answer, trainer).evaluate(), expected())


def test_draws_where_the_loss_is_elsewhere(tmp_path, tiny_classifier):
    from peft import get_peft_model

    from peft_calib import BayesianLoraConfig, predict

    config = BayesianLoraConfig(
        r=4,
        lora_alpha=400,
        target_modules=["query", "value"],
        num_train_examples=9,
        init_sd=0.5,
        max_sd=1.0,
        sample_seed=0,
    )
    adapted = get_peft_model(tiny_classifier(), config)
    ids = torch.tensor(rows()["input_ids"][:])
    drawn = predict(adapted, {"input_ids": ids}, "sample", 2, seed=3)
    wanted = calibration_report(drawn.probabilities, rows()["labels"][:], confidence_level=None)["nll"]
    for wiring in ("alone", "compute_metrics"):
        callback = CalibrationCallback(diagram=False, num_samples=2, seed=3)
        metrics = make(tmp_path, trainer="labels popped", wiring=wiring, callback=callback, found=adapted).evaluate()
        assert metrics["eval_sample_nll"] == pytest.approx(wanted, abs=1e-5)
        assert metrics["eval_nll"] != pytest.approx(wanted, abs=1e-6)


def test_label_columns_of_other_names(tmp_path):
    metrics = make(tmp_path, data=rows("target"), label_names=["target"]).evaluate()
    assert_stock_numbers(metrics, expected("target"))
    both = rows().add_column("domain", [0.5] * NUM_ROWS)
    for wiring in ("alone", "both", "compute_metrics", "both, not put together"):
        metrics = make(tmp_path, wiring=wiring, data=both, label_names=["domain", "labels"]).evaluate()
        assert_stock_numbers(metrics, expected())


def test_several_evaluation_sets_and_half_precision(tmp_path):
    data = {"one": rows(), "two": rows().select(range(13))}
    trainer = make(tmp_path, trainer="labels popped", data=data)
    metrics = trainer.evaluate()
    assert metrics["eval_one_nll"] == pytest.approx(expected()["nll"], abs=1e-5)
    assert metrics["eval_two_nll"] != pytest.approx(metrics["eval_one_nll"], abs=1e-3)
    metrics = make(tmp_path, trainer="compute_loss_func", bf16_full_eval=True).evaluate()
    assert metrics["eval_nll"] == pytest.approx(expected()["nll"], rel=0.02)


def test_labels_of_one_column_each_count_as_classes(tmp_path):
    data = rows().map(lambda row: {"labels": [row["labels"]]})
    assert_stock_numbers(make(tmp_path, data=data).evaluate(), expected())
    assert_stock_numbers(make(tmp_path, wiring="both", data=data).evaluate(), expected())


def test_the_best_checkpoint_is_found_where_the_loss_is_elsewhere(tmp_path):
    from small_trainer import adapted, arguments
    from small_trainer import rows as task

    best = BestCalibrationCallback(accuracy_tolerance=None)
    trainer = Pops2(
        adapted(lambda num_labels: model_of_two()),
        arguments(tmp_path, eval_strategy="steps", eval_steps=4),
        train_dataset=task(64, 1),
        eval_dataset=task(64, 2),
        callbacks=[CalibrationCallback(diagram=False), best],
    )
    trainer.train()
    assert best.best["value"] == min(log["eval_nll"] for log in trainer.state.log_history if "eval_nll" in log)


class Pops2(Pops):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss


def model_of_two():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.BertForSequenceClassification(tf.BertConfig(**SIZES | {"num_labels": 2, "vocab_size": 64}))


# --------------------------------------------------------------------- never in silence


def warned(trainer, message):
    with pytest.warns(UserWarning, match=message):
        metrics = trainer.evaluate()
    assert "eval_nll" not in metrics
    return metrics


def test_a_loop_of_the_trainers_own_is_told_of(tmp_path):
    class OwnLoop(Pops):
        def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
            self.callback_handler.eval_dataloader = dataloader
            for each in dataloader:
                with torch.no_grad():
                    self.compute_loss(self.model.eval(), each)
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            return tf.trainer_utils.EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": 0.0}, NUM_ROWS)

    settings = tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = OwnLoop(model(), settings, eval_dataset=rows(), callbacks=[CalibrationCallback(diagram=False)])
    warned(trainer, r"compute_metrics=callback\.compute_metrics")


def test_rows_without_labels_are_told_of_in_an_evaluation_and_fine_in_a_prediction(tmp_path):
    trainer = make(tmp_path, data=rows(labelled=False))
    warned(trainer, "the rows have no labels")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert trainer.predict(rows(labelled=False)).predictions.shape == (NUM_ROWS, CLASSES)


def test_numbers_for_labels_and_several_columns_of_classes_are_told_of(tmp_path):
    real = rows().cast_column("labels", Value("float32"))

    class Loose(Pops):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**{name: value for name, value in inputs.items() if name == "input_ids"})
            loss = outputs["logits"].mean()
            return (loss, outputs) if return_outputs else loss

    settings = tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    warned(Loose(model(), settings, eval_dataset=real, callbacks=[CalibrationCallback()]), "real numbers")
    settings = tf.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, label_names=["target", "domain"]
    )
    twice = rows("target").add_column("domain", [1] * NUM_ROWS)
    warned(Loose(model(), settings, eval_dataset=twice, callbacks=[CalibrationCallback()]), "2 label columns")


def test_question_answering_is_told_of(tmp_path):
    """Two label columns and two outputs over positions: nothing that one panel could measure."""
    base = tf.BertForQuestionAnswering(tf.BertConfig(**SIZES | {"num_labels": 2}))
    data = Dataset.from_dict(
        {"input_ids": [[1, 2, 3, 4]] * 6, "start_positions": [1] * 6, "end_positions": [2] * 6}
    )  # fmt: skip
    trainer = make(tmp_path, found=base, data=data)
    warned(trainer, "start_positions, end_positions")
    with pytest.raises(ValueError, match="2 label columns"):
        make(tmp_path, found=base, data=data, wiring="compute_metrics").evaluate()


@pytest.mark.parametrize("wiring", ["alone", "both", "both, batch by batch"])
def test_logits_that_are_not_finite_end_no_training(tmp_path, wiring):
    found = model()
    with torch.no_grad():
        found.classifier.weight[0, 0] = float("nan")
    metrics = warned(make(tmp_path, wiring=wiring, found=found), f"{NUM_ROWS} of {NUM_ROWS} rows are NaN")
    assert metrics["eval_rows_not_finite"] == NUM_ROWS
    assert BestCalibrationCallback()._point(1, metrics, None) is None


def test_masked_classes_are_no_broken_logits():
    logits, labels = np.array([[1.0, -np.inf, 0.5], [0.0, 2.0, -np.inf]] * 8, np.float32), np.array([0, 1] * 8)
    callback = CalibrationCallback(diagram=False, confidence_level=None)
    metrics = callback.compute_metrics(tf.EvalPrediction(logits, labels))
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert metrics["nll"] == pytest.approx(float(loss), abs=1e-6)


def test_outputs_that_cannot_be_told_apart_are_an_error():
    embedding, logits, labels = torch.zeros(4, 8), torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"Several outputs could be .*callback\.preprocess_logits_for_metrics"):
        preprocess_logits_for_calibration((embedding, logits), labels)
    with pytest.raises(ValueError, match="No output goes with"):
        preprocess_logits_for_calibration((torch.tensor(1.0), torch.zeros(4, 5, 3)), labels)
    assert preprocess_logits_for_calibration((torch.tensor(1.0), torch.zeros(4, 5, 8), logits), labels).shape == (4, 3)


def test_labels_that_are_all_masked_are_told_of(tmp_path):
    masked = rows().map(lambda row: {"labels": -100})
    trainer = make(tmp_path, data=masked)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid value.*")
        warned(trainer, "every label is -100")


def test_one_callback_serves_two_trainers(tmp_path):
    """The one made first is evaluated after the other was made, by positions instead of names."""

    class ByPosition(tf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(inputs["input_ids"], None)
            loss = torch.nn.functional.cross_entropy(outputs["logits"], inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    callback = CalibrationCallback(diagram=False, confidence_level=None)
    settings = tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    first = ByPosition(model(), settings, eval_dataset=rows(), callbacks=[callback])
    make(tmp_path, callback=callback)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_stock_numbers(first.evaluate(), expected())
    assert callback.report.settings["num_rows"] == NUM_ROWS


def test_a_callback_can_be_copied_while_it_watches(tmp_path):
    callback = CalibrationCallback(diagram=False, confidence_level=None)
    make(tmp_path, callback=callback).evaluate()
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert_stock_numbers(make(tmp_path, callback=copied).evaluate(), expected())


def test_a_compute_metrics_that_is_not_called_is_told_of(tmp_path):
    trainer = make(tmp_path, wiring="compute_metrics")
    trainer.evaluate()
    trainer.args.prediction_loss_only = True
    warned(trainer, "did not call compute_metrics")
    assert_stock_numbers(trainer.evaluate(), expected())


def test_an_evaluation_that_was_broken_off_leaves_no_rows(tmp_path):
    callback = CalibrationCallback(diagram=False, confidence_level=None)

    class BreaksOff(tf.TrainerCallback):
        armed = True

        def on_prediction_step(self, *args, **kwargs):
            if self.armed:
                raise KeyboardInterrupt

    breaks = BreaksOff()
    trainer = make(tmp_path, callback=callback)
    trainer.add_callback(breaks)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    breaks.armed = False
    assert_stock_numbers(trainer.evaluate(), expected())
    assert callback.report.settings["num_rows"] == NUM_ROWS


def test_draws_need_the_callback_among_the_callbacks(tmp_path):
    callback = CalibrationCallback(diagram=False, num_samples=2)
    settings = tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = tf.Trainer(model(), settings, eval_dataset=rows(), compute_metrics=callback.compute_metrics)
    with pytest.warns(UserWarning, match=r"callbacks=\[\.\.\.\]"):
        assert "eval_nll" in trainer.evaluate()


# --------------------------------------------------------------------- language models


def llama(**options):
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes | options)).eval()


ANSWERS = [7, 9, 11]


def padded(lengths, labelled):
    draw = np.random.default_rng(0)
    longest, found = max(lengths), {"input_ids": [], "attention_mask": [], "labels": []}
    for row, length in enumerate(lengths):
        ids = [*draw.integers(12, 50, length - 1).tolist(), ANSWERS[row % 3]]
        found["input_ids"].append([*(ids if labelled else ids[:-1]), *[0] * (longest - length)])
        found["attention_mask"].append([*[1] * (length - (0 if labelled else 1)), *[0] * (longest - length)])
        found["labels"].append([*[-100] * (length - 1), ids[-1], *[-100] * (longest - length)])
    return Dataset.from_dict(found if labelled else {name: found[name] for name in ("input_ids", "attention_mask")})


def test_answers_of_unlabelled_rows_come_from_where_each_row_ends(tmp_path):
    lengths = [5, 8, 3, 6, 8, 4, 7, 5, 2]
    callback = CalibrationCallback(diagram=False, answer_token_ids=ANSWERS)
    trainer = make(tmp_path, wiring="both", callback=callback, found=llama(), data=padded(lengths, True))
    with_labels = trainer.predict(padded(lengths, True)).predictions
    without = trainer.predict(padded(lengths, False)).predictions
    assert without.shape == (9, 3)
    np.testing.assert_allclose(without, with_labels, atol=1e-5)
    with pytest.raises(ValueError, match=r"last token .* attention mask"):
        preprocess_logits_for_calibration(torch.zeros(2, 4, 50), None, ANSWERS)


def test_unlabelled_rows_keep_all_positions_of_a_token_classifier():
    kept = preprocess_logits_for_calibration(torch.ones(2, 5, 3, dtype=torch.bfloat16), None)
    assert (kept.shape, kept.dtype) == ((2, 5, 3), torch.float32)
    with pytest.raises(ValueError, match="answer_token_ids"):
        preprocess_logits_for_calibration(torch.zeros(2, 4, 5000), None)


def test_an_encoder_decoder_answers_at_the_label_and_not_before(tmp_path):
    sizes = dict(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    draw = np.random.default_rng(1)
    # the source is as long as the target, so that shapes do not tell the encoder's states from the logits
    labels = [[-100, ANSWERS[i % 3], 1] for i in range(9)]
    data = Dataset.from_dict({"input_ids": draw.integers(12, 50, (9, 3)).tolist(), "labels": labels})
    with torch.no_grad():
        fed = torch.tensor([[0, 0, label[1]] for label in labels])
        logits = found(input_ids=torch.tensor(data["input_ids"][:]), decoder_input_ids=fed).logits[:, 1][:, ANSWERS]
    wanted = calibration_report(logits, [i % 3 for i in range(9)], input="logits", confidence_level=None)["nll"]
    for wiring in ("alone", "both"):
        callback = CalibrationCallback(diagram=False, answer_token_ids=ANSWERS)
        metrics = make(tmp_path, wiring=wiring, callback=callback, found=found, data=data).evaluate()
        assert metrics["eval_nll"] == pytest.approx(wanted, abs=1e-5)


def test_an_answer_that_nothing_precedes_is_told_of(tmp_path):
    data = Dataset.from_dict({"input_ids": [[7, 20, 21]] * 4, "labels": [[7, -100, -100]] * 4})
    callback = CalibrationCallback(diagram=False, answer_token_ids=ANSWERS)
    warned(make(tmp_path, callback=callback, found=llama(), data=data), "its very first token")


def test_a_partial_of_the_function_still_serves_labelled_rows(tmp_path):
    data = padded([5, 8, 3, 6], True)
    keep = partial(preprocess_logits_for_calibration, answer_token_ids=ANSWERS)
    labels = torch.tensor(data["labels"][:])
    logits = torch.randn(4, 8, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep((logits,), labels), keep(logits, labels))
