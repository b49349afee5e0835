"""The house rules that code can hold: imports point down, and a typo is answered before anything heavy is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "lightning", "transformers", "tokenizers", "datasets", "matplotlib", "numpy", "rich")


def loaded_by(module: str, names: tuple[str, ...]) -> list[str]:
    """Which of ``names`` a fresh Python has loaded after importing ``module``."""
    script = f"import sys, {module}; print(*[n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def test_imports_point_down() -> None:
    pytest.importorskip("importlinter")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("an installed wheel has no pyproject.toml")
    script = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["bitnet_train.validation", "bitnet_train.recipes", "bitnet_train.explain"])
def test_the_configuration_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(module, HEAVY) == []


def test_the_program_loads_no_torch_before_it_knows_what_to_do() -> None:
    assert loaded_by("bitnet_train.__main__", ("torch", "lightning", "transformers", "numpy", "matplotlib")) == []


def test_estimating_needs_no_torch() -> None:
    assert loaded_by("bitnet_train.commands.estimate", ("torch", "lightning", "transformers")) == []


@pytest.mark.parametrize("layer", ["quant.weights", "kernels.op", "nn.decoder"])
def test_the_library_stands_without_hydra_and_lightning(layer: str) -> None:
    assert loaded_by(f"bitnet_train.{layer}", ("hydra", "lightning", "transformers")) == []
