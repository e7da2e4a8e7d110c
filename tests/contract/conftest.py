"""Every law in turn, or the one that `--law module:Config` names."""

from pathlib import Path

import pytest
from families import FAMILIES, Family
from methods import METHODS, Method, from_outside

PRINCIPAL = ("hyper", "bayesian", "curve", "ensemble")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "method" in metafunc.fixturenames:
        given = metafunc.config.getoption("--law")
        methods = {given: from_outside(given)} if given else METHODS
        metafunc.parametrize("method", methods.values(), ids=list(methods))
    if "principal" in metafunc.fixturenames:  # on many bases: one variant of each of our methods
        given = metafunc.config.getoption("--law")
        chosen = {given: from_outside(given)} if given else {name: METHODS[name] for name in PRINCIPAL}
        metafunc.parametrize("principal", chosen.values(), ids=list(chosen))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a law that is named only what is asked of every law."""
    if config.getoption("--law"):
        of_laws = {"method", "principal"}
        here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
        left_out = {item for item in here if not of_laws & set(getattr(item, "fixturenames", ()))}
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture(autouse=True)
def _told_in_the_summary(request, record_property):
    """Which law a test holds: `tests/conftest.py` prints how much of the contract each does."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    method = params.get("method", params.get("principal"))
    if method is not None:
        known = [name for name, of in METHODS.items() if of is method]
        record_property("law", known[0] if known else request.config.getoption("--law"))


@pytest.fixture(params=list(FAMILIES))
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def bert() -> Family:
    return FAMILIES["bert"]


@pytest.fixture
def adapt(method: Method):
    """Adapt a fresh model of a family with the law at hand."""
    return method.adapt
