"""A `SentenceTransformer` around every law: its call of `model.forward` runs no hook, and misses nothing for it."""

import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from methods import METHODS
from small_trainer import arguments
from torch import nn

from peft_calib import draws, regularization_loss
from peft_calib.trainer_callbacks import RegularizedLossMixin

sentence_transformers = pytest.importorskip("sentence_transformers")
TEXTS = ["a lovely place by the river", "we waited for an hour", "the soup was cold"]


def encoder(folder, config=None):
    made = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    if config is not None:
        made.add_adapter(config)
    return made


def said(made) -> np.ndarray:
    return made.encode(TEXTS, show_progress_bar=False)


@pytest.mark.filterwarnings("ignore:The regulariser of the last")  # of the last forward, which no step follows
@pytest.mark.parametrize("name", ["hyper", "bayesian", "curve", "ensemble"])
def test_a_sentence_transformer_trains_encodes_draws_and_comes_back(name, tiny_model_folder, tmp_path):
    method = METHODS[name]
    config = method.config(r=2, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    made = encoder(tiny_model_folder, config)
    start = said(encoder(tiny_model_folder))
    np.testing.assert_allclose(said(made), start, rtol=0, atol=1e-6)
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(3):
        features = made.preprocess(TEXTS) if hasattr(made, "preprocess") else made.tokenize(TEXTS)
        loss = made.train()(features)["sentence_embedding"].square().sum(1).sub(4).square().mean()
        term = regularization_loss(made)
        assert (term is not None) == (name == "bayesian")
        optimizer.zero_grad()
        (loss if term is None else loss + term).backward()
        optimizer.step()
    made.eval()
    mean = said(made)
    assert np.abs(mean - start).max() > 1e-3
    varies = method.tuner.get_holder(made[0].model).laws["default"].varies
    drawn = []
    for index in range(2):
        with draws(made, 1, seed=3, first=index):
            drawn.append(said(made))
    assert (np.abs(drawn[0] - drawn[1]).max() > 1e-6) == varies
    np.testing.assert_array_equal(said(made), mean)
    made.save_pretrained(str(tmp_path / "saved"))
    again = encoder(tmp_path / "saved")
    np.testing.assert_array_equal(said(again), mean)
    with draws(again, 1, seed=3, first=1):
        np.testing.assert_array_equal(said(again), drawn[1])


# ----------------------------------------------------------------- the library's own trainers


def bi_encoder(folder, method):
    """What is trained, the class of its trainer, that of its arguments, a loss, and labels of four pairs."""
    made = encoder(folder, method.config(r=2, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    loss = sentence_transformers.sentence_transformer.losses.CosineSimilarityLoss(made)
    classes = "SentenceTransformerTrainer", "SentenceTransformerTrainingArguments"
    return made, *(getattr(sentence_transformers, name) for name in classes), loss, [1.0, 0.8, 0.1, 0.0]


def cross_encoder(folder, method):
    """The same for pairs that are read together."""
    kinds = sentence_transformers.cross_encoder
    made = sentence_transformers.CrossEncoder(str(folder), device="cpu", local_files_only=True)
    made.add_adapter(method.config(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    classes = kinds.CrossEncoderTrainer, kinds.CrossEncoderTrainingArguments
    return made, *classes, kinds.losses.CrossEntropyLoss(made), [1, 0, 2, 0]


def prepared(build, folder, method, tmp_path, mixins=(RegularizedLossMixin,)):
    torch.manual_seed(0)
    made, trainer_class, arguments_class, loss, labels = build(folder, method)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    pairs = {"first": [*TEXTS, "nobody came"], "second": ["by the river", "the queue was long", "hot soup", "x"]}
    trainer_class = type("Trained", (*mixins, trainer_class), {})
    rows = Dataset.from_dict({**pairs, "label": labels})
    options = arguments(tmp_path, arguments_class, max_steps=2, max_grad_norm=0.0)
    return made, trainer_class(made, options, rows, loss=loss), loss


def trained(made):
    return {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:The regulariser of the last")
@pytest.mark.parametrize("build", [bi_encoder, cross_encoder])
@pytest.mark.parametrize("name", ["hyper", "bayesian", "curve"])
def test_its_trainer_is_a_loop(name, build, tiny_model_folder, tmp_path):
    """With `RegularizedLossMixin`, as losses there are formed outside the model."""
    made, trainer, _ = prepared(build, tiny_model_folder, METHODS[name], tmp_path)
    start = trained(made)
    trainer.train()
    other, trainer, loss = prepared(build, tiny_model_folder, METHODS[name], tmp_path)
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    other.train()
    for _ in range(2):
        (batch,) = trainer.get_train_dataloader()
        value, term = loss(*trainer.collect_features(batch)), regularization_loss(other)
        optimizer.zero_grad()
        (value if term is None else value + term).backward()
        optimizer.step()
    found, expected = trained(made), trained(other)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-3)
    assert not all(torch.equal(found[key], value) for key, value in start.items())


class EachMember:
    """A loss formed outside the model of each member, and their mean."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        losses = []
        for k in range(2):
            with draws(model, 1, first=k):
                losses.append(super().compute_loss(model, dict(inputs), **kwargs))
        loss = torch.stack(losses).mean()
        return (loss, {}) if return_outputs else loss


@pytest.mark.parametrize("build", [bi_encoder, cross_encoder])
def test_members_train_there_one_by_one(build, tiny_model_folder, tmp_path):
    for mixins, moved in (((), [True, False]), ((EachMember,), [True, True])):
        made, trainer, _ = prepared(build, tiny_model_folder, METHODS["ensemble"], tmp_path, mixins)
        start = trained(made)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        told = any("no other member would train" in str(warning.message) for warning in caught)
        assert told == (not all(moved))
        found = trained(made)
        for key in [key for key in start if ".B." in key]:
            assert [not torch.equal(found[key][k], start[key][k]) for k in range(2)] == moved
