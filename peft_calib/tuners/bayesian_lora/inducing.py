"""The mathematics of the inducing-variable posterior over LoRA factors; pure functions on stacks of factors.

A factor W of shape (m, n) hangs on an R x C core V through a row basis Z_r (R, m) and a column basis Z_c (C, n):

    K = Z Z^T + D^2 = L L^T,   G = L^-1 Z,   W / sigma = G_r^T V G_c + lambda E,   E ~ N(0, I - P_r (x) P_c),   P =
    G^T G

with the prior p(V) = N(0, I), under which (and lambda = 1) the entries of W are independent N(0, sigma^2). Whitening
is built in, so the prior of V never changes. Reference: Ritter et al. 2021 (inducing weights) as applied to LoRA
factors by Lin et al. 2026, arXiv 2601.21003.

Every function takes leading batch dimensions; none draws random numbers, callers pass standard normal noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Times that a failed Cholesky factorisation is tried again with ten times the jitter.
ESCALATIONS = 3


class CholeskyError(ValueError):
    """A basis whose kernel has no Cholesky factor; `index` is its place in the batch."""

    def __init__(self, index: int, jitter: float) -> None:
        super().__init__(f"kernel {index} has no Cholesky factor, even with a relative jitter of {jitter:g}")
        self.index, self.jitter = index, jitter


class Whitened(NamedTuple):
    """A whitened basis: G (..., size, dim), whose rows are orthonormal in the limit D -> 0; L; D (..., size)."""

    G: torch.Tensor
    L: torch.Tensor
    D: torch.Tensor

    @property
    def extended(self) -> torch.Tensor:
        """H = L^-1 [Z, D] of shape (..., size, dim + size), for which H H^T = I exactly."""
        scaled = torch.linalg.solve_triangular(self.L, torch.diag_embed(self.D), upper=False)
        return torch.cat([self.G, scaled], dim=-1)


def whiten(Z: torch.Tensor, variance: torch.Tensor, jitter: float) -> Whitened:
    """Whiten bases (count, size, dim): `K = Z Z^T + diag(variance + jitter * mean diag K)`, `G = L^-1 Z`.

    Where a factorisation fails, the jitter is taken times ten up to three times; then `CholeskyError` is raised.
    """
    gram = Z @ Z.mT
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = jitter * (diagonal + variance).detach().mean(-1, keepdim=True)
    if torch.compiler.is_exporting():
        added = (variance + scale).expand_as(diagonal)
        return Whitened(*_eliminated(gram + torch.diag_embed(added), Z), added.sqrt())
    if _may_look(Z):
        added = (variance + scale).expand_as(diagonal)
        L, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(added))
        if not info.any():
            return Whitened(torch.linalg.solve_triangular(L, Z, upper=False), L, added.sqrt())
    # each basis gets the first power that serves it, chosen on the device
    failed = _failed(gram, variance, scale)
    if _may_look(Z) and failed.all(0).any():
        raise CholeskyError(int(failed.all(0).nonzero()[0, 0]), jitter * 10**ESCALATIONS)
    power = failed[:-1].cumprod(0).sum(0).unsqueeze(-1)
    added = (variance + scale * 10.0**power).expand_as(diagonal)
    L, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(added))
    L = L.masked_fill(failed.all(0)[..., None, None], torch.nan)
    return Whitened(torch.linalg.solve_triangular(L, Z, upper=False), L, added.sqrt())


def _eliminated(K: torch.Tensor, Z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`L^-1 Z` and the Cholesky factor L of K, row by row, for ONNX, which knows no factorisation; K is small."""
    columns, rows = [], []
    for j in range(K.shape[-1]):
        root = K[:, j : j + 1, j : j + 1].sqrt()
        columns.append(K[:, :, j : j + 1] / root)
        rows.append(Z[:, j : j + 1, :] / root)
        K = K - columns[-1] * columns[-1].mT
        Z = Z - columns[-1] * rows[-1]
    return torch.cat(rows, dim=1), torch.cat(columns, dim=2).tril()


def _may_look(Z: torch.Tensor) -> bool:
    """Whether the code may branch on values here.

    Not in a graph, which has one path; and not in a training forward on an accelerator, where the host would wait for
    all the work it has sent there, once a stack and step. A kernel without a factor is NaN then, and so is the loss.
    """
    return not torch.compiler.is_compiling() and (Z.device.type == "cpu" or not torch.is_grad_enabled())


