"""Training a curve: which points, the perturbation of the weights, the diversity term, checkpointing, the Trainer."""

import math
import warnings

import pytest
import torch
from curve_models import BERT, adapt, anchored, save_loras
from datasets import Dataset
from families import FAMILIES, logits, perturb
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_calib import CurveLoraConfig, curve_at, regularization_loss
from peft_calib.trainer_callbacks import RegularizerScheduleCallback
from peft_calib.tuners.curve_lora.diversity import diversity_term, jensen_shannon
from peft_calib.tuners.curve_lora.weight_noise import BaseNorms, WeightNoise, scheduled_rho

LABELS = {"labels": torch.tensor([0, 2])}


def law_of(model):
    return model.base_model.get_law()


def gradients(model, batch):
    model.zero_grad()
    model.train()(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ----------------------------------------------------------------- points


def test_each_forward_takes_a_fresh_point_and_leaves_the_global_state_alone(bert):
    model, batch = adapt(), bert.batch()
    state = torch.get_rng_state()
    seen = []
    for _ in range(20):
        expected = model.train()(**batch).logits.detach()
        t = law_of(model).last_t
        seen.append(float(t))
        with curve_at(model, float(t)):
            torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-6)
    assert len(set(seen)) == 20 and min(seen) < 0.5 and max(seen) > 1.5
    assert torch.equal(torch.get_rng_state(), state)
    again = adapt()
    again.train()(**batch)
    assert float(law_of(again).last_t) == seen[0]
    other = adapt(sample_seed=1)
    other.train()(**batch)
    assert float(law_of(other).last_t) != seen[0]


def test_the_number_of_forwards_is_saved_so_that_points_continue(bert, tmp_path):
    model, batch = adapt(), bert.batch()
    for _ in range(3):
        model.train()(**batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert.build(), tmp_path, is_trainable=True)
    model.train()(**batch)
    again.train()(**batch)
    assert torch.equal(law_of(again).last_t, law_of(model).last_t)


def test_stratified_points_follow_the_accumulation_steps(bert):
    model, batch = adapt(t_sampling="stratified"), bert.batch()
    law_of(model).set_progress(0, 10, accumulation_steps=4)
    for _ in range(3):
        points = []
        for _ in range(4):
            model.train()(**batch)
            points.append(float(law_of(model).last_t))
        gaps = torch.tensor(points).sort().values.diff()
        torch.testing.assert_close(gaps, torch.full((3,), 0.5), atol=1e-6, rtol=0)


def test_arc_length_points_are_where_the_length_is(bert):
    """A curve that hardly moves in its first segment is sampled in its second."""
    model, batch = adapt(moved=False, num_handles=0, t_sampling="arc_length"), bert.batch()
    with torch.no_grad():
        for parameters in (law_of(model).control_A, law_of(model).control_B):
            for stack in parameters.values():
                stack[1].copy_(stack[0])
                stack[2].copy_(stack[0] + 1.0)
    points = []
    for _ in range(30):
        model.train()(**batch)
        points.append(float(law_of(model).last_t))
    assert min(points) >= 1.0 - 1e-9 and min(points) < 1.2 and max(points) > 1.8


