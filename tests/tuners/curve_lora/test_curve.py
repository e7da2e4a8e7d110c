"""The pure mathematics of the curve, against closed forms."""

import math

import pytest
import torch

from peft_calib.tuners.curve_lora.curve import CurveShape
from peft_calib.tuners.curve_lora.gauge import align, balance, rotate_to
from peft_calib.tuners.curve_lora.sampling import at_arc_length, opposite, sample_points, training_position

SHAPES = [(1, 0), (2, 0), (2, 1), (3, 0), (2, 2), (3, 1), (3, 2), (5, 2), (9, 2)]


def uniform(count: int, high: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * high


def points(shape: CurveShape, *size: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.num_control_points, *size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("N", "m", "control_points", "handles", "grid"),
    [
        *[(1, 0, 1, 0, 1), (3, 0, 3, 0, 5), (2, 1, 3, 1, 5), (2, 2, 4, 2, 7), (3, 1, 5, 2, 9), (3, 2, 7, 4, 13)],
        *[(5, 1, 9, 4, 17), (5, 2, 13, 8, 25), (9, 1, 17, 8, 33), (9, 2, 25, 16, 49)],
    ],
)
def test_counts_are_the_papers(N, m, control_points, handles, grid):
    shape = CurveShape(N, m)
    assert (shape.num_control_points, len(shape.handles), shape.num_grid_points) == (control_points, handles, grid)
    assert len(shape.anchors) == N and sorted(shape.anchors + shape.handles) == list(range(control_points))


@pytest.mark.parametrize(("N", "m"), SHAPES)
def test_coefficients_are_a_partition_of_unity(N, m):
    shape = CurveShape(N, m)
    c = shape.coefficients(uniform(1000, shape.num_segments))
    assert ((c.sum(1) - 1).abs() < 1e-12).all() and (c >= 0).all()
    assert ((c != 0).sum(1) <= m + 2).all()


@pytest.mark.parametrize(("N", "m"), SHAPES)
def test_anchors_are_exact_one_hot_rows_with_finite_gradients(N, m):
    shape = CurveShape(N, m)
    t = torch.arange(N, dtype=torch.float64, requires_grad=True)
    c = shape.coefficients(t)
    assert torch.equal(c, torch.eye(shape.num_control_points, dtype=torch.float64)[list(shape.anchors)])
    if N > 1:  # a single point does not move
        (c @ points(shape)).sum().backward()
        assert torch.isfinite(t.grad).all()
    segment, tau = shape.locate(torch.tensor([float(shape.num_segments)]))
    assert segment.item() == max(N - 2, 0) and tau.item() == (1 if N > 1 else 0)


@pytest.mark.parametrize(("N", "m"), [(3, 1), (3, 2), (5, 2)])
def test_continuous_at_anchors_but_with_corners(N, m):
    shape, theta = CurveShape(N, m), points(CurveShape(N, m), 6)
    for anchor in range(1, N - 1):
        jumps = []
        for h in (1e-3, 1e-4, 1e-5):
            left, right = shape.coefficients(torch.tensor([anchor - h, anchor + h], dtype=torch.float64)) @ theta
            jumps.append(float((left - right).norm()))
        assert jumps[1] < 0.2 * jumps[0] and jumps[2] < 0.2 * jumps[1]
        at = shape.derivative_coefficients(torch.tensor([anchor - 1e-9, anchor], dtype=torch.float64)) @ theta
        assert (at[0] - at[1]).norm() > 0.1  # C0 and no more


def test_a_handle_acts_on_its_own_segment_only():
    shape = CurveShape(3, 2)
    theta = points(shape, 5)
    moved = theta.clone()
    moved[4] += 1.0  # the first handle of the second segment
    outside = torch.cat([uniform(50, 1.0), torch.tensor([0.0, 1.0, 2.0])]).double()
    inside = 1 + uniform(50, 1.0).clamp(0.01, 0.99)
    assert torch.equal(shape.coefficients(outside) @ theta, shape.coefficients(outside) @ moved)
    assert ((shape.coefficients(inside) @ theta - shape.coefficients(inside) @ moved).abs() > 0).all()


def test_no_handles_is_linear_interpolation():
    shape, theta, t = CurveShape(4, 0), points(CurveShape(4, 0), 5), uniform(40, 3.0)
    k = t.floor().long()
    expected = (1 - (t - k)).unsqueeze(1) * theta[k] + (t - k).unsqueeze(1) * theta[k + 1]
    torch.testing.assert_close(shape.coefficients(t) @ theta, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("N", "m"), [(2, 1), (3, 2)])
def test_velocity_is_the_derivative(N, m):
    shape = CurveShape(N, m)
    A, B = points(shape, 3, 7), points(shape, 5, 3, seed=4)
    t, h = (uniform(30, 1.0).clamp(0.01, 0.99) + torch.arange(30) % (N - 1)).double(), 1e-5

    def update(where):
        c = shape.coefficients(where)
        return torch.einsum("tk,kor->tor", c, B) @ torch.einsum("tk,kri->tri", c, A)

    c, d = shape.coefficients(t), shape.derivative_coefficients(t)
    analytic = torch.einsum("tk,kor->tor", d, B) @ torch.einsum("tk,kri->tri", c, A)
    analytic = analytic + torch.einsum("tk,kor->tor", c, B) @ torch.einsum("tk,kri->tri", d, A)
    numeric = (update(t + h) - update(t - h)) / (2 * h)
    torch.testing.assert_close(analytic, numeric, rtol=0, atol=1e-6)


# ----------------------------------------------------------------- sampling


def test_the_opposite_point_is_half_the_curve_away_and_uniform():
    shape = CurveShape(4, 1)
    t = uniform(20_000, 3.0)
    other = opposite(t, shape)
    distance = (t - other).abs()
    torch.testing.assert_close(torch.minimum(distance, 3 - distance), torch.full_like(t, 1.5))
    ordered = (other / 3).sort().values
    ideal = (torch.arange(len(t), dtype=torch.float64) + 0.5) / len(t)
    assert float((ordered - ideal).abs().max()) < 1.63 / len(t) ** 0.5  # Kolmogorov-Smirnov at 1 %


def test_training_points_are_uniform_keyed_and_fresh():
    positions = torch.tensor([training_position(7, step, False, 1) for step in range(3000)], dtype=torch.float64)
    ideal = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    assert float((positions.sort().values - ideal).abs().max()) < 1.63 / 3000**0.5
    assert len(positions.unique()) == 3000
    assert positions[5] == training_position(7, 5, False, 1) != training_position(8, 5, False, 1)


def test_strata_cover_the_curve_within_each_optimiser_step():
    by_step = [[training_position(1, 4 * step + micro, True, 4) for micro in range(4)] for step in range(500)]
    positions = torch.tensor(by_step, dtype=torch.float64)
    gaps = positions.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.25))
    for micro in range(4):  # each one alone is uniform
        ordered, ideal = positions[:, micro].sort().values, (torch.arange(500, dtype=torch.float64) + 0.5) / 500
        assert float((ordered - ideal).abs().max()) < 1.63 / 500**0.5


