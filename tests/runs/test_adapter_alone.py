"""The folder that a training leaves answers texts as the run itself does, to the last bit, in another process too."""

import json
import shutil

import numpy as np
import pytest
from command_line import read
from processes import run_code

from peft_calib.artefact import ARTEFACT_FILE
from peft_calib.provenance.row_hashes import hash_rows
from peft_calib.runs.evaluation import Evaluation, evaluate_run
from peft_calib.runs.folder import RunFolder
from peft_calib.runs.loading import load_task

METHODS = ("hyper-lora", "bayesian-lora", "curve-lora", "ensemble-lora", "ensemble")
IN_ANOTHER_PROCESS = """
import json, sys
import numpy as np, torch
import peft_calib
rows = json.load(open("rows.json"))
for name in sys.argv[1:]:
    predictor = peft_calib.load(name)
    found = {how: predictor.predict(rows, how=how).probabilities.numpy() for how in predictor.artefact.ways}
    np.savez(f"{name}.npz", names=np.array(predictor.label_names), **found)
"""


@pytest.fixture(scope="module")
def evaluated(trained, test_file) -> dict[str, Evaluation]:
    return {method: evaluate_run(trained[method], data=test_file, progress=False) for method in METHODS}


def probabilities(evaluation: Evaluation, variant: str, keys: np.ndarray) -> np.ndarray:
    """Those of an evaluation after its temperature, which sorts its rows by length, for rows in their own order."""
    place = {key: position for position, key in enumerate(evaluation.items["keys"].tolist())}
    return evaluation.probabilities(variant, "after")[[place[key] for key in keys.view(np.int64).tolist()]]


def test_the_folder_alone_in_another_process_says_what_the_run_says(trained, evaluated, test_file, tmp_path):
    rows = read(test_file)
    keys = hash_rows(load_task(RunFolder(trained["bayesian-lora"])).canonical(rows, "rows", "test"))[1]
    for method in METHODS:
        if method != "ensemble":
            shutil.copytree(trained[method] / "adapter", tmp_path / method)
        else:  # its members, and what they have together
            for name in ("member-0", "member-1"):
                shutil.copytree(trained[method] / name, tmp_path / method / name)
            shutil.copy(trained[method] / ARTEFACT_FILE, tmp_path / method)
    (tmp_path / "rows.json").write_text(json.dumps(rows["text"][:]))
    run_code(IN_ANOTHER_PROCESS, *METHODS, cwd=tmp_path)
    for method in METHODS:
        told = np.load(tmp_path / f"{method}.npz")
        assert told["names"].tolist() == ["bad", "good"]
        for variant in evaluated[method].content["variants"]:
            expected = probabilities(evaluated[method], variant, keys)
            assert np.array_equal(told[variant], expected), (method, variant)
