"""From scores of whole answers to P(correct): formulas, peers' numbers, the choice of a map, sets of samples."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_calib.calibration import (
    AnswerCalibration,
    AnswerScores,
    NoGuaranteeError,
    SampleSets,
    SelectiveThreshold,
    answer_scores,
    answers_match,
    normalise_answer,
    rouge_l,
)
from peft_calib.calibration.texts import ANSWER_SCORES
from peft_calib.calibration.texts.maps import fit_map, isotonic_steps, nonnegative_logistic


@dataclass
class Scored:
    """What `score_texts` answers."""

    sample_log_probabilities: torch.Tensor
    log_probabilities: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor
    mask: torch.Tensor


def scored(log_p: list[list[float]], entropy: list[list[float]]) -> Scored:
    """One draw of texts of unequal length."""
    longest = max(map(len, log_p))
    filled = [torch.tensor([row + [0.0] * (longest - len(row)) for row in rows]) for rows in (log_p, entropy)]
    mask = torch.tensor([[k < len(row) for k in range(longest)] for row in log_p])
    return Scored(filled[0][None], *filled, torch.zeros_like(filled[0]), mask)


SAMPLES = [
    ["the cat sat down", "the cat lay down", "a dog sat", "the cat sat down"],
    ["Paris", "paris", "Rome", "Paris is it"],
    ["4", "4", "4", "4"],
]
ANSWERS = ["the cat sat down", "paris", "4"]
LOG_P = [[-0.1, -0.7, -0.2], [-1.5], [-0.05, -2.25]]
ENTROPY = [[0.3, 0.9, 0.4], [1.2], [0.1, 1.7]]


# ----------------------------------------------------------------------------------------------------------- the texts


def test_answers_are_compared_without_case_articles_and_punctuation_but_with_their_numbers():
    assert normalise_answer(" The, Big—Dog!  ") == "bigdog"
    assert normalise_answer("Ａ ＣＡＴ") == "cat"  # NFKC
    assert [normalise_answer(t) for t in ("-5", "3.5", "1,000", "a-5", "$5", "in 1999.")] == [
        "-5", "3.5", "1,000", "a5", "$5", "in 1999",
    ]  # fmt: skip
    assert answers_match(["The Sun.", "x", "1.0"], ["sun", ["y", "X!"], "10"]).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="2 answers were given for 1 references"):
        answers_match(["a", "b"], ["a"])


def test_overlap_is_that_of_rouge_score():
    """rouge-score 0.1.2, `RougeScorer(["rougeL"], use_stemmer=False)`, `fmeasure`."""
    theirs = {
        ("the cat sat down", "The cat lay down."): 0.75,
        ("a b c d", "d c b a"): 0.25,
        ("x", "y"): 0.0,
        ("one two", "one two three four"): 0.6666666666666666,
        ("It's 3.5%", "its 3,5"): 0.5714285714285715,
    }
    for pair, expected in theirs.items():
        assert rouge_l(*pair) == pytest.approx(expected, abs=1e-12) and rouge_l(*pair[::-1]) == rouge_l(*pair)
    assert (rouge_l("", "..."), rouge_l("", "a")) == (1.0, 0.0)  # theirs gives 0 to both


def test_scores_are_those_of_lm_polygraph_and_uqlm_where_definitions_agree():
    """Numbers of lm-polygraph 0.7.0 and uqlm 0.6.7 on the same texts and log-probabilities."""
    found = answer_scores(scored(LOG_P, ENTROPY), ANSWERS, SAMPLES)
    assert list(found) == [score.key for score in ANSWER_SCORES]

    def equal(name, expected):
        np.testing.assert_allclose(found[name], expected, atol=1e-6)

    equal("sum_log_probability", [-1.0, -1.5, -2.3])  # lm-polygraph, minus MaximumSequenceProbability
    equal("mean_log_probability", [-0.3333333333333333, -1.5, -1.15])  # minus Perplexity
    equal("mean_entropy", [0.5333333333333333, 1.2, 0.9])  # MeanTokenEntropy
    # minus LexicalSimilarity("rougeL"), which also takes words to their stems: here that changes nothing
    equal("pair_overlap", [0.5119047619047619, 0.3333333333333333, 1.0])
    probability = np.exp(found["mean_log_probability"])
    np.testing.assert_allclose(probability, [0.7165313105737893, 0.22313016014842982, 0.3166367693790532], atol=1e-6)
    least = np.exp(found["min_log_probability"])  # uqlm: sequence_probability above, min_probability here
    np.testing.assert_allclose(least, [0.4965853037914095, 0.22313016014842982, 0.10539922456186433], atol=1e-6)
    # uqlm's exact match compares texts as they are, [0.5, 0.25, 1]; ours takes "Paris" for "paris"
    equal("match_share", [0.5, 0.5, 1.0])
    # uqlm's discrete semantic entropy of these groups; lm-polygraph's SemanticEntropyEmpirical is the same
    equal("answer_entropy", [1.0397207708399179, 1.0397207708399179, 0.0])
    equal("num_answers", [3, 3, 1])
    equal("mean_overlap", [np.mean([1, 0.75, 2 / 7, 1]), np.mean([1, 1, 0, 0.5]), 1.0])


def test_draws_enter_as_a_mean_of_probabilities():
    by_draw = torch.tensor([[[-0.1, -0.3]], [[-2.0, -1.0]]], dtype=torch.float64)
    mean = by_draw.exp().mean(0).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = answer_scores(Scored(by_draw, mean, mean.abs(), torch.tensor([[0.2, 0.4]]), mask))
    assert found["sum_log_probability"][0] == pytest.approx(np.log((np.exp(-0.4) + np.exp(-3.0)) / 2), abs=1e-12)
    assert found["mean_log_probability"][0] == pytest.approx(float(mean.mean()), abs=1e-12)
    assert found["mean_mutual_information"][0] == pytest.approx(0.3, abs=1e-6)
    assert "match_share" not in found


def test_what_is_wrong_with_scores_is_said():
    with pytest.raises(ValueError, match="Give `scored`"):
        answer_scores()
    with pytest.raises(ValueError, match="`samples` go with `answers`"):
        answer_scores(answers=["a"], samples=[[]])
    with pytest.raises(ValueError, match="`scored` is of 3 answers, and 1 are given"):
        answer_scores(scored(LOG_P, ENTROPY), ["a"], [["a"]])
    with pytest.raises(ValueError, match="The score s of row 1 is nan"):
        AnswerScores({"s": [0.0, np.nan]})
    with pytest.raises(ValueError, match="columns of one length"):
        AnswerScores({"s": [0.0], "t": [0.0, 1.0]})


# ---------------------------------------------------------------------------------------------------------- P(correct)


def labelled(count: int, seed: int = 0, strength: float = 1.5) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A score that says something, one that adds to it, and one of chance."""
    generator = np.random.default_rng(seed)
    good, second, noise = generator.normal(size=(3, count))
    right = generator.random(count) < 1 / (1 + np.exp(-(strength * good + 0.7 * strength * second - 0.3)))
    return {"mean_log_probability": good, "answer_entropy": -second, "other": noise}, right