def test_loss_gradient_along_the_curve_is_the_chain_rule(bert):
    """dl/dt by autograd equals <grad_W l, dW/dt>, and the loss changes by no more than the path allows."""
    model = perturb(get_peft_model(bert.build().double(), CurveLoraConfig(r=4, target_modules=["query", "dense"])))
    model, batch = model.eval(), {**bert.batch(), **LABELS}
    law, layers = law_of(model), dict(model.base_model.model.named_modules())

    def loss_at(t):
        with curve_at(model, t):
            return model(**batch).loss

    def slope(t):
        """<grad_W l, dW/dt> from the gradients of merged weights and the analytic velocity."""
        point = torch.tensor([t], dtype=torch.float64)
        A_t, B_t = {}, {}
        with torch.no_grad():
            for group, (A, B) in law.control_points().items():
                c = law.shape.coefficients(point)
                A_t[group], B_t[group] = (torch.tensordot(c, stack.double(), 1)[0] for stack in (A, B))
        velocity = law.velocity(point)
        weights = [layers[slot.name].base_layer.weight for slot in law.slots]
        with curve_at(model, t):
            for weight in weights:
                weight.requires_grad_(True)
            grads = torch.autograd.grad(model(**batch).loss, weights)
        total, norms = 0.0, [0.0, 0.0]
        for group, indices in law.slots.groups.items():
            for place, index in enumerate(indices):
                dA, dB = (part[0, place] for part in velocity[group])
                change = law.slots[index].scaling * (dB @ A_t[group][place] + B_t[group][place] @ dA)
                total += float((grads[index] * change).sum())
                norms[0] += float(grads[index].square().sum())
                norms[1] += float(change.square().sum())
        return total, math.sqrt(norms[0] * norms[1])

    for value in (0.2, 0.8, 1.3):
        t = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (derivative,) = torch.autograd.grad(loss_at(t), t)
        assert float(derivative) == pytest.approx(slope(value)[0], rel=1e-6, abs=1e-10)
    start, end = 1.1, 1.7
    grid = torch.linspace(start, end, 25, dtype=torch.float64)
    bounds = torch.tensor([slope(float(t))[1] for t in grid], dtype=torch.float64)
    change = abs(float(loss_at(end)) - float(loss_at(start)))
    assert change <= 1.01 * float(torch.trapezoid(bounds, grid))


def test_probabilities_move_continuously(bert):
    model, batch = adapt(), bert.batch(4)

    def largest_step(count):
        with curve_at(model, torch.linspace(0, 2, count, dtype=torch.float64).tolist()):
            p = logits(model, batch).softmax(-1).view(count, 4, -1)
        return float((p[1:] - p[:-1]).abs().sum(-1).amax() / 2)

    assert largest_step(161) == pytest.approx(largest_step(81) / 2, rel=0.2)


def test_anchors_train_no_more_than_their_own_coefficients(bert):
    """At a point, the gradient of a control point is its coefficient times that of the factor."""
    model, batch = adapt(num_handles=1), {**bert.batch(), **LABELS}
    with curve_at(model, 0.25):
        model.train()(**batch).loss.backward()
    law = law_of(model)
    c = law.shape.coefficients(torch.tensor([0.25], dtype=torch.float64))[0].float()
    for stack in law.control_A.values():
        reference = stack.grad[1] / c[1]
        for k in range(law.shape.num_control_points):
            torch.testing.assert_close(stack.grad[k], c[k] * reference, rtol=1e-4, atol=1e-8)


# ----------------------------------------------------------------- perturbation


class _Watch:
    """Stands in for a perturbation and keeps what a layer would add."""

    def __init__(self, inner):
        self.inner, self.added = inner, []

    def __call__(self, layer, adapter, x, A, B):
        self.added.append((layer, x.detach(), A.detach(), B.detach(), self.inner(layer, adapter, x, A, B)))
        return self.added[-1][-1]


