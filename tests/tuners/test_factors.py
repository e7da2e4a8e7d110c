"""Slots, their table, and the splitting of stacked factors."""

import pytest
import torch

from peft_calib.tuners import Factors, Slot, SlotTable


def slot(name="encoder.layer.3.attention.self.query", d_in=4, d_out=6, r=2):
    return Slot(name, d_in, d_out, r, 1.0)


@pytest.mark.parametrize(
    ("name", "layer", "module_type"),
    [
        ("encoder.layer.3.attention.self.query", 3, "encoder.layer.*.attention.self.query"),
        ("encoder.block.11.layer.0.SelfAttention.q", 11, "encoder.block.*.layer.0.SelfAttention.q"),
        ("decoder.block.11.layer.0.SelfAttention.q", 11, "decoder.block.*.layer.0.SelfAttention.q"),
        ("pooler.dense", None, "pooler.dense"),
        ("0.lin", 0, "*.lin"),
        ("lin0", None, "lin0"),
    ],
)
def test_layer_and_type_come_from_the_name(name, layer, module_type):
    assert (slot(name).layer, slot(name).module_type) == (layer, module_type)


def test_groups_keep_module_order():
    table = SlotTable([slot("a"), slot("b", d_out=8), slot("c"), slot("d", r=3)])
    assert list(table.groups.values()) == [(0, 2), (1,), (3,)]
    assert [group.key for group in table.groups] == ["4x6r2", "4x8r2", "4x6r3"]


def test_table_check_passes_on_itself_and_on_json():
    table = SlotTable([slot("a"), slot("b")])
    table.check(table.to_json())
    table.check([tuple(row) for row in table.to_json()])


@pytest.mark.parametrize(
    "other", [[slot("a")], [slot("a"), slot("b"), slot("c")], [slot("b"), slot("a")], [slot("a"), slot("b", d_in=5)]]
)
def test_table_check_names_the_first_difference(other):
    with pytest.raises(ValueError, match=r"slot [012] is .* in the adapter but .* in the model"):
        SlotTable([slot("a"), slot("b")]).check(SlotTable(other).to_json())


@pytest.mark.parametrize("num_samples", [1, 3])
def test_per_slot_gives_every_slot_its_own(num_samples):
    table = SlotTable([slot("a"), slot("b", d_out=8), slot("c")])
    groups = {
        g: (torch.randn(num_samples, len(n), g.r, g.in_features), torch.randn(1, len(n), g.out_features, g.r))
        for g, n in table.groups.items()
    }
    pairs = Factors(groups).per_slot(table, num_samples)
    first = next(iter(table.groups))
    for position, index in enumerate((0, 2)):
        A, B = groups[first][0][:, position], groups[first][1][:, position].expand(num_samples, -1, -1)
        expected = (A.squeeze(0), B.squeeze(0)) if num_samples == 1 else (A, B)
        assert all(torch.equal(x, y) for x, y in zip(pairs[index], expected, strict=True))
    assert pairs[1][1].shape[-2:] == (8, 2)
