"""Which backend is taken, and what is said about it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.kernels import op  # noqa: F401  (registers the backends)
from bitnet_train.kernels.avx512 import build
from bitnet_train.kernels.backend import BACKENDS, choose_backend, register_backend
from bitnet_train.kernels.cpu import CpuBackend
from bitnet_train.kernels.reference import ReferenceBackend


class Picky(ReferenceBackend):
    name = "picky"
    device_types = ("cpu",)

    def __init__(self, obstacle: str | None) -> None:
        self.obstacle = obstacle

    def unsupported(self, device: torch.device) -> str | None:
        return self.obstacle


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    before = dict(BACKENDS)
    yield BACKENDS
    BACKENDS.clear()
    BACKENDS.update(before)


def test_the_cpu_takes_an_int8_backend_and_says_why_not_a_faster_one() -> None:
    choice = choose_backend("cpu")
    assert isinstance(choice.backend, CpuBackend)
    if choice.backend.name == "avx512":
        assert choice.reason == "the fastest for cpu"
    else:
        assert choice.reason.startswith("avx512: ")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"CXX": "/nonexistent/g++"}, "compiling its kernels with /nonexistent/g\\+\\+ failed"),
     ({"PATH": "/nonexistent", "CXX": ""}, "there is no C\\+\\+ compiler")],
)  # fmt: skip
def test_without_a_compiler_the_onednn_backend_is_taken_and_the_reason_given(
    registry: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    if BACKENDS["avx512"].unsupported(torch.device("cpu")):
        pytest.skip("this machine has no AVX-512 kernels to do without")
    monkeypatch.setenv("BITNET_TRAIN_CACHE", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    build.load.cache_clear()
    try:
        choice = choose_backend("cpu")
        assert choice.backend.name == "cpu"
        assert re.search(reason, choice.reason)
    finally:
        build.load.cache_clear()


def test_a_device_without_kernels_takes_the_reference_and_says_why() -> None:
    choice = choose_backend("mps")
    assert type(choice.backend) is ReferenceBackend
    assert choice.reason == "no faster kernels are written for mps"


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_named_backend_is_taken(name: str) -> None:
    choice = choose_backend(torch.device("cpu"), name)
    assert choice.backend.name == name
    assert "kernels.backend" in choice.reason


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        ConfigError, match=r"kernels\.backend=referense does not exist.*auto, .*Did you mean 'reference'\?"
    ):
        choose_backend("cpu", "referense")


def test_a_backend_that_cannot_run_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"kernels\.backend=cpu cannot run here: it needs a CPU, not cuda"):
        choose_backend("cuda", "cpu")


def test_the_last_registered_backend_that_can_run_is_preferred(registry: dict) -> None:
    register_backend(Picky(None))
    assert choose_backend("cpu").backend.name == "picky"
    register_backend(Picky("no such chip"))
    choice = choose_backend("cpu")
    assert choice.backend.name != "picky"
    assert choice.reason.startswith("picky: no such chip")


def test_no_backend_at_all_is_one_clear_error(registry: dict) -> None:
    registry.clear()
    register_backend(Picky("broken"))
    with pytest.raises(ConfigError, match="no kernel backend can run on cpu: picky: broken"):
        choose_backend("cpu")
