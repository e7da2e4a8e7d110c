"""`result + s * B A x`: the products of every adapted map, in the layouts that a processor is quick with.

Factors are thin, and a product with a few columns takes up to four times as long on a CPU as one with a few rows. So
what lies between A and B is kept as (r, N), and B as (r, d_out). The backward of an ordinary product follows these
layouts; that of a batched one does not, which is why several functions have a backward of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..internals.torch import in_forward_ad, is_functorch_wrapped
from .rows import check_divides


def add_low_rank(
    result: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return `result + scaling * B A x`, in the wider of the two dtypes, for one draw or for K draws at once.

    The result and x are (N, ..., d), A (r, d_in) and B (d_out, r); for K draws all have K in front, N = K * rows,
    draw-major. x is in the dtype of the factors.
    """
    if A.dim() == 2:
        hidden = A @ x.reshape(-1, x.shape[-1]).t()
        hidden = hidden if scaling == 1 else hidden * scaling
        if result.dtype != hidden.dtype:
            return result + (hidden.t() @ B.t()).view(result.shape)
        # the addition rides in the matrix product: one pass less over the output than LoRA makes
        rows = B.t().contiguous() if B.is_cpu else B.t()
        return torch.addmm(result.reshape(-1, result.shape[-1]), hidden.t(), rows).view(result.shape)
    num_samples = A.shape[0]
    check_divides(x, num_samples)
    inputs = x.reshape(num_samples, -1, x.shape[-1])
    base = result.reshape(num_samples, -1, result.shape[-1])
    if _has_plain_backward(base, inputs, A, B):
        return _SeveralFunctions.apply(base, inputs, A, B, scaling).view(result.shape)
    hidden = torch.bmm(inputs, A.transpose(1, 2))
    if result.dtype != hidden.dtype:
        return result + torch.bmm(hidden * scaling, B.transpose(1, 2)).view(result.shape)
    return torch.baddbmm(base, hidden, B.transpose(1, 2), alpha=scaling).view(result.shape)


def _has_plain_backward(*tensors: torch.Tensor) -> bool:
    """Whether nothing but a backward will look at the products: no graph is built, nothing is cast or mapped."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.is_grad_enabled() or in_forward_ad() or len({t.dtype for t in tensors}) > 1:
        return False
    plain = all(type(t) in (torch.Tensor, nn.Parameter) for t in tensors)
    return plain and all(t.is_cpu and not is_functorch_wrapped(t) for t in tensors)


class _SeveralFunctions(torch.autograd.Function):
    """`base + s * x A^T B^T` for base (K, N, d_out), x (K, N, d_in), A (K, r, d_in) and B (K, d_out, r)."""

    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        hidden, rows = torch.bmm(A, x.transpose(1, 2)), B.transpose(1, 2).contiguous()
        ctx.save_for_backward(x, A, B, hidden)
        ctx.scaling = scaling
        return torch.baddbmm(base, hidden.transpose(1, 2), rows, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        x, A, B, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient: what is kept knows nothing of A and x
            hidden = torch.bmm(A, x.transpose(1, 2))
        back = torch.bmm(B.transpose(1, 2).contiguous(), gradient.transpose(1, 2)) * ctx.scaling
        of_x = torch.bmm(back.transpose(1, 2), A) if ctx.needs_input_grad[1] else None
        of_A = torch.bmm(back, x) if ctx.needs_input_grad[2] else None
        of_B = (torch.bmm(hidden, gradient) * ctx.scaling).transpose(1, 2) if ctx.needs_input_grad[3] else None
        return gradient, of_x, of_A, of_B, None
