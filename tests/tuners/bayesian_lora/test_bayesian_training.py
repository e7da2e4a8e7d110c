"""Training: a conjugate problem with a known posterior, variances that learn, bayesianize, parameter groups."""

import math

import pytest
import torch
import transformers as tf
from families import FAMILIES, logits, perturb
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_calib
from peft_calib import BayesianLoraConfig
from peft_calib.tuners import Sample
from peft_calib.tuners.asked import asking
from peft_calib.tuners.bayesian_lora.stacks import BoundedScale

BERT = FAMILIES["bert"]

# ----------------------------------------------------------------- a conjugate problem

ROWS, WIDTH, NOISE, STEPS, DRAWS = 40, 4, 0.5, 500, 128


class Regression(nn.Module):
    """y = w0 x with Gaussian noise of known standard deviation; the loss is the negative log-likelihood a row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x, labels=None):
        mean = self.linear(x).squeeze(-1)
        loss = None if labels is None else ((mean - labels).square() / (2 * NOISE**2)).mean()
        return {"loss": loss, "mean": mean}


def regression_data(orthogonal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    if orthogonal:
        x = torch.linalg.qr(x)[0] * math.sqrt(ROWS)
    # much evidence for some directions, little for others
    x = x * torch.tensor([2.0, 1.0, 0.4, 0.1] if orthogonal else [0.8, 0.6, 0.4, 0.3], dtype=torch.float64)
    w = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
    return x, x @ w + NOISE * torch.randn(ROWS, generator=generator, dtype=torch.float64)


def linear_bayesian_model(posterior: str, orthogonal: bool) -> PeftModel:
    """y = s b V G_c x with b and G_c fixed: linear in the 1 x 4 core V, whose prior is standard normal."""
    config = BayesianLoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=["linear"],
        num_train_examples=ROWS,
        inducing_rows=1,
        inducing_cols=WIDTH,
        posterior=posterior,
        init="random",
        prior_mean="zero",
        prior_std=1.0,
        prior_std_scaling="none",
        max_sd=1.5,
        init_sd=0.3,
        init_d=1e-3,
        core_units="whitened",
    )
    model = get_peft_model(Regression(), config)
    law = model.base_model.get_law()
    with torch.no_grad():
        law.bases[f"{WIDTH}x{WIDTH}"].Z.copy_(torch.eye(WIDTH) if orthogonal else _well_conditioned())
    for name, parameter in law.named_parameters():
        parameter.requires_grad_(name.startswith("cores"))
    return model


def _well_conditioned() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=generator)


@pytest.mark.parametrize(("posterior", "orthogonal"), [("diagonal", True), ("full", False), ("matrix_normal", False)])
def test_trained_posterior_is_the_exact_one_where_the_family_contains_it(posterior, orthogonal):
    model, (x, y) = linear_bayesian_model(posterior, orthogonal), regression_data(orthogonal)
    law = model.base_model.get_law()
    stack = law.cores[f"1x{WIDTH}"]
    features, scale = regression_features(law, x)
    fix_core_of_b(stack)
    spread, means = law.spread_parameters(), [stack.mean]
    optimizer = torch.optim.Adam([{"params": means, "lr": 0.05}, {"params": spread, "lr": 0.003}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    holder, batch = model.base_model.get_holder(model.get_base_model()), (x.repeat(DRAWS, 1), y.repeat(DRAWS))
    for step in range(STEPS):  # the evidence lower bound from many draws a step
        optimizer.zero_grad()
        with asking(model.get_base_model(), {id(holder): Sample(DRAWS, seed=step)}):
            (model(*batch)["loss"] + law.kl() / ROWS).backward()
        fix_core_of_b(stack)
        optimizer.step()
        fix_core_of_b(stack)
        schedule.step()
    precision = torch.eye(WIDTH, dtype=torch.float64) + scale**2 * features.T @ features / NOISE**2
    exact = scale**2 * torch.einsum("ni,ij,nj->n", features, precision.inverse(), features)
    exact_mean = scale**2 * features @ precision.inverse() @ (features.T @ y) / NOISE**2
    with torch.no_grad():
        root = stack._root(torch.float64)[0]
        found = scale**2 * (features @ root).square().sum(-1)
        mean = scale * features @ stack._mean(torch.float64)[0, 0]
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
    assert (mean - exact_mean).abs().max() < 0.25 * exact.sqrt().max()
    torch.testing.assert_close(model.eval()(x)["mean"], mean, rtol=1e-6, atol=1e-8)


def regression_features(law, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Features G_c x, and the factor with which V features enters y."""
    with torch.no_grad():
        bases = law._bases()
        group = next(iter(law.layout.members))
        columns, row_a = bases[group, "A", "columns"].G[0], bases[group, "A", "rows"].G[0, 0, 0]
        b = bases[group, "B", "rows"].G[0, 0, 0] * bases[group, "B", "columns"].G[0, :, 0] @ B_CORE
    return x @ columns.T, float(row_a * b)


