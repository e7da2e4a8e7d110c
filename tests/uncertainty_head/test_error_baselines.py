"""Baselines of error detection, each held to its formula written out, to its symmetries, and to bad input."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from transformers import ElectraConfig
from transformers.models.electra.modeling_electra import ElectraClassificationHead

from peft_calib.calibration.scores.selective import error_auroc, rank
from peft_calib.uncertainty_head import FeatureSet
from peft_calib.uncertainty_head.baselines import (
    BASELINES,
    Bald,
    DeepDeterministic,
    EnsembleVariance,
    Entropy,
    LinearProbe,
    Mahalanobis,
    MarginalMahalanobis,
    ProbeTraining,
    RelativeMahalanobis,
    RobustDensity,
    SoftmaxResponse,
    SpectralDense,
    TemperatureScaled,
    baseline,
    ensemble_of,
)

OF_ONE_FUNCTION = ("softmax_response", "entropy", "margin", "temperature_scaled", "mahalanobis", "linear_probe", "ddu")
OF_ONE_FUNCTION += ("mahalanobis_marginal", "relative_mahalanobis", "robust_density")
OF_SEVERAL = ("sampled_response", "predictive_entropy", "bald", "ensemble_variance")
DISTANCES = (Mahalanobis, MarginalMahalanobis, RelativeMahalanobis)


def items(size: int = 200, *, classes: int = 3, functions: int = 1, seed: int = 0, scale: float = 1.0) -> FeatureSet:
    """Features that a linear head reads, and labels that its probabilities drew: some predictions are wrong."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(classes, 6, generator=torch.Generator().manual_seed(99))
    features = torch.randn(functions, size, 6, generator=generator)
    logits = features @ head.T
    labels = torch.multinomial(logits.softmax(-1).mean(0), 1, generator=generator).flatten()
    return FeatureSet(features, scale * logits, labels=labels)


def made(name: str):
    options = {"robust_density": {"num_components": 8}, "linear_probe": {"training": ProbeTraining(epochs=3)}}
    return baseline(name, **options.get(name, {}))


