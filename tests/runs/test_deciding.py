"""`peft-calib decide`: rules beside the adapter of a run, applied to predictions and measured on rows of their own."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import peft_calib, sentences, write_csv
from datasets import load_dataset

from peft_calib import Scorer, export_lora, load, predict_to
from peft_calib.calibration import NoGuaranteeError, TemperatureScaling, load_decision
from peft_calib.calibration.decide.stored import decision_scores
from peft_calib.hub import write_card
from peft_calib.provenance.companions import attach_recalibration, attached_file
from peft_calib.provenance.splits import record_split
from peft_calib.provenance.stored_decision import StoredDecision
from peft_calib.runs.deciding import decide
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.exporting import export_run
from peft_calib.runs.predicting import predict_table
from peft_calib_vllm import Asked, Served, answer

#: What rows that a quick run may get wrong allow.
EASY = ["--risk", "0.7", "--alpha", "0.2"]
THRESHOLD, SETS = "decision.threshold.json", "decision.sets.json"


@pytest.fixture(scope="module")
def fit_file(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("decide") / "fit.csv", sentences(120, seed=2))


@pytest.fixture(scope="module")
def new_file(tmp_path_factory) -> Path:
    rows = [(text, label, ("north", "south")[i % 2]) for i, (text, label) in enumerate(sentences(60, seed=3))]
    return write_csv(tmp_path_factory.mktemp("decide") / "new.csv", rows, ("text", "label", "region"))


@pytest.fixture(scope="module")
def decided(train, fit_file, tmp_path_factory) -> dict[str, Path]:
    """Runs with rules beside their adapters."""
    found = {
        "lora": train("lora", "--calibration-fraction", "0.4"),
        "bayesian": train("bayesian-lora", "--num-samples", 3, "--adapter-option", "kl_weight=0.1"),
        "ensemble": train("ensemble", "--members", 2),
    }
    for run in found.values():
        assert peft_calib("decide", run, "--data", fit_file, *EASY, "--score", "aps") is None
    return found


@pytest.fixture
def lora(decided, tmp_path) -> Path:
    """A run with rules, of its own for a test that writes."""
    return Path(shutil.copytree(decided["lora"], tmp_path / "lora"))


def quiet_load(folder: Path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load(folder, device="cpu", **options)


@pytest.mark.parametrize(
    ("name", "place", "way"),
    [("lora", "adapter", "mean"), ("bayesian", "adapter", "sample"), ("ensemble", ".", "sample")],
)
def test_a_prediction_says_what_its_rules_decide(decided, new_file, name, place, way):
    run = decided[name]
    stored = StoredDecision.read(run / place / THRESHOLD)
    assert (stored.to.how, stored.num_rows) == (way, 120)
    predictor = quiet_load(run)
    found = predictor.predict([text for text, _ in sentences(30, seed=5)])
    rule, sets = load_decision(run / place / THRESHOLD), load_decision(run / place / SETS)
    assert torch.equal(found.answered, rule.accept(found.probabilities))
    assert torch.equal(found.sets, sets.predict(found.probabilities))
    assert found.decision == f"{rule.promise()} {sets.promise()}" and rule.promise() in repr(found)
    for names, row, held in zip(found.label_sets, found.probabilities.tolist(), found.sets.tolist(), strict=True):
        likely = sorted(range(2), key=lambda k: -row[k])
        assert names == [predictor.label_names[k] for k in likely if held[k]]
    if way == "sample":
        other = predictor.predict(["a", "b"], num_samples=1)
        assert other.answered is None and "The rule in decision.threshold.json was fitted" in other.decision
        assert predictor.further_columns(None, 1, 0) == []
    if name == "bayesian":  # draws of another seed are another function
        assert predictor.predict(["a"], seed=1).answered is None
        assert "3 draws of seed 0" in predictor.predict(["a"], seed=1).decision
        assert predictor.predict(["a"], how="late").answered is not None


@pytest.mark.parametrize(("name", "place"), [("bayesian", "adapter"), ("ensemble", ".")])
def test_exported_draws_have_the_rules_that_are_for_them(decided, tmp_path, name, place):
    run, texts = decided[name], [text for text, _ in sentences(30, seed=5)]
    here = quiet_load(run).predict(texts)
    count = ("--num-samples", here.num_samples) if name == "bayesian" else ()
    assert peft_calib("export", run, tmp_path / "draws", *count) is None
    there = quiet_load(tmp_path / "draws").predict(texts)
    assert (there.decision, there.num_samples) == (here.decision, here.num_samples)
    assert torch.equal(there.answered, here.answered) and torch.equal(there.sets, here.sets)
    folders = {f"draw-{k}": str(tmp_path / "draws" / f"draw-{k}") for k in range(here.num_samples)}
    served = Served.of(folders)  # as the plugin of vLLM reads it
    draws = quiet_load(run, recalibrate=False).predict(texts, how="sample", num_samples=here.num_samples)
    content = answer(Asked({"texts": texts}, served), served, draws.sample_probabilities.numpy())
    assert content["decision"] == here.decision
    assert [row["answered"] for row in content["data"]] == here.answered.tolist()
    assert [row["label_set"] for row in content["data"]] == here.label_sets
    with pytest.warns(UserWarning, match="without a decision: the rule in decision.threshold.json was fitted for "):
        export_run(run, tmp_path / "fewer", num_samples=here.num_samples - 1)
    assert not list((tmp_path / "fewer").rglob("decision.*"))
    assert (run / place / THRESHOLD).is_file()


def test_an_export_carries_a_rule_of_its_own_way_only(decided, fit_file, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(decided["bayesian"], run)
    decide(run, str(fit_file), alpha=0.3, how="mean", overwrite=True, progress=False)  # a rule for each way
    model = quiet_load(run / "adapter").model
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_lora(model, tmp_path / "draws", num_samples=3)
    assert [file.name for file in (tmp_path / "draws").glob("decision.*")] == [THRESHOLD]
    assert [file.name for file in (tmp_path / "draws/mean").glob("decision.*")] == [SETS]
    assert quiet_load(tmp_path / "draws/mean").predict(["a"]).sets is not None
    export_lora(model, tmp_path / "one")
    assert [file.name for file in (tmp_path / "one").glob("decision.*")] == [SETS]
    for other in ({"seed": 1}, {"antithetic": True}):  # other functions than the rule was fitted to
        with pytest.warns(UserWarning, match="3 draws of seed 0"):
            export_lora(model, tmp_path / "other", num_samples=3, **other)
        assert not list((tmp_path / "other").glob("decision.*"))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "cores" in name).add_(0.1)
    export_lora(model, tmp_path / "trained on", num_samples=3)
    assert not list((tmp_path / "trained on").rglob("decision.*"))


def test_tables_shards_and_workers_have_the_columns(decided, new_file, tmp_path, capsys):
    run, rows = decided["lora"], load_dataset("csv", data_files=str(new_file), split="train", cache_dir=str(tmp_path))
    predictor = quiet_load(run)
    out = predictor.predict(rows)
    table = predict_table(run, rows, tmp_path / "t.csv", prefix="m_", all_probabilities=True, progress=False)
    lines = load_dataset("csv", data_files=str(tmp_path / "t.csv"), split="train", cache_dir=str(tmp_path))
    names = ["m_mutual_information", "m_answered", "m_set", "m_probability_bad", "m_probability_good"]
    assert lines.column_names[-5:] == names
    assert lines["m_answered"][:] == out.answered.tolist()
    assert [json.loads(text) for text in lines["m_set"]] == out.label_sets
    assert any("rows are answered" in line for line in table.lines())
    predict_to(tmp_path / "shards", predictor, rows, shard_rows=25, progress=False)
    files = f"{tmp_path}/shards/*.parquet"
    found = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert found["answered"][:] == out.answered.tolist() and found["set"][:] == out.label_sets
    scored = Scorer(run, device="cpu")({"text": rows["text"][:8]})
    assert scored["answered"] == out.answered.tolist()[:8] and scored["set"] == out.label_sets[:8]
    out.save(tmp_path / "saved")
    again = type(out).load(tmp_path / "saved").select(torch.arange(4, 9))
    assert torch.equal(again.answered, out.answered[4:9]) and again.label_sets == out.label_sets[4:9]
    assert again.decision == out.decision and again.to_dataset()["set"][:] == again.label_sets
    plain = quiet_load(run, decisions=False)
    assert plain.predict(rows).answered is None and plain.predict(rows).temperature == out.temperature
    with pytest.raises(ValueError, match="begun in another way"):
        predict_to(tmp_path / "shards", plain, rows, shard_rows=25, progress=False)


def test_an_evaluation_says_what_the_rules_reach(lora, new_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert peft_calib("evaluate", lora, "--data", new_file, "--group-column", "region") is None
    shown = capsys.readouterr().out
    assert "Which rows to answer:" in shown and "Prediction sets:" in shown
    (place,) = lora.glob("evaluation/*")
    content = json.loads((place / "report.json").read_text())
    found = content["variants"]["mean"]["decision"]
    rows = load_dataset("csv", data_files=str(new_file), split="train", cache_dir=str(lora / "cache"))
    p, labels = quiet_load(lora).predict(rows).probabilities, [int(name == "good") for name in rows["label"]]
    reached = load_decision(lora / "adapter" / THRESHOLD).evaluate(p, labels)
    for key in ("accepted", "errors", "num_rows"):
        assert found["threshold"]["reached"][key] == getattr(reached, key)
    assert found["threshold"]["reached"]["risk_interval"] == pytest.approx(reached.risk_interval)
    scores = decision_scores(p, labels, rule=lora / "adapter" / THRESHOLD)  # what metrics/decision computes
    assert (scores["accepted"], scores["errors"]) == (reached.accepted, reached.errors)
    reached = load_decision(lora / "adapter" / SETS).evaluate(p, labels)
    assert found["sets"]["reached"]["coverage"] == reached.coverage and found["sets"]["told"] == str(reached)
    regions = {one["name"]: one["num_rows"] for one in found["threshold"]["groups"]["groups"]}
    assert regions == {"north": 30, "south": 30}
    assert set(content["variants"]["mean"]["after"]["groups"]["panels"]) == {"north", "south"}
    page, text = (place / "report.html").read_text(), (place / "report.md").read_text()
    assert page.count("<figure>") == 10 and "<h2>Prediction sets</h2>" in page
    assert "## Which rows to answer" in text and "| south | 30 |" in text


def test_a_rule_is_not_reported_on_its_own_rows_and_another_one_is_measured_anew(lora, fit_file, new_file, tmp_path):
    content = evaluate_run(lora, data=str(fit_file), progress=False).content["variants"]["mean"]
    for kind in ("threshold", "sets"):
        assert content["decision"][kind]["refused"].startswith("Refused: 120 of the 120 rows are among the 120")
    assert "accuracy" in content["after"]
    first = evaluate_run(lora, data=str(new_file), progress=False).content
    lines = fit_file.read_text().splitlines()
    few = tmp_path / "few.csv"  # three rows of the fit among 60 others: left out, and counted
    few.write_text("\n".join(["text,label", *(",".join(row) for row in sentences(60, seed=7)), *lines[1:4]]) + "\n")
    found = evaluate_run(lora, data=str(few), progress=False).content["variants"]["mean"]["decision"]["sets"]
    assert found["rows_left_out"] == 3 and found["reached"]["num_rows"] == 60
    decide(lora, str(fit_file), alpha=0.3, overwrite=True, progress=False)
    second = evaluate_run(lora, data=str(new_file), progress=False).content
    assert first["identity"]["decisions"]["threshold"] == second["identity"]["decisions"]["threshold"]
    assert first["identity"]["decisions"]["sets"] != second["identity"]["decisions"]["sets"]
    assert second["variants"]["mean"]["decision"]["sets"]["reached"]["alpha"] == 0.3


def test_a_rule_of_another_temperature_or_adapter_is_refused(lora, decided, new_file, fit_file):
    artefact = lora / "adapter" / "predictor.json"
    content = json.loads(artefact.read_text())
    other = TemperatureScaling().fit(np.tile([[6.0, 0.0], [6.0, 0.0], [0.0, 6.0]], (20, 1)), [0, 1, 1] * 20)
    content["ways"]["mean"] |= other.state()  # fitted anew, on other rows
    del content["digest"]
    artefact.write_text(json.dumps(content))
    now = other.temperature
    with pytest.raises(
        ValueError, match=rf"another recalibration: T = .* where the rule was fitted, and T = {now:.6g} now"
    ):
        quiet_load(lora)
    assert quiet_load(lora, decisions=False).predict(["a"]).temperature == now != 1.0
    assert peft_calib("decide", lora, "--data", fit_file, *EASY, "--overwrite") is None
    assert quiet_load(lora).predict(["a"]).answered is not None
    # the run itself keeps its temperature elsewhere: there the rule is stale now
    told = evaluate_run(lora, data=str(new_file), progress=False).content["variants"]["mean"]["decision"]
    assert "another recalibration" in told["threshold"]["refused"]
    for name in (THRESHOLD, SETS):
        shutil.copy(decided["bayesian"] / "adapter" / name, lora / "adapter" / name)
    with pytest.raises(ValueError, match=r"another adapter, or one that has been .*decisions=False loads") as told:
        quiet_load(lora)
    assert str(lora / "adapter" / THRESHOLD) in str(told.value) and "--overwrite, or remove the file" in str(
        told.value
    )


def test_classes_are_called_by_their_names(lora, fit_file, new_file, capsys):
    words = ["--risk", "0.8", "--per-class", "--alpha", "0.3", "--groups", "label", "--overwrite"]
    assert peft_calib("decide", lora, "--data", fit_file, *words) is None
    shown = capsys.readouterr().out
    assert shown.count("| bad | ") == shown.count("| good | ") == 2
    found = evaluate_run(lora, data=str(new_file), progress=False).content["variants"]["mean"]["decision"]
    assert "| bad | " in found["sets"]["told"] and "| good | " in found["sets"]["told"]
    predicted = [name for name in ("bad", "good") if f"| {name} | " in found["threshold"]["told"]]
    assert predicted and "predicted class" in found["threshold"]["told"]


def test_rules_travel_with_the_model_until_it_is_recalibrated(decided, tmp_path):
    predictor = quiet_load(decided["lora"])
    predictor.model.save_pretrained(tmp_path)
    for name in (THRESHOLD, SETS):
        there, here = (json.loads((place / name).read_text()) for place in (decided["lora"] / "adapter", tmp_path))
        assert there == here
    assert quiet_load(tmp_path).predict(["a text"]).answered is not None
    state = predictor.recalibration("mean")[0].state()
    attach_recalibration(predictor.model, state, num_samples=None, seed=0)
    assert attached_file(predictor.model, THRESHOLD) is None


def test_a_rule_that_was_edited_by_hand_is_not_believed(lora, decided, new_file):
    for name in (THRESHOLD, SETS):
        place = lora / "adapter" / name
        place.write_text((decided["lora"] / "adapter" / name).read_text())
        content = json.loads(place.read_text())
        settings, promised = content["rule"]["settings"], "risk" if name == THRESHOLD else "alpha"
        settings[promised] /= 2
        place.write_text(json.dumps(content))
        for read in (load_decision, lambda _: quiet_load(lora)):
            with pytest.raises(ValueError, match=r"was changed after the rule .*Fit the rule again") as told:
                read(place)
            assert str(place) in str(told.value)
        assert str(place) in peft_calib("evaluate", lora, "--data", new_file)
        del content["digest"]  # a file of an earlier release, which had none
        place.write_text(json.dumps(content))
        assert load_decision(place).promise()
        place.write_text((decided["lora"] / "adapter" / name).read_text())
    assert quiet_load(lora).predict(["a"]).answered is not None


def test_a_rule_may_go_by_the_uncertainty_head(lora, fit_file, new_file):
    told = peft_calib("decide", lora, "--data", fit_file, "--risk", "0.7", "--by", "head", "--overwrite")
    assert "no uncertainty head is stored" in told or "there is no uncertainty head" in told
    fast = ["--lr", "1e-3", "--alpha", "0.1", "--beta", "0.01", "--epochs", "1"]
    assert peft_calib("train-head", lora, *fast) is None
    assert peft_calib("decide", lora, "--data", fit_file, "--risk", "0.7", "--by", "head", "--overwrite") is None
    found = quiet_load(lora).predict([text for text, _ in sentences(20, seed=5)])
    rule = load_decision(lora / "adapter" / THRESHOLD)
    assert torch.equal(found.answered, rule.accept(1 - found.error_probability, input="confidence"))
    content = evaluate_run(lora, data=str(new_file), progress=False).content["variants"]["mean"]
    assert content["decision"]["threshold"]["by"] == "head"
    assert content["decision"]["threshold"]["reached"]["num_rows"] == 60
    assert peft_calib("train-head", lora, *fast, "--score", "sr_norm", "--overwrite") is None
    with pytest.raises(ValueError, match="another uncertainty head"):
        quiet_load(lora)


def test_a_card_says_what_is_promised_and_what_was_reached(lora, new_file, tmp_path):
    evaluate_run(lora, data=str(new_file), progress=False)
    text = write_card(lora, tmp_path / "card", base_model="user/base").read_text()
    part = text.partition("## Deciding")[2].partition("## How it was measured")[0]
    for kind, name in (("threshold", THRESHOLD), ("sets", SETS)):
        rule = load_decision(lora / "adapter" / name)
        assert rule.promise() in part and (tmp_path / "card" / name).is_file(), kind
    assert "Reached (mean adapter of `new`)" in part and "(decision.png)" in part
    assert (tmp_path / "card" / "decision.png").is_file()
    assert quiet_load(tmp_path / "card", base_model=_base(lora)).predict(["a"]).answered is not None


def _base(run: Path) -> str:
    return json.loads((run / "config.json").read_text())["settings"]["model"]


# ------------------------------------------------------------------------------------------- an adapter that is no run


def test_an_adapter_that_is_no_run(decided, fit_file, train_file, tmp_path):
    folder = Path(shutil.copytree(decided["lora"] / "adapter", tmp_path / "adapter"))
    rows = load_dataset("csv", data_files=str(fit_file), split="train", cache_dir=str(tmp_path))
    told = peft_calib("decide", folder, "--data", fit_file, *EASY)
    assert "holds decision.threshold.json; pass --overwrite" in told
    found = decide(folder, rows, risk=0.7, overwrite=True, progress=False)
    assert set(found.stored[0].rows) == {"tokens", "text"}
    before = StoredDecision.read(decided["lora"] / "adapter" / THRESHOLD)
    assert found.stored[0].rule.threshold == before.rule.threshold
    renamed = rows.rename_columns({"text": "words", "label": "mood"})
    columns = {"text_column": ["words"], "label_column": "mood", "overwrite": True, "progress": False}
    found = decide(folder, renamed, risk=0.7, **columns)
    assert {"tokens", "text", "words", "mood+words"} <= set(found.stored[0].rows)
    trained = load_dataset("csv", data_files=str(train_file), split="train", cache_dir=str(tmp_path))
    for rename in ({"label": "mood"}, {"text": "words", "label": "mood"}):
        seen = trained.rename_columns(rename)
        with pytest.raises(ValueError, match=r"rows to be decided on are among the .* trained on"):
            decide(folder, seen, risk=0.7, **{**columns, "text_column": [rename.get("text", "text")]})
    with pytest.raises(ValueError, match="120 of 120 rows have no label that is one of the classes"):
        decide(folder, rows.remove_columns("label"), risk=0.7, overwrite=True, progress=False)
    record_split(folder, trained_on=rows)
    with pytest.raises(ValueError, match=r"120 of the 120 rows to be decided on are among .* trained on"):
        decide(folder, rows, risk=0.7, overwrite=True, progress=False)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--risk", "1.5"], "`risk` must"),
        (["--risk", "0.05", "--target-coverage", "0.8"], "Ask for one of `risk`"),
        (["--alpha", "0"], "`alpha` must"),
        (["--alpha", "0.1", "--per-class"], "ask for one with --risk"),
        (["--risk", "0.1", "--score", "aps"], "--score is of prediction sets: ask for them with --alpha"),
        (["--alpha", "0.1", "--groups", "region"], "--groups must be label or predicted, got 'region'"),
        (["--by", "margin"], "--by must be one of probability, head, got 'margin'"),
        (["--by", "head", "--per-class"], "leave out --by head"),
        (["--text-column", "words"], "the columns of a run are those of its training"),
        (["--num-samples", "3"], "The adapter is deterministic"),
        (["--how", "sample", "--num-samples", "4"], "(--how sample) takes draws, and this adapter is deterministic"),
        (["--how", "linear"], "a rule is for --how mean, sample or late"),
        (["--alpha", "0.1", "--confidence", "0.99"], "say --sets-confidence for prediction sets"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(decided, fit_file, words, told):
    found = peft_calib("decide", decided["lora"], "--data", fit_file, "--overwrite", *words)
    assert told in found and "\n" not in found


def test_words_of_the_command_line(decided, fit_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    peft_calib("decide", decided["lora"], "--costs", "1", "--per-class")
    assert "takes 2 numbers, <wrong> <passed on>" in capsys.readouterr().err
    folder = Path(shutil.copytree(decided["lora"] / "adapter", tmp_path / "adapter"))
    record_split(folder, trained_on=[{"other": "a"}])
    content = json.loads((folder / "calibration_split.json").read_text())
    content["trained_on"].pop("text", None)
    del content["digest"]
    (folder / "calibration_split.json").write_text(json.dumps({**content, "calibrated_on": {}}))
    before = warnings.formatwarning
    shown: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda *one: shown.append(warnings.formatwarning(*one[:4]))
        assert peft_calib("decide", folder, "--data", fit_file, *EASY, "--overwrite") is None
    assert warnings.formatwarning is before
    (line,) = [one for one in shown if "cannot be checked" in one]
    assert line.startswith("warning: The adapter knows the rows") and ".py" not in line and line.count("\n") == 1


def test_rows_that_do_not_do_are_refused(lora, train_file, fit_file, tmp_path):
    few = write_csv(tmp_path / "few.csv", sentences(20, seed=9))
    told = peft_calib("decide", lora, "--data", few, "--risk", "0.05", "--overwrite")
    assert "59" in told and "\n" not in told
    with pytest.raises(NoGuaranteeError) as refused:
        decide(lora, str(few), alpha=0.01, overwrite=True, progress=False)
    assert refused.value.rows_needed == 99
    before = {name: (lora / "adapter" / name).read_bytes() for name in (THRESHOLD, SETS)}
    assert peft_calib("decide", lora, "--data", few, "--alpha", "0.2", "--risk", "0.05", "--overwrite") is not None
    assert before == {name: (lora / "adapter" / name).read_bytes() for name in (THRESHOLD, SETS)}
    assert "rows to be decided on are among" in peft_calib("decide", lora, "--data", train_file, *EASY, "--overwrite")
    assert "name labelled rows to fit the rule on with --data" in peft_calib("decide", lora, "--overwrite")
    assert "decision.threshold.json; pass --overwrite" in peft_calib("decide", lora, "--data", fit_file)
    assert "neither a finished run nor an adapter" in peft_calib("decide", tmp_path, "--data", fit_file)


def test_equal_inputs_are_one_observation(lora, fit_file, tmp_path):
    thrice = write_csv(tmp_path / "thrice.csv", sentences(3, seed=9) * 20)
    told = peft_calib("decide", lora, "--data", thrice, "--risk", "0.05", "--overwrite")
    assert "3 rows" in told and "59" in told
    rows = sentences(120, seed=2)
    other = {"good": "bad", "bad": "good"}
    mixed = write_csv(tmp_path / "mixed.csv", rows + [(text, other[label]) for text, label in rows[:40]] + rows[:10])
    options = {"risk": 0.8, "overwrite": True, "progress": False}
    found = decide(lora, str(mixed), **options)
    assert (found.stored[0].num_rows, found.repeated, found.to_dict()["rows_repeated"]) == (120, 50, 50)
    assert "50 row(s) that repeat the input of another one were left out." in found.lines()
    turned = write_csv(tmp_path / "turned.csv", [*reversed(mixed_rows(mixed))])
    again = decide(lora, str(turned), **options).stored[0].rule.curve
    assert again.errors[-1] == found.stored[0].rule.curve.errors[-1]


def mixed_rows(path: Path) -> list[tuple[str, str]]:
    return [tuple(line.rsplit(",", 1)) for line in path.read_text().splitlines()[1:]]


def test_damaged_files_are_told(lora):
    path = lora / "adapter" / THRESHOLD
    content = json.loads(path.read_text())
    for change, told in (
        ({"format_version": 2}, "format_version"),
        ({"adapters": "x"}, "adapters"),
        ({"fitted_to": {**content["fitted_to"], "how": "linear"}}, "fitted_to.how"),
        ({"rule": {**content["rule"], "num_classes": 0}}, "rule.num_classes"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=told):
            quiet_load(lora)
    shutil.copy(lora / "adapter" / SETS, path)
    with pytest.raises(ValueError, match="holds a rule of another kind, ConformalSets"):
        quiet_load(lora)