@torch.no_grad()
def _failed(gram: torch.Tensor, variance: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Which bases have no Cholesky factor at each power of ten of the jitter, bool (ESCALATIONS + 1, count)."""
    powers = 10.0 ** torch.arange(ESCALATIONS + 1, device=gram.device, dtype=gram.dtype)
    added = variance + scale * powers.view(-1, 1, 1)
    return torch.linalg.cholesky_ex(gram + torch.diag_embed(added.expand(-1, *gram.shape[:-1]))).info > 0


def combine(rows: torch.Tensor, core: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`G_r^T V G_c`, (..., m, n), contracting the smaller of the two sides first."""
    if rows.shape[-1] <= columns.shape[-1]:
        return (rows.mT @ core) @ columns
    return rows.mT @ (core @ columns)


def conditional_noise(noise: torch.Tensor, rows: Whitened, columns: Whitened, kind: str) -> torch.Tensor:
    """Turn white noise into E ~ N(0, I - P_r (x) P_c), (..., m, n), what V leaves open of a factor.

    `"matheron"` is exact: `E = e - G_r^T (H_r e' H_c^T) G_c` with e' the noise (..., m + R, n + C), extended by the
    diagonals' own (Matheron's rule in whitened coordinates; no second Cholesky factor is needed). `"projected"` leaves
    the extension out, `E = e - P_r e P_c`: exact for D -> 0 and free of further noise.
    """
    if kind == "projected":
        return noise - combine(rows.G, rows.G @ noise @ columns.G.mT, columns.G)
    white = rows.extended @ noise @ columns.extended.mT
    m, n = rows.G.shape[-1], columns.G.shape[-1]
    return noise[..., :m, :n] - combine(rows.G, white, columns.G)


def draw_diagonal(mean: torch.Tensor, sd: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`V = mean + sd * noise`, elementwise."""
    return mean + sd * noise


def draw_matrix_normal(
    mean: torch.Tensor, row: torch.Tensor, column: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """`V = mean + T_r noise T_c^T` with lower triangular T_r, T_c: cov(vec V) = T_c T_c^T (x) T_r T_r^T."""
    return mean + row @ noise @ column.mT


def draw_full(mean: torch.Tensor, factor: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`V = mean + T noise` with T (R C, R C) lower triangular on the row-major entries of V."""
    return mean + (factor @ noise.flatten(-2).unsqueeze(-1)).squeeze(-1).view(noise.shape)


def kl_diagonal(mean: torch.Tensor, sd: torch.Tensor) -> torch.Tensor:
    """KL of N(mean, sd^2) from N(0, 1), summed over all entries: `sum 0.5 (sd^2 + mean^2 - 1) - log sd`, in nats."""
    return (0.5 * (sd.square() + mean.square() - 1) - sd.log()).sum()


def kl_matrix_normal(mean: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """KL of MN(mean, T_r T_r^T, T_c T_c^T) from MN(0, I, I), summed over the batch, in nats."""
    R, C = mean.shape[-2:]
    trace = row.square().sum((-2, -1)) * column.square().sum((-2, -1))
    log_det = C * _log_diagonal(row) + R * _log_diagonal(column)
    return (0.5 * (trace + mean.square().sum((-2, -1)) - R * C) - log_det).sum()


def kl_full(mean: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """KL of N(vec mean, T T^T) from N(0, I), summed over the batch, in nats."""
    square = factor.square().sum((-2, -1)) + mean.square().sum((-2, -1)) - factor.shape[-1]
    return (0.5 * square - _log_diagonal(factor)).sum()


def kl_conditional(scale: torch.Tensor, numel: torch.Tensor) -> torch.Tensor:
    """KL of N(M, lambda^2 S) from N(M, S): `sum m n (0.5 lambda^2 - log lambda - 0.5)`, whatever S is, in nats."""
    return (numel * (0.5 * scale.square() - scale.log() - 0.5)).sum()


def kl_sampled(noise: torch.Tensor, log_det: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """One-sample estimate of KL(q(V) || N(0, I)) where V (`core`) is a map of standard normal noise, in nats.

    `log q(V) - log p(V) = 0.5 |V|^2 - 0.5 |noise|^2 - log |det dV/dnoise|`, unbiased; used with a flow.
    """
    return 0.5 * (core.square().sum() - noise.square().sum()) - log_det.sum()


def _log_diagonal(factor: torch.Tensor) -> torch.Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


#: How the families of q(V) are drawn, and their divergence from the prior.
DRAWS = {"diagonal": draw_diagonal, "matrix_normal": draw_matrix_normal, "full": draw_full}
DIVERGENCES = {"diagonal": kl_diagonal, "matrix_normal": kl_matrix_normal, "full": kl_full}


def mean_of_product(mean: torch.Tensor, root: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """E[V X V] of a Gaussian core V: `mean X mean + sum_kl Cov(V_ik, V_lj) X_kl`, (..., R, C).

    Needed where A and B share one core, since E[B A] is then not E[B] E[A]. `root` is a square root of the covariance
    of the row-major entries, (..., R C, R C).
    """
    R, C = mean.shape[-2:]
    covariance = (root @ root.mT).unflatten(-1, (R, C)).unflatten(-3, (R, C))
    return mean @ middle @ mean + torch.einsum("...iklj,...kl->...ij", covariance, middle)


def embed(
    W: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    sigma: torch.Tensor,
    variance: float,
    jitter: float,
    length: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bases Z_r, Z_c and core mean that give factors (count, m, n), m <= n, exactly: `sigma G_r^T V G_c = W`.

    With w_i the norm of row i and l the length: the first rows of Z_r are the identity, those of Z_c are l W_i / w_i,
    and `V[:m] = diag(L_r) w / (l sigma) * L_c[:m]`, because L_c G_c = Z_c. All other rows are those of the random fill
    given (at least m of each); rows of zeros keep the direction given in `columns` and get a zero mean. `variance` and
    `jitter` are what the bases are whitened with.
    """
    m = W.shape[-2]
    norm = W.norm(dim=-1, keepdim=True)
    Z_r, Z_c = rows.clone(), columns.clone()
    Z_r[..., :m, :] = torch.eye(m, dtype=W.dtype)
    directions = W / norm.clamp_min(torch.finfo(W.dtype).tiny)
    Z_c[..., :m, :] = torch.where(norm > 0, length * directions, Z_c[..., :m, :])
    D2 = torch.full((1, 1), variance, dtype=W.dtype)
    L_r, L_c = whiten(Z_r, D2, jitter).L, whiten(Z_c, D2, jitter).L
    mean = torch.zeros(*W.shape[:-2], Z_r.shape[-2], Z_c.shape[-2], dtype=W.dtype)
    diagonal = L_r.diagonal(dim1=-2, dim2=-1)[..., :m, None]
    mean[..., :m, :] = diagonal * norm / (length * sigma) * L_c[..., :m, :]
    return Z_r, Z_c, mean
