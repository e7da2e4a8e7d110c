"""Equal bits give equal answers, wherever the bits were put by whoever loaded them."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, logits, perturb
from methods import METHODS
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from peft_calib.tuners.memory import ALIGNMENT, is_astray

BERT = FAMILIES["bert"]


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def build(method):
    return perturb(method.adapt(BERT, init_weights=False, task_type="SEQ_CLS"), scale=0.2)


def astray_copy(tensor: torch.Tensor, offset: int = 8) -> torch.Tensor:
    """The same numbers `offset` bytes behind an aligned address."""
    size = tensor.element_size()
    memory = torch.empty(tensor.numel() + ALIGNMENT // size, dtype=tensor.dtype)
    start = (offset - memory.data_ptr()) % ALIGNMENT // size
    place = memory[start : start + tensor.numel()].view(tensor.shape)
    assert place.data_ptr() % ALIGNMENT == offset
    return place.copy_(tensor)


def transposed_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in another order of memory."""
    return tensor.clone().mT.contiguous().mT if tensor.dim() > 1 else astray_copy(tensor)


def put(model: nn.Module, law: nn.Module, how) -> None:
    """Lay every tensor of a law somewhere else, without a word to anybody."""
    for tensor in (*law.parameters(), *law.buffers()):
        tensor.data = how(tensor.detach())


def own_memory(law: nn.Module) -> bool:
    return not any(is_astray(tensor) for tensor in (*law.parameters(), *law.buffers()))


def test_what_is_astray():
    x = torch.zeros(64)
    assert not is_astray(x)
    assert is_astray(x[2:])
    assert not is_astray(x[16:])
    assert is_astray(torch.zeros(4, 4).t())
    assert is_astray(torch.zeros(4, 4)[:, :2])
    assert not is_astray(torch.zeros(3, device="meta"))
    assert not is_astray(torch.zeros(0))
    assert torch.vmap(lambda row: row + float(is_astray(row)))(torch.zeros(3, 2)).sum() == 0


@pytest.mark.parametrize("how", [astray_copy, transposed_copy], ids=["unaligned", "transposed"])
@pytest.mark.parametrize("trainable", [True, False])
def test_tensors_laid_elsewhere_give_equal_logits_and_gradients(method, how, trainable):
    model, moved = build(method), build(method)
    law = method.law(moved)
    for each in (model, moved):
        method.law(each).requires_grad_(trainable)
    put(moved, law, how)
    assert torch.equal(logits(moved, BERT.batch()), logits(model, BERT.batch()))
    if not trainable:
        assert own_memory(law)  # nobody else writes to it, so it was moved for good
        return
    for each in (model, moved):
        each.train()(**BERT.batch()).logits.square().mean().backward()
    for ours, theirs in zip(law.parameters(), method.law(model).parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_an_optimizer_that_writes_through_a_larger_buffer_still_reaches_the_law(method):
    """DeepSpeed and ZeroRedundancyOptimizer lay all parameters into one buffer and update that."""
    model = build(method)
    law = method.law(model)
    flat = torch.zeros(2 + sum(p.numel() for p in law.parameters()))
    start = 2
    for parameter in law.parameters():
        place = flat[start : start + parameter.numel()].view(parameter.shape)
        parameter.data = place.copy_(parameter.detach())
        start += parameter.numel()
    model.train()(**BERT.batch()).logits.square().mean().backward()
    before = logits(model, BERT.batch())
    flat.add_(0.1)
    model.base_model.invalidate_factors()
    assert not torch.equal(logits(model, BERT.batch()), before)
    assert all(p.data_ptr() - flat.data_ptr() < flat.nbytes for p in law.parameters())


def test_a_changed_tensor_that_is_astray_is_noticed(method):
    model = build(method)
    put(model, method.law(model), astray_copy)
    before = logits(model, BERT.batch())
    perturb(model, seed=7, scale=0.5)
    assert not torch.equal(logits(model, BERT.batch()), before)


@pytest.mark.parametrize("mapped", [False, True])
def test_assigned_tensors_are_copied(method, tmp_path, mapped):
    model, other = build(method), method.adapt(BERT, init_weights=False, task_type="SEQ_CLS")
    law, expected = method.law(other), logits(model, BERT.batch())
    state = method.law(model).state_dict()
    if mapped:
        file = tmp_path / "law.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
        with safe_open(file, framework="pt") as handle:
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (a handle, not a dict)
    state = {name: astray_copy(tensor) for name, tensor in state.items()}
    law.load_state_dict(state, assign=True)
    heads = {k: v for k, v in model.state_dict().items() if "modules_to_save" in k}
    other.load_state_dict(heads, strict=False)
    assert own_memory(law)
    for tensor in state.values():
        tensor.zero_()  # the law does not live in the memory it was loaded from
    for name, tensor in method.law(model).state_dict().items():
        assert torch.equal(law.state_dict()[name], tensor)
    assert torch.equal(logits(other, BERT.batch()), expected)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_by_peft(method, tmp_path, low_cpu_mem_usage, trainable):
    model = build(method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        BERT.build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=trainable
    )
    assert own_memory(method.law(again))
    heads = [p for name, p in again.named_parameters() if "modules_to_save" in name]
    assert heads or any(name.startswith("heads.") for name, _ in method.law(again).named_parameters())
    assert not any(is_astray(head) for head in heads)
    assert torch.equal(logits(again, BERT.batch()), logits(model, BERT.batch()))


@pytest.mark.parametrize("trainable", [False, True])
def test_loaded_by_transformers(method, tmp_path, trainable):
    model = BERT.build()
    model.add_adapter(method.config(target_modules=list(BERT.targets), init_weights=False), "mine")
    expected = logits(perturb(model, scale=0.2), BERT.batch())
    model.save_pretrained(tmp_path)
    again = BERT.build()
    again.load_adapter(str(tmp_path), adapter_name="other", is_trainable=trainable)
    assert torch.equal(logits(again, BERT.batch()), expected)
    assert trainable or own_memory(method.tuner.get_holder(again).laws["other"])


def test_copies_of_a_law_that_is_astray(method):
    model = build(method)
    expected = logits(model, BERT.batch())
    put(model, method.law(model), astray_copy)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, BERT.batch()), expected)


def test_a_law_built_of_views_is_laid_out_like_one_that_was_loaded(method):
    model = build(method)
    assert own_memory(method.law(model))


@pytest.mark.parametrize("method", ["hyper", "bayesian", "curve", "gauss", "hyper-random"], indirect=True)
def test_materialised_from_the_meta_device(method):
    model = build(method)
    expected = logits(model, BERT.batch())
    other = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    for tensor in (*other.buffers(), *other.parameters()):
        tensor.data.fill_(1)  # whatever was there
    for name, tensor in model.named_buffers():
        if name not in model.state_dict() and method.tuner.holder_name not in name:
            other.get_buffer(name).copy_(tensor)  # the base model's own tables
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, BERT.batch()), expected)
