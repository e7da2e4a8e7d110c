"""A short life of every law on every base: trained, saved, loaded, drawn from, exported, switched off, merged."""

import json
from pathlib import Path

import pytest
import torch
from bases import BASES, Base
from differences import DIFFERENCES
from families import perturb
from methods import METHODS
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.wavlm.modeling_wavlm import TDNNLayer

from peft_calib import draws, export_lora, predict
from peft_calib.tuners.uncalled import uncalled

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _without_the_compiler_of_scripted_functions():
    """DeBERTa's few scripted functions are compiled when they are called again: seconds, for nothing that is held."""
    with torch.jit.optimized_execution(False):
        yield


def adapted(base: Base, config_class, **fields) -> PeftModel:
    targets = base.targets if isinstance(base.targets, str) else list(base.targets)
    config = {"r": 2, "target_modules": targets, "task_type": base.task, **base.fields, **fields}
    return get_peft_model(base.build(), config_class(**config))


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def train(model: PeftModel, batch: dict, steps: int = 2) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("name", BASES)
def test_a_short_life(name, principal, tmp_path):
    base, batch = BASES[name], BASES[name].batch()
    start = logits(base.build(), batch)
    model = adapted(base, principal.config)
    assert torch.equal(logits(model, batch), start)
    train(model, batch)
    mean = logits(model, batch)
    assert not torch.allclose(mean, start, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), start)
    _is_saved_whole(model, mean, base, tmp_path / "adapter")
    if principal.law(model).varies:
        _draws_are_plain_loras(model, base, tmp_path / "draws")
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), mean, **CLOSE)


def _is_saved_whole(model: PeftModel, mean: torch.Tensor, base: Base, folder) -> None:
    """Equal bits in all that is saved; a convolution below may round by the place where its input lies."""
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base.build(), folder)
    saved, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    torch.testing.assert_close(logits(again, base.batch()), mean, rtol=1e-5, atol=1e-6)


def _draws_are_plain_loras(model: PeftModel, base: Base, folder) -> None:
    batch = base.batch()
    with draws(model, 2, seed=0), torch.no_grad():
        both = model(**batch).logits.chunk(2)
    export_lora(model, folder, num_samples=2)
    stock = PeftModel.from_pretrained(base.build(), folder / "draw-0", "draw-0")
    stock.load_adapter(folder / "draw-1", "draw-1")
    for index, drawn in enumerate(both):
        stock.set_adapter(f"draw-{index}")
        torch.testing.assert_close(logits(stock, batch), drawn, **CLOSE)
    assert not torch.allclose(*both, atol=1e-6)


# ----------------------------------------------------------------- what is different, see differences.py


@pytest.mark.parametrize("target", ["x_proj", "dt_proj", "out_proj"])
def test_a_map_that_nobody_calls_is_refused(target, principal):
    with pytest.raises(
        ValueError, match=r"reads the weights of .*exclude_modules=\['dt_proj', 'out_proj', 'x_proj'\]"
    ):
        adapted(BASES["mamba"], principal.config, target_modules=[target])
    model = adapted(BASES["mamba"], principal.config, target_modules=["in_proj", target], exclude_modules=[target])
    assert {slot.module_type.rpartition(".")[2] for slot in principal.law(model).slots} == {"in_proj"}


def test_a_map_beside_isinstance_and_dtype_of_its_weight_is_adapted(principal):
    assert adapted(BASES["t5"], principal.config, target_modules=["wo"])


class Looked(nn.Module):
    """All that is done with maps that are called, in ways that look as if they were not; and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.read = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = x.to(self.one.weight.dtype)
        for layer in (self.one, torch.relu):
            x = layer(x)
        x = checkpoint(self.two, x, use_reentrant=False) if self.two.weight.requires_grad else self.two(x)
        return nn.functional.linear(self.three(x), self.read.weight)  # not self.read(x)

    def penalty(self):
        return torch.norm(self.three.weight)


class Renamed(nn.Module):
    """Maps under names of their own in a forward: one is called, one's weight is read, one name is for two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.read = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        one, layer, inner = self.one, self.two, self.read
        x = nn.functional.linear(layer(one(x)), inner.weight)
        layer = self.three
        return layer(x)


