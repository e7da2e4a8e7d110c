"""Every method from the first command to the last, on one data set."""

import json
import warnings

import numpy as np
import pytest
import torch
from command_line import QUICK, fresh_base, peft_calib, read
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
from safetensors.torch import load_file

from peft_calib.calibration import TemperatureScaling
from peft_calib.prediction import load_frozen, predict_dataset
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.loading import FinishedRun
from peft_calib.runs.rows import load_run_rows
from peft_calib.runs.settings import METHODS
from peft_calib.splits import RowSet, read_split
from peft_calib.trainer_callbacks import load_recalibration

PEFT_TYPES = {
    "lora": "LORA",
    "hyper-lora": "HYPERLORA",
    "bayesian-lora": "BAYESIANLORA",
    "curve-lora": "CURVELORA",
} | {"ensemble-lora": "ENSEMBLELORA"}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_holds_what_it_says(trained, method):
    run = trained[method]
    content = json.loads((run / "run.json").read_text())
    assert content["method"] == method
    assert content["rows"] == {"train": 64, "calibration": 16}
    for stage in content["stages"]:
        assert json.loads((run / stage / "stage.json").read_text())["optimizer_steps"] == 16
        assert not list((run / "training" / stage).glob("checkpoint-*"))
        assert list((run / "training" / stage).glob("calibration_eval_step_*.json"))
    for name in content["adapters"]:
        kind = PeftConfig.from_pretrained(run / name).peft_type
        assert str(getattr(kind, "value", kind)) == PEFT_TYPES.get(method, "LORA")
    for name in content["plain_lora"]:
        assert json.loads((run / name / "adapter_config.json").read_text())["peft_type"] == "LORA"
    temperatures = json.loads((run / "temperature.json").read_text())
    assert set(temperatures) == set(content["temperature"])
    assert all(fitted["parameters"]["temperature"] > 0 for fitted in temperatures.values())
    if method != "ensemble":  # the adapter's folder alone is enough for its probabilities
        for how in temperatures:
            assert load_recalibration(run / "adapter", how).state()["fit"] == temperatures[how]["fit"]
        names = json.loads((run / "adapter" / "predictor.json").read_text())["classes"]
        assert names == json.loads((run / "config.json").read_text())["labels"]["names"]
        assert TemperatureScaling.load(run / "temperature.json").state()["fit"] == temperatures["mean"]["fit"]
        for folder in {"adapter", *content["plain_lora"]}:
            assert load_recalibration(run / folder, "mean").state()["fit"] == temperatures["mean"]["fit"]
            alone = AutoPeftModelForSequenceClassification.from_pretrained(run / folder)
            assert alone.config.id2label == dict(enumerate(names))
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("method", METHODS)
def test_the_record_says_which_rows_were_seen(trained, method):
    run = FinishedRun.load(trained[method])
    _, rows = load_run_rows(run.task.config)
    for name in run.adapter_names:
        record = read_split(trained[method] / name)
        assert record.trained_on["text"].digest == RowSet.of(rows.train).digest
        assert record.calibrated_on["text"].digest == RowSet.of(rows.calibration).digest


def test_bayesian_training_knows_the_number_of_rows(trained):
    config = PeftConfig.from_pretrained(trained["bayesian-lora"] / "adapter")
    assert config.num_train_examples == 64
    assert config.kl_weight == 0.1


def test_a_loss_made_of_logits_has_the_divergence_too(tmp_path, train_file, tiny_model_folder):
    """Label smoothing forms the loss outside the model, and whoever trains by a command cannot change the trainer."""
    base = ["--data", train_file, "--model", tiny_model_folder, "--method", "bayesian-lora", *QUICK]
    options = ["label_smoothing_factor=0.1", "max_steps=2", "eval_strategy=no"]
    further = [part for option in options for part in ("--trainer-option", option)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reached no loss")
        assert peft_calib("train", "--output-dir", tmp_path / "run", *base, *further) is None


def test_members_differ_in_their_seed_only(trained):
    run = trained["ensemble"]
    one, two = weights(run / "member-0"), weights(run / "member-1")
    assert one.keys() == two.keys()
    assert not torch.equal(*(m["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"]
                             for m in (one, two)))  # fmt: skip
    settings = [PeftConfig.from_pretrained(run / name).to_dict() for name in ("member-0", "member-1")]
    assert settings[0] == settings[1]


def test_anchors_and_curve_share_one_head(trained):
    run = trained["curve-lora"]
    heads = [{k: v for k, v in weights(run / name).items() if "classifier" in k and "lora" not in k}
             for name in ("anchor-0", "anchor-1", "adapter", "lora")]  # fmt: skip
    assert heads[0]
    fresh = FinishedRun.load(run).model.get_base_model().classifier.original_module.state_dict()
    assert not torch.equal(heads[0]["base_model.model.classifier.weight"], fresh["weight"])  # it was trained
    for head in heads[1:]:
        assert head.keys() == heads[0].keys()
        assert all(torch.equal(head[key], heads[0][key]) for key in head)


def test_the_curve_passes_through_its_anchors(trained, test_file):
    import peft_calib as package

    run = FinishedRun.load(trained["curve-lora"])
    rows = run.task.encode_prediction(run.task.canonical(read(test_file), "test", "train"), run.tokenizer)
    for position in (0, 1):
        with package.curve_at(run.model, float(position)):
            on_curve = predict_dataset(run.model, rows, "mean", processing_class=run.tokenizer, progress=False)
        anchor = PeftModel.from_pretrained(fresh_base(run), trained["curve-lora"] / f"anchor-{position}").eval()
        alone = predict_dataset(anchor, rows, "mean", processing_class=run.tokenizer, progress=False)
        torch.testing.assert_close(on_curve.probabilities, alone.probabilities, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "draws"), [("bayesian-lora", 3), ("curve-lora", 5), ("ensemble", 2), ("ensemble-lora", 2)]
)
def test_draws_are_averaged_as_probabilities(trained, test_file, method, draws):
    run = FinishedRun.load(trained[method])
    rows = run.task.canonical(read(test_file), "test", "train")
    assert run.variants["sample"] == draws
    prediction = run.predict(rows, "sample", draws, progress=False)
    assert prediction.num_samples == draws
    mean = prediction.sample_probabilities.double().mean(0)
    torch.testing.assert_close(prediction.probabilities.double(), mean, atol=1e-6, rtol=0)
    assert float(prediction.mutual_information.mean()) > 0