@pytest.mark.parametrize("name", [*OF_ONE_FUNCTION, *OF_SEVERAL])
def test_each_scores_every_item_by_itself_and_leaves_the_global_generator_alone(name):
    functions = 3 if name in OF_SEVERAL else 1
    train, new = items(functions=functions), items(50, functions=functions, seed=1)
    before = torch.get_rng_state()
    fitted = made(name).fit(train, items(80, functions=functions, seed=2))
    scores = fitted.score(new)
    assert scores.shape == (50,) and scores.dtype == np.float64 and np.isfinite(scores).all()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(fitted.score(new.select(order)), scores[order], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(made(name).fit(train, items(80, functions=functions, seed=2)).score(new), scores)
    assert torch.equal(before, torch.get_rng_state())
    # labels of new items are not read
    without = FeatureSet(new.features, new.logits)
    np.testing.assert_array_equal(fitted.score(without), scores)


@pytest.mark.parametrize("name", [*OF_ONE_FUNCTION, *OF_SEVERAL])
def test_a_map_to_the_probability_of_an_error_keeps_the_order_and_meets_the_share_of_errors(name):
    functions = 3 if name in OF_SEVERAL else 1
    train, held_out, new = (items(400, functions=functions, seed=seed) for seed in range(3))
    fitted = made(name).fit(train, held_out)
    with pytest.raises(ValueError, match="no map"):
        fitted.error_probability(new)
    p, scores = fitted.calibrate(held_out).error_probability(new), fitted.score(new)
    assert ((p >= 0) & (p <= 1)).all() and fitted.calibration
    order = np.argsort(scores, kind="stable")
    assert (np.diff(p[order]) >= -1e-12).all()
    assert fitted.error_probability(held_out).mean() == pytest.approx(float(held_out.errors.double().mean()), abs=0.01)


def test_the_table_of_names_is_the_classes():
    assert set(BASELINES) == {*OF_ONE_FUNCTION, *OF_SEVERAL, "attention_probe"}
    with pytest.raises(ValueError, match="no baseline 'softmax'"):
        baseline("softmax")


def test_softmax_scores_are_their_formulas_and_survive_saturation():
    p = items().probabilities.numpy()
    top = np.sort(p)[:, ::-1]
    for name, expected in {
        "softmax_response": 1 - top[:, 0],
        "entropy": -(p * np.log(p)).sum(1) / np.log(3),
        "margin": 1 - (top[:, 0] - top[:, 1]),
    }.items():
        np.testing.assert_allclose(baseline(name).fit(items()).score(items()), expected, atol=1e-12)
    sure = FeatureSet(torch.zeros(1, 2, 1), torch.tensor([[[60.0, 0.0], [70.0, 0.0]]]))
    for name in ("softmax_response", "entropy", "margin"):
        first, second = baseline(name).fit(sure).score(sure)
        assert first > second > 0
    np.testing.assert_allclose(SoftmaxResponse().fit(sure).score(sure)[0], np.exp(-60), rtol=1e-6)


def test_with_two_classes_response_entropy_margin_and_their_scaled_kin_rank_alike():
    two, held_out = items(classes=2), items(classes=2, seed=1)
    wrong = held_out.errors
    aurocs = [
        error_auroc(rank(baseline(name).fit(two).score(held_out), wrong))
        for name in ("softmax_response", "entropy", "margin", "temperature_scaled")
    ]
    assert max(aurocs) - min(aurocs) < 1e-12


def test_options_an_item_does_not_have_count_for_nothing():
    whole = items(40, classes=3)
    logits = torch.cat([whole.logits, torch.full((1, 40, 1), 50.0)], -1)
    options = torch.tensor([True, True, True, False]).repeat(40, 1)
    masked = FeatureSet(whole.features, logits, labels=whole.labels, options=options)
    for name in ("softmax_response", "entropy", "margin", "temperature_scaled"):
        np.testing.assert_allclose(
            baseline(name).fit(masked).score(masked), baseline(name).fit(whole).score(whole), atol=1e-6
        )


def test_a_temperature_undoes_the_scale_of_the_logits_on_validation_items():
    train, validation = items(2000, scale=4.0), items(2000, seed=1, scale=4.0)
    fitted = TemperatureScaled().fit(train, validation)
    assert fitted.temperature == pytest.approx(4.0, rel=0.15)
    assert fitted.temperature != TemperatureScaled().fit(train).temperature
    scores = fitted.score(validation)
    assert abs(scores.mean() - float(validation.errors.double().mean())) < 0.03


def reference_distances(train: FeatureSet, new: FeatureSet) -> dict[type, np.ndarray]:
    """Item by item, class by class, from the formulas."""
    phi, y, x = train.features[0].double().numpy(), train.labels.numpy(), new.features[0].double().numpy()
    S = np.zeros((6, 6))
    means = [phi[y == c].mean(0) for c in range(3)]
    for row, label in zip(phi, y, strict=True):
        S += np.outer(row - means[label], row - means[label]) / len(phi)
    S0, mu = np.cov(phi.T, bias=True), phi.mean(0)
    nearest = np.array([min((r - m) @ np.linalg.inv(S) @ (r - m) for m in means) for r in x])
    marginal = np.array([(r - mu) @ np.linalg.inv(S0) @ (r - mu) for r in x])
    return {Mahalanobis: nearest, MarginalMahalanobis: marginal, RelativeMahalanobis: nearest - marginal}


@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_are_their_formulas(kind):
    train, new = items(), items(30, seed=1)
    np.testing.assert_allclose(kind().fit(train).score(new), reference_distances(train, new)[kind], rtol=1e-8)


@pytest.mark.parametrize("kind", [*DISTANCES, DeepDeterministic])
def test_distances_do_not_depend_on_the_coordinates(kind):
    train, new = items(), items(30, seed=1)
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 3 * torch.eye(6)

    def moved(part: FeatureSet) -> FeatureSet:
        return FeatureSet(part.features.double() @ matrix + 7.0, part.logits, labels=part.labels)

    options = {"covariance": "empirical"}
    plain = kind(**options).fit(train).score(new)
    other = kind(**options).fit(moved(train)).score(moved(new))
    # a density changes by the volume of the map, the same for all items
    shift = float(torch.linalg.slogdet(matrix)[1]) if kind is DeepDeterministic else 0.0
    np.testing.assert_allclose(other - shift, plain, rtol=1e-7, atol=1e-7)


def test_ddu_is_minus_the_log_density_of_a_mixture():
    train, new = items(), items(30, seed=1)
    phi, y, x = train.features[0].double().numpy(), train.labels.numpy(), new.features[0].double().numpy()
    density = np.zeros(30)
    for c in range(3):
        own = phi[y == c]
        density += len(own) / len(phi) * multivariate_normal(own.mean(0), np.cov(own.T, bias=True)).pdf(x)
    found = DeepDeterministic(covariance="empirical").fit(train).score(new)
    np.testing.assert_allclose(found, -np.log(density), rtol=1e-8)


def test_ddu_takes_a_class_of_one_item_and_refuses_a_singular_covariance_by_name():
    train = items(40)
    labels = torch.where(train.labels == 2, 1, train.labels)
    labels[0] = 2
    rare = FeatureSet(train.features, train.logits, labels=labels)
    assert np.isfinite(DeepDeterministic().fit(rare).score(train)).all()
    wide = FeatureSet(torch.randn(1, 40, 50), train.logits, labels=train.labels)
    assert np.isfinite(DeepDeterministic().fit(wide).score(wide)).all()
    with pytest.raises(ValueError, match=r"covariance of class 0 .* singular"):
        DeepDeterministic(covariance="empirical").fit(wide)


def test_several_functions_have_each_their_own_space():
    train, new = items(functions=2), items(30, functions=2, seed=1)

    def only(part: FeatureSet, k: int) -> FeatureSet:
        return FeatureSet(part.features[k : k + 1], part.logits[k : k + 1], labels=part.labels)

    for kind in (Mahalanobis, RelativeMahalanobis, DeepDeterministic):
        each = [kind().fit(only(train, k)).score(only(new, k)) for k in range(2)]
        np.testing.assert_allclose(kind().fit(train).score(new), np.mean(each, axis=0), rtol=1e-10)


def test_normalised_features_forget_their_length():
    train, new = items(), items(30, seed=1)
    longer = FeatureSet(5 * new.features, new.logits)
    fitted = Mahalanobis(normalise=True).fit(train)
    np.testing.assert_allclose(fitted.score(longer), fitted.score(new), rtol=1e-5)
    assert not np.allclose(Mahalanobis().fit(train).score(longer), Mahalanobis().fit(train).score(new))


def test_a_robust_density_is_not_moved_by_strays_as_the_covariance_of_all_is():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 300, 3, generator=generator)
    strayed = clean.clone()
    strayed[0, :20] = 6 + 0.1 * torch.randn(20, 3, generator=generator)
    train = FeatureSet(strayed, torch.zeros(1, 300, 2))
    wrong = np.arange(300) < 20
    density = RobustDensity(num_components=6).fit(train).score(train)
    assert error_auroc(rank(density, wrong)) > 0.99
    marginal = MarginalMahalanobis().fit(train).score(train)
    assert np.median(density[wrong]) / np.median(density[~wrong]) > 10 * np.median(marginal[wrong]) / np.median(
        marginal[~wrong]
    )


