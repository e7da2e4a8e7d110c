"""The law of BayesianLoRA: factors of all slots from stacked bases and cores, drawn or in the mean."""

from __future__ import annotations

import torch
from torch import nn

from ..factors import Draw, Factors, Pair, Sample, ShapeGroup, SlotTable, Train, stacked
from ..generation import Contents, is_transformed, parameter_stamp
from ..lora_factors import plain_factors, read_lora_factors
from ..model import FactorModel
from ..posterior import Posterior
from ..seeding import Normals, NormalSource, keyed_generator
from ..transfer import IndexTable
from .config import BayesianLoraConfig
from .inducing import Whitened, conditional_noise, kl_conditional
from .initial import FactorStart, core_shape, core_step, start_factors
from .layout import BasisPlace, Layout, Place, assemble, assemble_core_form, middle
from .stacks import BasisStack, BoundedScale, CoreStack

_INIT, _KL = 0, 3  # purposes of a draw, first part of its key; those in between are the base class's


class BayesianLaw(Posterior):
    """A posterior over the factors: `W = sigma (G_r^T V G_c + lambda E)` for each A and B, V ~ q.

    Bases of equal shape lie in one stack, cores of equal shape in another, whatever slots and sides they belong to.
    `pairs`, the factors of a trained LoRA, are embedded as the posterior's mean.
    """

    method = "BayesianLoRA"

    def __init__(self, config: BayesianLoraConfig, slots: SlotTable, pairs: list[Pair] | None = None) -> None:
        super().__init__(config, slots)
        self.layout = Layout(config, slots)
        generator = keyed_generator(config.init_seed, _INIT)
        self._build_posterior(pairs, generator)
        self._build_plain(pairs, generator)
        self._whitened: tuple | None = None

    def _build_posterior(self, pairs: list | None, generator: torch.Generator) -> None:
        config, layout = self.config, self.layout
        starts: dict[Place, FactorStart] = {}
        for group, indices in layout.members.items():
            given = [pairs[i] for i in indices] if pairs else None
            both = start_factors(config, group, len(indices), given, generator)
            starts.update({(group, side): start for side, start in zip("AB", both, strict=True)})
        self.bases, self.cores = nn.ModuleDict(), nn.ModuleDict()
        for key, places in layout.bases.items():
            Z = [getattr(starts[group, side], role) for group, side, role in places]
            names = [f"factor {side} of {self.slots[i].name}" for g, side, _ in places for i in layout.members[g]]
            self.bases[key] = BasisStack(torch.cat(Z), config, names)
        for key, places in layout.cores.items():
            mean = torch.cat([starts[place].mean for place in places])
            step = torch.cat([core_step(config, side, starts[group, side]) for group, side in places])
            self.cores[key] = CoreStack(mean, step, config, generator)
        self.register_buffer("sigma", torch.cat([starts[place].sigma for place in layout.places]))
        if config.conditional_noise != "none" and config.learn_lambda:
            gain = config.variance_lr_multiplier
            self.noise_scale = BoundedScale(self.sigma.shape, config.init_lambda, config.max_lambda, gain)

    def _build_plain(self, pairs: list | None, generator: torch.Generator) -> None:
        self.plain_A, self.plain_B = nn.ParameterDict(), nn.ParameterDict()
        self.orders: dict[ShapeGroup, IndexTable] = {}
        for group, indices in self.layout.plain.items():
            if not indices:
                continue
            A, B = plain_factors(group, len(indices), self.config.init_weights, generator)
            if pairs:
                A, B = stacked([pairs[i] for i in indices])
            self.plain_A[group.key], self.plain_B[group.key] = nn.Parameter(A), nn.Parameter(B)
            if group in self.layout.members:
                self.orders[group] = IndexTable(torch.tensor([*self.layout.members[group], *indices]).argsort())

    def forward(self, draw: Draw) -> Factors:
        """The factors of all slots: in the mean, one draw with the regulariser for training, or K keyed draws."""
        if draw.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {draw.num_samples}.")
        bases, regularizer, normals = self._bases(), None, self.normals(draw)
        if normals is None:
            pairs = self._mean_factors(bases)
        else:
            pairs, divergence = self._drawn_factors(bases, draw, normals)
            if divergence is not None:
                regularizer = self._regularizer(divergence)
        out = self._parameter_dtype
        groups = {g: self._with_plain(g, pairs.get(g)) for g in self.slots.groups}
        return Factors({g: (A.to(out), B.to(out)) for g, (A, B) in groups.items()}, regularizer)

    @property
    def _parameter_dtype(self) -> torch.dtype:
        return next(iter(self.bases.values())).Z.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the factor mathematics: at least float32, whatever the parameters are stored in."""
        return torch.promote_types(self._parameter_dtype, torch.float32)

    def _bases(self) -> dict[BasisPlace, Whitened]:
        """Whitened bases by group, side and role; kept between calls without gradients until a parameter changes."""
        if torch.is_grad_enabled():
            self._whitened = None
            return self._whiten()
        if torch.compiler.is_compiling() or is_transformed(self.bases):
            return self._whiten()  # there is nothing that could be kept
        stamp, kept = (self.dtype, parameter_stamp(self.bases.parameters())), self._whitened
        if kept is None or kept[0] != stamp or not kept[1].hold(self.bases):
            self._whitened = kept = (stamp, Contents(self.bases), self._whiten())
        return kept[2]

    def _whiten(self) -> dict[BasisPlace, Whitened]:
        return self.layout.split_bases({key: stack(self.dtype) for key, stack in self.bases.items()})

    def _prior_std(self) -> dict[Place, torch.Tensor]:
        return self.layout.split(self.sigma.to(self.dtype))

    def _mean_factors(self, bases: dict) -> dict[ShapeGroup, Pair]:
        sigma = self._prior_std()
        if not self.config.share_inducing:
            V = self.layout.split_cores({key: stack.expectation(self.dtype) for key, stack in self.cores.items()})
            return assemble(bases, V, sigma)
        middles = {(g, "A"): middle(bases, g) for g in self.layout.members}
        products = {}
        for key, places in self.layout.cores.items():
            products[key] = self.cores[key].expected_product(torch.cat([middles[place] for place in places]))
        return assemble_core_form(bases, self.layout.split_cores(products), sigma)

    def _drawn_factors(self, bases: dict, draw: Draw, normals: Normals) -> tuple[dict, torch.Tensor | None]:
        noise = {key: self._normal(stack.shape, normals) for key, stack in self.cores.items()}
        divergence = None
        if isinstance(draw, Train):
            drawn = {key: stack.draw_with_kl(noise[key]) for key, stack in self.cores.items()}
            divergence = torch.stack([kl for _, kl in drawn.values()]).sum()
            V = self.layout.split_cores({key: core for key, (core, _) in drawn.items()})
        else:
            V = self.layout.split_cores({key: stack.draw(noise[key]) for key, stack in self.cores.items()})
        sigma = self._prior_std()
        if self.config.conditional_noise == "none":
            if isinstance(draw, Sample) and all(core_shape(self.config, g.r)[1] == g.r for g in self.layout.members):
                products = {(g, "A"): V[g, "B"] @ middle(bases, g) @ V[g, "A"] for g in self.layout.members}
                return assemble_core_form(bases, products, sigma), divergence
            return assemble(bases, V, sigma), divergence
        pairs = assemble(bases, V, None)
        return self._add_noise(pairs, bases, sigma, normals), divergence

    def _add_noise(self, pairs: dict, bases: dict, sigma: dict, normals: Normals) -> dict:
        kind, scale = self.config.conditional_noise, self.layout.split(self._noise_scale())
        noisy = {}
        for group, factors in pairs.items():
            sides = []
            for side, W in zip("AB", factors, strict=True):
                rows, columns = bases[group, side, "rows"], bases[group, side, "columns"]
                extra = (rows.G.shape[-2], columns.G.shape[-2]) if kind == "matheron" else (0, 0)
                shape = (W.shape[1], W.shape[2] + extra[0], W.shape[3] + extra[1])
                E = conditional_noise(self._normal(shape, normals), rows, columns, kind)
                sides.append(sigma[group, side] * (W + scale[group, side] * E))
            noisy[group] = tuple(sides)
        return noisy

    def _noise_scale(self) -> torch.Tensor:
        if hasattr(self, "noise_scale"):
            return self.noise_scale(self.dtype)
        return torch.full_like(self.sigma, self.config.init_lambda, dtype=self.dtype)

    def _with_plain(self, group: ShapeGroup, pair: Pair | None) -> Pair:
        if not self.layout.plain[group]:
            return pair
        plain = tuple(side[group.key].unsqueeze(0) for side in (self.plain_A, self.plain_B))
        if pair is None:
            return plain
        order = self.orders[group].on(self.sigma.device)
        both = (
            torch.cat([drawn, fixed.to(drawn.dtype).expand(drawn.shape[0], -1, -1, -1)], dim=1)
            for drawn, fixed in zip(pair, plain, strict=True)
        )
        return tuple(stack.index_select(1, order) for stack in both)

    def kl(self) -> torch.Tensor:
        """KL of the posterior from the prior in nats, with a graph; with a flow an estimate from one fixed draw."""
        normals = Normals([NormalSource(keyed_generator(self.config.given_seed or 0, _KL))])
        terms = [stack.draw_with_kl(self._normal(stack.shape, normals))[1] for stack in self.cores.values()]
        return torch.stack(terms).sum() + self._conditional_kl()

    def _conditional_kl(self) -> torch.Tensor | float:
        if self.config.conditional_noise == "none":
            return 0.0
        return kl_conditional(self._noise_scale(), self.sigma.new_tensor(self.layout.numel(), dtype=self.dtype))

    def _regularizer(self, divergence: torch.Tensor) -> torch.Tensor:
        """`kl_factor (kl_weight KL_U + kl_conditional_weight KL_W|U) / N`."""
        config, conditional = self.config, self._conditional_kl()
        weight = config.kl_weight if config.kl_conditional_weight is None else config.kl_conditional_weight
        return (config.kl_weight * divergence + weight * conditional) * self.evidence_weight()

    def _normal(self, shape: tuple[int, ...], normals: Normals) -> torch.Tensor:
        return normals.of(shape, self.dtype, self.sigma.device)

    @torch.no_grad()
    def core_sd(self) -> torch.Tensor:
        """Standard deviation of every entry of every core, in units of the prior's; before any flow."""
        return torch.cat([stack.marginal_sd(self.dtype).flatten() for stack in self.cores.values()])

    def spread_parameters(self) -> list[nn.Parameter]:
        found = [parameter for stack in self.cores.values() for parameter in stack.spread_parameters()]
        return [*found, *self.noise_scale.parameters()] if hasattr(self, "noise_scale") else found

    def scales(self) -> dict[str, torch.Tensor]:
        """Standard deviations of each stack of cores over their start, and those of the conditional noise."""
        found = {name: part.ratio() for name, part in self.named_modules() if isinstance(part, BoundedScale)}
        return {"noise" if name == "noise_scale" else name: ratio for name, ratio in found.items()}

    def invalidate(self) -> None:
        self._whitened = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_whitened": None}


class BayesianLoraModel(FactorModel):
    """Adapts a model with LoRA factors drawn from a sparse-GP posterior (arXiv 2601.21003).

    In `.eval()` the factors are the posterior's mean; in training each forward uses one draw, and the Kullback-Leibler
    divergence from the prior is part of `outputs.loss`.

    Args:
        model: The base model, changed in place.
        config: A `BayesianLoraConfig`.
        adapter_name: Name of the adapter.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 4))
        >>> type(get_peft_model(base, BayesianLoraConfig(target_modules=["0"])).base_model).__name__
        'BayesianLoraModel'
    """

    prefix = "bayesianlora_"
    holder_name = "calib_bayesian"

    def build_law(self, config: BayesianLoraConfig, slots: SlotTable) -> BayesianLaw:
        """Make the posterior; a LoRA adapter to start from is read once and saved with the adapter from then on."""
        pairs = read_lora_factors(config.init_from, slots) if config.init_from is not None else None
        return BayesianLaw(config, slots, pairs)

    def kl(self, adapter_name: str = "default"):
        """KL of an adapter's posterior from its prior, in nats (with a flow an estimate from one draw)."""
        return self.get_law(adapter_name).kl()
