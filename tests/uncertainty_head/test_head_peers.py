"""Distances and scores of ensembles against lm-polygraph 0.7 and torch-uncertainty 0.13, by their stored answers."""

import json

import head_peers
import numpy as np
import torch

from peft_calib.uncertainty_head import FeatureSet
from peft_calib.uncertainty_head.baselines import Bald, MarginalMahalanobis, RobustDensity, SampledResponse

STORED = json.loads(head_peers.FILE.read_text())
GIVEN = head_peers.items()
POLYGRAPH, TORCH_UNCERTAINTY = STORED["lm-polygraph"], STORED["torch-uncertainty"]


def of(phi: np.ndarray) -> FeatureSet:
    return FeatureSet(torch.from_numpy(phi)[None], torch.zeros(1, len(phi), head_peers.CLASSES))


def test_mahalanobis_is_the_square_of_lm_polygraphs_with_n_for_n_minus_one():
    found = MarginalMahalanobis().fit(of(GIVEN["train"])).score(of(GIVEN["new"]))
    size = len(GIVEN["train"])
    # theirs is float32
    np.testing.assert_allclose(found, np.square(POLYGRAPH["mahalanobis"]) * size / (size - 1), rtol=2e-4)


def test_robust_density_is_lm_polygraphs():
    found = RobustDensity(num_components=100).fit(of(GIVEN["train"])).score(of(GIVEN["new"]))
    np.testing.assert_allclose(found, POLYGRAPH["rde"], rtol=1e-6)


def test_scores_of_an_ensemble_are_torch_uncertaintys():
    logits = torch.from_numpy(GIVEN["logits"])
    members = FeatureSet(torch.zeros(*logits.shape[:2], 1), logits)
    np.testing.assert_allclose(
        SampledResponse().fit(members).score(members), 1 + np.array(TORCH_UNCERTAINTY["msp"]), atol=1e-12
    )
    found = Bald().fit(members).score(members)
    np.testing.assert_allclose(found, TORCH_UNCERTAINTY["mutual_information_rows_first"], atol=1e-12)
    # their criterion documents functions first, and takes rows first: as documented it answers for five rows
    assert len(TORCH_UNCERTAINTY["mutual_information_functions_first"]) == head_peers.FUNCTIONS
