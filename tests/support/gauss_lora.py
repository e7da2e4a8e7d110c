"""A law from outside: a diagonal Gaussian over A beside a plain B, written against the public base classes only."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from peft_calib.registry import ensure_peft_type, register_tuner
from peft_calib.tuners import CalibLoraConfig, Draw, FactorModel, Factors, SlotTable
from peft_calib.tuners.counting import CountingLaw
from peft_calib.tuners.seeding import keyed_generator


@dataclass
class GaussLoraConfig(CalibLoraConfig):
    """A ~ N(mean, sd^2) entry by entry.

    Args:
        start_sd: Initial standard deviation in units of LoRA's initial A.
        num_train_examples: N.
        seed: Key of everything random.
    """

    start_sd: float = field(default=0.1, metadata={"help": "Initial standard deviation."})
    num_train_examples: int = field(default=100, metadata={"help": "Number of training items."})
    seed: int | None = field(default=None, metadata={"help": "Key of everything random."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type("GAUSSLORA")

    @property
    def given_seed(self) -> int | None:
        return self.seed


class GaussLaw(CountingLaw):
    """Means, log standard deviations (as offsets from their start) and B, stacked by shape group."""

    method = "GaussLoRA"

    def __init__(self, config: GaussLoraConfig, slots: SlotTable) -> None:
        super().__init__(slots, config.init_seed)
        self.num_train_examples, self.start_sd = config.num_train_examples, config.start_sd
        self.mean, self.log_sd, self.B = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        # a linear map inside a law must not be adapted itself by a further adapter
        self.mix = nn.utils.skip_init(nn.Linear, 1, 1, bias=False)
        nn.init.ones_(self.mix.weight)
        generator = keyed_generator(config.init_seed, 0)
        for group, indices in slots.groups.items():
            shape, bound = (len(indices), group.r, group.in_features), group.in_features**-0.5
            B = torch.zeros(len(indices), group.out_features, group.r)
            self.mean[group.key] = nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)
            self.log_sd[group.key] = nn.Parameter(torch.zeros(shape))
            noise = torch.rand(B.shape, generator=generator) * 2 - 1
            self.B[group.key] = nn.Parameter(B if config.init_weights else noise * bound)

    def _sd(self, key: str) -> torch.Tensor:
        return self.start_sd * self.mean[key].shape[-1] ** -0.5 * self.log_sd[key].exp()

    def forward(self, draw: Draw) -> Factors:
        generators: list[torch.Generator] = []
        if draw.mode == "train":
            generators = [keyed_generator(self.seed(), 1, int(self.generations()))]
            self.count_generation()
        elif draw.mode == "sample":
            generators = [keyed_generator(draw.seed, 2, draw.first + k) for k in range(draw.num_samples)]
        groups = {}
        for group in self.slots.groups:
            mean = self.mean[group.key]
            normals = [torch.randn(mean.shape, generator=g).to(mean) for g in generators]
            A = mean[None] + self._sd(group.key) * torch.stack(normals) if normals else mean[None]
            groups[group] = (A, self.mix(self.B[group.key].unsqueeze(-1)).squeeze(-1)[None])
        return Factors(groups, self.kl() / self.num_train_examples if draw.mode == "train" else None)

    def kl(self) -> torch.Tensor:
        terms = []
        for key, mean in self.mean.items():
            ratio = self._sd(key).square() * mean.shape[-1]
            terms.append(0.5 * (ratio + mean.square() * mean.shape[-1] - 1 - ratio.log()).sum())
        return torch.stack(terms).sum()

    def spread_parameters(self) -> list[nn.Parameter]:
        return list(self.log_sd.parameters())

    def scales(self) -> dict[str, torch.Tensor]:
        return {key: offset.detach().exp() for key, offset in self.log_sd.items()}


class GaussLoraModel(FactorModel):
    """The tuner."""

    prefix = "gausslora_"
    holder_name = "calib_gauss"

    def build_law(self, config: GaussLoraConfig, slots: SlotTable) -> GaussLaw:
        return GaussLaw(config, slots)


register_tuner("GAUSSLORA", GaussLoraConfig, GaussLoraModel)