def test_scores_of_several_functions_are_their_formulas():
    several = items(functions=4)
    p = several.logits.double().softmax(-1).numpy()
    mean = p.mean(0)
    entropy = -(mean * np.log(mean)).sum(1)
    for name, expected in {
        "sampled_response": 1 - mean.max(1),
        "predictive_entropy": entropy,
        "bald": entropy + (p * np.log(p)).sum(2).mean(0),
        "ensemble_variance": ((p - mean) ** 2).mean(0).sum(1),
    }.items():
        np.testing.assert_allclose(baseline(name).fit(several).score(several), expected, atol=1e-12)


def test_functions_that_agree_have_no_disagreement():
    one = items()
    same = ensemble_of([one, one, one])
    assert Bald().fit(same).score(same).max() < 1e-9 and EnsembleVariance().fit(same).score(same).max() < 1e-12
    np.testing.assert_allclose(Entropy().fit(same).score(same), Entropy().fit(one).score(one), atol=1e-12)


def test_members_of_other_rows_are_not_ensemble_of():
    with pytest.raises(ValueError, match="Feature sets 0 and 1 differ in their labels"):
        ensemble_of([items(), items(seed=1)])
    with pytest.raises(ValueError, match="at least one adapter"):
        ensemble_of([])


def test_a_dense_layer_has_the_spectral_norm_one_and_its_own_activation():
    torch.manual_seed(0)
    head = ElectraClassificationHead(ElectraConfig(hidden_size=6, num_labels=2)).eval()
    transform = SpectralDense.of(head)
    h = items(9).features[0].double()
    weight = head.dense.weight.double()
    norm = np.linalg.svd(weight.detach().numpy())[1][0]
    expected = torch.nn.functional.gelu(h @ (weight / norm).T + head.dense.bias.double())
    np.testing.assert_allclose(transform(h.numpy()), expected.detach(), atol=1e-6)
    train = items()
    plain = Mahalanobis().fit(FeatureSet(torch.from_numpy(transform(train.features[0].numpy()))[None], train.logits,
                                         labels=train.labels))  # fmt: skip
    through = Mahalanobis(transform=transform).fit(train)
    moved = FeatureSet(torch.from_numpy(transform(train.features[0].numpy()))[None], train.logits)
    np.testing.assert_allclose(through.score(train), plain.score(moved), rtol=1e-6)


