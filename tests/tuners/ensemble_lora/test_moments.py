"""Draws around members: the moments that are kept along a training, and what is drawn from them."""

from __future__ import annotations

import shutil

import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_calib import EnsembleLoraConfig, calibrate_posterior, export_lora, predict, predict_dataset
from peft_calib.trainer_callbacks import RegularizerScheduleCallback
from peft_calib.tuners import Mean, Sample
from peft_calib.tuners.moments import Moments
from peft_calib.tuners.seeding import Normals, NormalSource, keyed_generator

BERT = FAMILIES["bert"]
STEPS = 12


def adapted(moments: int = 4, members: int = 2, **fields) -> PeftModel:
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "seed": 0, "layers": "all"}
    config = EnsembleLoraConfig(num_members=members, moments=moments, r=2, **{**options, **fields})
    return get_peft_model(BERT.build(), config)


def law_of(model: PeftModel):
    return model.base_model.get_law()


def rows(count: int = 24) -> Dataset:
    ids = torch.randint(3, 30, (count, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * 6, "labels": row[0] % 2} for row in ids])


def trained(model: PeftModel, folder, steps: int = STEPS, resume: str | None = None) -> PeftModel:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_steps=8, logging_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=[RegularizerScheduleCallback()])
    trainer.train(resume_from_checkpoint=resume)
    return model.eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[PeftModel, str]:
    folder = tmp_path_factory.mktemp("moments")
    return trained(adapted(), folder), str(folder / "checkpoint-8")


def factors(model: PeftModel, draw) -> torch.Tensor:
    found = law_of(model)(draw)
    stacks = [side.flatten(1) for pair in found.groups.values() for side in pair]
    heads = [tensor.flatten(1) for tensors in found.heads.values() for tensor in tensors.values()]
    return torch.cat([*stacks, *heads], dim=1).detach()