#: The fixed core of B, whose standard deviation is made to vanish.
B_CORE = torch.tensor([1.0, 0.5, -0.5, 0.25], dtype=torch.float64)


def fix_core_of_b(stack) -> None:
    with torch.no_grad():
        stack.mean[1, 0] = B_CORE
        if stack.family == "matrix_normal":
            stack.row_sd.offset[1] = -1e3
            stack.col_mix[1] = 0.0
        else:
            stack.sd.offset[1] = -1e3
            if stack.family == "full":
                stack.mix[1] = 0.0


# ----------------------------------------------------------------- variances learn


def separable(rows: int) -> list[dict]:
    """Sentences whose class is told by their first word."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(rows):
        ids = torch.randint(10, 64, (6,), generator=generator)
        ids[0] = 3 + i % 3
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(i % 3)})
    return found


def train(model: nn.Module, data: list[dict], folder, **arguments) -> None:
    args = tf.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    tf.Trainer(model, args, train_dataset=data).train()


def spreads(model: PeftModel) -> torch.Tensor:
    """Standard deviations of all cores in units of their initial value."""
    law = model.base_model.get_law()
    return law.core_sd() / law.config.init_sd


def test_variances_move_under_the_stock_trainer(tmp_path):
    """One parameter group, the Trainer's own AdamW: what the released code could not do."""
    config = BayesianLoraConfig(r=4, target_modules=["query", "value"], num_train_examples=200, task_type="SEQ_CLS")
    model = get_peft_model(BERT.build(), config)
    train(model, separable(200), tmp_path, max_steps=40)
    change = spreads(model).median().log().abs()
    assert change > math.log(1.2)


def test_less_evidence_leaves_wider_posteriors():
    """Regression on 6 and on 40 rows of the same data, from the same start."""
    x, y = regression_data(True)
    medians = []
    for rows in (6, ROWS):
        model = linear_bayesian_model("diagonal", True)
        law = model.base_model.get_law()
        law.num_train_examples, stack = rows, law.cores[f"1x{WIDTH}"]
        fix_core_of_b(stack)
        optimizer = torch.optim.Adam(law.spread_parameters(), lr=0.003)
        model.train()
        for _ in range(250):
            optimizer.zero_grad()
            model(x[:rows], y[:rows])["loss"].backward()
            optimizer.step()
            fix_core_of_b(stack)
        medians.append(stack.sd(torch.float64)[0].median())
    assert medians[0] > 1.2 * medians[1]


