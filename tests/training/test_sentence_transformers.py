"""A `SentenceTransformer` around every law: its call of `model.forward` runs no hook, and misses nothing for it."""

import numpy as np
import pytest
import torch
from methods import METHODS

from peft_calib import draws, regularization_loss

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