def test_moments_are_those_of_the_steps_kept():
    path = torch.randn(9, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    moments = Moments({"w": path[0]}, rank=3)
    for step, value in enumerate(path, start=1):
        moments.keep({"w": value}, left=9 - step, steps=9)
    assert moments.kept() == 9
    torch.testing.assert_close(moments.of("mean", "w"), path.mean(0))
    torch.testing.assert_close(moments.of("squares", "w") / 8, path.var(0))
    running = torch.stack([path[: n + 1].mean(0) for n in range(9)])
    # every third step, the last first
    torch.testing.assert_close(moments.of("deviations", "w"), (path - running)[[8, 5, 2]])
    moments.reset()
    assert moments.kept() == 0
    assert not any(buffer.any() for buffer in moments.buffers())


def test_draws_have_the_covariance_of_the_paper():
    path = torch.randn(20, 1, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path[:, 0, 1] += 2 * path[:, 0, 0]
    moments = Moments({"w": path[0]}, rank=5)
    for step, value in enumerate(path, start=1):
        moments.keep({"w": value}, left=20 - step, steps=20)
    count = 20_000
    sources = [NormalSource(keyed_generator(0, k)) for k in range(count)]
    normals = Normals(sources)
    shared = normals.of((5,), torch.float64, torch.device("cpu"))
    around = torch.tensor([[5.0, 6.0, 7.0]], dtype=torch.float64)
    drawn = moments.drawn("w", around, [0] * count, normals, shared)
    columns = moments.of("deviations", "w")[:, 0]
    expected = (torch.diag(path[:, 0].var(0)) + columns.T @ columns / 4) / 2
    sd = expected.diag().sqrt()  # in units of which the errors of 20,000 draws are known: 0.01 for a covariance
    torch.testing.assert_close((drawn.mean(0) - around[0]) / sd, torch.zeros(3).double(), rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(drawn.T) / sd.outer(sd), expected / sd.outer(sd), rtol=0, atol=0.05)


def test_the_last_part_of_the_training_is_kept(finished):
    model, _ = finished
    moments = law_of(model).moments
    assert moments.kept() == STEPS // 2
    assert int(moments.num_columns) == 4
    assert law_of(model).num_draws is None
    assert law_of(model).default_num_samples == 8
    assert torch.equal(factors(model, Mean())[0], factors(adapted_members(model), Mean())[0])


def adapted_members(model: PeftModel) -> PeftModel:
    """The same members without moments."""
    plain = adapted(moments=0)
    parameters = dict(law_of(model).named_parameters())
    for name, parameter in law_of(plain).named_parameters():
        parameter.data.copy_(parameters[name])
    return plain.eval()


def test_a_resumed_training_ends_with_the_same_moments(finished, tmp_path):
    model, checkpoint = finished
    place = shutil.copytree(checkpoint, tmp_path / "checkpoint-8")
    again = trained(adapted(), tmp_path, resume=str(place))
    expected = dict(law_of(model).named_buffers())
    for name, buffer in law_of(again).named_buffers():
        assert torch.equal(buffer, expected[name]), name


def test_a_second_training_begins_anew(finished, tmp_path):
    model = adapted()
    trained(model, tmp_path, steps=4)
    trained(model, tmp_path, steps=8)
    assert law_of(model).moments.kept() == 4


def test_draws_do_not_depend_on_how_they_are_asked_for(finished):
    model, _ = finished
    together = factors(model, Sample(6, seed=3))
    apart = torch.cat([factors(model, Sample(2, seed=3, first=first)) for first in (0, 2, 4)])
    assert torch.equal(together, apart)
    assert not torch.equal(together[0], together[2])  # both around the first member
    assert not torch.equal(together, factors(model, Sample(6, seed=4)))


def test_they_lie_around_the_members_by_the_scale(finished):
    model, _ = finished
    config, members = model.peft_config["default"], factors(adapted_members(model), Sample(2))

    def away(scale: float) -> torch.Tensor:
        config.posterior_scale = scale
        return factors(model, Sample(2, seed=5)) - members

    try:
        torch.testing.assert_close(away(2.0), 2 * away(1.0), rtol=1e-4, atol=1e-6)
        assert float(away(1.0).abs().max()) > 1e-3
        assert not away(0.0).any()
        assert law_of(model).num_draws == 2
    finally:
        config.posterior_scale = 1.0


def test_saved_and_loaded_they_predict_the_same(finished, tmp_path):
    model, _ = finished
    batch = {key: value for key, value in BERT.batch(3).items() if key != "labels"}
    before = predict(model, batch, num_samples=4, seed=1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BERT.build(), tmp_path)
    after = predict(again, batch, num_samples=4, seed=1)
    assert torch.equal(before.sample_probabilities, after.sample_probabilities)
    folder = tmp_path / "draws"
    export_lora(model, folder, num_samples=3, seed=1)
    for k in range(3):
        plain = PeftModel.from_pretrained(BERT.build(), folder / f"draw-{k}").eval()
        with torch.no_grad():
            p = plain(**batch).logits.softmax(-1)
        torch.testing.assert_close(p, before.sample_probabilities[k].to(p), rtol=0, atol=1e-5)


def test_scale_and_temperature_are_chosen_on_calibration_rows(finished):
    model, _ = finished
    held_out = [dict(row, labels=(row["labels"] + (n % 3 == 0)) % 2) for n, row in enumerate(rows(40))]
    try:
        found = calibrate_posterior(model, held_out, num_samples=4, scales=(1.0,))
        assert [candidate.scale for candidate in found.candidates] == [0.0, 1.0]
        assert model.peft_config["default"].posterior_scale == found.scale
        members = predict_dataset(adapted_members(model), held_out, progress=False)
        p = members.probabilities[torch.arange(40), members.labels].double()
        assert found.candidates[0].nll <= float(-p.log().mean()) + 1e-6
    finally:
        model.peft_config["default"].posterior_scale = 1.0


def test_without_a_callback_the_draws_are_the_members():
    model = adapted().eval()
    assert law_of(model).num_draws == 2
    assert torch.equal(factors(model, Sample(2)), factors(adapted_members(model), Sample(2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moments": 1}, "moments must be 0 or at least 2"),
        ({"moments": -1}, "moments must lie in"),
        ({"moments_start": 1.0}, "moments_start is a part of the training"),
        ({"posterior_scale": -1.0}, "posterior_scale must not be negative"),
    ],
)
def test_numbers_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EnsembleLoraConfig(**fields)


def test_too_few_steps_are_told_before_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"needs two steps at least .* there are 1 of 2: train longer"):
        trained(adapted(), tmp_path, steps=2)


def test_a_scale_without_moments_says_what_is_missing():
    with pytest.raises(TypeError, match="none were kept: train with RegularizerScheduleCallback"):
        calibrate_posterior(adapted().eval(), list(rows(40)))
