"""The one layer against the definition y = W0 x + s B A x in float64."""

import pytest
import torch

from peft_calib.tuners.layer import add_low_rank


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_one_draw(shape, scaling):
    x, A, B = torch.randn(*shape, 7).double(), torch.randn(2, 7).double(), torch.randn(6, 2).double()
    result = torch.randn(*shape, 6).double()
    expected = result + scaling * torch.einsum("or,ri,...i->...o", B, A, x)
    torch.testing.assert_close(add_low_rank(result, x, A, B, scaling), expected)


def test_many_draws_equal_one_at_a_time():
    K, x = 3, torch.randn(6, 5, 7).double()
    A, B, result = torch.randn(K, 2, 7).double(), torch.randn(K, 6, 2).double(), torch.randn(6, 5, 6).double()
    got = add_low_rank(result, x, A, B, 0.5)
    for k in range(K):
        rows = slice(2 * k, 2 * k + 2)
        torch.testing.assert_close(got[rows], add_low_rank(result[rows], x[rows], A[k], B[k], 0.5))


def test_rows_must_divide_into_draws():
    with pytest.raises(ValueError, match="received 3 rows, no multiple of the 2 functions"):
        add_low_rank(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, 1, 4), torch.zeros(2, 4, 1), 1.0)


def test_result_and_gradients_in_mixed_precision():
    x, result = torch.randn(3, 7), torch.randn(3, 6, dtype=torch.bfloat16)
    A, B = torch.randn(2, 7, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    out = add_low_rank(result, x, A, B, 2.0)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, result.float() + 2 * x @ A.T @ B.T)
    out.sum().backward()
    torch.testing.assert_close(B.grad, (2 * (x @ A.detach().T).sum(0)).expand(6, 2))
