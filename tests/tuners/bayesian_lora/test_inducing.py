"""The mathematics in float64: prior, embedding, noise and divergences against dense and independent computations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from peft_calib.tuners.bayesian_lora import inducing as P

R, C, M, N = 3, 2, 4, 6
JITTER = 1e-5


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def bases(draw):
    """A row basis (R, M) and a column basis (C, N) with noticeable diagonals."""
    variance = torch.tensor([[0.3]], dtype=torch.float64) ** 2
    return P.whiten(draw(1, R, M), variance, JITTER), P.whiten(draw(1, C, N), variance, JITTER), variance


def jacobian(function, shape) -> torch.Tensor:
    """Matrix of a linear map from `shape` to the map's output, both flattened row by row."""
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    return torch.stack([function(unit).flatten() for unit in units], dim=1)


def dense_projections(bases) -> tuple[torch.Tensor, torch.Tensor]:
    """P_r and P_c as Z^T K^-1 Z, from Z = L G and an explicit inverse."""
    out = []
    for basis in bases[:2]:
        Z = (basis.L @ basis.G)[0]
        K = Z @ Z.T + torch.diag(basis.D[0] ** 2)
        out.append(Z.T @ K.inverse() @ Z)
    return out[0], out[1]


# ----------------------------------------------------------------- bases


