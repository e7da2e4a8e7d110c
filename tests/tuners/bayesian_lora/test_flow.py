"""The autoregressive flow: identity at the start, triangular, with the exact log-determinant."""

import pytest
import torch
from torch.autograd.functional import jacobian

from peft_calib.tuners.bayesian_lora.flow import MaskedAffineFlow


def make(count=1, features=5, hidden=16, depth=1, scale=0.0) -> MaskedAffineFlow:
    flow = MaskedAffineFlow(count, features, hidden, depth, torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return flow


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_identity_at_the_start(depth):
    u = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    v, log_det = make(2, depth=depth)(u)
    torch.testing.assert_close(v, u, rtol=0, atol=1e-15)
    torch.testing.assert_close(log_det, torch.zeros(2, 7, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("depth", "features"), [(1, 5), (2, 5), (3, 4), (2, 1)])
def test_log_determinant_is_that_of_the_jacobian(depth, features):
    flow = make(features=features, depth=depth, scale=0.2)
    u = torch.randn(features, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    J = jacobian(lambda x: flow(x.view(1, 1, -1))[0].flatten(), u)
    assert not torch.allclose(J, torch.eye(features, dtype=torch.float64))
    torch.testing.assert_close(flow(u.view(1, 1, -1))[1].squeeze(), torch.linalg.slogdet(J)[1], rtol=1e-8, atol=1e-9)


def test_each_layer_is_autoregressive():
    flow = make(scale=0.5)
    u = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    J = jacobian(lambda x: flow(x.view(1, 1, -1))[0].flatten(), u)
    assert torch.equal(J, J.tril())
    assert (J.diagonal() > 0).all()
    assert (J.tril(-1) != 0).any(dim=1)[1:].all()  # each coordinate but the first listens to earlier ones


def test_layers_alternate_the_order():
    flow = make(depth=2, scale=0.5)
    u = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    J = jacobian(lambda x: flow.layers[1](x.view(1, 1, -1))[0].flatten(), u)
    assert torch.equal(J, J.triu())


def test_factors_have_their_own_network():
    flow = make(3, scale=0.5)
    u = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64).expand(3, 2, 5)
    v, _ = flow(u)
    assert not torch.allclose(v[0], v[1])
    alone = make(3, scale=0.5)
    for parameter in alone.parameters():
        parameter.data = parameter.data[1:2]
    torch.testing.assert_close(alone(u[1:2])[0], v[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("features", "hidden", "expected"), [(9, 16, 1554), (8, 16, 1504)])
def test_number_of_parameters(features, hidden, expected):
    assert expected == features * hidden + hidden + 4 * (hidden**2 + hidden) + 2 * features * hidden + 2 * features
    assert sum(p.numel() for p in make(1, features, hidden).parameters()) == expected
