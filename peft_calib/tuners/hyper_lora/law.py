"""The law of HyperLoRA: generated, frozen or random A; generated B; blending with an anchor."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from ..counting import CountingLaw
from ..factors import Draw, Factors, Mean, Pair, Sample, ShapeGroup, SlotTable, Train, stacked
from ..lora_factors import read_lora_factors
from ..model import FactorModel
from ..seeding import keyed_generator, uniform
from ..transfer import IndexTable, to_device
from .config import HyperLoraConfig
from .generator import HEADS, Head, MLPTrunk, TransformerTrunk


class HyperLaw(CountingLaw):
    """Generates the factors of all slots from their embeddings.

    `z = trunk(E[slot])`, `B = head_B(z)^T`, and A per `a_mode`; then `replace`, `add` (`(1 - alpha) * generated +
    alpha * anchor`) or `multiply` per side, where anchors are a trained LoRA's factors or a fresh LoRA's. The result
    depends on no data: it is one LoRA.
    """

    method = "HyperLoRA"

    def __init__(self, config: HyperLoraConfig, slots: SlotTable, anchors: list[Pair] | None = None) -> None:
        super().__init__(slots, config.init_seed, counts=config.a_mode == "random" or config.hyper_dropout > 0)
        # a copy: the law must not change when the caller goes on using the object
        self.config = copy.copy(config)
        self.regenerate = config.regenerate
        self.cache = config.cache_eval
        # the transformer has tokens of their own for A and B, so that the authors' form can share one head
        self.sides = 2 if config.hyper_arch == "transformer" and config.a_mode == "generated" else 1
        self.shares_heads = self.sides == 2 and config.init == "authors"
        draws = torch.Generator().manual_seed(config.init_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=draws, device="cpu")))
            self._build_embeddings()
            self._build_network()
        self._build_frozen(draws, anchors)
        if not config.keeps_frozen_a:
            self.keep_seed(config.init_seed)
            self.register_load_state_dict_post_hook(_draw_frozen_again)
        self.register_buffer("alpha", torch.tensor(float(config.noise_alpha)))

    def _build_embeddings(self) -> None:
        config, slots = self.config, self.slots
        if config.embed_mode == "slot":
            self.slot_emb = nn.Embedding(len(slots) * self.sides, config.embed_dim)
            return
        layers = sorted({slot.layer for slot in slots if slot.layer is not None})
        outside = len(layers) if any(slot.layer is None for slot in slots) else None
        rows = [outside if slot.layer is None else layers.index(slot.layer) for slot in slots]
        types = sorted({slot.module_type for slot in slots})
        columns = [types.index(slot.module_type) for slot in slots]
        self.layer_emb = nn.Embedding(max(rows) + 1, config.embed_dim)
        self.type_emb = nn.Embedding(len(types) * self.sides, config.embed_dim)
        self.layer_rows = IndexTable(rows * self.sides)
        columns += [column + len(types) for column in columns] if self.sides == 2 else []
        self.type_rows = IndexTable(columns)

    def _build_network(self) -> None:
        c = self.config
        if c.hyper_arch == "mlp":
            self.trunk: nn.Module = MLPTrunk(c.embed_dim, c.hyper_hidden, c.hyper_depth)
        else:
            self.trunk = TransformerTrunk(
                c.embed_dim, c.hyper_hidden, c.hyper_depth, c.hyper_nhead, c.hyper_ffn, c.hyper_dropout
            )
        self.heads = nn.ModuleDict()
        last = len(self.slots) * (self.sides - 1)
        self.rows_a = {group: IndexTable(indices) for group, indices in self.slots.groups.items()}
        self.rows_b = {group: IndexTable(i + last for i in indices) for group, indices in self.slots.groups.items()}
        for group in self.slots.groups:
            for side in ("A", "B") if c.a_mode == "generated" else ("B",):
                name = self._head_name(side, group)
                if name not in self.heads:
                    self.heads[name] = self._make_head(side, group)

    def _head_name(self, side: str, group: ShapeGroup) -> str:
        d = group.in_features if side == "A" else group.out_features
        return f"{d}r{group.r}" if self.shares_heads else f"{side}_{group.key}"

    def _make_head(self, side: str, group: ShapeGroup) -> Head:
        c, d = self.config, group.in_features if side == "A" else group.out_features
        width = c.head_rank if c.head == "factored" else c.hyper_hidden
        gain = None if c.init == "authors" else (HEAD_GAIN_A if side == "A" else HEAD_GAIN) / width
        size = {"factored": (c.head_rank,), "chunk": (c.chunk_size,)}.get(c.head, ())
        head = HEADS[c.head](c.hyper_hidden, group.r, d, *size, gain)
        self._init_last(head, side, group.in_features)
        return head

    def _init_last(self, head: Head, side: str, d_in: int) -> None:
        c = self.config
        if c.init == "authors":
            return
        if not c.init_weights or (side == "A" and not c.a_residual):
            # LoRA's variance of A, 1 / (3 d_in), behind features of root mean square about 0.7
            std = 1 / (math.sqrt(3 * d_in * head.last.in_features) * 0.7 * head.gain)
            nn.init.normal_(head.last.weight, std=std)
        else:
            nn.init.zeros_(head.last.weight)
        nn.init.zeros_(head.last.bias)

    def _build_frozen(self, draws: torch.Generator, anchors: list | None) -> None:
        c = self.config
        uses_anchor_a = c.noise_mode_a != "replace" or (c.a_mode == "generated" and c.a_residual)
        for group, indices in self.slots.groups.items():
            shape = (len(indices), group.r, group.in_features)
            if c.a_mode == "fixed":
                self._keep(f"fixed_A_{group.key}", uniform(shape, self._bound(group), draws))
            given = stacked([anchors[i] for i in indices]) if anchors else None
            if uses_anchor_a:
                fresh = uniform(shape, 1 / math.sqrt(group.in_features), draws)
                self._keep(f"anchor_A_{group.key}", given[0] if given else fresh)
            if c.noise_mode_b != "replace":
                fresh = torch.zeros(len(indices), group.out_features, group.r)
                self._keep(f"anchor_B_{group.key}", given[1] if given else fresh)

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor, persistent=self.config.keeps_frozen_a)

    def _bound(self, group: ShapeGroup) -> float:
        return 1 / math.sqrt(group.in_features if self.config.a_init == "lora" else group.r)

    def forward(self, draw: Draw) -> Factors:
        weight = next(self.trunk.parameters())
        dtype = torch.promote_types(weight.dtype, getattr(torch, self.config.gen_dtype))
        noise = self._noise(draw)
        z = self.trunk(self._inputs().to(dtype), noise)
        random_a = self._random_a(draw, noise, weight.device) if self.config.a_mode == "random" else {}
        groups = {}
        for group in self.slots.groups:
            A = random_a.get(group)
            A = self._factor_a(group, z, dtype).unsqueeze(0) if A is None else A.to(dtype)
            B = self._head("B", group)(z[self.rows_b[group].on(z.device)]).transpose(1, 2)
            A = self._blend(A, f"anchor_A_{group.key}", self.config.noise_mode_a)
            B = self._blend(B, f"anchor_B_{group.key}", self.config.noise_mode_b)
            groups[group] = (A.to(weight.dtype), B.unsqueeze(0).to(weight.dtype))
        return Factors(groups)

    def _head(self, side: str, group: ShapeGroup) -> nn.Module:
        return self.heads[self._head_name(side, group)]

    def _inputs(self) -> torch.Tensor:
        if self.config.embed_mode == "slot":
            return self.slot_emb.weight
        device = self.layer_emb.weight.device
        return self.layer_emb(self.layer_rows.on(device)) + self.type_emb(self.type_rows.on(device))

    def _factor_a(self, group: ShapeGroup, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.config.a_mode == "fixed":
            return getattr(self, f"fixed_A_{group.key}").to(dtype)
        A = self._head("A", group)(z[self.rows_a[group].on(z.device)])
        if self.config.a_residual:
            A = A + getattr(self, f"anchor_A_{group.key}").to(dtype)
        return A

    def _blend(self, generated: torch.Tensor, anchor: str, mode: str) -> torch.Tensor:
        if mode == "replace":
            return generated
        anchor = getattr(self, anchor).to(generated.dtype)
        if mode == "multiply":
            return generated * anchor
        return torch.lerp(generated, anchor.expand_as(generated), self.alpha.to(generated.dtype))

    def _noise(self, draw: Draw) -> torch.Generator | None:
        """Private generator of a training forward, keyed by the seed and a counter that is saved with the adapter."""
        if not self.stochastic or not isinstance(draw, Train):
            return None
        self.count_generation()
        return keyed_generator(self.seed(), 1, int(self.generations()))

    def _random_a(self, draw: Draw, noise: torch.Generator | None, device: torch.device) -> dict:
        """A of shape (K, n, r, d_in) for each group: fresh in training, one fixed draw in eval, draws when asked."""
        if isinstance(draw, Sample):
            generators = [keyed_generator(draw.seed, 3, draw.first + k) for k in range(draw.num_samples)]
        else:
            generators = [keyed_generator(self.seed(), 2, 0) if isinstance(draw, Mean) else noise]
        stacks: dict[ShapeGroup, list] = {group: [] for group in self.slots.groups}
        for generator in generators:
            for group, indices in self.slots.groups.items():
                shape = (len(indices), group.r, group.in_features)
                stacks[group].append(uniform(shape, self._bound(group), generator))
        return {group: to_device(torch.stack(draws), device) for group, draws in stacks.items()}

    @property
    def varies(self) -> bool:
        """Whether A is random: dropout in the generator acts in training only."""
        return self.config.a_mode == "random"

    def check_exportable(self, draw: Draw | None = None) -> None:
        """Random A stands for a distribution: only an explicit seed makes one adapter of it."""
        if self.config.a_mode == "random" and self.config.seed is None:
            raise ValueError(
                'a_mode="random" draws A anew, so no single LoRA represents this adapter. Set seed in the config to '
                "merge or export the draw it names, or predict with several draws."
            )

    def set_progress(self, step: int, total_steps: int, accumulation_steps: int = 1) -> None:
        """Anneal the anchor's weight: `alpha = alpha_0 * max(0, 1 - t / T)`, t and T in optimiser steps."""
        if not self.config.noise_anneal:
            return
        horizon = self.config.noise_anneal_steps or total_steps
        if self.config.authors_horizon:
            horizon *= accumulation_steps
        with torch.no_grad():
            self.alpha.fill_(self.config.noise_alpha * max(0.0, 1 - step / horizon))


