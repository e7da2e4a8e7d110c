"""A temperature at the end of training: fitted on rows not trained on, and stored with the weights it belongs to."""

import json

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from small_trainer import adapted, rows, trainer
from transformers import TrainerCallback

from peft_calib import BayesianLoraConfig, calibration_split, predict_dataset
from peft_calib.calibration import TemperatureScaling
from peft_calib.calibration.recalibrate import VectorScaling
from peft_calib.splits import SPLIT_FILE, check_unseen, read_split
from peft_calib.trainer_callbacks import BestCalibrationCallback, RecalibrationCallback, load_recalibration
from peft_calib.trainer_callbacks.recalibration import RECALIBRATION_FILE


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
    (tmp_path / "final" / RECALIBRATION_FILE).write_text(json.dumps({"method": "Path"}))
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
    saved = json.loads((tmp_path / "final" / RECALIBRATION_FILE).read_text())
    assert (saved["how"], saved["num_samples"], saved["seed"]) == ("sample", 3, 5)


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
