"""`peft-calib compare` of several runs a method: who is a replicate of whom, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from command_line import QUICK, peft_calib

from peft_calib.runs.replicates import replicates_among
from peft_calib.runs.settings import RunConfig

BASE = RunConfig(data="rows.csv", model="folder")


def named(**configs: RunConfig) -> dict[str, RunConfig]:
    return configs


def test_runs_that_differ_in_their_seed_alone_are_replicates():
    hyper = replace(BASE, method="hyper-lora")
    found = replicates_among(
        named(
            h1=replace(hyper, seed=1), l0=BASE, h0=hyper, l1=replace(BASE, seed=1, metrics=["nll"]),
        )
    )  # fmt: skip
    assert found == {"hyper-lora": ["h0", "h1"], "lora": ["l0", "l1"]}


def test_settings_tell_two_methods_of_one_name_apart():
    quick = replace(BASE, learning_rate=2e-3)
    found = replicates_among(
        named(a=BASE, b=replace(BASE, seed=1), c=quick, d=replace(quick, seed=1))
    )  # fmt: skip
    assert list(found) == ["lora (learning_rate=0.001)", "lora (learning_rate=0.002)"]


@pytest.mark.parametrize(
    "configs",
    [
        named(a=BASE, b=replace(BASE, seed=1)),  # one method
        named(a=BASE, b=replace(BASE, method="hyper-lora")),  # one run each
        named(a=BASE, b=replace(BASE, seed=1), c=replace(BASE, method="hyper-lora")),  # one of them alone
    ],
)
def test_runs_without_replicates_are_compared_one_by_one(configs):
    assert replicates_among(configs) is None


@pytest.mark.slow
def test_methods_are_compared_over_rows_and_runs(train_file, test_file, tiny_model_folder, tmp_path, capsys):
    runs = []
    for method in ("lora", "hyper-lora"):
        for seed in (0, 1):
            runs.append(tmp_path / f"{method}-{seed}")
            args = ["--data", train_file, "--model", tiny_model_folder, "--method", method, "--seed", seed, *QUICK]
            assert peft_calib("train", "--output-dir", runs[-1], *args) is None
    capsys.readouterr()
    out = tmp_path / "found.json"
    assert peft_calib("compare", *runs, "--data", test_file, "--metric", "nll", "--output", out) is None
    told = " ".join(capsys.readouterr().out.split())
    content = json.loads(out.read_text())
    (pair,) = content["pairs"]
    assert (pair["a"], pair["b"]) == ("hyper-lora", "lora")
    assert pair["settings"]["num_runs"] == {"lora": 2, "hyper-lora": 2}
    assert pair["settings"]["paired"] is True
    score = pair["scores"]["nll"]
    assert score["run_sd_b"] > 0
    assert score["low"] < score["difference"] < score["high"]
    assert "±" in told and "between the runs of a method" in told
