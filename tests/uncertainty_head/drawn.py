"""Features of a linear head that is off by a known amount, with labels drawn from the truth."""

import torch
from torch import nn

from peft_calib.uncertainty_head import CopiedHead, FeatureSet

WIDTH, CLASSES = 16, 4


def drawn(count: int = 600, seed: int = 0, classes: int = CLASSES, functions: int = 1) -> FeatureSet:
    """Items whose frozen head has the true directions and as much again of wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, WIDTH, generator=generator)
    true = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.multinomial((features @ true.T).softmax(-1), 1, generator=generator)[:, 0]
    varied = features + 0.3 * torch.randn(functions, count, WIDTH, generator=generator) * (functions > 1)
    with torch.no_grad():
        logits = frozen(classes)(varied)
    return FeatureSet(varied, logits, labels)


def frozen(classes: int = CLASSES) -> nn.Linear:
    """The head that predicts."""
    true = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(99))
    off = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(98))
    head = nn.Linear(WIDTH, classes).requires_grad_(False)
    head.weight.copy_(true + 0.7 * off)
    head.bias.zero_()
    return head.eval()


def copied(classes: int = CLASSES) -> CopiedHead:
    """A copy of it."""
    head = frozen(classes)
    return CopiedHead(head, [dict(head.named_parameters())])