def test_the_logistic_map_is_scikit_learns_where_no_slope_would_be_negative():
    from sklearn.linear_model import LogisticRegression

    scores, right = labelled(400)
    x = np.stack([scores["mean_log_probability"], -scores["answer_entropy"]], axis=1)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(x, right)
    slopes, intercept = nonnegative_logistic(x, right.astype(float), 1 / len(right))
    np.testing.assert_allclose(slopes, theirs.coef_[0], rtol=1e-4)
    assert intercept == pytest.approx(theirs.intercept_[0], abs=1e-4)
    slopes, _ = nonnegative_logistic(-x, right.astype(float), 1 / len(right))
    assert (slopes == 0).all()  # a score that points the wrong way is left out, not turned around


def test_steps_are_isotonic_regression_with_finite_losses():
    from sklearn.isotonic import IsotonicRegression

    scores, right = labelled(5000)
    found = isotonic_steps(scores["mean_log_probability"], right)
    grid = np.linspace(-2, 2, 41)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(scores["mean_log_probability"], right).predict(grid)
    np.testing.assert_allclose(np.interp(grid, found["steps"], found["heights"]), theirs, atol=0.03)
    heights = np.array(isotonic_steps(np.arange(20.0), np.arange(20) >= 10)["heights"])
    assert heights.tolist() == sorted(heights) and heights[0] == pytest.approx(0.5 / 11) and heights[-1] < 1


