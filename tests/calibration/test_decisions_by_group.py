"""What a rule reaches in groups, held to counts and to scipy's exact intervals; the pages that show it."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from peft_calib.calibration import (
    ConformalSets,
    SelectiveThreshold,
    calibration_report,
    decision_html,
    load_decision,
    reach_diagram,
    reached_by_group,
)

NAMES = np.array(["<b>north</b>", "south", "east|west"])


def rows(count: int, seed: int):
    generator = np.random.default_rng(seed)
    p = generator.dirichlet([0.3, 0.3, 0.3], count)
    labels = (generator.random((count, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=2)
    return p, labels, NAMES[generator.choice(3, count, p=[0.6, 0.3, 0.1])]


@pytest.fixture(scope="module")
def fitted():
    p, labels, _ = rows(600, 0)
    return SelectiveThreshold(risk=0.1).fit(p, labels), ConformalSets(alpha=0.1).fit(p, labels)


@pytest.mark.parametrize("kind", [0, 1])
def test_groups_are_counted_and_their_intervals_hold_at_once(fitted, kind):
    rule, (p, labels, groups) = fitted[kind], rows(400, 1)
    found = reached_by_group(rule, p, labels, groups)
    assert [one.group for one in found.groups] == sorted(NAMES.tolist())
    if kind == 0:
        decided, failed = rule.accept(p), (p.argmax(1) != labels) & rule.accept(p)
    else:
        decided, failed = np.ones(400, bool), ~rule.predict(p)[np.arange(400), labels]
    for one in found.groups:
        mine = groups == one.group
        assert one.num_rows == mine.sum()
        assert (one.decided, one.failures) == ((decided & mine).sum(), (failed & mine).sum())
        exact = binomtest(one.failures, one.decided).proportion_ci(1 - 0.05 / 3, "exact")
        assert one.interval == pytest.approx((exact.low, exact.high), abs=1e-12)
    whole = rule.evaluate(p, labels)
    failures = sum(one.failures for one in found.groups)
    assert failures == (whole.errors if kind == 0 else round(400 * (1 - whole.coverage)))
    assert json.loads(json.dumps(found.to_dict()))["target"] == 0.1


def test_a_group_that_pays_for_the_others_is_named(fitted):
    p, labels, _ = rows(400, 2)
    groups = np.where(p.argmax(1) == labels, "right", "wrong")
    found = reached_by_group(fitted[0], p, labels, groups)
    assert [one.name for one in found.above()] == ["wrong"]
    assert "above 10 %: wrong" in found.verdict() and "not of each group" in str(found)
    axes = reach_diagram(found).axes[0]
    assert axes.get_xlabel() == "share wrong" and len(axes.get_yticklabels()) == 2


def test_rows_of_the_fit_and_masked_rows(fitted):
    p, labels, groups = rows(600, 0)
    with pytest.raises(ValueError, match="must be reported on rows it has not"):
        reached_by_group(fitted[0], p, labels, groups)
    p, labels, groups = rows(100, 3)
    keep = groups == "south"
    found = reached_by_group(fitted[1], p, labels, groups, mask=keep)
    assert [one.name for one in found.groups] == ["south"] and found.groups[0].num_rows == keep.sum()


def test_sets_by_names_go_by_these_groups():
    p, labels, groups = rows(600, 0)
    sets = ConformalSets(alpha=0.2).fit(p, labels, groups=groups)
    p, labels, groups = rows(300, 4)
    found = reached_by_group(sets, p, labels, groups)
    inside = sets.predict(p, groups=groups)[np.arange(300), labels]
    for one in found.groups:
        assert one.failures == (~inside[groups == one.group]).sum()


def test_many_groups_and_groups_without_an_answer_are_drawn(fitted):
    p, labels, _ = rows(300, 5)
    found = reached_by_group(fitted[0], p, labels, np.arange(300) % 60)
    assert len(reach_diagram(found).axes[0].get_yticklabels()) == 40
    unsure = np.full((4, 3), 1 / 3)
    found = reached_by_group(fitted[0], unsure, [0, 1, 2, 0], ["a", "a", "b", "b"])
    assert [one.decided for one in found.groups] == [0, 0] and "| – | – |" in str(found)
    reach_diagram(found)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_page_holds_promise_reach_and_pictures(fitted, kind):
    rule, (p, labels, groups) = fitted[kind], rows(400, 1)
    found = reached_by_group(rule, p, labels, groups)
    part = decision_html(rule, rule.evaluate(p, labels), found)
    assert part.count("<figure>") == 2 and rule.promise() in part
    assert "<b>north" not in part and "&lt;b&gt;north" in part
    page = calibration_report(p, labels, confidence_level=None).to_html(part)
    assert part in page and page.index(part) < page.index("<summary>Settings</summary>")
    assert "Refused: own rows" in decision_html(rule, "Refused: own rows", title="A rule")


def test_a_rule_beside_an_adapter_is_read_as_its_own_file(fitted, tmp_path):
    rule = fitted[0]
    (tmp_path / "decision.threshold.json").write_text(json.dumps({"format_version": 1, "rule": rule.state()}))
    assert load_decision(tmp_path / "decision.threshold.json").to_dict() == rule.to_dict()


def test_sets_with_weights_say_where_to_go():
    p, labels, groups = rows(300, 3)
    sets = ConformalSets(alpha=0.2).fit(p, labels, sample_weight=np.linspace(1.0, 2.0, 300))
    new, truth, groups = rows(50, 4)
    with pytest.raises(ValueError, match=r"fitted with weights.*evaluate on the rows of each group"):
        reached_by_group(sets, new, truth, groups)
