"""The generator against the paper's sizes and statistics, and the blending laws against their formulas."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_calib import HyperLoraConfig
from peft_calib.tuners import Mean, Sample, Slot, SlotTable, Train
from peft_calib.tuners.hyper_lora import HyperLaw
from peft_calib.tuners.hyper_lora.generator import ChunkHead, FactoredHead, FullHead, RankHead, seeded_dropout


def roberta_slots(r=8, alpha=8, width=768, layers=12):
    """Query and value of RoBERTa-base, queries first as the authors number them; the order does not matter."""
    names = [f"roberta.encoder.layer.{i}.attention.self.{m}" for i in range(layers) for m in ("query", "value")]
    return SlotTable([Slot(name, width, width, r, alpha / r) for name in names])


def mixed_slots():
    shapes = {"q": (8, 8), "up": (8, 20), "down": (20, 8)}
    return SlotTable([Slot(f"layers.{i}.{n}", *s, 3, 2.0) for i in range(3) for n, s in shapes.items()])


def size(module):
    return sum(p.numel() for p in module.parameters())


# ----------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (HyperLoraConfig.paper_mlp("fixed"), 21_249_024),
        (HyperLoraConfig.paper_mlp("random"), 21_249_024),
        (HyperLoraConfig.paper_mlp("generated"), 33_838_080),
        (HyperLoraConfig.paper_transformer("fixed"), 4_227_328),
        (HyperLoraConfig.paper_transformer("random"), 4_227_328),
        (HyperLoraConfig.paper_transformer("generated"), 4_228_864),
    ],
)
def test_paper_sizes_on_roberta_base(config, expected):
    with torch.device("meta"):
        assert size(HyperLaw(config, roberta_slots())) == expected


@pytest.mark.parametrize(
    ("a_mode", "mlp", "transformer"),
    [("fixed", 25_448_448, 4_755_200), ("generated", 42_233_856, 4_758_272)],
)
def test_paper_sizes_on_roberta_large(a_mode, mlp, transformer):
    slots = roberta_slots(width=1024, layers=24)
    with torch.device("meta"):
        assert size(HyperLaw(HyperLoraConfig.paper_mlp(a_mode), slots)) == mlp
        assert size(HyperLaw(HyperLoraConfig.paper_transformer(a_mode), slots)) == transformer


def test_paper_size_in_a_real_model():
    from transformers import RobertaConfig, RobertaModel

    with torch.device("meta"):
        base = RobertaModel(RobertaConfig(vocab_size=100))
    config = HyperLoraConfig.paper_transformer("generated", target_modules=["query", "value"])
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_228_864


@pytest.mark.parametrize(("h", "r", "d"), [(16, 4, 30), (8, 1, 7)])
def test_head_formulas(h, r, d):
    q, c = 5, 8
    chunks = math.ceil(d / c)
    assert size(FullHead(h, r, d)) == (h + 1) * r * d
    assert size(RankHead(h, r, d)) == (h + 1) * d + r * h
    assert size(FactoredHead(h, r, d, q)) == h * q + (q + 1) * r * d
    assert size(ChunkHead(h, r, d, c)) == (h + 1) * c + (r + chunks) * h
    z = torch.randn(6, h)
    for head in (FullHead(h, r, d), RankHead(h, r, d), FactoredHead(h, r, d, q), ChunkHead(h, r, d, c)):
        assert head(z).shape == (6, r, d)


def test_embeddings_by_place():
    slots = SlotTable([*mixed_slots(), Slot("pooler", 8, 8, 3, 1.0)])
    law = HyperLaw(HyperLoraConfig(embed_dim=5), slots)
    assert law.layer_emb.weight.shape == (4, 5)  # three layers and a spare row for what lies outside
    assert law.type_emb.weight.shape == (4, 5)
    assert HyperLaw(HyperLoraConfig(embed_dim=5, embed_mode="slot"), slots).slot_emb.weight.shape == (10, 5)
    assert HyperLaw(HyperLoraConfig(embed_dim=5), mixed_slots()).layer_emb.weight.shape == (3, 5)


# ----------------------------------------------------------------- the paper's start


@pytest.mark.parametrize(
    ("config", "std_a", "std_b", "frobenius"),
    [
        (HyperLoraConfig.paper_mlp("fixed"), 0.204, 0.023, 10.2),
        (HyperLoraConfig.paper_mlp("generated"), 0.022, 0.021, 1.0),
        (HyperLoraConfig.paper_transformer("fixed"), 0.0206, 0.0057, 0.51),
        (HyperLoraConfig.paper_transformer("generated"), 0.0213, 0.0058, 0.53),
    ],
)
def test_initial_statistics_of_the_paper(config, std_a, std_b, frobenius):
    slots = roberta_slots(alpha=config.lora_alpha)
    with torch.no_grad():
        A, B = HyperLaw(config, slots)(Mean()).per_slot(slots)[0]
    assert A.std().item() == pytest.approx(std_a, rel=0.12)
    assert B.std().item() == pytest.approx(std_b, rel=0.12)
    delta = slots[0].scaling * B @ A
    assert delta.norm().item() == pytest.approx(frobenius, rel=0.25)


def test_initial_b_is_shared_across_slots_as_measured():
    slots = roberta_slots()
    with torch.no_grad():
        pairs = HyperLaw(HyperLoraConfig.paper_mlp("generated"), slots)(Mean()).per_slot(slots)
    B = torch.nn.functional.normalize(torch.stack([b.flatten() for _, b in pairs]), dim=1)
    cosine = ((B @ B.T).sum() - len(slots)) / (len(slots) * (len(slots) - 1))
    assert cosine.item() == pytest.approx(0.47, abs=0.12)


def test_default_start_has_loras_a_and_zero_b():
    slots = mixed_slots()
    for A, B in HyperLaw(HyperLoraConfig(), slots)(Mean()).per_slot(slots):
        bound = 1 / math.sqrt(A.shape[1])
        assert A.abs().max() <= bound
        assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.35)
        assert not B.any()
    A = [A for A, _ in HyperLaw(HyperLoraConfig(), slots)(Mean()).per_slot(slots)]
    assert not torch.equal(A[0], A[3])


def test_authors_fixed_a_has_the_authors_scale():
    with torch.no_grad():
        stacks = HyperLaw(HyperLoraConfig.paper_mlp("fixed"), roberta_slots())(Mean()).groups
    A = next(iter(stacks.values()))[0]
    assert A.abs().max().item() == pytest.approx(1 / math.sqrt(8), rel=0.01)


# ----------------------------------------------------------------- what the laws say


def filled(law, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in law.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return law


@pytest.mark.parametrize("a_mode", ["generated", "fixed"])
@pytest.mark.parametrize("mode", ["add", "multiply"])
def test_blending_follows_its_formula(a_mode, mode):
    slots, alpha = mixed_slots(), 0.3
    fields = {"a_mode": a_mode, "a_residual": False, "seed": 5}
    plain = filled(HyperLaw(HyperLoraConfig(**fields), slots))(Mean()).per_slot(slots)
    config = HyperLoraConfig(noise_mode_a=mode, noise_mode_b="add", noise_alpha=alpha, **fields)
    law = HyperLaw(config, slots)
    filled(law)
    blended = law(Mean()).per_slot(slots)
    for group, indices in slots.groups.items():
        anchors = getattr(law, f"anchor_A_{group.key}")
        bound = 1 / math.sqrt(group.in_features)
        assert 0.5 * bound < anchors.abs().max() <= bound
        for row, i in enumerate(indices):
            (A, B), (A_mixed, B_mixed) = plain[i], blended[i]
            expected = A * anchors[row] if mode == "multiply" else (1 - alpha) * A + alpha * anchors[row]
            if a_mode == "generated":
                torch.testing.assert_close(A_mixed, expected)
            torch.testing.assert_close(B_mixed, (1 - alpha) * B)


def test_residual_a_is_anchor_plus_head():
    slots = mixed_slots()
    law = filled(HyperLaw(HyperLoraConfig(), slots))
    A = law(Mean()).groups
    for group, indices in slots.groups.items():
        head = law.heads[f"A_{group.key}"]
        z = law.trunk(law._inputs())[list(indices)]
        torch.testing.assert_close(A[group][0][0], getattr(law, f"anchor_A_{group.key}") + head(z))


def test_transformer_couples_slots_and_ignores_their_order():
    slots = mixed_slots()
    fields = {"hyper_arch": "transformer", "hyper_hidden": 16, "hyper_ffn": 32, "hyper_nhead": 4, "embed_dim": 8}
    law = filled(HyperLaw(HyperLoraConfig(**fields), slots)).eval()
    before = law(Mean()).per_slot(slots)
    with torch.no_grad():
        law.layer_emb.weight[2] += 1
    after = law(Mean()).per_slot(slots)
    assert not torch.allclose(before[0][1], after[0][1])  # layer 0 hears of layer 2
    x = torch.randn(6, 16)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    layer = law.trunk.layers[0]
    torch.testing.assert_close(layer(x, None)[order], layer(x[order], None), rtol=1e-5, atol=1e-6)


def test_encoder_layer_is_torchs():
    slots = mixed_slots()
    fields = {"hyper_arch": "transformer", "hyper_hidden": 16, "hyper_ffn": 32, "hyper_nhead": 4}
    ours = filled(HyperLaw(HyperLoraConfig(**fields), slots)).trunk.layers[0]
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    names = {
        "self_attn.in_proj_weight": ours.in_proj.weight,
        "self_attn.in_proj_bias": ours.in_proj.bias,
        "self_attn.out_proj.weight": ours.out_proj.weight,
        "self_attn.out_proj.bias": ours.out_proj.bias,
        "linear1.weight": ours.ffn_in.weight,
        "linear1.bias": ours.ffn_in.bias,
        "linear2.weight": ours.ffn_out.weight,
        "linear2.bias": ours.ffn_out.bias,
        "norm1.weight": ours.norm_attention.weight,
        "norm1.bias": ours.norm_attention.bias,
        "norm2.weight": ours.norm_ffn.weight,
        "norm2.bias": ours.norm_ffn.bias,
    }
    theirs.load_state_dict({name: value.detach() for name, value in names.items()})
    x = torch.randn(7, 16)
    torch.testing.assert_close(ours(x, None), theirs(x[None])[0], rtol=1e-5, atol=1e-5)


def test_random_a_is_fresh_in_training_fixed_in_eval_and_keyed():
    slots = mixed_slots()
    law = HyperLaw(HyperLoraConfig(a_mode="random", seed=1), slots)

    def A(draw):
        return law(draw).groups[slots[0].group][0]

    assert not torch.equal(A(Train()), A(Train()))
    assert torch.equal(A(Mean()), A(Mean()))
    three = A(Sample(3, seed=7))
    assert three.shape[0] == 3
    assert torch.equal(three[1:], A(Sample(2, seed=7, first=1)))
    assert not torch.equal(three, A(Sample(3, seed=8)))
    resumed = HyperLaw(HyperLoraConfig(a_mode="random", seed=1), slots)
    resumed.load_state_dict(law.state_dict())
    assert torch.equal(resumed(Train()).groups[slots[0].group][0], A(Train()))


def test_dropout_is_noise_in_training_only():
    slots = mixed_slots()
    config = HyperLoraConfig(hyper_arch="transformer", hyper_hidden=32, hyper_dropout=0.3, init_weights=False)
    law = HyperLaw(config, slots)
    one, two = (law(Train()).groups[slots[0].group][1] for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(*(law(Mean()).groups[slots[0].group][1] for _ in range(2)))


def test_seeded_dropout_keeps_the_mean():
    x = torch.ones(200_000)
    dropped = seeded_dropout(x, 0.3, torch.Generator().manual_seed(0))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert seeded_dropout(x, 0.3, None) is x


# ----------------------------------------------------------------- annealing


def test_horizon_counts_optimizer_steps():
    law = HyperLaw(HyperLoraConfig.paper_transformer("fixed"), mixed_slots())
    values = []
    for step in (0, 5, 10, 12):
        law.set_progress(step, 10, accumulation_steps=2)
        values.append(round(law.alpha.item(), 6))
    assert values == [0.99, 0.495, 0.0, 0.0]


def test_authors_horizon_and_own_horizon():
    law = HyperLaw(HyperLoraConfig.paper_transformer("fixed", authors_horizon=True), mixed_slots())
    law.set_progress(10, 10, accumulation_steps=2)
    assert law.alpha.item() == pytest.approx(0.495)  # the authors' run ends half way
    law = HyperLaw(HyperLoraConfig.paper_transformer("fixed", noise_anneal_steps=4), mixed_slots())
    law.set_progress(2, 10)
    assert law.alpha.item() == pytest.approx(0.495)


def test_without_annealing_alpha_stays():
    law = HyperLaw(HyperLoraConfig(noise_mode_a="add", noise_alpha=0.4), mixed_slots())
    law.set_progress(9, 10)
    assert law.alpha.item() == pytest.approx(0.4)


# ----------------------------------------------------------------- anchors from a trained LoRA


@pytest.fixture
def trained_lora(tmp_path):
    import sys

    sys.path.insert(0, str(__import__("pathlib").Path(__file__).parents[1]))
    from families import FAMILIES, logits, perturb

    bert = FAMILIES["bert"]
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["query", "dense"], rank_pattern={"query": 2})
    model = perturb(get_peft_model(bert.build(), config), scale=0.2)
    model.save_pretrained(tmp_path / "lora")
    return bert, tmp_path / "lora", logits(model, bert.batch()), logits


def test_anchor_adapter_is_where_the_blend_starts(trained_lora, tmp_path):
    from peft import PeftModel

    bert, folder, expected, logits = trained_lora
    fields = {"r": 4, "lora_alpha": 2, "target_modules": ["query", "dense"], "noise_anneal": True}
    fields |= {"noise_mode_a": "add", "noise_mode_b": "add", "noise_alpha": 1.0}
    model = get_peft_model(bert.build(), HyperLoraConfig(anchor_adapter=str(folder), **fields))
    torch.testing.assert_close(logits(model, bert.batch()), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "hyper")
    for file in folder.iterdir():
        file.unlink()
    again = PeftModel.from_pretrained(bert.build(), tmp_path / "hyper")
    assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


def test_multiply_on_a_real_anchor_trains(trained_lora):
    bert, folder, *_ = trained_lora
    config = HyperLoraConfig(
        r=4, target_modules=["query", "dense"], noise_mode_b="multiply", anchor_adapter=str(folder), init_weights=False
    )
    model = get_peft_model(bert.build(), config).train()
    model(**bert.batch()).logits.square().mean().backward()
    assert any(p.grad.abs().max() > 0 for p in model.base_model.get_law().parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["query", "key"]}, "has no factors for bert.encoder.layer.0.attention.self.key"),
        ({"target_modules": ["query", "dense"], "r": 2}, "does not fit a map of"),
    ],
)
def test_anchor_that_does_not_fit_is_refused(trained_lora, fields, message):
    bert, folder, *_ = trained_lora
    config = HyperLoraConfig(**{"r": 4, "noise_mode_b": "add", "anchor_adapter": str(folder), **fields})
    with pytest.raises(ValueError, match=message):
        get_peft_model(bert.build(), config)