@pytest.mark.parametrize("kind", ["platt", "isotonic", "logistic"])
def test_no_map_falls_where_a_score_says_surer(kind):
    scores, right = labelled(200)
    names = ("mean_log_probability", "answer_entropy") if kind == "logistic" else ("mean_log_probability",)
    calibration = AnswerCalibration(kind, names).fit(scores, right)
    grid = np.linspace(-4, 4, 101)
    for name in names:
        turned = -grid if name == "answer_entropy" else grid
        p = calibration.transform({**{other: np.zeros(101) for other in names}, name: turned})
        assert (np.diff(p) >= 0).all() and 0 < p.min() < p.max() < 1


def test_cross_fitting_takes_what_helps_and_the_base_rate_where_nothing_does():
    scores, right = labelled(600)
    chosen = AnswerCalibration().fit(scores, right)
    assert chosen.fitted.kind == "logistic" and chosen.fitted.numbers["slopes"][2] < 0.3
    one = AnswerCalibration().fit({name: scores[name] for name in ("mean_log_probability", "other")}, right)
    assert (one.fitted.kind, one.fitted.scores) == ("platt", ("mean_log_probability",))
    best = min(candidate.nll for candidate in one.candidates)
    assert {c.kind for c in one.candidates} == {"constant", "platt", "isotonic", "logistic"}
    taken = next(c for c in one.candidates if (c.kind, c.scores) == (one.fitted.kind, one.fitted.scores))
    assert taken.excess[0] == pytest.approx(taken.nll - best) and taken.excess[0] <= taken.excess[1]
    none = AnswerCalibration().fit({"other": scores["other"]}, right)
    assert none.fitted.kind == "constant" and "no score tells right answers from wrong ones" in str(none)
    assert np.ptp(none.transform({"other": [0.0, 5.0]})) == 0
    assert "| the base rate |" in one.to_markdown()


def test_what_comes_out_is_calibrated_on_other_answers_and_thresholds_hold():
    calibration = AnswerCalibration().fit(*labelled(2000))
    scores, right = labelled(4000, seed=1)
    report = calibration.evaluate(scores, right, num_resamples=40)
    assert report["ece"] < report.floor["ece"].high + 0.02 and report["error_auroc"] > 0.8
    p = calibration.transform(scores)
    rule = SelectiveThreshold(risk=0.2).fit(p[:2000], right[:2000], input="confidence")
    reached = rule.evaluate(p[2000:], right[2000:], input="confidence")
    assert reached.risk < 0.22 and reached.coverage > 0.2


def test_own_answers_are_refused_and_files_hold_what_was_fitted(tmp_path):
    scores, right = labelled(300)
    calibration = AnswerCalibration(seed=3).fit(scores, right)
    moved = {name: column.astype(np.float32) + np.float32(1e-6) for name, column in scores.items()}
    with pytest.raises(ValueError, match="of these answers are among the 300"):
        calibration.evaluate(moved, right)  # scores of another batch differ in their last digits
    file = tmp_path / "p.json"
    calibration.save(file)
    again = AnswerCalibration.load(file)
    other, labels = labelled(50, seed=9)
    assert np.array_equal(again.transform(other), calibration.transform(other))
    assert again.to_markdown() == calibration.to_markdown()
    with pytest.raises(ValueError, match="of these answers are among the 300"):
        again.evaluate(scores, right)
    again.evaluate(other, labels, confidence_level=None)
    content = json.loads(file.read_text())
    content["fitted"]["slopes"][0] *= 2
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{file} was changed after the map in it was fitted.*Fit it again"):
        AnswerCalibration.load(file)
    content["fitted"]["slopes"][0] = -1.0
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"fitted.slopes is .* must be numbers of at least 0"):
        AnswerCalibration.load(file)
    file.write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(ValueError, match="format version 2"):
        AnswerCalibration.load(file)