def test_less_data_leave_wider_posteriors_under_the_stock_trainer(tmp_path):
    """As many steps with the Trainer's own AdamW on 32 rows and on 800: both posteriors move, the first stays wide."""
    medians, lowest = [], []
    prior = {"prior_std": 0.5, "prior_std_scaling": "none"}  # wide enough for the data to object
    for rows in (32, 800):
        config = BayesianLoraConfig(r=4, lora_alpha=64, target_modules=["query", "value", "dense"], **prior)
        model = get_peft_model(BERT.build(), config)
        model.base_model.get_law().set_num_train_examples(rows)
        train(model, separable(rows), tmp_path, max_steps=100)
        medians.append(spreads(model).median())
        lowest.append(spreads(model).quantile(0.1))
    assert min(medians) > 1.2
    assert medians[0] > 1.1 * medians[1]
    assert lowest[0] > 1.3 * lowest[1]  # where the data speak, they speak louder


# ----------------------------------------------------------------- bayesianize


@pytest.fixture
def trained_lora(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "dense"], task_type="SEQ_CLS")
    model = get_peft_model(BERT.build(), config)
    train(model, separable(96), tmp_path, max_steps=30)
    return model.eval()


def loader(rows: int = 96, batch_size: int = 16) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(separable(rows), batch_size=batch_size)


def test_bayesianize_keeps_the_function_and_fits_the_variances(trained_lora):
    batch = BERT.batch()
    expected = logits(trained_lora, batch)
    prior = {"prior_std": 0.5, "prior_std_scaling": "none"}  # wide enough for the data to object
    model = peft_calib.bayesianize(trained_lora, loader(), num_epochs=4, **prior)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    config = model.peft_config["default"]
    assert config.peft_type.value == "BAYESIANLORA"
    assert (config.r, config.lora_alpha, config.num_train_examples) == (4, 8, 96)
    sd = spreads(model)
    assert sd.log().abs().median() > math.log(1.2)
    assert sd.max() > 1.1 * sd.min()  # not one number: the data know some directions better than others
    assert not model.training
    assert all(p.requires_grad for p in model.base_model.get_law().parameters())
    assert all(p.grad is None for p in model.parameters())


def test_bayesianize_raises_the_evidence_lower_bound(trained_lora):
    def bound(model) -> float:
        model.eval()
        model.base_model.get_law().train()
        losses = [model(**batch).loss.item() for _ in range(4) for batch in loader()]
        return sum(losses) / len(losses)

    batches = loader()
    model = peft_calib.bayesianize(trained_lora, batches, num_epochs=6)
    fitted = bound(model)
    with torch.no_grad():
        for parameter in model.base_model.get_law().spread_parameters():
            parameter.zero_()
    assert fitted < bound(model) - 0.1


