"""K functions where a row of a map's input is no row of the batch: what one pass gives is what each gives alone."""

import pytest
import torch
from methods import METHODS
from peft import get_peft_model
from torch import nn
from transformers import XLNetConfig, XLNetForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_calib import draws

STOCHASTIC = {"bayesian": {"init_sd": 0.3, "max_sd": 1.0}, "ensemble": {}}


class Shared(nn.Module):
    """Adapts what it reads from one table of positions, the same for all rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.table = nn.Embedding(20, 8), nn.Parameter(torch.randn(rows, 8))
        self.first, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor) -> SequenceClassifierOutput:
        positions = self.first(self.table)[: input_ids.shape[1]]
        return SequenceClassifierOutput(logits=self.out((self.words(input_ids) * positions).mean(1)))


class Routed(nn.Module):
    """Sends only those rows through a second map for which the first says so: as many as its function wants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.first, self.expert, self.out = nn.Embedding(20, 8), *(nn.Linear(8, n) for n in (8, 8, 2))

    def forward(self, input_ids: torch.Tensor) -> SequenceClassifierOutput:
        x = self.first(self.words(input_ids).mean(1))
        chosen = x[:, 0] > 0
        return SequenceClassifierOutput(logits=self.out(x.index_put((chosen,), self.expert(x[chosen]))))


def xlnet() -> XLNetForSequenceClassification:
    torch.manual_seed(0)
    return XLNetForSequenceClassification(
        XLNetConfig(vocab_size=20, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=2, initializer_range=0.5)
    )


MODELS = {
    "a table of 7": (lambda: Shared(7), ["first"]),
    "a table of 8": (lambda: Shared(8), ["first"]),
    "positions before rows": (xlnet, ["layer_1", "layer_2"]),
    "rows by what a function says": (Routed, ["first", "expert"]),
}


@pytest.mark.parametrize("method", STOCHASTIC)
@pytest.mark.parametrize("name", MODELS)
def test_all_at_once_is_each_alone(method, name):
    make, targets = MODELS[name]
    config = METHODS[method].config(target_modules=targets, init_weights=False, **STOCHASTIC[method])
    model = get_peft_model(make(), config).eval()
    random = torch.Generator().manual_seed(1)
    for rows, length in ((4, 6), (3, 5), (5, 7)):
        ids = torch.randint(1, 20, (rows, length), generator=random)
        with torch.no_grad():
            with draws(model, 2, seed=0):
                together = model(input_ids=ids).logits
            alone = []
            for k in range(2):
                with draws(model, 1, seed=0, first=k):
                    alone.append(model(input_ids=ids).logits)
        assert not torch.allclose(alone[0], alone[1], atol=1e-4)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_the_look_leaves_no_trace():
    """The first training forward of several functions draws what a later one draws, and switches nothing."""
    config = METHODS["ensemble"].config(target_modules=["first"], init_weights=False, lora_dropout=0.5)
    ids, states = torch.arange(12).view(3, 4), []
    model = get_peft_model(Shared(8), config).train()
    model.get_base_model().dropped = nn.Dropout().eval()
    for _ in range(2):
        torch.manual_seed(5)
        model(input_ids=ids)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert model.training and not model.get_base_model().dropped.training
