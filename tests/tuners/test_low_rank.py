"""The products of the one layer against the definition y = W0 x + s B A x in float64."""

import pytest
import torch

from peft_calib.tuners.low_rank import add_low_rank


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


def several(requires_grad: bool = True) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 6), (4, 3, 5), (2, 2, 5), (2, 6, 2))  # result, x, A and B of two functions
    return tuple(torch.randn(*s, generator=generator).double().requires_grad_(requires_grad) for s in shapes)


def defined(result, x, A, B):
    inputs = x.reshape(2, 2, *x.shape[1:])
    return result + 0.5 * torch.einsum("kor,kri,kn...i->kn...o", B, A, inputs).reshape(result.shape)


def ours(result, x, A, B):
    return add_low_rank(result, x, A, B, 0.5)


def test_several_functions_have_the_gradients_of_the_definition_and_gradients_of_these():
    tensors = several()
    torch.testing.assert_close(ours(*tensors), defined(*tensors))
    weights = torch.arange(72).double().reshape(4, 3, 6)
    found, expected = (torch.autograd.grad((f(*tensors) * weights).sum(), tensors) for f in (ours, defined))
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)
    assert torch.autograd.gradcheck(ours, tensors) and torch.autograd.gradgradcheck(ours, tensors)


def test_what_is_not_asked_for_has_no_gradient():
    result, x, A, B = several(requires_grad=False)
    ours(result, x, A, B.requires_grad_()).sum().backward()
    assert B.grad is not None and x.grad is None


def test_several_functions_inside_transforms():
    tensors = several(requires_grad=False)
    tangents = tuple(torch.ones_like(t) for t in tensors)
    torch.testing.assert_close(torch.func.jvp(ours, tensors, tangents), torch.func.jvp(defined, tensors, tangents))
    of_A = [
        torch.func.grad(lambda A, f=f: f(tensors[0], tensors[1], A, tensors[3]).sum())(tensors[2])
        for f in (ours, defined)
    ]
    torch.testing.assert_close(*of_A)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[2], tangents[2])
        moved = ours(tensors[0], tensors[1], dual, tensors[3])
        assert torch.autograd.forward_ad.unpack_dual(moved).tangent is not None
