"""A seeded sample of the mutation study: what is changed behind an adapter's back is refused, or changes nothing.

At full size: benchmarks/mutations.py.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutation_study import CLEAR, OTHER, SAME, answers, save_adapter, study
from mutations import mutations

from peft_calib.edits import accept_edits

METHODS = ("hyper-lora", "bayesian-lora", "curve-lora", "ensemble-lora")


@pytest.mark.parametrize("method", METHODS)
def test_no_mutation_loads_silently_and_every_error_names_its_file(method, tmp_path):
    save_adapter(method, tmp_path / "good")
    counts, bad = study(tmp_path / "good", tmp_path, mutations(tmp_path / "good", 30, seed=11))
    assert not bad, bad[:3]
    refused = sum(count for (_, outcome), count in counts.items() if outcome == CLEAR)
    assert refused >= 20, counts  # a study whose mutations change nothing shows nothing


def test_the_study_notices_what_loads_silently(tmp_path):
    save_adapter("lora", tmp_path / "good")
    counts, bad = study(tmp_path / "good", tmp_path, mutations(tmp_path / "good", 20, seed=11))
    assert any(entry["outcome"] == OTHER for entry in bad)
    assert sum(counts.values()) == 20 and any(outcome == SAME for _, outcome in counts)


def test_an_edit_on_purpose_is_obeyed_once_it_is_accepted(tmp_path):
    save_adapter("curve-lora", tmp_path / "good")
    before = answers(tmp_path / "good")
    config = tmp_path / "good" / "adapter_config.json"
    config.write_text(config.read_text().replace('"eval_t": "middle"', '"eval_t": 0.25'))
    with pytest.raises(ValueError, match=r"eval_t is 0\.25, but the adapter was saved with 'middle'"):
        answers(tmp_path / "good")
    accept_edits(tmp_path / "good")
    after = answers(tmp_path / "good")
    assert not before[:4].equal(after[:4]) and before[4:].equal(after[4:])  # the deterministic answer, not the draws