#: A head's output is multiplied by this over the number of its input features, so that at LoRA's learning rate a step
#: moves B about as far as LoRA's would. A changes less in LoRA too. Chosen by measurement (see docs/hyper-lora.md).
HEAD_GAIN = 16.0
HEAD_GAIN_A = 2.0


@torch.no_grad()
def _draw_frozen_again(law: HyperLaw, _: Any) -> None:
    """Make what is drawn and not saved anew when the seed was loaded: `to_empty` may have left it without content."""
    draws = torch.Generator().manual_seed(law.seed())
    torch.randint(2**62, (), generator=draws, device="cpu")  # the network's own seed
    before = {name: tensor for name, tensor in law.named_buffers() if name.startswith(("fixed_A", "anchor_"))}
    law._build_frozen(draws, None)
    for name, tensor in before.items():
        setattr(law, name, getattr(law, name).to(tensor.device, tensor.dtype))


class HyperLoraModel(FactorModel):
    """Adapts a model with LoRA factors generated by one shared network (arXiv 2603.19278).

    Args:
        model: The base model, changed in place.
        config: A `HyperLoraConfig`.
        adapter_name: Name of the adapter.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 4))
        >>> type(get_peft_model(base, HyperLoraConfig(target_modules=["0"])).base_model).__name__
        'HyperLoraModel'
    """

    prefix = "hyperlora_"
    holder_name = "calib_hyper"

    def build_law(self, config: HyperLoraConfig, slots: SlotTable) -> HyperLaw:
        """Make the generator; anchors are read once and saved with the adapter from then on."""
        anchors = read_lora_factors(config.anchor_adapter, slots) if config.anchor_adapter is not None else None
        return HyperLaw(config, slots, anchors)