def test_only_what_a_forward_reads_without_a_call_is_refused():
    assert uncalled(Looked) == {"read"}
    assert uncalled(Renamed) == {"read"}
    assert {"x_proj", "dt_proj", "out_proj"} < uncalled(MambaMixer)
    assert "kernel" in uncalled(TDNNLayer)  # named in isinstance, too


def test_members_train_where_rows_share_a_table(tmp_path):
    """The gradient of K members in K passes is the mean of those of each member alone, and draws are the members."""
    base, ensemble = BASES["deberta-v2"], METHODS["ensemble"]
    model = perturb(adapted(base, ensemble.config, num_members=2))
    batch, law = base.batch(), ensemble.law(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model.train()(**batch).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)  # there is no dropout: the attempt in one pass left no trace
    together = {name: parameter.grad.clone() for name, parameter in law.named_parameters()}
    for member in range(2):
        model.zero_grad()
        with draws(model, 1, first=member):
            model(**batch).loss.backward()
        for name, parameter in law.named_parameters():
            torch.testing.assert_close(parameter.grad[member] / 2, together[name][member], rtol=1e-4, atol=1e-7)
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="Switch gradient checkpointing off"):
        model.train()(**batch)


@pytest.mark.parametrize("how", ["sample", "late"])
@pytest.mark.parametrize("name", ["ensemble", "bayesian"])
def test_predictions_where_rows_share_a_table(name, how):
    model = perturb(adapted(BASES["deberta-v2"], METHODS[name].config))
    batch = {key: value for key, value in BASES["deberta-v2"].batch().items() if key != "labels"}
    expected = []
    for index in range(2):
        with torch.no_grad(), draws(model, 1, seed=4, first=index):
            expected.append(model(**batch).logits.softmax(-1))
    for _ in range(2):  # met for the first time, and known
        got = predict(model, batch, num_samples=2, seed=4, how=how).sample_probabilities
        torch.testing.assert_close(got.float(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_lora_has_the_same_trouble_where_nothing_is_said():
    """What the bases leave out, LoRA leaves out as well: a head that is trained whole is no target beside it."""
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        adapted(BASES["distilbert"], LoraConfig, target_modules="all-linear")


# ----------------------------------------------------------------- the page

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"


def test_the_page_lists_every_base_and_every_difference():
    page = PAGE.read_text()
    bases = [f"| `{base.model.__name__}` | {_targets(base)} |" for base in BASES.values()]
    differences = [f"| {d.what} | {d.lora} | {d.ours} | {d.why} |" for d in DIFFERENCES.values()]
    for marker, rows in {"bases": bases, "differences": differences}.items():
        shown = page.partition(f"<!-- {marker} -->")[2].partition(f"<!-- end of {marker} -->")[0].strip().split("\n")
        assert shown[2:] == rows, "the page should have:\n" + "\n".join(rows)


def _targets(base: Base) -> str:
    names = [base.targets] if isinstance(base.targets, str) else base.targets
    return ", ".join(f"`{name}`" for name in names)


def test_every_difference_is_shown_by_a_test():
    root = Path(__file__).parents[2]
    for difference in DIFFERENCES.values():
        file, _, function = difference.shown_by.partition("::")
        assert f"def {function}(" in (root / file).read_text(), difference.shown_by


def test_the_page_says_what_pefts_own_suites_found():
    found = json.loads((PAGE.parents[1] / "benchmarks" / "results" / "conformance.json").read_text())
    laws = {f"{name.upper()}LORA": f"{name}LoRA" for name in ("Hyper", "Bayesian", "Curve", "Ensemble")}
    known = {f"to {d.what}: {d.ours}, for {d.why}" for d in DIFFERENCES.values()}
    rows = []
    for method, law in laws.items():
        modules = found[method]["modules"].values()
        reasons = {why for module in modules for why in module["deselected"].values()}
        assert reasons <= known and all("adapter_model.bin" in why for why in reasons)
        adapted = [test for module in modules for test in module.get("adapted", {})]
        assert len(adapted) == (13 if law == "EnsembleLoRA" else 12)
        counts = [sum(module[key] for module in modules) for key in ("passed", "failed", "skipped")]
        rows.append(f"| {law} | {' | '.join(map(str, counts))} | {sum(len(m['deselected']) for m in modules)} |")
    assert "\n".join(rows) in PAGE.read_text(), "\n".join(rows)
