"""A temperature at the end of training: fitted on rows not trained on, and stored with the weights it belongs to."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset, IterableDataset, Value
from peft import LoraConfig, get_peft_model
from small_trainer import adapted, arguments, rows, trainer
from tokenizers import Tokenizer, models
from transformers import Trainer, TrainerCallback

from peft_calib import BayesianLoraConfig, HyperLoraConfig, calibration_split, predict_dataset, prepare_for_trainer
from peft_calib.artefact import ARTEFACT_FILE, read_artefact
from peft_calib.calibration import TemperatureScaling
from peft_calib.calibration.recalibrate import VectorScaling
from peft_calib.provenance.companions import attach_recalibration
from peft_calib.splits import SPLIT_FILE, check_unseen, read_split
from peft_calib.trainer_callbacks import BestCalibrationCallback, RecalibrationCallback, load_recalibration


@pytest.fixture
def split():
    return calibration_split(rows(120, 1, flipped=0.2), 0.3)


def test_temperature_is_that_of_the_calibration_rows_and_saved_with_the_adapter(tiny_classifier, tmp_path, split):
    train, calibration = split
    run = trainer(
        adapted(tiny_classifier),
        tmp_path,
        [RecalibrationCallback(calibration, batch_size=7)],
        train=train,
        save_strategy="steps",
        save_steps=4,
    )
    run.train()
    run.save_model(tmp_path / "final")
    found = load_recalibration(tmp_path / "final")
    predictions = run.predict(calibration)
    expected = TemperatureScaling().fit(predictions.predictions, predictions.label_ids)
    assert found.temperature == pytest.approx(expected.temperature, rel=1e-4)
    # the last checkpoint has the same weights, the one before has not
    assert load_recalibration(tmp_path / "checkpoint-8").temperature == found.temperature
    with pytest.raises(FileNotFoundError, match="RecalibrationCallback"):
        load_recalibration(tmp_path / "checkpoint-4")
    for folder in ("final", "checkpoint-4", "checkpoint-8"):
        record = read_split(tmp_path / folder)
        assert (len(record.trained_on["tokens"]), len(record.calibrated_on["tokens"])) == (
            len(train),
            len(calibration),
        )
    with pytest.raises(ValueError, match="reported on"):
        check_unseen(tmp_path / "final", calibration)
    with pytest.raises(ValueError, match="has not seen"):
        found.evaluate(predictions.predictions, predictions.label_ids)


def test_overlap_is_refused_before_training(tiny_classifier, tmp_path, split):
    train, calibration = split
    leak = [*calibration, *[train[i] for i in range(10)]]

    class Never(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise AssertionError("training began")

    model = adapted(tiny_classifier)
    with pytest.raises(ValueError, match=r"trained on .*calibration_split"):
        trainer(model, tmp_path, [RecalibrationCallback(leak), Never()], train=train).train()
    with pytest.raises(TypeError, match="stream"):
        RecalibrationCallback(IterableDataset.from_generator(lambda: iter(train)))


def test_weights_that_changed_since_are_noticed(tiny_classifier, tmp_path, split):
    train, calibration = split
    run = trainer(adapted(tiny_classifier), tmp_path, [RecalibrationCallback(calibration)], train=train)
    run.train()
    with torch.no_grad():
        next(p for p in run.model.parameters() if p.requires_grad).add_(1e-3)
    run.save_model(tmp_path / "final")
    with pytest.raises(ValueError, match="other weights"):
        load_recalibration(tmp_path / "final")
    file = tmp_path / "final" / ARTEFACT_FILE
    damaged = json.loads(file.read_text())
    damaged["ways"]["mean"]["method"] = "Path"
    del damaged["digest"]
    file.write_text(json.dumps(damaged))
    (tmp_path / "final" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="method is 'Path', but must be one of"):
        load_recalibration(tmp_path / "final")
    # a new training does not carry the old temperature on
    trainer(run.model, tmp_path, [RecalibrationCallback(calibration)], train=train, max_steps=1, save_strategy="steps",
            save_steps=1).train()  # fmt: skip
    assert (tmp_path / "checkpoint-1" / SPLIT_FILE).exists()
    load_recalibration(tmp_path / "checkpoint-1")


def test_after_the_best_checkpoint_was_put_back(tiny_classifier, tmp_path, split):
    train, calibration = split
    numbers = iter([(0.1, 0.9), (0.5, 0.9)])

    def metrics(_):
        nll, accuracy = next(numbers, (1.0, 0.5))
        return {"nll": nll, "accuracy": accuracy}

    run = trainer(
        adapted(tiny_classifier),
        tmp_path,
        [BestCalibrationCallback(), RecalibrationCallback(calibration)],
        train=train,
        eval_strategy="steps",
        eval_steps=4,
        compute_metrics=metrics,
    )
    run.train()
    run.save_model(tmp_path / "final")
    predictions = run.predict(calibration)
    expected = TemperatureScaling().fit(predictions.predictions, predictions.label_ids)
    assert load_recalibration(tmp_path / "final").temperature == pytest.approx(expected.temperature, rel=1e-4)


def test_draws_and_another_method(tiny_classifier, tmp_path, split):
    train, calibration = split
    config = BayesianLoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", init_sd=0.3, max_sd=1.0)
    callback = RecalibrationCallback(calibration, VectorScaling(), num_samples=3, seed=5)
    run = trainer(adapted(tiny_classifier, config), tmp_path, [callback], train=train)
    run.train()
    run.save_model(tmp_path / "final")
    prediction = predict_dataset(run.model, calibration, "sample", 3, seed=5, progress=False)
    logits = prediction.probabilities.double().log().numpy()
    expected = VectorScaling().fit(logits, np.asarray(calibration["labels"]))
    found = load_recalibration(tmp_path / "final")
    assert isinstance(found, VectorScaling)
    np.testing.assert_allclose(found.transform(logits), expected.transform(logits), atol=1e-4)
    saved = json.loads((tmp_path / "final" / ARTEFACT_FILE).read_text())["ways"]["sample"]
    assert (saved["num_samples"], saved["seed"]) == (3, 5)


def test_the_global_random_state_stays(tiny_classifier, tmp_path, split):
    from peft_calib.trainer_callbacks.forwards import logits_of_rows

    model = adapted(tiny_classifier).train()
    collate = trainer(model, tmp_path, []).data_collator
    before = torch.random.get_rng_state()
    logits_of_rows(model, split[1], collate, batch_size=8)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    with pytest.raises(ValueError, match="no labels"):
        logits_of_rows(model, split[1].remove_columns("labels"), collate, batch_size=8)


# --------------------------------------------------------------------- whatever a model answers


def fitted(model, folder, callback, train, **options):
    run = trainer(model, folder, [callback], train=train, **options)
    run.train()
    run.save_model(folder / "final")
    return run, load_recalibration(folder / "final")


def test_tuples_and_frames_give_the_same_temperature(tiny_classifier, tmp_path, split):
    train, calibration = split
    _, expected = fitted(adapted(tiny_classifier), tmp_path / "a", RecalibrationCallback(calibration), train)
    model = adapted(tiny_classifier)
    model.get_base_model().config.return_dict = False
    callback = RecalibrationCallback(calibration.to_pandas().sample(frac=1.0, random_state=0))
    _, found = fitted(model, tmp_path / "b", callback, train)
    assert found.fit_result.fitted == pytest.approx(expected.fit_result.fitted, rel=1e-4)


def test_words_of_one_sentence_count_together(tiny_classifier, tmp_path):
    """The temperature is that of the padded answer, whose interval knows which words belong together."""
    draw, lengths = np.random.default_rng(0), [6, 3, 8, 5] * 12
    ids = [draw.integers(3, 64, length).tolist() for length in lengths]
    data = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *[i % 3 for i in row[1:]]] for row in ids]})
    words = tf.DataCollatorForTokenClassification(tokenizer())
    base = tf.BertForTokenClassification(tiny_classifier().config)
    config = HyperLoraConfig(r=4, target_modules=["query", "value"], task_type="TOKEN_CLS")
    model = prepare_for_trainer(get_peft_model(base, config))
    callback = RecalibrationCallback(data.select(range(24)), batch_size=5)
    run = Trainer(
        model, arguments(tmp_path), train_dataset=data.select(range(24, 48)), data_collator=words, callbacks=[callback]
    )
    run.train()
    batch = words([data[i] for i in range(24)])
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = TemperatureScaling().fit(model.eval()(**batch).logits, labels)
    for name in ("fitted", "low", "high", "num_rows"):
        assert getattr(callback.method.fit_result, name) == pytest.approx(getattr(expected.fit_result, name), rel=1e-3)


def test_a_language_model_that_answers_with_a_token(tiny_decoder, tmp_path):
    draw, answers = np.random.default_rng(0), [7, 9]
    ids = [[*draw.integers(12, 60, 5).tolist(), answers[i % 2]] for i in range(40)]
    data = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 5 + row[-1:] for row in ids]})
    config = HyperLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_decoder(), config)
    callback = RecalibrationCallback(data.select(range(20)), answer_token_ids=answers)
    Trainer(model, arguments(tmp_path), train_dataset=data.select(range(20, 40)), callbacks=[callback]).train()
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(ids[:20])).logits[:, 4][:, answers]
    expected = TemperatureScaling().fit(logits, [i % 2 for i in range(20)])
    assert callback.method.fit_result.fitted == pytest.approx(expected.fit_result.fitted, rel=1e-3)


def tokenizer():
    words = {"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 64)}}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>"
    )


# --------------------------------------------------------------------- a temperature that is none


def test_too_few_rows_are_told_of_before_and_the_training_ends_well(tiny_classifier, tmp_path, split):
    train, calibration = split
    run = trainer(
        adapted(tiny_classifier), tmp_path, [RecalibrationCallback(calibration.select(range(6)))], train=train
    )
    with pytest.warns(UserWarning, match=r"will fit nothing.*at least 10") as caught:
        run.train()
    assert any("fitted nothing" in str(each.message) for each in caught)
    run.save_model(tmp_path / "final")
    assert not (tmp_path / "final" / ARTEFACT_FILE).exists()
    assert len(read_split(tmp_path / "final").calibrated_on["tokens"]) == 6


def test_a_temperature_that_is_left_off_says_why(tiny_classifier, tmp_path):
    train, calibration = calibration_split(rows(80, 1, flipped=0.5), 0.2)
    callback = RecalibrationCallback(calibration)
    with pytest.warns(UserWarning, match="is left off: its 95% interval"):
        _, found = fitted(adapted(tiny_classifier), tmp_path, callback, train, learning_rate=1e-5, max_steps=1)
    saved = json.loads((tmp_path / "final" / ARTEFACT_FILE).read_text())["ways"]["mean"]
    assert found.temperature == 1.0
    assert saved["fit"]["applied"] is False
    assert saved["fit"]["low"] <= 1 <= saved["fit"]["high"]


def test_logits_that_are_not_finite_are_a_warning(tiny_classifier, tmp_path, split):
    train, calibration = split

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_base_model().bert.pooler.dense.bias[0] = float("nan")

    run = trainer(adapted(tiny_classifier), tmp_path, [Breaks(), RecalibrationCallback(calibration)], train=train)
    with pytest.warns(UserWarning, match=r"fitted nothing.*NaN"):
        run.train()


def test_what_cannot_end_well_is_refused_before_training(tiny_classifier, tmp_path, split):
    train, calibration = split

    class Never(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise AssertionError("training began")

    def train_with(callback, config=None):
        trainer(adapted(tiny_classifier, config), tmp_path, [callback, Never()], train=train).train()

    with pytest.raises(ValueError, match="no labels"):
        train_with(RecalibrationCallback(calibration.remove_columns("labels")))
    with pytest.raises(ValueError, match="classes are integers"):
        train_with(RecalibrationCallback(calibration.cast_column("labels", Value("float32"))))
    plain = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(TypeError, match="Leave num_samples out"):
        train_with(RecalibrationCallback(calibration, num_samples=2), plain)


def test_a_base_that_cannot_be_read_ends_no_finished_training(tiny_classifier, tmp_path, split):
    """Sparse tensors, and those of quantisation libraries, cannot be looked into as others."""
    train, calibration = split
    model = adapted(tiny_classifier)
    model.get_base_model().masks = torch.nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    run = trainer(model, tmp_path, [RecalibrationCallback(calibration)], train=train)
    with pytest.warns(UserWarning, match="is not known again later: its tensor masks cannot be read"):
        run.train()
    run.save_model(tmp_path / "final")
    assert read_artefact(tmp_path / "final").base is None
    assert load_recalibration(tmp_path / "final").temperature > 0


def test_a_temperature_that_cannot_be_stored_is_a_warning(tiny_classifier, tmp_path, split, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no digest of this")

    train, calibration = split
    monkeypatch.setattr("peft_calib.provenance.companions.adapter_digest", fails)
    run = trainer(adapted(tiny_classifier), tmp_path, [RecalibrationCallback(calibration)], train=train)
    with pytest.warns(UserWarning, match="could not store what it fitted .*no digest of this"):
        run.train()


def test_each_way_is_asked_for_and_the_draws_are_the_main_one(tiny_classifier, tmp_path):
    config = BayesianLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model, draw = adapted(tiny_classifier, config), np.random.default_rng(0)
    fitted = {
        count: TemperatureScaling().fit((count or 4) * draw.normal(size=(60, 2)), draw.integers(0, 2, 60))
        for count in (3, None)
    }
    for count, method in fitted.items():  # the mean comes last, and is not the main way
        attach_recalibration(model, method.state(), num_samples=count, seed=0)
    model.save_pretrained(tmp_path)
    assert fitted[3].fit_result.fitted != fitted[None].fit_result.fitted
    for how, count in ((None, 3), ("sample", 3), ("late", 3), ("mean", None)):
        assert load_recalibration(tmp_path, how).fit_result == fitted[count].fit_result
    with pytest.raises(ValueError, match="no recalibration for how='linear'; it has one for sample and mean"):
        load_recalibration(tmp_path, "linear")
