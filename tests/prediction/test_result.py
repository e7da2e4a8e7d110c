"""Prediction: averages of probabilities, entropies against scipy, saving, joining."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from peft_calib import Prediction, RegressionPrediction


def samples(K=5, N=7, C=4, seed=0, sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(K, N, C, generator=generator).mul(sharpness).softmax(-1)


@settings(deadline=None)
@given(
    K=st.integers(1, 9),
    C=st.integers(2, 300),
    seed=st.integers(0, 99),
    sharpness=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
)
def test_entropy_splits(K, C, seed, sharpness):
    p = Prediction(sample_probabilities=samples(K, 3, C, seed, sharpness), num_forwards=K)
    assert (p.entropy - p.expected_entropy - p.mutual_information).abs().max() < 1e-6
    assert p.mutual_information.min() >= 0
    assert p.mutual_information.max() <= np.log(K) + 1e-6  # float32 probabilities sum to 1 to 1e-7
    if K == 1:
        assert p.mutual_information.abs().max() == 0


def test_against_scipy():
    probabilities = samples()
    p = Prediction(sample_probabilities=probabilities, num_forwards=5)
    array = probabilities.double().numpy()
    np.testing.assert_allclose(p.entropy, entropy(array.mean(0), axis=-1), rtol=1e-6)
    np.testing.assert_allclose(p.expected_entropy, entropy(array, axis=-1).mean(0), rtol=1e-6)
    divergence = entropy(array, array.mean(0, keepdims=True), axis=-1).mean(0)
    np.testing.assert_allclose(p.mutual_information, divergence, rtol=1e-5, atol=1e-9)


def test_probabilities_are_averaged_not_logits():
    probabilities = torch.tensor([[[0.99, 0.01]], [[0.4, 0.6]]])
    p = Prediction(sample_probabilities=probabilities, num_forwards=2)
    torch.testing.assert_close(p.probabilities, torch.tensor([[0.695, 0.305]]))
    of_logits = probabilities.log().mean(0).softmax(-1)
    assert (of_logits - p.probabilities).abs().max() > 0.1


def test_certain_and_opposed():
    p = Prediction(sample_probabilities=torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), num_forwards=2)
    assert p.expected_entropy.item() == 0
    assert p.mutual_information.item() == pytest.approx(np.log(2))


def test_rows_with_fewer_draws():
    full = samples(K=6, N=2)
    padded = full.clone()
    padded[4:, 1] = float("nan")
    p = Prediction(sample_probabilities=padded, num_forwards=5, draws_per_row=torch.tensor([6, 4]))
    short = Prediction(sample_probabilities=full[:4], num_forwards=4)
    whole = Prediction(sample_probabilities=full, num_forwards=6)
    for name in ("probabilities", "entropy", "expected_entropy", "mutual_information"):
        torch.testing.assert_close(getattr(p, name)[1], getattr(short, name)[1])
        torch.testing.assert_close(getattr(p, name)[0], getattr(whole, name)[0])
    assert p.average_num_samples == 5


def test_save_and_load(tmp_path):
    p = Prediction(sample_probabilities=samples(), num_forwards=2.5, seed=4, labels=torch.arange(7))
    again = Prediction.load(p.save(tmp_path / "p"))
    assert torch.equal(again.sample_probabilities, p.sample_probabilities)
    assert torch.equal(again.labels, p.labels)
    assert (again.num_forwards, again.how, again.seed) == (2.5, "sample", 4)
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["prediction.json", "prediction.safetensors"]
    with pytest.raises(ValueError, match="no RegressionPrediction"):
        RegressionPrediction.load(tmp_path / "p")
    with pytest.raises(ValueError, match="no saved prediction"):
        Prediction.load(tmp_path)


def test_to_dataset():
    p = Prediction(sample_probabilities=samples(), num_forwards=5, labels=torch.arange(7))
    rows = p.to_dataset()
    assert rows.num_rows == 7
    np.testing.assert_allclose(rows["probabilities"][:], p.probabilities, rtol=1e-6)
    assert rows["prediction"][:] == p.probabilities.argmax(-1).tolist()
    assert rows["label"][:] == list(range(7))
    np.testing.assert_allclose(rows["mutual_information"][:], p.mutual_information)


def test_concatenate():
    full = samples(K=4, N=7)
    parts = [
        Prediction(sample_probabilities=full[:, :5], num_forwards=4),
        Prediction(sample_probabilities=full[:, 5:], num_forwards=1),
    ]
    joined = Prediction.concatenate(parts)
    assert torch.equal(joined.sample_probabilities, full)
    assert joined.num_forwards == pytest.approx((5 * 4 + 2 * 1) / 7)
    uneven = Prediction.concatenate([parts[0], Prediction(sample_probabilities=full[:2, 5:], num_forwards=2)])
    assert uneven.draws_per_row.tolist() == [4] * 5 + [2] * 2
    torch.testing.assert_close(uneven.probabilities[5:], full[:2, 5:].mean(0))
    with pytest.raises(ValueError, match="no prediction"):
        Prediction.concatenate([])


def test_regression_moments():
    values = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    p = RegressionPrediction(sample_values=values, num_forwards=6)
    np.testing.assert_allclose(p.mean, values.numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(p.variance, values.numpy().var(0, ddof=1), rtol=1e-5)
    assert RegressionPrediction(sample_values=values[:1], num_forwards=1).variance.max() == 0
    assert p.to_dataset().column_names == ["mean", "variance"]
