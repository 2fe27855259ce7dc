"""Every room's tests: what is marked gpu needs one, and says so in the JUnit file."""

import json
import os
from collections.abc import Callable

# Triton reads this when it is first imported, which other rooms' tests do before tests/kernels.
os.environ["TRITON_INTERPRET"] = "1"

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The JUnit file holds no marks; house/skips.py forgives only skips with this property.
    for item in items:
        if item.get_closest_marker("gpu"):
            item.user_properties.append(("gpu", True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def bar(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Holds a figure to its limit and says both in the JUnit file (`harness/bars.py`)."""

    def hold(name: str, found: float, limit: float, *, least: bool = False) -> None:
        said = json.dumps({"name": name, "found": found, "limit": limit, "least": least})
        request.node.user_properties.append(("bar", said))
        kept = found >= limit if least else found <= limit
        assert kept, f"{name}: {found:.3e}, at {'least' if least else 'most'} {limit:.3e}"

    return hold