def test_an_ensemble_is_its_members(trained, test_file):
    run = FinishedRun.load(trained["ensemble"])
    rows = run.task.canonical(read(test_file), "test", "train")
    together = run.predict(rows, "sample", 2, progress=False).sample_probabilities
    encoded = run.task.encode_prediction(rows, run.tokenizer)
    for k in range(2):
        member = PeftModel.from_pretrained(fresh_base(run), trained["ensemble"] / f"member-{k}").eval()
        alone = predict_dataset(member, encoded, "mean", processing_class=run.tokenizer, progress=False)
        torch.testing.assert_close(together[k], alone.probabilities, atol=1e-5, rtol=1e-4)


def test_members_whose_heads_have_several_layers(train_file, test_file, tiny_roberta_folder, tmp_path):
    """Stock PEFT mixes adapters in a batch for heads of one layer only; RoBERTa's has two."""
    out = tmp_path / "run"
    base = ["--data", train_file, "--model", tiny_roberta_folder, "--method", "ensemble", "--members", 2]
    assert peft_calib("train", "--output-dir", out, *base, "--learning-rate", "1e-2", *QUICK) is None
    run = FinishedRun.load(out)
    rows = run.task.canonical(read(test_file), "test", "train")
    together = run.predict(rows, "sample", 2, progress=False)
    encoded = run.task.encode_prediction(rows, run.tokenizer)
    for k in range(2):
        member = PeftModel.from_pretrained(fresh_base(run), out / f"member-{k}").eval()
        alone = predict_dataset(member, encoded, "mean", processing_class=run.tokenizer, progress=False)
        torch.testing.assert_close(together.sample_probabilities[k], alone.probabilities[:], atol=1e-5, rtol=1e-4)
    assert together.num_forwards == 2


