"""What core tests share: few threads, fixed seeds, and tiny random vision transformers of every family."""

import random
import sys
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("iared2", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("iared2")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Imports the package before any test imports timm (see iared2/_compat.py), and after the shape checks are switched on."""
    import iared2  # noqa: F401


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first precision of a process; the next test may want another."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def _gpu_or_skip(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none here")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family` runs for every family in turn."""
    if "family" in metafunc.fixturenames:
        from families import FAMILIES  # not above: a conftest is imported before the shape checks are switched on

        metafunc.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