def test_whitening_solves_the_kernel(draw):
    Z = draw(5, R, N)
    variance = draw(5, R).square()
    white = P.whiten(Z, variance, JITTER)
    mean_diagonal = (Z.square().sum(-1) + variance).mean(-1, keepdim=True)
    K = Z @ Z.mT + torch.diag_embed(variance + JITTER * mean_diagonal)
    torch.testing.assert_close(white.L @ white.L.mT, K, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(white.L @ white.G, Z, rtol=1e-13, atol=1e-13)
    eye = torch.eye(R, dtype=torch.float64).expand(5, R, R)
    torch.testing.assert_close(white.extended @ white.extended.mT, eye, rtol=0, atol=1e-12)


def test_jitter_escalates_where_the_factorisation_fails():
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(2, 12, 3, generator=generator) @ torch.randn(2, 3, 300, generator=generator)
    variance = torch.zeros(1, 1)
    scale = Z.square().sum(-1).mean(-1).view(2, 1, 1)
    for jitter, fails in ((1e-8, True), (1e-5, False)):
        assert torch.linalg.cholesky_ex(Z @ Z.mT + jitter * scale * torch.eye(12))[1].any() == fails
    white = P.whiten(Z, variance, 1e-8)
    assert white.L.isfinite().all()
    assert white.G.isfinite().all()
    assert (white.D.square() <= 1e-8 * 10**P.ESCALATIONS * scale[..., 0] * 1.001).all()


def test_without_a_look_at_the_values_each_basis_finds_its_own_jitter(monkeypatch):
    """What a training forward does on an accelerator, where looking would make the host wait."""
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(1, 12, 3, generator=generator) @ torch.randn(1, 3, 300, generator=generator)
    Z = torch.cat([low_rank, torch.randn(1, 12, 300, generator=generator), torch.full((1, 12, 300), torch.nan)])
    variance = torch.zeros(1, 1)
    seen = P.whiten(Z[:2], variance, 1e-8)
    monkeypatch.setattr(P, "_may_look", lambda Z: False)
    unseen = P.whiten(Z, variance, 1e-8)
    for found, expected in zip(unseen, seen, strict=True):
        torch.testing.assert_close(found[:2], expected, rtol=1e-4, atol=1e-6)
    assert unseen.G[2].isnan().all()
    fits = P.whiten(Z[1:2], variance, 1e-8).D[0]
    assert torch.equal(unseen.D[1], fits)  # its neighbour's trouble is not its own
    assert unseen.D[0].min() > 2 * fits.max()


def test_a_kernel_that_cannot_be_factorised_is_named():
    Z = torch.ones(3, 2, 4)
    Z[1] = torch.nan
    with pytest.raises(P.CholeskyError, match="kernel 1 has no Cholesky factor") as caught:
        P.whiten(Z, torch.full((1, 1), 0.01), JITTER)
    assert caught.value.index == 1


# ----------------------------------------------------------------- prior


def test_prior_is_independent_normal(bases):
    """Mean zero, s = 1, lambda = 1 and Matheron noise: cov(W / sigma) = I, whatever the bases."""
    rows, columns, _ = bases
    core = jacobian(lambda V: P.combine(rows.G, V.unsqueeze(0), columns.G), (R, C))
    noise = jacobian(lambda e: P.conditional_noise(e.unsqueeze(0), rows, columns, "matheron"), (M + R, N + C))
    covariance = core @ core.T + noise @ noise.T
    torch.testing.assert_close(covariance, torch.eye(M * N, dtype=torch.float64), rtol=0, atol=1e-14)


def test_matheron_noise_has_the_conditional_covariance(bases):
    rows, columns, _ = bases
    P_r, P_c = dense_projections(bases)
    noise = jacobian(lambda e: P.conditional_noise(e.unsqueeze(0), rows, columns, "matheron"), (M + R, N + C))
    expected = torch.eye(M * N, dtype=torch.float64) - torch.kron(P_r, P_c)
    torch.testing.assert_close(noise @ noise.T, expected, rtol=0, atol=3e-12)


def test_projected_noise_is_exact_in_the_limit_of_small_diagonals(draw):
    Z_r, Z_c = draw(1, R, M), draw(1, C, N)
    errors = []
    for d in (1e-1, 1e-2, 1e-3):
        variance = torch.full((1, 1), d**2, dtype=torch.float64)
        bases = P.whiten(Z_r, variance, 0.0), P.whiten(Z_c, variance, 0.0)
        P_r, P_c = dense_projections(bases)
        noise = jacobian(lambda e, b=bases: P.conditional_noise(e.unsqueeze(0), *b, "projected"), (M, N))
        errors.append((noise @ noise.T + torch.kron(P_r, P_c) - torch.eye(M * N, dtype=torch.float64)).abs().max())
    assert errors[0] > 1e-4
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 50


def test_mean_is_the_same_in_whitened_and_unwhitened_form(bases, draw):
    rows, columns, _ = bases
    V = draw(1, R, C)
    U = rows.L @ V @ columns.L.mT
    T_r = (rows.L @ rows.G).mT @ torch.cholesky_inverse(rows.L)
    T_c = torch.cholesky_inverse(columns.L) @ (columns.L @ columns.G)
    torch.testing.assert_close(P.combine(rows.G, V, columns.G), T_r @ U @ T_c, rtol=0, atol=1e-13)


def test_core_form_equals_the_product_of_the_factors(draw):
    small = torch.full((1, 1), 1e-4, dtype=torch.float64)
    A_r, A_c = P.whiten(draw(1, R, 2), small, JITTER).G, P.whiten(draw(1, C, 7), small, JITTER).G
    B_r, B_c = P.whiten(draw(1, R, 5), small, JITTER).G, P.whiten(draw(1, C, 2), small, JITTER).G
    V_a, V_b = draw(1, R, C), draw(1, R, C)
    product = P.combine(B_r, V_b, B_c) @ P.combine(A_r, V_a, A_c)
    torch.testing.assert_close(B_r.mT @ (V_b @ (B_c @ A_r.mT) @ V_a) @ A_c, product, rtol=0, atol=1e-14)


# ----------------------------------------------------------------- embedding


@given(
    m=st.integers(1, 5),
    n=st.integers(1, 9),
    more=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    sigma=st.floats(1e-3, 1e2),
    zero=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_any_factor_is_embedded_exactly(m, n, more, sigma, zero, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    W = draw(2, m, n)
    if zero:
        W[:, 0] = 0
    sigmas = torch.full((2, 1, 1), sigma, dtype=torch.float64)
    Z_r, Z_c, mean = P.embed(W, draw(2, m + more[0], m), draw(2, m + more[1], n), sigmas, 1e-4, JITTER)
    variance = torch.full((1, 1), 1e-4, dtype=torch.float64)
    found = sigmas * P.combine(P.whiten(Z_r, variance, JITTER).G, mean, P.whiten(Z_c, variance, JITTER).G)
    torch.testing.assert_close(found, W, rtol=0, atol=4e-15 * float(W.abs().max()) * (m + more[1]))


@pytest.mark.parametrize("d_in", [32, 4096])
def test_embedding_in_float32(d_in):
    generator = torch.Generator().manual_seed(3)
    W = (torch.rand(4, 8, d_in, generator=generator) * 2 - 1) / d_in**0.5
    rows, columns = torch.randn(4, 9, 8, generator=generator), torch.randn(4, 10, d_in, generator=generator)
    sigma = torch.full((4, 1, 1), 0.2)
    Z_r, Z_c, mean = P.embed(W, rows, columns, sigma, 1e-4, JITTER)
    variance = torch.full((1, 1), 1e-4)
    found = sigma * P.combine(P.whiten(Z_r, variance, JITTER).G, mean, P.whiten(Z_c, variance, JITTER).G)
    assert (found - W).norm() / W.norm() < 4.4e-7


# ----------------------------------------------------------------- divergences


def test_diagonal_kl_equals_torch_distributions_whitened_and_unwhitened(bases, draw):
    rows, columns, _ = bases
    mean, sd = draw(1, R, C), draw(1, R, C).abs() + 0.1
    found = P.kl_diagonal(mean, sd)
    whitened = kl_divergence(Normal(mean, sd), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(found, whitened, rtol=1e-13, atol=0)
    map_ = torch.kron(rows.L[0], columns.L[0])  # row-major vec of L_r V L_c^T
    q = MultivariateNormal(map_ @ mean.flatten(), map_ @ torch.diag(sd.flatten() ** 2) @ map_.T)
    K_r, K_c = rows.L[0] @ rows.L[0].T, columns.L[0] @ columns.L[0].T
    p = MultivariateNormal(torch.zeros(R * C, dtype=torch.float64), torch.kron(K_r, K_c))
    torch.testing.assert_close(found, kl_divergence(q, p), rtol=1e-9, atol=0)


def lower(draw, size) -> torch.Tensor:
    return torch.tril(draw(1, size, size), -1) + torch.diag_embed(draw(1, size).abs() + 0.1)


def standard(size) -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64))


def test_full_kl_equals_torch_distributions(draw):
    mean, factor = draw(1, R, C), lower(draw, R * C)
    q = MultivariateNormal(mean.flatten(), scale_tril=factor[0])
    torch.testing.assert_close(P.kl_full(mean, factor), kl_divergence(q, standard(R * C)), rtol=1e-12, atol=0)


def test_matrix_normal_kl_equals_torch_distributions(draw):
    mean, row, column = draw(1, R, C), lower(draw, R), lower(draw, C)
    q = MultivariateNormal(mean.flatten(), scale_tril=torch.kron(row[0], column[0]))
    found = P.kl_matrix_normal(mean, row, column)
    torch.testing.assert_close(found, kl_divergence(q, standard(R * C)), rtol=1e-12, atol=0)


def test_divergences_add_over_the_batch(draw):
    mean, row, column, full = draw(3, R, C), *(torch.cat([lower(draw, n) for _ in range(3)]) for n in (R, C, R * C))
    for kl, parts in ((P.kl_matrix_normal, (row, column)), (P.kl_full, (full,)), (P.kl_diagonal, (mean.abs() + 0.1,))):
        each = sum(kl(mean[i : i + 1], *(part[i : i + 1] for part in parts)) for i in range(3))
        torch.testing.assert_close(kl(mean, *parts), each, rtol=1e-13, atol=0)


def test_conditional_kl_equals_a_dense_gaussian(bases, draw):
    P_r, P_c = dense_projections(bases)
    S = torch.eye(M * N, dtype=torch.float64) - torch.kron(P_r, P_c)
    mean, scale = draw(M * N), 0.37
    dense = kl_divergence(MultivariateNormal(mean, scale**2 * S), MultivariateNormal(mean, S))
    found = P.kl_conditional(torch.tensor([scale], dtype=torch.float64), torch.tensor([float(M * N)]))
    torch.testing.assert_close(found, dense, rtol=1e-8, atol=0)


def test_all_divergences_vanish_at_the_prior():
    mean = torch.zeros(1, R, C, dtype=torch.float64)
    eye = [torch.eye(n, dtype=torch.float64).unsqueeze(0) for n in (R, C, R * C)]
    assert P.kl_diagonal(mean, torch.ones_like(mean)) == 0
    assert P.kl_matrix_normal(mean, eye[0], eye[1]) == 0
    assert P.kl_full(mean, eye[2]) == 0
    assert P.kl_conditional(torch.ones(2), torch.tensor([7.0, 5.0])) == 0


def test_sampled_kl_is_unbiased(draw):
    mean, sd = draw(1, R, C), draw(1, R, C).abs() + 0.2
    noise = draw(20_000, R, C)
    V = P.draw_diagonal(mean, sd, noise)
    estimates = torch.stack([P.kl_sampled(e, sd.log().sum(), v) for e, v in zip(noise, V, strict=True)])
    error = estimates.std() / len(estimates) ** 0.5
    assert (estimates.mean() - P.kl_diagonal(mean, sd)).abs() < 4 * error


# ----------------------------------------------------------------- moments


def test_draws_have_the_stated_moments(draw):
    row, column, full = lower(draw, R), lower(draw, C), lower(draw, R * C)
    mean = draw(1, R, C)
    for function, parts, covariance in (
        (P.draw_matrix_normal, (row, column), torch.kron(row[0] @ row[0].T, column[0] @ column[0].T)),
        (P.draw_full, (full,), full[0] @ full[0].T),
    ):
        map_ = jacobian(lambda e, f=function, p=parts: f(mean, *p, e.unsqueeze(0)) - mean, (R, C))
        torch.testing.assert_close(map_ @ map_.T, covariance, rtol=1e-12, atol=1e-12)


def test_mean_of_product_against_closed_form_and_draws(draw):
    mean, sd, X = draw(1, R, C), draw(1, R, C).abs(), draw(1, C, R)
    found = P.mean_of_product(mean, torch.diag_embed(sd.flatten(-2)), X)
    torch.testing.assert_close(found, mean @ X @ mean + sd.square() * X.mT, rtol=1e-12, atol=1e-12)
    root = lower(draw, R * C)
    V = P.draw_full(mean, root, draw(50_000, R, C))
    products = V @ X @ V
    error = products.std(0) / len(V) ** 0.5
    assert ((products.mean(0) - P.mean_of_product(mean, root, X)[0]).abs() / error).max() < 4.5
