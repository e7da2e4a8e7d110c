"""The law on small slot tables: keyed draws, the mean, the divergence, caching, cost, bad input."""

import random
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from operations import Operations

from peft_calib import BayesianLoraConfig
from peft_calib.tuners import Draw, Mean, Sample, Slot, SlotTable, Train
from peft_calib.tuners.bayesian_lora import BayesianLaw
from peft_calib.tuners.bayesian_lora.initial import CORE_STEP_B
from peft_calib.tuners.bayesian_lora.layout import assemble
from peft_calib.tuners.bayesian_lora.stacks import BoundedScale

VARIANTS = {
    "default": {},
    "random": {"init": "random"},
    "matrix_normal": {"init": "random", "posterior": "matrix_normal"},
    "full": {"init": "random", "posterior": "full"},
    "maf": {"init": "random", "flow": "maf", "flow_depth": 2},
    "projected": {"init": "random", "conditional_noise": "projected", "init_lambda": 0.02},
    "matheron": {"init": "random", "conditional_noise": "matheron", "learn_lambda": True, "init_lambda": 0.02},
    "shared": {"init": "random", "share_inducing": True},
    "shared_full": {"init": "random", "share_inducing": True, "posterior": "full"},
    "shared_matrix_normal": {"init": "random", "share_inducing": True, "posterior": "matrix_normal"},
    "shared_maf": {"init": "random", "share_inducing": True, "flow": "maf"},
    "wide": {"init": "random", "inducing_rows": 4, "inducing_cols": 5},
    "partly": {"init": "random", "bayesian_modules": ["q"]},
}


def table(layers: int = 2, d: int = 6) -> SlotTable:
    rows = [(f"layers.{i}.{name}", d, out) for i in range(layers) for name, out in (("q", d), ("v", d), ("up", d - 1))]
    return SlotTable(Slot(name, d_in, d_out, 2, 2.0) for name, d_in, d_out in rows)


def make(slots: SlotTable | None = None, moved: bool = True, **fields) -> BayesianLaw:
    config = BayesianLoraConfig(r=2, num_train_examples=100, init_sd=fields.pop("init_sd", 0.3), **fields)
    law = BayesianLaw(config, slots or table()).double()
    if moved:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for name, parameter in law.named_parameters():
                step = 0.01 if "offset" in name or "mix" in name else 0.2
                parameter += step * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return law


def deltas(law: BayesianLaw, draw: Draw) -> list[torch.Tensor]:
    """B A of every slot, (K, d_out, d_in)."""
    with torch.no_grad():
        pairs = law(draw).per_slot(law.slots, draw.num_samples)
    return [B @ A if A.dim() == 3 else (B @ A).unsqueeze(0) for A, B in pairs]


# ----------------------------------------------------------------- draws


@pytest.mark.parametrize("variant", VARIANTS)
def test_draws_are_keyed_and_do_not_depend_on_their_chunks(variant):
    law = make(**VARIANTS[variant])
    whole = deltas(law, Sample(5, seed=3))
    chunks = [deltas(law, Sample(k, seed=3, first=first)) for first, k in ((0, 2), (2, 3))]
    for slot, delta in enumerate(whole):
        torch.testing.assert_close(torch.cat([c[slot] for c in chunks]), delta, rtol=1e-12, atol=1e-13)
        again = deltas(law, Sample(5, seed=3))[slot]
        assert torch.equal(again, delta)
        if not (variant == "partly" and not law.slots[slot].name.endswith("q")):
            assert not torch.allclose(delta[0], delta[1])
            assert not torch.allclose(deltas(law, Sample(5, seed=4))[slot], delta)