def separable(size: int, seed: int) -> FeatureSet:
    """The prediction is always 0, and wrong where the first feature is large."""
    features = torch.randn(1, size, 6, generator=torch.Generator().manual_seed(seed))
    return FeatureSet(features, torch.tensor([1.0, 0.0]).expand(1, size, 2), labels=(features[0, :, 0] > 0.5).long())


def test_a_probe_finds_errors_that_lie_on_one_side_and_keeps_its_best_rate():
    train, validation, new = separable(400, 0), separable(200, 1), separable(300, 2)
    wrong = new.errors
    slow = LinearProbe(ProbeTraining(learning_rates=(1e-7,), epochs=3)).fit(train, validation)
    tuned = LinearProbe(ProbeTraining(learning_rates=(1e-7, 0.02), epochs=40)).fit(train, validation)
    assert error_auroc(rank(tuned.score(new), wrong)) > 0.97 > error_auroc(rank(slow.score(new), wrong))
    assert tuned.score(new).min() >= 0 and tuned.score(new).max() <= 1
    other = LinearProbe(ProbeTraining(learning_rates=(1e-7, 0.02), epochs=40), seed=1).fit(train, validation)
    assert not np.allclose(other.score(new), tuned.score(new))


def labelled(labels: torch.Tensor) -> FeatureSet:
    return FeatureSet(items().features, items().logits, labels=labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mahalanobis().score(items()), "not fitted"),
        (lambda: Mahalanobis().fit(FeatureSet(items().features, items().logits)), "needs labels"),
        (lambda: Mahalanobis().fit(items().select(torch.zeros(0, dtype=torch.int64))), "no items"),
        (lambda: Mahalanobis().fit(items().select(torch.tensor([0]))), "at least two items"),
        (lambda: Mahalanobis(covariance="ridge"), "covariance must be one of"),
        (lambda: SoftmaxResponse().fit(items()).score(items(classes=4)), "fitted on features with"),
        (lambda: Bald().fit(items()), "these features are of one"),
        (lambda: TemperatureScaled().fit(items(9)), "at least 10"),
        (lambda: TemperatureScaled(score="variance"), "score must be"),
        (lambda: RobustDensity(num_components=0), "at least 1"),
        (lambda: baseline("attention_probe").fit(items()), "token_states"),
        (lambda: LinearProbe().fit(labelled(items().predicted)), "0 of these"),
        (lambda: Mahalanobis().fit(labelled(items().labels + 1)), "0 to 2"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