@pytest.mark.parametrize("kind", ["dense", "local"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_perturbation_has_the_stated_size(kind, name):
    """Row i of the weight is perturbed by `rho ||W'_i|| / sqrt(d_in)`, W' including the update; by simulation."""
    family, rho = FAMILIES[name], 0.25
    model = adapt(family)
    layer = next(m for m in model.modules() if type(m).__name__ == "FactorLinear")
    A, B = layer.factors("default")
    x = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(0))
    norms, values = BaseNorms(), []
    for step in range(4000):
        noise = WeightNoise(torch.tensor(rho), torch.tensor([3, step]), kind, norms)
        values.append(noise(layer, "default", x, A, B)[0])
    stored = layer.get_base_weight()
    weight = (stored.T if layer.fan_in_fan_out else stored) + layer.scaling["default"] * B @ A
    expected = rho * weight.norm(dim=1) / layer.in_features**0.5 * x.norm()
    ratio = torch.stack(values).std(0) / expected
    assert float(ratio.mean()) == pytest.approx(1.0, rel=0.01) and float((ratio - 1).abs().max()) < 0.06
    assert torch.stack(values).mean(0).abs().max() < 5 * float(expected.max()) / 4000**0.5


def test_dense_noise_is_one_matrix_for_all_rows_and_its_gradient_too(bert):
    model = adapt()
    layer = next(m for m in model.modules() if type(m).__name__ == "FactorLinear")
    A, B = layer.factors("default")
    noise = WeightNoise(torch.tensor(0.25), torch.tensor([3, 1]), "dense", BaseNorms())
    eye = torch.eye(layer.in_features)
    matrix = noise(layer, "default", eye, A, B).T  # the perturbation itself, row by row
    x = torch.randn(5, 3, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = noise(layer, "default", x, A, B)
    torch.testing.assert_close(y, x @ matrix.T, rtol=1e-5, atol=1e-6)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(gradient, weights @ matrix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "local"])
def test_both_points_share_the_normal_numbers(bert, kind):
    model = adapt()
    layer = next(m for m in model.modules() if type(m).__name__ == "FactorLinear")
    A, B = layer.factors("default")
    A2, B2 = torch.stack([A, A]), torch.stack([B, 3 * B])
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    noise = WeightNoise(torch.tensor(0.25), torch.tensor([3, 1]), kind, BaseNorms())
    both = noise(layer, "default", x.repeat(2, 1), A2, B2)
    first, second = noise.scale(layer, 0, A2, B2, layer.scaling["default"])
    torch.testing.assert_close(both[2:], both[:2] * (second / first), rtol=1e-4, atol=1e-6)


def test_the_schedule_of_the_perturbation():
    cycles = [scheduled_rho("cycles", step / 1000, 50) for step in range(1000)]
    assert sum(cycles) / 1000 == pytest.approx(1.0, abs=1e-9) and max(cycles) == pytest.approx(2.0, abs=1e-9)
    assert min(cycles) == pytest.approx(0.0, abs=1e-12)
    rise = [scheduled_rho("flat_lora", step / 100, 50) for step in range(101)]
    assert rise == sorted(rise) and (rise[0], rise[-1]) == (0.0, 1.0)
    assert scheduled_rho("constant", 0.3, 50) == 1.0


@pytest.mark.parametrize("kind", ["dense", "local"])
def test_perturbation_acts_in_training_only_and_never_repeats(bert, kind):
    quiet, noisy, batch = adapt(), adapt(flat_rho=0.25, flat_noise=kind), bert.batch()
    with torch.no_grad():
        assert torch.equal(logits(quiet, batch), logits(noisy, batch))
    first = noisy.train()(**batch).logits
    assert (first - quiet.train()(**batch).logits).abs().max() > 1e-3
    law_of(noisy).num_generations.zero_()
    law_of(noisy)._count = 0
    assert torch.equal(noisy.train()(**batch).logits, first)  # keyed
    law_of(noisy).set_progress(0, 100)  # the cycle starts at zero
    law_of(quiet).num_generations.fill_(int(law_of(noisy).num_generations))
    law_of(quiet)._count = None
    torch.testing.assert_close(noisy.train()(**batch).logits, quiet.train()(**batch).logits)


def test_local_noise_works_on_a_quantised_base():
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")).to("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CurveLoraConfig(r=4, target_modules=["0"], flat_rho=0.25, flat_noise="local", init_weights=False)
        model = get_peft_model(base, config)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    y = model.train()(x)
    y.sum().backward()
    assert torch.isfinite(y).all() and all(p.grad is not None for p in law_of(model).parameters())


# ----------------------------------------------------------------- diversity


def test_divergence_is_the_information_of_two_points_and_bounded():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (5 * torch.randn(2, 200, 4, generator=generator, dtype=torch.float64)).log_softmax(-1)
    divergence = jensen_shannon(log_p, log_q)
    mean = (log_p.exp() + log_q.exp()) / 2
    entropies = [torch.special.entr(p).sum(-1) for p in (mean, log_p.exp(), log_q.exp())]
    torch.testing.assert_close(divergence, entropies[0] - (entropies[1] + entropies[2]) / 2, rtol=0, atol=1e-12)
    assert (divergence >= 0).all() and (divergence <= math.log(2)).all()
    apart = torch.tensor([[[800.0, 0.0]], [[0.0, 800.0]]], dtype=torch.float64)
    assert float(diversity_term(apart, 1.0, 1.0)[1]) == pytest.approx(math.log(2))


def test_the_hinge_is_silent_above_the_margin_and_takes_the_mean_first():
    z = torch.zeros(2, 2, 3, dtype=torch.float64)
    z[0, 0, 0] = z[1, 0, 1] = 9.0  # one row disagrees a lot, the other not at all
    z.requires_grad_(True)
    term, divergence = diversity_term(z, 0.05, 2.0)
    assert float(divergence) > 0.05 and float(term) == 0.0
    assert not torch.autograd.grad(term, z)[0].any()
    term, divergence = diversity_term(z, 0.5, 2.0)
    assert float(term) == pytest.approx(2 * (0.5 - float(divergence)))
    masked = torch.tensor([[[0.0, -math.inf, 1.0]], [[1.0, -math.inf, 0.0]]])
    assert torch.isfinite(diversity_term(masked, 0.5, 1.0)[0])


def test_loss_of_a_two_point_forward(bert):
    """(CE(t1) + CE(t2)) / 2 + lambda max(margin - JSD, 0), formed here by hand from single forwards."""
    model, batch = adapt(jsd_weight=0.7, jsd_margin=0.3), {**bert.batch(4), "labels": torch.tensor([0, 2, 1, 1])}
    out = model.train()(**batch)
    t = law_of(model).last_t.tolist()
    assert abs(t[0] - t[1]) == pytest.approx(1.0)
    with torch.no_grad():
        single = []
        for point in t:
            with curve_at(model, point):
                single.append(logits(model, batch))
    assert out.logits.shape == (4, 3)
    torch.testing.assert_close(out.logits.detach(), single[0], rtol=0, atol=1e-5)
    task = torch.stack([nn.functional.cross_entropy(z, batch["labels"]) for z in single]).mean()
    log_p = [z.log_softmax(-1) for z in single]
    expected = task + 0.7 * (0.3 - jensen_shannon(*log_p).mean())
    assert float(out.loss) == pytest.approx(float(expected), abs=1e-5)
    law = law_of(model)
    assert float(law.last_jsd) == pytest.approx(float(jensen_shannon(*log_p).mean()), abs=1e-6)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in law.parameters())
    assert float(model.eval()(**batch).loss) == pytest.approx(float(at_middle(model, batch)))


