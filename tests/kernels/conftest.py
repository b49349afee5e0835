"""The op's tests run under every backend that this machine's CPU has."""

import pytest
import torch

from bitnet_train.kernels import op  # noqa: F401  registers the backends
from bitnet_train.kernels.backend import BACKENDS, Backend

NAMES = [name for name, backend in BACKENDS.items() if backend.unsupported(torch.device("cpu")) is None]


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]