def test_prediction_points():
    shape = CurveShape(3, 2)
    grid = sample_points(shape, 0, 0, 13, 13)
    torch.testing.assert_close(grid, torch.linspace(0, 2, 13, dtype=torch.float64))
    assert {0.0, 1.0, 2.0} <= set(grid.tolist())  # anchors exactly
    assert torch.equal(torch.cat([sample_points(shape, 0, k, 1, 13) for k in range(13)]), grid)
    with pytest.raises(ValueError, match="13 points"):
        sample_points(shape, 0, 10, 4, 13)
    for count in (4, 8, 16):  # an open end: every beginning covers the curve
        t = sample_points(shape, 5, 0, count, None).sort().values
        assert float(t.diff().max()) < 2 * 2 * 1.62 / count
        assert torch.equal(sample_points(shape, 5, 0, 16, None)[:count], sample_points(shape, 5, 0, count, None))


def test_arc_length_positions_invert_the_length():
    speeds = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64)  # two segments, two intervals each
    t = at_arc_length(torch.tensor([0.0, 0.125, 0.5, 1.0]), speeds, 2)
    torch.testing.assert_close(t, torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64))
    still = at_arc_length(torch.tensor([0.25]), torch.zeros(4), 2)
    assert still.item() == 0.5  # a curve of length zero


# ----------------------------------------------------------------- gauge


def test_balancing_and_rotating_leave_every_update_as_it_is():
    generator = torch.Generator().manual_seed(0)
    for r, d_in, d_out in ((3, 7, 5), (6, 4, 5), (4, 9, 2)):
        A, B = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
        A, B = A.double(), B.double() * 9
        balanced_A, balanced_B = balance(A, B)
        torch.testing.assert_close(balanced_B @ balanced_A, B @ A)
        torch.testing.assert_close(balanced_A @ balanced_A.T, balanced_B.T @ balanced_B, atol=1e-9, rtol=0)
        rotated = rotate_to(balanced_A, balanced_B, A, B)
        torch.testing.assert_close(rotated[1] @ rotated[0], B @ A)


def test_aligning_undoes_a_rotation_of_the_gauge():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator)
    G = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    first, second = align([[(A, B)], [(G.T @ A, B @ G)]])
    torch.testing.assert_close(first[0][0], second[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(first[0][1], second[0][1], atol=1e-5, rtol=0)


def test_the_opposite_gauge_annihilates_the_linear_midpoint():
    A, B = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    c = CurveShape(2, 0).coefficients(torch.tensor([0.5], dtype=torch.float64))[0]
    mid_A, mid_B = c[0] * A + c[1] * -A, c[0] * B + c[1] * -B
    assert torch.equal(mid_B @ mid_A, torch.zeros(5, 7, dtype=torch.float64))


@pytest.mark.parametrize(("N", "m", "message"), [(0, 1, "num_anchors"), (2, -1, "num_handles"), (2.0, 1, "num_anch")])
def test_bad_shapes(N, m, message):
    with pytest.raises(ValueError, match=message):
        CurveShape(N, m)
    shape = CurveShape(3, 1)
    for t in (-0.1, 2.1, math.nan):
        with pytest.raises(ValueError, match=r"\[0, 2\]"):
            shape.check(torch.tensor([t], dtype=torch.float64))