def test_diversity_of_a_language_model(llama_batch):
    family, batch = llama_batch
    tokens = [5, 9, 11]
    model = adapt(family, jsd_weight=1.0, jsd_margin=0.2, jsd_label_tokens=tokens, task_type="CAUSAL_LM")
    out = model.train()(**batch)
    t = law_of(model).last_t.tolist()
    at = []
    for point in t:
        with curve_at(model, point), torch.no_grad():
            at.append(model.eval()(**batch))
    chosen = batch["labels"][:, 1:] != -100
    log_p = [o.logits[:, :-1][chosen][:, tokens].log_softmax(-1) for o in at]
    divergence = jensen_shannon(*log_p).mean()
    task = torch.stack([o.loss for o in at]).mean()
    assert float(out.loss) == pytest.approx(float(task + 0.2 - divergence), abs=1e-5)
    with_items = model.train()(**batch, num_items_in_batch=torch.tensor(2 * int(chosen.sum())))
    assert float(with_items.loss) == pytest.approx(float(out.loss) / 2, rel=0.1)  # half of the step's items


@pytest.fixture
def llama_batch():
    family = FAMILIES["llama"]
    batch = family.batch()
    labels = batch["input_ids"].clone()
    labels[:, :3] = -100
    labels[1, 4] = -100
    return family, {**batch, "labels": labels}


def test_diversity_needs_classes(bert):
    batch = bert.batch()
    encoder = get_peft_model(bert.build().bert, CurveLoraConfig(r=4, target_modules=["query"], jsd_weight=1.0))
    with pytest.raises(ValueError, match="no logits"):
        encoder.train()(**batch)
    regressor = bert.build(num_labels=1, problem_type="regression")
    model = get_peft_model(regressor, CurveLoraConfig(r=4, target_modules=["query"], jsd_weight=1.0))
    with pytest.raises(ValueError, match="regression"):
        model.train()(**batch, labels=torch.tensor([0.1, 0.2]))