def test_bad_input_is_told_before_anything_is_fitted():
    scores, right = labelled(200)
    few = np.zeros(200, bool)
    few[:9] = True
    with pytest.raises(ValueError, match=r"9 of 200 answers are right.*at least 10 of each"):
        AnswerCalibration().fit(scores, few)
    few[:12] = True
    with pytest.raises(ValueError, match=r"isotonic of 1 score.* takes at least 25 right"):
        AnswerCalibration("isotonic", ["other"]).fit(scores, few)
    told = AnswerCalibration().fit(scores, few).to_markdown()
    assert told.count("too few answers") == 4  # three step functions and the regression
    with pytest.raises(ValueError, match="There is no score wrong; there are mean_log_probability"):
        AnswerCalibration(scores=["wrong"]).fit(scores, right)
    with pytest.raises(ValueError, match="correct must hold one of True and False"):
        AnswerCalibration().fit(scores, right[:50])
    with pytest.raises(ValueError, match="method must be one of"):
        AnswerCalibration("beta")
    with pytest.raises(ValueError, match=r"scores is a list of names: scores=\['other'\]"):
        AnswerCalibration(scores="other")
    with pytest.raises(ValueError, match="not fitted yet"):
        AnswerCalibration().transform(scores)


def test_an_own_score_may_be_smaller_where_surer():
    generator = np.random.default_rng(0)
    doubt = generator.exponential(size=400)
    right = generator.random(400) < np.exp(-doubt)
    calibration = AnswerCalibration(falling=["doubt"]).fit({"doubt": doubt}, right)
    sure, unsure = calibration.transform({"doubt": [0.1, 3.0]})
    assert sure > 0.7 > 0.3 > unsure
    assert AnswerCalibration().fit({"doubt": doubt}, right).fitted.kind == "constant"  # it would have to fall


def test_a_constant_score_is_no_error():
    right = np.arange(60) % 3 == 0
    found = fit_map("platt", ("s",), np.ones((60, 1)), right).apply(np.ones((1, 1)))
    assert found[0] == pytest.approx(1 / 3, abs=0.02)


# ---------------------------------------------------------------------------------------------------- sets of samples