@pytest.mark.parametrize("method", METHODS)
def test_evaluation(trained, test_file, method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert peft_calib("evaluate", trained[method], "--data", test_file) is None
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    found = evaluate_run(trained[method], data=str(test_file), progress=False)  # read back, not made again
    assert found.content["rows"] == 60
    for report in found.content["variants"].values():
        for stage in ("before", "after"):
            low, high = report[stage]["intervals"]["nll"]
            assert low <= report[stage]["nll"] <= high
            assert report[stage]["noise_floor"]["ece"]["high"] > 0
        assert report["before"]["accuracy"] == report["after"]["accuracy"]
    probabilities = found.probabilities(found.main_variant, "after")
    labels = found.items["labels"]
    assert np.isclose(-np.log(probabilities[np.arange(60), labels]).mean(),
                      found.content["variants"][found.main_variant]["after"]["nll"])  # fmt: skip
    assert (found.folder / "report.md").read_text().count("|") > 20
    page = (found.folder / "report.html").read_text()
    assert f"<h1>{trained[method].name}</h1>" in page
    for told in (
        method,
        test_file.name,
        "60 rows",
        "UTC",
        found.content["variants"][found.main_variant]["temperature_fit"]["reason"],
    ):
        assert told in page, told


def test_comparison_is_paired_and_corrected(trained, test_file, tmp_path, capsys):
    out = tmp_path / "comparison.json"
    runs = [trained[name] for name in ("lora", "ensemble", "curve-lora")]
    assert peft_calib("compare", *runs, "--data", test_file, "--metric", "nll", "--output", out) is None
    assert "nll" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert (content["rows"], content["items"]) == (60, 60)
    pairs = content["pairs"]
    assert [{pair["a"], pair["b"]} for pair in pairs] == [{"ensemble", "lora"}, {"curve-lora", "lora"}]
    for pair in pairs:
        score = pair["scores"]["nll"]
        assert score["adjusted_p_value"] >= score["p_value"]
        side = "a" if pair["a"] == "lora" else "b"
        lora = evaluate_run(runs[0], data=str(test_file), progress=False)
        assert np.isclose(score[side], lora.content["variants"]["mean"]["after"]["nll"])
    assert "exists" in peft_calib("compare", *runs, "--data", test_file, "--output", out)
    assert "same run" in peft_calib("compare", runs[0], runs[0], "--data", test_file)
    assert "at least two" in peft_calib("compare", runs[0], "--data", test_file)
    drawless = trained["lora"], trained["hyper-lora"]
    assert "--num-samples means nothing" in peft_calib("compare", *drawless, "--data", test_file, "--num-samples", 4)


def test_export(trained, test_file, tmp_path):
    for method in ("lora", "hyper-lora", "bayesian-lora", "curve-lora"):
        assert peft_calib("export", trained[method], tmp_path / method) is None
        run = FinishedRun.load(trained[method])
        rows = run.task.encode_prediction(run.task.canonical(read(test_file), "test", "train"), run.tokenizer)
        stock = PeftModel.from_pretrained(fresh_base(run), tmp_path / method).eval()
        expected, found = (
            predict_dataset(model, rows, "mean", processing_class=run.tokenizer, progress=False).probabilities
            for model in (run.model, stock)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_export_of_draws(trained, test_file, tmp_path):
    for method, count in (("bayesian-lora", 3), ("ensemble", 2), ("ensemble-lora", 2), ("curve-lora", 5)):
        assert peft_calib("export", trained[method], tmp_path / method, "--num-samples", count) is None
        run = FinishedRun.load(trained[method])
        rows = run.task.canonical(read(test_file), "test", "train")
        frozen = load_frozen(fresh_base(run), tmp_path / method).eval()
        names = [f"draw-{k}" for k in range(count)]
        encoded = run.task.encode_prediction(rows, run.tokenizer)
        found = predict_dataset(
            frozen, encoded, num_samples=count, adapter_names=names, processing_class=run.tokenizer, progress=False
        )
        expected = run.predict(rows, "sample", count, progress=False)
        torch.testing.assert_close(found.sample_probabilities, expected.sample_probabilities, atol=1e-5, rtol=1e-4)


def test_export_of_a_point_of_the_curve(trained, tmp_path):
    assert peft_calib("export", trained["curve-lora"], tmp_path / "start", "--t", 0) is None
    anchor, point = weights(trained["curve-lora"] / "anchor-0"), weights(tmp_path / "start")
    for key in anchor:
        torch.testing.assert_close(point[key], anchor[key])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", ["--num-samples", 2], "has no draws"),
        ("lora", ["--t", 0.5], "point of a curve"),
        ("ensemble", ["--num-samples", 9], "has 2 members"),
        ("curve-lora", ["--t", 7], r"7"),
    ],
)
def test_exports_that_mean_nothing(trained, tmp_path, method, options, message):
    assert message in peft_calib("export", trained[method], tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_nothing(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for method in ("lora", "ensemble", "hyper-lora"):
        assert "exists" in peft_calib("export", trained[method], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_method_from_outside_goes_the_whole_way(train, test_file, tmp_path):
    method = "gauss_lora:GaussLoraConfig"
    run = train(method, "--adapter-option", "start_sd=0.2", name="gauss")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["start_sd"], config["num_train_examples"]) == ("GAUSSLORA", 0.2, 64)
    assert set(json.loads((run / "temperature.json").read_text())) == {"mean", "sample"}
    assert peft_calib("evaluate", run, "--data", test_file) is None
    assert peft_calib("export", run, tmp_path / "draws", "--num-samples", "2") is None
    assert load_frozen(fresh_base(FinishedRun.load(run)), tmp_path / "draws").peft_config.keys() == {
        "draw-0",
        "draw-1",
        "mean",
    }


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gauss", "must be one of"),
        ("no_such_module:Config", "cannot be imported"),
        ("gauss_lora:Nobody", "names no subclass"),
        ("gauss_lora:GaussLaw", "names no subclass"),
    ],
)
def test_a_method_that_is_none_is_refused(method, message, train_file, tiny_model_folder, tmp_path):
    base = ["--data", train_file, "--model", tiny_model_folder, "--method", method]
    refused = peft_calib("train", "--output-dir", tmp_path / "run", *base)
    assert message in refused
    assert not (tmp_path / "run" / "training").exists()


def test_members_share_what_lies_below_them(trained, train):
    stage = json.loads((trained["ensemble-lora"] / "adapter" / "stage.json").read_text())
    assert stage["lower_layers_kept"]
    assert not json.loads((trained["bayesian-lora"] / "adapter" / "stage.json").read_text())["lower_layers_kept"]
    run = FinishedRun.load(train("ensemble-lora", "--members", 3, "--adapter-option", "layers=1"))
    assert run.variants == {"mean": 1, "sample": 3}
    config = run.model.peft_config["default" if "default" in run.model.peft_config else "adapter"]
    assert (config.num_members, config.layers) == (3, 1)
