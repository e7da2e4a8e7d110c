"""What a HyperLoRA does in a real model, beyond what every law does."""

import torch
from families import logits
from peft import LoraConfig, get_peft_model

from peft_calib import HyperLoraConfig


def test_first_step_moves_the_b_heads_only_and_all_move_by_the_third(bert, adapt):
    model, batch = adapt(bert).train(), bert.batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch).logits.square().mean().backward()
    grads = {n: p.grad.abs().max() for n, p in model.named_parameters() if p.requires_grad}
    assert all((g > 0) == (".heads.B_" in n and ".last." in n) for n, g in grads.items())
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_stays_bounded_under_aggressive_sgd(bert, adapt):
    model, batch = adapt(bert).train(), bert.batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    assert logits(model, batch).isfinite().all()


def test_fewer_parameters_than_the_lora_it_replaces():
    from transformers import BertConfig, BertModel

    for width in (64, 768):
        base = BertConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=4, vocab_size=30)
        sizes = []
        for config_cls in (HyperLoraConfig, LoraConfig):
            with torch.device("meta"):
                model = BertModel(base)
            config = config_cls(target_modules="all-linear", r=8)
            model = get_peft_model(model, config, low_cpu_mem_usage=True)
            sizes.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        assert sizes[0] < sizes[1]