def prompts(count: int, samples: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal difficulty, and scores that know a little of which sample is right."""
    chance = generator.beta(1.0, 1.0, size=(count, 1)) * 0.8 + 0.2
    right = generator.random((count, samples)) < chance
    return right, np.round(right + generator.normal(size=right.shape), 1)  # ties


@pytest.mark.parametrize("by", ["count", "score"])
@pytest.mark.parametrize(("count", "alpha"), [(40, 0.2), (200, 0.1)])
def test_coverage_holds_on_average_over_calibration_splits(by, count, alpha):
    """600 data sets: at least `1 - alpha` less two standard errors; `benchmarks/generated_sets.py` has more."""
    generator, covered = np.random.default_rng(0), []
    for _ in range(600):
        right, scores = prompts(count + 50, 12, generator)
        given = (right, scores) if by == "score" else (right, None)
        first, second = (
            [None if one is None else one[part] for one in given] for part in (slice(count), slice(count, None))
        )
        sets = SampleSets(alpha, by).fit(*first)
        inside = sets.predict(second[0] if second[1] is None else second[1])
        covered.append((inside & second[0]).any(axis=1).mean())
    assert np.mean(covered) >= 1 - alpha - 2 * np.std(covered) / np.sqrt(len(covered))
    if by == "score":  # nearly without ties it is not far above either
        assert np.mean(covered) < 1 - alpha + 0.04


def test_coverage_holds_in_so_many_splits_and_the_plug_in_number_does_not():
    generator, kept, plain = np.random.default_rng(1), 0, 0
    for _ in range(400):
        right, scores = prompts(100, 10, generator)
        future, future_scores = prompts(4000, 10, generator)
        sets = SampleSets(0.2, "score", confidence=0.9).fit(right, scores)
        kept += (sets.predict(future_scores) & future).any(axis=1).mean() >= 0.8
        needed = np.sort(np.where(right, -scores, np.inf).min(axis=1))[79]  # covers 80 % of the rows of the fit
        plain += ((-future_scores <= needed) & future).any(axis=1).mean() >= 0.8
    assert kept / 400 >= 0.9 - 2 * np.sqrt(0.09 / 400)
    assert plain / 400 < 0.8


def test_a_set_says_how_many_samples_it_takes_or_why_none_will_do(tmp_path):
    right = np.zeros((50, 6), bool)
    right[np.arange(50), np.arange(50) % 5] = True  # a right one among the first five, evenly
    sets = SampleSets(0.2).fit(right)
    assert sets.num_samples == 5 and "among the first 5 samples" in sets.promise()  # rank 41 of 50
    assert SampleSets(0.3).fit(right).num_samples == 4
    assert sets.predict(right).sum(axis=1).tolist() == [5] * 50
    with pytest.raises(ValueError, match="at least M = 5 samples a prompt, got shape"):
        sets.predict(right[:, :4])
    with pytest.raises(ValueError, match="there is no cut"):
        _ = sets.cut
    right[:20] = False
    with pytest.raises(NoGuaranteeError, match=r"20 of 50 prompts have no right answer.*least alpha .* about 0.42"):
        SampleSets(0.2).fit(right)
    with pytest.raises(NoGuaranteeError, match=r"5 prompts cannot bound .* by 10 %: that takes 9 prompts"):
        SampleSets(0.1).fit(right[:5])
    with pytest.raises(ValueError, match="of these prompts are among the 50"):
        sets.evaluate(np.eye(6, dtype=bool)[np.arange(50) % 5])
    sets.save(tmp_path / "sets.json")
    again = SampleSets.load(tmp_path / "sets.json")
    assert str(again) == str(sets) and again.law == sets.law
    text = (tmp_path / "sets.json").read_text()
    (tmp_path / "sets.json").write_text(text.replace('"quantile": 5.0', '"quantile": 2.0'))
    with pytest.raises(ValueError, match="was changed after the rule"):
        SampleSets.load(tmp_path / "sets.json")
    (tmp_path / "sets.json").write_text(text.replace('"quantile": 5.0', '"quantile": 2.5'))
    with pytest.raises(ValueError, match=r"quantile is 2.5"):
        SampleSets.load(tmp_path / "sets.json")


def test_a_report_counts_different_answers_and_says_what_was_possible():
    generator = np.random.default_rng(0)
    right, scores = prompts(400, 6, generator)
    texts = np.where(right, "yes", "no").astype(object)
    sets = SampleSets(0.1, "score").fit(right[:200], scores[:200])
    report = sets.evaluate(right[200:], scores[200:], texts[200:])
    assert report.mean_size <= 2 and report.coverage <= report.possible
    assert report.band[0] <= report.coverage and "sets hold a right answer" in str(report)
    assert report.to_dict()["num_prompts"] == 200
    for wrong, told in (
        ({"right": right}, "needs `scores`"),
        ({"right": right[:, 0], "scores": scores}, r"right must be \(N, M\) booleans"),
        ({"right": right, "scores": scores[:, :2]}, "scores must be finite numbers of shape"),
    ):
        with pytest.raises(ValueError, match=told):
            SampleSets(0.1, "score").fit(**wrong)
    with pytest.raises(ValueError, match="takes no scores"):
        SampleSets(0.1).fit(right, scores)
    with pytest.raises(ValueError, match='`by` must be "count" or "score"'):
        SampleSets(0.1, "best")


# ---------------------------------------------------------------------------------------------------------- the page


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "generated-text.md").read_text()


def test_the_page_runs_and_its_figures_are_those_of_the_simulation(capsys):
    generator = np.random.default_rng(0)
    data = [prompts(100, 6, generator) for _ in range(2)]
    names = {"sample_is_right": data[0][0], "sample_scores": data[0][1], "new_scores": data[1][1]}
    exec(
        PAGE.split("```python\n")[2].partition("```")[0],
        {**names, "test_is_right": data[1][0], "test_scores": data[1][1]},
    )
    assert "right answer among the first" in capsys.readouterr().out
    found = json.loads((ROOT / "benchmarks" / "results" / "generated_sets.json").read_text())
    for name, case in found["cases"].items():
        alpha = float(name.partition("alpha ")[2].partition(",")[0])
        average, sure, plain = (case[kind] for kind in ("on average", "with confidence", "plug-in"))
        assert average["mean_coverage"] >= 1 - alpha - 2 * average["standard_error"]
        assert sure["share_of_data_sets_covered"] >= 0.9 - 2 * np.sqrt(0.09 / found["data_sets"])
        assert plain["share_of_data_sets_covered"] < average["share_of_data_sets_covered"] < 1
        row = (
            f"| {name} | {100 * average['mean_coverage']:.1f} % | {100 * sure['share_of_data_sets_covered']:.1f} % | "
            f"{100 * plain['mean_coverage']:.1f} %, {100 * plain['share_of_data_sets_covered']:.0f} % |"
        )
        assert row in PAGE
    tight = found["cases"]["plain, 200 prompts, alpha 0.1, by score"]["plug-in"]
    assert tight["mean_coverage"] < 0.9 - 2 * tight["standard_error"]  # what the rank is for


def test_the_table_of_scores_on_the_page_is_that_of_the_code():
    for score in ANSWER_SCORES:
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{score.key}` |"))
        assert f"| {'larger' if score.higher_is_surer else 'smaller'} |" in line


def test_other_prompts_that_only_look_alike_are_not_taken_for_those_of_the_fit():
    generator = np.random.default_rng(0)
    for cut in range(20):
        first, second = ((generator.random((72, 4)) < 0.3), (generator.random((72, 4)) < 0.3))
        sets = SampleSets(0.6).fit(first)
        assert sets.evaluate(second).num_prompts == 72, cut
        with pytest.raises(ValueError, match="of these prompts are among the 72"):
            sets.evaluate(first[::-1])
        right = generator.random((2, 200)) < 0.5
        levels = {"match_share": generator.integers(0, 9, (2, 200)) / 8}
        calibration = AnswerCalibration().fit({"match_share": levels["match_share"][0]}, right[0])
        calibration.evaluate({"match_share": levels["match_share"][1]}, right[1], confidence_level=None)
        with pytest.raises(ValueError, match="of these answers are among the 200"):
            calibration.evaluate({"match_share": levels["match_share"][0]}, right[0])


def test_scores_that_are_no_numbers_and_files_that_are_not_there_are_told(tmp_path):
    generator = np.random.default_rng(0)
    right, scores = generator.random((60, 3)) < 0.6, generator.random((60, 3))
    sets = SampleSets(0.3, by="score").fit(right, scores)
    bad = scores.copy()
    bad[4, 1], bad[5, 0] = np.nan, np.inf
    told = r"^2 scores are NaN or infinite, first nan of sample 1 of prompt 4; finite numbers are expected: leave out"
    for asked in (lambda: sets.fit(right, bad), lambda: sets.predict(bad), lambda: sets.evaluate(right, bad)):
        with pytest.raises(ValueError, match=told):
            asked()
    for kind in (SampleSets, AnswerCalibration):
        with pytest.raises(
            FileNotFoundError, match=r"^There is no file .*gone\.json\. Fit .* or name the right one\.$"
        ):
            kind.load(tmp_path / "gone.json")


def test_the_figures_of_the_page_are_those_of_the_benchmark():
    found = json.loads((ROOT / "benchmarks" / "results" / "generated_text.json").read_text())
    named = {f"`{key}`": way for key, way in found["ways"].items() if "_" in key}
    named |= {key: way for key, way in found["ways"].items() if "_" not in key}
    named |= {"`exp(mean_log_probability)` as it is": found["uncalibrated"], "the base rate": found["base_rate"]}
    for name, way in named.items():
        cells = [
            f"{way[key]:.3f} [{way['intervals'][key][0]:.3f}, {way['intervals'][key][1]:.3f}]"
            for key in ("auroc", "ece", "nll")
        ]
        assert f"| {name} | {' | '.join(cells)} |" in PAGE
    assert f"asked the {found['answers']} shortest of" in PAGE and f"{found['right']} answers are the text" in PAGE
    assert all(case["refused"] == case["cuts"] == 20 for case in found["thresholds"].values())
    assert f"{100 * found['sets']['possible']:.1f} % of the questions" in PAGE
