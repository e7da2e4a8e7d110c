"""A whole data set: in order, whatever the batch size, the loader or the number of processes."""

import sys
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from stochastic_models import bayesian

sys.path.insert(0, str(Path(__file__).parents[1] / "tuners"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from families import FAMILIES
from processes import run_ranks

from peft_calib import Prediction, predict, predict_dataset

BERT = FAMILIES["bert"]


def rows(n=11):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (n, 6), generator=generator)
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "text": ["a"] * n, "label": (torch.arange(n) % 3).tolist()}
    )


def whole(model, data, **options):
    batch = {"input_ids": torch.tensor(data["input_ids"][:])}
    return predict(model, batch, **options)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_batch_size_does_not_matter(batch_size):
    model, data = bayesian(BERT), rows()
    p = predict_dataset(model, data, num_samples=3, seed=2, batch_size=batch_size, progress=False)
    expected = whole(model, data, num_samples=3, seed=2)
    torch.testing.assert_close(p.sample_probabilities, expected.sample_probabilities, rtol=0, atol=1e-6)
    assert p.labels.tolist() == data["label"][:]
    assert p.num_forwards == 3
    assert p.to_dataset().num_rows == 11


def test_dataloader_and_map_style():
    model, data = bayesian(BERT), rows()
    batches = [
        {"input_ids": torch.tensor(data["input_ids"][i]), "labels": torch.tensor(data["label"][i])} for i in range(11)
    ]
    expected = predict_dataset(model, data, num_samples=2, batch_size=4, progress=False)
    for given in (DataLoader(batches, batch_size=4), batches):
        p = predict_dataset(model, given, num_samples=2, batch_size=4, progress=False)
        assert torch.equal(p.sample_probabilities, expected.sample_probabilities)
        assert torch.equal(p.labels, expected.labels)
    stream = DataLoader(
        datasets.Dataset.from_list([{"input_ids": r["input_ids"].tolist()} for r in batches])
        .with_format("torch")
        .to_iterable_dataset(),
        batch_size=4,
    )
    p = predict_dataset(model, stream, num_samples=2, progress=False)
    assert torch.equal(p.sample_probabilities, expected.sample_probabilities)


def test_global_random_state_is_untouched():
    model, data = bayesian(BERT), rows()
    before = torch.get_rng_state()
    predict_dataset(model, data, num_samples=2, progress=False)
    predict_dataset(
        model, DataLoader(data.select_columns(["input_ids"]).with_format("torch"), batch_size=4), progress=False
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_processing_class_pads(minilm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = bayesian(BERT, overrides={"vocab_size": len(tokenizer)})
    texts = ["a fine day", "it rains all day long and the night", "sun"]
    data = datasets.Dataset.from_dict({"text": texts}).map(lambda row: tokenizer(row["text"]))
    p = predict_dataset(model, data, num_samples=2, processing_class=tokenizer, progress=False)
    for i, text in enumerate(texts):
        alone = predict(model, tokenizer(text, return_tensors="pt"), num_samples=2)
        torch.testing.assert_close(p.probabilities[i], alone.probabilities[0], rtol=0, atol=1e-6)


def test_bad_input():
    model, data = bayesian(BERT), rows()
    with pytest.raises(ValueError, match="no rows"):
        predict_dataset(model, data.select([]), progress=False)
    with pytest.raises(ValueError, match="no rows"):
        predict_dataset(model, DataLoader([]), progress=False)
    with pytest.raises(ValueError, match="shuffles"):
        predict_dataset(model, DataLoader([{"input_ids": torch.ones(4).long()}] * 3, shuffle=True), progress=False)
    with pytest.raises(ValueError, match="Tokenise"):
        predict_dataset(model, data.select_columns(["text"]), progress=False)
    with pytest.raises(TypeError, match=r"datasets\.Dataset"):
        predict_dataset(model, iter([]), progress=False)
    with pytest.raises(ValueError, match="batch_size"):
        predict_dataset(model, data, batch_size=0, progress=False)
    with pytest.raises(ValueError, match="split"):
        predict_dataset(model, data, split="columns", progress=False)
    with pytest.raises(ValueError, match="num_samples"):
        predict_dataset(model, data, num_samples=0, progress=False)


def worker(rank, folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = bayesian(BERT)
    for name, options in CASES.items():
        p = predict_dataset(model, rows(), seed=5, batch_size=2, progress=False, **options)
        p.save(folder / f"{name}-{rank}")
    with pytest.raises(ValueError, match="split='draws'"):
        predict_dataset(model, rows(), num_samples="auto", split="draws", progress=False)


CASES = {
    "rows": {"num_samples": 3},
    "draws": {"num_samples": 5, "split": "draws"},
    "one_draw": {"num_samples": 1, "split": "draws"},
    "auto": {"num_samples": "auto", "tolerance": 0.01},
    "mean": {"how": "mean"},
}


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    run_ranks(worker, tmp_path)
    model = bayesian(BERT)
    for name, options in CASES.items():
        options = {k: v for k, v in options.items() if k != "split"}
        expected = predict_dataset(model, rows(), seed=5, batch_size=2, progress=False, **options)
        for rank in range(2):  # each process has the whole result
            got = Prediction.load(tmp_path / f"{name}-{rank}")
            torch.testing.assert_close(
                got.sample_probabilities, expected.sample_probabilities, rtol=0, atol=1e-6, equal_nan=True
            )
            assert got.labels.tolist() == expected.labels.tolist()
            assert got.num_forwards == pytest.approx(expected.num_forwards)