@pytest.mark.parametrize("variant", VARIANTS)
def test_antithetic_draws_mirror_their_partners(variant):
    law = make(**VARIANTS[variant])
    pairs = deltas(law, Sample(5, seed=3, antithetic=True))
    ordinary = deltas(law, Sample(5, seed=3))
    begun_in_a_pair = deltas(law, Sample(3, seed=3, first=1, antithetic=True))
    for slot, delta in enumerate(pairs):
        torch.testing.assert_close(delta[::2], ordinary[slot][::2], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(begun_in_a_pair[slot], delta[1:4], rtol=1e-12, atol=1e-13)
        if not (variant == "partly" and not law.slots[slot].name.endswith("q")):
            assert not torch.allclose(delta[0], delta[1])
            assert not torch.allclose(delta[1], ordinary[slot][1])


@pytest.mark.parametrize("variant", [n for n in VARIANTS if "maf" not in n and "shared" not in n])
def test_the_factors_of_an_antithetic_pair_average_to_the_mean(variant):
    """Without a flow A and B are affine in the normals, so a pair's average is exactly the mean factor."""
    law, draw = make(**VARIANTS[variant]), Sample(2, antithetic=True)
    with torch.no_grad():
        noise = {
            key: law.normals(draw).of(stack.shape, law.dtype, law.sigma.device) for key, stack in law.cores.items()
        }
        for key, stack in law.cores.items():
            torch.testing.assert_close(stack.draw(noise[key]).mean(0), stack.expectation(torch.float64)[0])
        if law.config.conditional_noise != "none":  # drawn factors are assembled apart there
            drawn, mean = law(draw).groups, law(Mean()).groups
            for group, pair in drawn.items():
                for both, expected in zip(pair, mean[group], strict=True):
                    torch.testing.assert_close(both.mean(0), expected[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mean_is_the_expected_update(variant):
    """E[B A] over 20,000 draws is the deterministic update that is merged and exported."""
    law, total = make(SlotTable(list(table(1))), **VARIANTS[variant]), 20_000
    expected = deltas(law, Mean())
    sums = [torch.zeros(2, *e.shape[1:], dtype=torch.float64) for e in expected]
    for first in range(0, total, 2000):
        for moments, delta in zip(sums, chunked(law, first, 2000), strict=True):
            moments += torch.stack([delta.sum(0), delta.square().sum(0)])
    for (first, second), mean in zip(sums, expected, strict=True):
        average = first / total
        sd = (second / total - average.square()).clamp_min(0).sqrt()
        # with a flow the expectation is itself an average over 1,024 draws
        error = sd * (1 / total + (1 / 1024 if "maf" in variant else 0)) ** 0.5
        assert ((average - mean[0]).abs() <= 4.5 * error + 1e-10).all()


def noise_of(law: BayesianLaw, draw: Sample, shape: tuple[int, ...]) -> torch.Tensor:
    return law.normals(draw).of(shape, law.dtype, law.sigma.device)


class ManyNormals(NamedTuple):
    generator: torch.Generator
    count: int

    def of(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.randn((self.count, *shape), generator=self.generator, dtype=dtype)


def chunked(law: BayesianLaw, first: int, count: int) -> list[torch.Tensor]:
    """Many draws at once with one private generator in place of one a draw, which would take most of the time."""
    generator = torch.Generator().manual_seed(first)
    law.normals = lambda draw: ManyNormals(generator, count)
    try:
        with torch.no_grad():
            groups = law(Sample(count, first=first)).groups
    finally:
        del law.normals
    found: list = [None] * len(law.slots)
    for group, indices in law.slots.groups.items():
        A, B = groups[group]
        for place, index in enumerate(indices):
            found[index] = (B[:, place] @ A[:, place]).expand(count, -1, -1)
    return found


def test_core_form_of_draws_equals_their_factors():
    """The shortcut taken for draws (A shared, B = P M) is the product of separately assembled factors."""
    law, draw = make(init="random"), Sample(3, seed=1)
    with torch.no_grad():
        noise = {
            key: law.normals(draw).of(stack.shape, law.dtype, law.sigma.device) for key, stack in law.cores.items()
        }
        V = law.layout.split_cores({key: stack.draw(noise[key]) for key, stack in law.cores.items()})
        factors = assemble(law._bases(), V, law._prior_std())
    whole = deltas(law, draw)
    for group, indices in law.slots.groups.items():
        A, B = factors[group]
        assert A.shape == (3, len(indices), 2, group.in_features)
        assert B.shape == (3, len(indices), group.out_features, 2)
        for place, index in enumerate(indices):
            torch.testing.assert_close(B[:, place] @ A[:, place], whole[index], rtol=0, atol=1e-14)


def test_training_draws_follow_a_counter_that_is_saved():
    law, twin = make().train(), make().train()
    first, second = (law(Train()) for _ in range(2))
    group = next(iter(first.groups))
    assert not torch.equal(first.groups[group][0], second.groups[group][0])
    twin.load_state_dict(law.state_dict())
    third, resumed = law(Train()), twin(Train())
    assert torch.equal(third.groups[group][0], resumed.groups[group][0])
    assert law.num_generations == 3


def test_global_random_states_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    law = make(init="random", flow="maf", conditional_noise="matheron")
    for draw in (Mean(), Train(), Sample(3)):
        law(draw)
    law.kl()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


def test_factors_differ_between_slots_at_the_start():
    for fields in ({}, {"init": "random"}):
        law = make(moved=False, **fields)
        pairs = law(Mean()).per_slot(law.slots)
        same_shape = [pairs[i] for i in law.slots.groups[law.slots[0].group]]
        for i, (A, _) in enumerate(same_shape):
            assert all(not torch.allclose(A, other) for other, _ in same_shape[i + 1 :])


# ----------------------------------------------------------------- divergence and its weight


@pytest.mark.parametrize("prior_mean", ["learned", "initial", "zero"])
def test_divergence_is_the_sum_over_the_cores(prior_mean):
    law = make(init="random", prior_mean=prior_mean)
    stack = next(iter(law.cores.values()))
    mean, sd = stack._mean(torch.float64), stack.sd(torch.float64)
    if prior_mean == "learned":
        mean = torch.zeros_like(mean)
    else:
        mean = mean - stack.prior_mean * stack.unit
        assert (mean != 0).all()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, sd), torch.distributions.Normal(0.0, 1.0)
    ).sum()
    torch.testing.assert_close(law.kl(), expected, rtol=1e-12, atol=0)


def test_estimate_with_an_identity_flow_agrees_with_the_closed_form():
    plain, flow = make(init="random", moved=False), make(init="random", moved=False, flow="maf")
    estimates = torch.stack([flow(Train()).regularizer.detach() for _ in range(400)]) * 100
    error = estimates.std() / len(estimates) ** 0.5
    assert error > 0
    assert (estimates.mean() - plain.kl().detach()).abs() < 4 * error


@pytest.mark.parametrize("variant", ["random", "matheron"])
def test_regularizer_is_weighted(variant):
    fields = VARIANTS[variant]
    value = make(kl_weight=0.5, **fields)(Train()).regularizer
    law = make(kl_weight=0.5, **fields)
    torch.testing.assert_close(value, 0.5 * law.kl() / 100, rtol=1e-12, atol=0)
    law.set_progress(0, 30)  # a third of 30 steps warms up: 1/10, 2/10, ... 1
    torch.testing.assert_close(law(Train()).regularizer, value / 10, rtol=1e-6, atol=0)
    law.set_progress(4, 30)
    torch.testing.assert_close(law(Train()).regularizer, value / 2, rtol=1e-6, atol=0)
    law.set_progress(9, 30)
    torch.testing.assert_close(law(Train()).regularizer, value, rtol=1e-12, atol=0)
    assert law(Mean()).regularizer is None
    assert law(Sample(2)).regularizer is None


def test_conditional_kl_has_its_own_weight():
    fields = VARIANTS["matheron"]
    zero, both = (make(kl_conditional_weight=w, **fields)(Train()).regularizer for w in (0.0, 1.0))
    law = make(**fields)
    torch.testing.assert_close((both - zero) * 100, law._conditional_kl(), rtol=1e-10, atol=0)


def test_unknown_number_of_training_items_warns_once_and_falls_back():
    law = BayesianLaw(BayesianLoraConfig(r=2, target_modules=["q"]), table())
    with pytest.warns(UserWarning, match="num_train_examples"):
        first = law(Train()).regularizer
    torch.testing.assert_close(first, law.kl() / 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law(Train())
    law.set_num_train_examples(50)
    torch.testing.assert_close(law(Train()).regularizer, law.kl() / 50)
    assert law.config.num_train_examples is None  # the configuration may belong to several models
    told = make()
    told.set_num_train_examples(70)  # what the configuration says stays
    assert told.num_train_examples == 100


@pytest.mark.parametrize("posterior", ["diagonal", "full", "matrix_normal"])
def test_a_learned_prior_mean_charges_for_the_spread_only(posterior):
    law = make(posterior=posterior)
    law.kl().backward()
    assert all(stack.mean.grad is None or not stack.mean.grad.any() for stack in law.cores.values())
    assert all(p.grad is not None and p.grad.any() for p in law.spread_parameters())
    # of all prior means it is the one of largest evidence, i.e. least divergence
    assert law.kl() < make(posterior=posterior, prior_mean="initial").kl()
    assert not any("prior_mean" in name for name in law.state_dict())


def test_a_learned_prior_mean_with_a_flow():
    """The divergence is that from N(m, 1), m the mean of the flow's base; at an identity flow the closed form's."""
    plain, flow = make(init="random", moved=False), make(init="random", moved=False, flow="maf")
    assert plain.config.prior_mean == flow.config.prior_mean == "learned"
    with torch.no_grad():
        for law in (plain, flow):
            for stack in law.cores.values():
                stack.mean += 3.0 / stack.unit
    estimates = torch.stack([flow(Train()).regularizer.detach() for _ in range(400)]) * 100
    error = estimates.std() / len(estimates) ** 0.5
    assert (estimates.mean() - plain.kl().detach()).abs() < 4 * error


@pytest.mark.parametrize("prior_mean", ["learned", "initial"])
def test_nothing_pulls_an_untrained_posterior_but_its_spread(prior_mean):
    """The divergence at the start is that of the standard deviations alone."""
    law = make(moved=False, prior_mean=prior_mean)
    sd = torch.tensor(0.3, dtype=torch.float64)
    count = sum(stack.mean.numel() for stack in law.cores.values())
    torch.testing.assert_close(law.kl(), count * (0.5 * (sd**2 - 1) - sd.log()), rtol=1e-6, atol=0)
    assert make(moved=False, prior_mean="zero").kl() > law.kl() + 1


# ----------------------------------------------------------------- scales


def test_scales_start_where_they_should_and_never_freeze():
    for start, upper in ((0.05, 1.0), (1e-3, 0.1), (0.5, 0.51)):
        scale = BoundedScale((3,), start, upper, 30.0)
        torch.testing.assert_close(scale(torch.float64), torch.full((3,), start, dtype=torch.float64))
        with torch.no_grad():
            scale.offset.copy_(torch.tensor([-0.3, 0.0, 0.3]))  # 9 logits up and down
        value = scale(torch.float32)
        assert ((value > 0) & (value < upper)).all()
        value.sum().backward()
        assert (scale.offset.grad > 0).all()


def test_scales_move_in_bfloat16():
    scale = BoundedScale((1000,), 0.05, 1.0, 30.0).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(scale.parameters(), lr=2e-4, weight_decay=0.0)
    before = scale(torch.float32).detach()
    for _ in range(30):
        optimizer.zero_grad()
        (-scale(torch.float32).log()).sum().backward()
        optimizer.step()
    after = scale(torch.float32).detach()
    torch.testing.assert_close((after / before).log().mean(), torch.tensor(30 * 2e-4 * 30.0), rtol=0.05, atol=0)
    assert (after > before).all()


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_optimiser_step_moves_a_factor_as_it_moves_in_lora(side):
    """A step of size lr in all entries of a core moves B by 2 lr sqrt(m n) in norm, and A by lr sqrt(R C)."""
    law, lr = make(moved=False), 1e-3
    before = law(Mean()).per_slot(law.slots)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, places in law.layout.cores.items():
            chosen = torch.cat([torch.full((len(law.layout.members[g]), 1, 1), float(s == side)) for g, s in places])
            mean = law.cores[key].mean
            mean += lr * chosen * torch.randn(mean.shape, generator=generator).sign()
    for pair, start in zip(law(Mean()).per_slot(law.slots), before, strict=True):
        moved, other = [(a - b).norm().item() for a, b in zip(pair, start, strict=True)][:: 1 if side == "A" else -1]
        assert other == 0
        expected = 2 if side == "A" else CORE_STEP_B * pair[1].numel() ** 0.5  # r = 2 makes R C = 4
        assert moved == pytest.approx(lr * expected, rel=0.05)


# ----------------------------------------------------------------- caching and cost


@pytest.mark.parametrize("variant", VARIANTS)
def test_operations_do_not_grow_with_depth(variant):
    counts = []
    for layers in (6, 24):
        law = make(table(layers), **VARIANTS[variant])
        with Operations() as count:
            factors = law(Train())
            loss = factors.regularizer + sum(t.square().sum() for pair in factors.groups.values() for t in pair)
            loss.backward()
        counts.append(len(count.names))
    assert counts[0] == counts[1]


def test_bases_are_whitened_once_for_many_draws_and_again_after_a_step():
    law = make(init="random")

    def factorisations(draw) -> int:
        with torch.no_grad(), Operations() as count:
            law(draw)
        return sum("cholesky_ex" in name for name in count.names)

    stacks = len(law.bases)
    assert factorisations(Sample(2)) == stacks
    assert factorisations(Sample(2, first=2)) == 0
    assert factorisations(Mean()) == 0
    for fused in (False, True):
        optimizer = torch.optim.Adam(law.parameters(), fused=fused)
        law(Train()).regularizer.backward()
        optimizer.step()
        assert factorisations(Sample(2)) == stacks
    for parameter in law.parameters():
        parameter.data.mul_(1.1)  # leaves no trace, but other numbers
    assert factorisations(Mean()) == stacks
    assert factorisations(Mean()) == 0


# ----------------------------------------------------------------- bad input


def test_sizes_below_the_rank_warn_with_the_rank_they_imply():
    with pytest.warns(UserWarning, match="to rank 1, below r = 2"):
        law = make(inducing_rows=1)
    for delta in deltas(law, Sample(2)):
        assert (torch.linalg.matrix_rank(delta) == 1).all()


def test_fewer_than_one_draw_is_refused():
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        make()(Sample(0))


def test_a_kernel_that_is_not_finite_names_its_slot():
    law = make()
    with torch.no_grad():
        law.bases["2x6"].Z[0] = torch.nan
    with pytest.raises(ValueError, match=r"kernel of factor A of layers\.0\.q could not be factorised"):
        law(Mean())


def test_no_slot_with_a_posterior_is_refused():
    for fields in ({"bayesian_modules": ["nothing"]}, {"bayesian_layers": [7]}):
        with pytest.raises(ValueError, match="no target module with a posterior"):
            make(**fields)


def test_choice_of_layers_and_modules():
    assert chosen(bayesian_layers=[-1]) == {"layers.3.q", "layers.3.v", "layers.3.up"}
    assert chosen(bayesian_layers=[0], bayesian_modules=["v"]) == {"layers.0.v"}
    assert chosen(bayesian_modules=r".*\.[02]\.q") == {"layers.0.q", "layers.2.q"}


def chosen(**fields) -> set[str]:
    law = make(table(4), **fields)
    return {law.slots[i].name for indices in law.layout.members.values() for i in indices}


def test_shared_cores_need_square_sizes():
    with pytest.raises(ValueError, match="inducing_rows = inducing_cols = r"):
        make(init="random", share_inducing=True, inducing_rows=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_sd": 0.0}, "init_sd must be a positive number"),
        ({"init_sd": -1.0}, "init_sd must be a positive number"),
        ({"init_lambda": float("nan")}, "init_lambda is nan, but must be a finite number"),
        ({"max_lambda": 0}, "max_lambda must be a positive number"),
        ({"init_d": 0.0}, "init_d must be a positive number"),
        ({"prior_std": -0.1}, "prior_std must be 'auto' or a positive number"),
        ({"prior_std": "wide"}, "prior_std must be 'auto' or a positive number"),
        ({"init_sd": 1.0}, r"init_sd \(1.0\) must be below max_sd"),
        ({"posterior": "laplace"}, "posterior must be one of"),
        ({"inducing_rows": 0}, "inducing_rows must be a positive integer"),
        ({"num_train_examples": 0}, "num_train_examples must be a positive integer"),
        ({"num_train_examples": 10.5}, "num_train_examples is 10.5, but must be a whole number"),
        ({"kl_weight": -1.0}, "kl_weight must not be negative"),
        ({"kl_warmup": 2}, "kl_warmup is a part"),
        ({"share_inducing": True}, "Set init='random'"),
        ({"init_from": "folder", "init": "random"}, "needs init='lora'"),
        ({"flow_depth": 0}, "flow_depth must be a positive integer"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BayesianLoraConfig(target_modules=["q"], **fields)
