"""Whole numbers are taken from Python and numpy alike, wherever one is asked for, and true and 3.0 are none."""

import numpy as np
import pytest

from peft_calib import BayesianLoraConfig, CurveLoraConfig, export_lora, predict
from peft_calib.calibration import ConformalSets, Watch, calibration_report
from peft_calib.prediction.serving import Limits
from peft_calib.runs.settings import RunConfig
from peft_calib.whole_numbers import check_whole


@pytest.mark.parametrize("value", [np.int8(7), np.uint64(7), 7])
def test_a_whole_number_of_any_library_comes_back_as_pythons(value):
    found = check_whole(value, "n", 1, 9)
    assert type(found) is int and found == 7


@pytest.mark.parametrize("value", [True, np.True_, 7.0, np.float64(7), "7", None, 0, 10])
def test_anything_else_is_named_with_the_range(value):
    with pytest.raises(ValueError, match=r"`n` must be a whole number from 1 to 9, got "):
        check_whole(value, "`n`", 1, 9)


def test_configurations_take_them_and_save_plain_ones():
    config = CurveLoraConfig(
        r=np.int64(4), num_anchors=np.int32(2), num_handles=np.int64(1), target_modules=["q"],
        rank_pattern={"q": np.int64(2)}, layers_to_transform=[np.int64(1)],
    )  # fmt: skip
    sizes = (config.r, config.num_anchors, config.num_handles, config.rank_pattern["q"], config.layers_to_transform[0])
    assert sizes == (4, 2, 1, 2, 1) and {type(size) for size in sizes} == {int}
    for r in (True, 2.0, 0):
        with pytest.raises(ValueError, match="The rank of 'r' must be a whole number of at least 1"):
            BayesianLoraConfig(r=r)


def test_so_do_the_engine_the_export_the_toolkit_the_client_and_the_settings(tiny_classifier, tmp_path):
    import torch
    from peft import get_peft_model

    config = BayesianLoraConfig(task_type="SEQ_CLS", r=np.int64(2), target_modules=["query"])
    model = get_peft_model(tiny_classifier(), config)
    batch = {"input_ids": torch.arange(3, 15).view(2, 6)}
    said = predict(model, batch, num_samples=np.int64(3), seed=np.int64(5))
    assert torch.equal(said.probabilities, predict(model, batch, num_samples=3, seed=5).probabilities)
    export_lora(model, tmp_path / "draws", num_samples=np.int64(2), seed=np.int64(5))
    assert (tmp_path / "draws" / "draw-1").is_dir()
    for wrong in ({"num_samples": True}, {"num_samples": 2, "seed": True}, {"num_samples": 2.0}):
        with pytest.raises(ValueError, match="must be a whole number"):
            export_lora(model, tmp_path / "other", **wrong)
    assert type(Limits(prompts_per_request=np.int64(4)).prompts_per_request) is int
    assert type(Watch(window=np.int64(50)).window) is int
    assert ConformalSets(free_ranks=np.int64(2), score="raps").free_ranks == 2
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    calibration_report(p, [0, 1], num_bins=np.int64(5), confidence_level=None).to_json()
    assert RunConfig.from_mapping({"data": "x.csv", "model": "m", "rank": np.int64(4)}).rank == 4
