"""A law from outside: a diagonal Gaussian over A beside a plain B, written against the public base classes only."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft_calib.registry import register_tuner
from peft_calib.tuners import Draw, FactorModel, Factors, Posterior, PosteriorConfig, SlotTable, plain_start


@dataclass
class GaussLoraConfig(PosteriorConfig):
    """A ~ N(mean, sd^2) entry by entry.

    Args:
        start_sd: Initial standard deviation in units of LoRA's initial A.
    """

    start_sd: float = 0.1
    peft_name: ClassVar[str] = "GAUSSLORA"


class GaussLaw(Posterior):
    """Means, log standard deviations (as offsets from their start) and B, stacked by shape group."""

    method = "GaussLoRA"

    def __init__(self, config: GaussLoraConfig, slots: SlotTable) -> None:
        super().__init__(config, slots)
        self.mean, self.log_sd, self.B = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        # a linear map inside a law must not be adapted itself by a further adapter
        self.mix = nn.utils.skip_init(nn.Linear, 1, 1, bias=False)
        nn.init.ones_(self.mix.weight)
        for group, (A, B) in plain_start(config, slots).items():
            self.mean[group.key], self.log_sd[group.key] = nn.Parameter(A), nn.Parameter(torch.zeros_like(A))
            self.B[group.key] = nn.Parameter(B)

    def _sd(self, key: str) -> torch.Tensor:
        return self.config.start_sd * self.mean[key].shape[-1] ** -0.5 * self.log_sd[key].exp()

    def forward(self, draw: Draw) -> Factors:
        normals, groups = self.normals(draw), {}
        for group in self.slots.groups:
            mean = self.mean[group.key]
            A = mean[None] if normals is None else mean + self._sd(group.key) * normals(mean)
            groups[group] = A, self.mix(self.B[group.key].unsqueeze(-1)).squeeze(-1)[None]
        return Factors(groups, self.evidence_term(draw))

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

    prefix, holder_name, law_class = "gausslora_", "calib_gauss", GaussLaw


register_tuner("GAUSSLORA", GaussLoraConfig, GaussLoraModel)
