"""llama.cpp on one thread, as torch in the folder above: on tiny models a second one only waits for the first."""

import pytest


@pytest.fixture(autouse=True)
def _llama_cpp_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
