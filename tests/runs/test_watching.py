"""`peft-calib watch`: predictions of a run held against its evaluation, file by file, and an exit code of its own."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import peft_calib, sentences, write_csv

from peft_calib import load, predict_to
from peft_calib.calibration import Watch
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.predicting import predict_table
from peft_calib.runs.watching import watch_run


@pytest.fixture(scope="module")
def ready(train, tmp_path_factory) -> tuple[Path, Path]:
    """A run, and a folder with labelled rows, predictions like them, and predictions of one class alone."""
    run, place = train("lora"), tmp_path_factory.mktemp("watch")
    test = write_csv(place / "test.csv", sentences(80, seed=11))
    for name, rows in {"like": sentences(60, seed=12), "again": sentences(60, seed=13)}.items():
        predict_table(run, write_csv(place / f"{name}_rows.csv", rows), place / f"{name}.csv", progress=False)
    predict_table(run, test, place / "reference.csv", progress=False)
    changed = [(text, label, "good", 0.9999) for text, label in sentences(300, seed=15)]
    write_csv(place / "changed.csv", changed, ("text", "label", "predicted_label", "probability"))
    return run, place


def told(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_watch_begins_with_the_evaluation_counts_files_once_and_ends_with_3(ready, tmp_path, capsys):
    run, place = ready
    state, metrics = tmp_path / "watch.json", tmp_path / "run.prom"
    assert peft_calib("watch", run, "--data", place / "test.csv", "--state", state, "--json") is None
    first = told(capsys)
    evaluation = evaluate_run(run, data=str(place / "test.csv"), progress=False)
    report = evaluation.content["variants"]["mean"]["after"]
    assert first["reference_accuracy"] == pytest.approx(report["accuracy"], abs=1e-12)
    assert first["reference_overconfidence"] == pytest.approx(report["mean_confidence"] - report["accuracy"], abs=1e-6)
    assert (first["rows"], first["alarmed"], first["expected"]) == (0, False, {})
    words = ("watch", run, "--state", state, "--metrics-file", metrics)
    assert peft_calib(*words, "--predictions", place / "like.csv") is None
    shown = capsys.readouterr().out
    assert "60 rows counted." in shown and "No alarm." in shown and "Accuracy to be expected" in shown
    assert peft_calib(*words, "--predictions", place / "like.csv", "--json") is None
    second = told(capsys)
    assert second["files_skipped"] == ["like.csv"] and second["rows"] == 60
    assert peft_calib(*words, "--predictions", place / "changed.csv", "--json") == "3"
    third = told(capsys)
    assert third["alarmed"] and third["rows"] == 360 and third["rows_counted"] == 300
    assert f'peft_calib_watch_rows_total{{run="{run.name}"}} 360\n' in metrics.read_text()
    assert peft_calib(*words) == "3"  # it stays
    assert "ALARM" in capsys.readouterr().out
    assert peft_calib(*words, "--data", place / "test.csv", "--overwrite") is None


def test_it_is_the_watch_of_the_toolkit(ready, tmp_path):
    run, place = ready
    found = watch_run(run, place / "like.csv", data=str(place / "test.csv"), state=tmp_path / "w", progress=False)
    evaluation = evaluate_run(run, data=str(place / "test.csv"), progress=False)
    own = Watch().start(evaluation.probabilities("mean", "after"), evaluation.items["labels"])
    out = load(run, device="cpu").predict([text for text, _ in sentences(60, seed=12)])
    report = own.update(out.probabilities)
    assert found.report.rows == report.rows and found.counted == 60
    assert found.report.confidence == pytest.approx(report.confidence, abs=1e-6)
    pairs = zip(found.report.expected, report.expected, strict=True)
    assert all(ours.accuracy == pytest.approx(theirs.accuracy, abs=1e-5) for ours, theirs in pairs)


def test_shards_are_counted_as_they_come_and_a_killed_call_goes_on(ready, tmp_path, monkeypatch):
    run, place = ready
    predictor = load(run, device="cpu")
    rows = [{"text": text} for text, _ in sentences(90, seed=14)]
    shards = predict_to(tmp_path / "shards", predictor, rows, shard_rows=30, progress=False)
    whole = watch_run(run, shards, reference=place / "reference.csv", state=tmp_path / "a", progress=False)
    assert whole.counted == 90 and "error_probability" not in {one.signal for one in whole.report.alarms}
    from peft_calib.runs import watching

    count = iter(range(9))
    real = watching.read_predicted

    def stops(*given):
        if next(count) == 2:  # the reference, a shard
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(watching, "read_predicted", stops)
    with pytest.raises(KeyboardInterrupt):
        watch_run(run, shards, reference=place / "reference.csv", state=tmp_path / "b", progress=False)
    monkeypatch.undo()
    rest = watch_run(run, shards, state=tmp_path / "b", progress=False)
    assert rest.counted == 60 and rest.skipped == ("shard-000000.parquet",)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_what_is_wrong_is_said_in_a_line(ready, tmp_path, train):
    run, place = ready
    state = tmp_path / "watch.json"
    words = ("watch", run, "--state", state)
    rows = json.loads((run / "config.json").read_text())["settings"]["data"]
    assert "trained on" in peft_calib(*words, "--data", rows) and not state.exists()
    assert "no column predicted_label" in peft_calib(*words, "--reference", place / "test.csv")
    assert "leave out --data" in peft_calib(*words, "--reference", place / "test.csv", "--data", "x.csv")
    reference = "--reference", place / "test.csv"
    assert "leave out --subset and --drop-missing" in peft_calib(
        *words, *reference, "--subset", "de", "--drop-missing"
    )
    assert "--how must be mean" in peft_calib(*words, "--how", "sample")
    assert "there are no predictions" in peft_calib(*words, "--predictions", tmp_path / "none.csv")
    assert not state.exists()
    assert peft_calib(*words, "--reference", place / "reference.csv") is None
    assert "--window was settled then" in peft_calib(*words, "--window", 50)
    assert "--subset, --drop-missing was settled then" in peft_calib(*words, "--subset", "de", "--drop-missing")
    assert "has no predictions.json" in peft_calib(*words, "--predictions", place)
    odd = tmp_path / "odd.csv"
    odd.write_text("text,predicted_label,probability\na,ugly,0.5\n")
    assert "'ugly', which is no class" in peft_calib(*words, "--predictions", odd)
    odd.write_text("text,predicted_label,probability\na,good,\n")
    assert "must hold a number" in peft_calib(*words, "--predictions", odd)
    before = state.read_text()
    other = shutil.copytree(run, tmp_path / "other")
    stored = json.loads((other / "temperature.json").read_text())
    for entry in stored.values():
        entry["parameters"]["temperature"] *= 2
    (other / "temperature.json").write_text(json.dumps(stored))
    assert "another temperature" in peft_calib("watch", other, "--state", state)
    damaged = before.replace('"window": 1000', '"window": 3')
    state.write_text(damaged)
    assert str(state) in peft_calib(*words)
    state.write_text(before[:-20])
    assert "damaged" in peft_calib(*words)


def test_an_adapter_that_is_no_run_is_watched_by_predictions_of_labelled_rows(ready, tmp_path, capsys):
    run, place = ready
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    told = peft_calib("watch", adapter)
    assert f"{adapter} is no run" in told and "--reference" in told
    found = watch_run(adapter, place / "like.csv", reference=place / "reference.csv")
    own = watch_run(run, place / "like.csv", reference=place / "reference.csv", state=tmp_path / "own.json")
    assert found.state == adapter / "watch.json" and found.report.to_dict() == own.report.to_dict()
    seen = tmp_path / "seen.csv"
    trained_on = json.loads((run / "config.json").read_text())["settings"]["data"]
    predict_table(adapter, trained_on, seen, progress=False)
    assert "trained on" in peft_calib("watch", adapter, "--reference", seen, "--overwrite")
    assert "labelled rows" in peft_calib(
        "watch", adapter, "--reference", _without_labels(place, tmp_path), "--overwrite"
    )
    assert "watches another adapters" in _of_another(adapter)
    (adapter / "predictor.json").unlink()
    assert "predictor.json would say" in peft_calib("watch", adapter, "--reference", place / "reference.csv")
    assert "no folder here" in peft_calib("watch", tmp_path / "none", "--reference", place / "reference.csv")


def _without_labels(place: Path, folder: Path) -> Path:
    lines = (place / "reference.csv").read_text().splitlines()
    file = folder / "unlabelled.csv"
    file.write_text("\n".join([lines[0].replace("label", "grade", 1), *lines[1:]]) + "\n")
    return file


def _of_another(adapter: Path) -> str:
    state = adapter / "watch.json"
    content = json.loads(state.read_text())
    content["of"]["adapters"] = {".": "sha256:0"}
    assert "was changed after" in _edited(state, content, adapter)
    del content["digest"]
    return _edited(state, content, adapter)


def _edited(state: Path, content: dict, adapter: Path) -> str:
    state.write_text(json.dumps(content))
    return peft_calib("watch", adapter)