def test_a_loss_of_ones_own_gets_the_term_beside_the_first_points_logits(bert):
    model, batch = adapt(jsd_weight=0.7, jsd_margin=0.3), bert.batch(4)
    out = model.train()(**batch)
    assert out.loss is None and out.logits.shape == (4, 3)
    term = regularization_loss(model)
    assert float(term) == pytest.approx(0.7 * (0.3 - float(law_of(model).last_jsd)))
    assert regularization_loss(model) is None


def at_middle(model, batch):
    with curve_at(model, 1.0), torch.no_grad():
        return model(**batch).loss


# ----------------------------------------------------------------- checkpointing, Trainer


VARIANTS = {
    "plain": {},
    "pair": {"jsd_weight": 1.0, "jsd_margin": 0.5},
    "dense": {"flat_rho": 0.2},
    "local": {"flat_rho": 0.2, "flat_noise": "local", "jsd_weight": 1.0, "jsd_margin": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(variant, reentrant):
    family = FAMILIES["llama"]
    batch = {**family.batch(), "labels": family.batch()["input_ids"]}
    plain, checkpointed = adapt(family, **VARIANTS[variant]), adapt(family, **VARIANTS[variant])
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    expected, found = gradients(plain, batch), gradients(checkpointed, batch)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_into_one_graph_with_fresh_points(variant):
    torch._dynamo.reset()
    eager, compiled = (
        perturb(
            get_peft_model(
                BERT.build(problem_type="single_label_classification"),
                CurveLoraConfig(r=4, target_modules=list(BERT.targets), **VARIANTS[variant]),
            )
        ).train()
        for _ in range(2)
    )
    step, batch, losses = torch.compile(compiled, backend="aot_eager", fullgraph=True), {**BERT.batch(), **LABELS}, []
    for index in range(3):
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            loss = step(**batch).loss
        loss.backward()
        expected = eager(**batch).loss
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        losses.append(float(loss))
    assert len(set(losses)) == 3
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_in_the_stock_trainer(tmp_path, variant):
    """A separable toy: the first token says the label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (96, 6), generator=generator)
    labels = torch.randint(0, 2, (96,), generator=generator)
    ids[:, 0] = 60 + labels
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    fields = {**VARIANTS[variant], "jsd_weight": VARIANTS[variant].get("jsd_weight", 0.0) * 0.05}
    config = CurveLoraConfig(task_type="SEQ_CLS", target_modules="all-linear", num_handles=1, **fields)
    model = get_peft_model(BERT.build(num_labels=2), config)
    settings = TrainingArguments(
        tmp_path, num_train_epochs=6, per_device_train_batch_size=16, learning_rate=5e-3, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[RegularizerScheduleCallback()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    for t in (0.0, 0.5, 1.0, 1.6, 2.0):
        with curve_at(model, t):
            accuracy = (logits(model, {"input_ids": ids}).argmax(-1) == labels).float().mean()
        assert accuracy > 0.9  # every point of the curve has learnt it
    assert law_of(model).rho >= 0


def test_an_anchored_curve_lowers_the_loss_between_its_anchors(tmp_path):
    """The line from an adapter to its mirror image leads through the base model, until handles learn a way round."""
    folders = save_loras(tmp_path, 1)
    tensors = load_file(tmp_path / "lora-0" / "adapter_model.safetensors")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "adapter_config.json").write_text((tmp_path / "lora-0" / "adapter_config.json").read_text())
    save_file({k: -v for k, v in tensors.items()}, tmp_path / "mirror" / "adapter_model.safetensors")
    model = anchored([*folders, str(tmp_path / "mirror")], num_handles=1)
    batch = BERT.batch(8)
    with curve_at(model, 0.0):
        target = logits(model, batch).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)

    def distance(t):
        with curve_at(model, t):
            return float((logits(model, batch) - target).square().mean())

    before = distance(0.5)
    for _ in range(150):
        optimizer.zero_grad()
        (model.train()(**batch).logits - target).square().mean().backward()
        optimizer.step()
    assert distance(0.0) == distance(1.0) == pytest.approx(0.0, abs=1e-8)
    assert distance(0.5) < 0.1 * before