def test_bayesianize_another_adapter_name_and_family(trained_lora, tmp_path):
    trained_lora.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BERT.build(), tmp_path, adapter_name="mine")
    expected = logits(again, BERT.batch())
    fields = {"posterior": "matrix_normal", "num_train_examples": 7}
    model = peft_calib.bayesianize(again, loader(), adapter_name="mine", **fields)
    torch.testing.assert_close(logits(model, BERT.batch()), expected, rtol=1e-5, atol=1e-5)
    assert model.peft_config["mine"].num_train_examples == 7


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, "DoRA scales"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "bias beside B"),
        ({"alora_invocation_tokens": [3]}, "behind its invocation"),
        ({"kasa_config": KasaConfig()}, "singular values"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_what_is_more_than_its_factors_is_not_taken_for_a_plain_lora(options, told, tmp_path):
    model = get_peft_model(BERT.build(), LoraConfig(r=4, target_modules=["query"], **options))
    with pytest.raises(TypeError, match=told):
        peft_calib.bayesianize(model, loader())
    model.save_pretrained(tmp_path)
    config = peft_calib.BayesianLoraConfig(r=4, target_modules=["query"], init_from=str(tmp_path))
    with pytest.raises(ValueError, match=f"not a plain LoRA adapter .*{told}"):
        get_peft_model(BERT.build(), config)


def test_a_lora_of_more_modules_is_not_taken_in_part(tmp_path):
    get_peft_model(BERT.build(), LoraConfig(r=4, target_modules=["query", "value"])).save_pretrained(tmp_path)
    config = peft_calib.BayesianLoraConfig(r=4, target_modules=["query"], init_from=str(tmp_path))
    with pytest.raises(ValueError, match="also adapts"):
        get_peft_model(BERT.build(), config)


def test_a_lora_converted_from_pissa_is_plain(tmp_path):
    model = get_peft_model(BERT.build(), LoraConfig(r=4, target_modules=["dense"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    perturb(model, seed=1, scale=0.1)
    lora, start = tmp_path / "lora", str(tmp_path / "start")
    model.save_pretrained(lora, path_initial_model_for_weight_conversion=start)
    config = peft_calib.BayesianLoraConfig(r=8, lora_alpha=16, target_modules=["dense"], init_from=str(lora))
    taken = get_peft_model(BERT.build(), config).eval()
    expected = logits(model.eval(), BERT.batch())
    torch.testing.assert_close(logits(taken, BERT.batch()), expected, rtol=0, atol=1e-5)
    assert (logits(BERT.build(), BERT.batch()) - expected).abs().max() > 1e-3


def test_bayesianize_refuses_what_it_cannot_do(trained_lora):
    with pytest.raises(TypeError, match="plain LoRA, got BertForSequenceClassification"):
        peft_calib.bayesianize(BERT.build(), loader())
    with pytest.raises(ValueError, match="number of training items is unknown"):
        peft_calib.bayesianize(trained_lora, iter([]))
    with pytest.raises(ValueError, match="There are no batches"):
        peft_calib.bayesianize(trained_lora, [], num_train_examples=5)
    with pytest.raises(ValueError, match="There are no batches"):
        peft_calib.bayesianize(trained_lora, loader(), num_epochs=0)
    assert isinstance(trained_lora.peft_config["default"], LoraConfig)  # nothing was taken apart


# ----------------------------------------------------------------- parameter groups


def test_variances_get_a_group_of_their_own():
    model = get_peft_model(BERT.build(), BayesianLoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    groups = peft_calib.param_groups(model, 1e-3, variance_lr=1e-2, weight_decay=0.1)
    scales = {p for m in model.modules() if isinstance(m, BoundedScale) for p in m.parameters()}
    assert set(groups[1]["params"]) == scales
    assert set(groups[0]["params"]) == {p for p in model.parameters() if p.requires_grad} - scales
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-2, 0.0)]


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_groups_in_the_stock_trainer(how, tmp_path):
    found = []
    for variance_lr in (1e-3, 1e-2):
        config = BayesianLoraConfig(r=4, target_modules=["query"], num_train_examples=48, task_type="SEQ_CLS")
        model = get_peft_model(BERT.build(), config)
        groups = peft_calib.param_groups(model, 1e-3, variance_lr=variance_lr)
        args = tf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
        )
        if how == "optimizers":
            extra = {"optimizers": (torch.optim.AdamW(groups), None)}
        else:
            extra = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "lr": 1e-3})}
        tf.Trainer(model, args, train_dataset=separable(48), **extra).train()
        found.append(spreads(model).log().abs().median())
    assert found[1] > 5 * found[0]


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        peft_calib.param_groups(nn.Linear(2, 2), 0.0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        peft_calib.param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)


def test_a_perturbed_adapter_can_be_trained_on_after_reload(tmp_path):
    config = BayesianLoraConfig(r=4, target_modules=["query"], num_train_examples=48, task_type="SEQ_CLS")
    model = perturb(get_peft_model(BERT.build(), config))
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(BERT.build(), tmp_path / "saved", is_trainable=True)
    before = logits(again, BERT.batch())
    train(again, separable(48), tmp_path, max_steps=2)
    assert not torch.allclose(logits(again, BERT.batch()), before)
    with torch.no_grad():
        drawn = again.base_model.get_law()(Sample(2))
    assert all(t.isfinite().all() for pair in drawn.groups.values() for t in pair)
