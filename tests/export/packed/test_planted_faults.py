"""Verification rejects every fault planted in a folder of the format ``packed``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from bitnet_train.errors import VerificationError
from tests.export.conftest import MakeExport, edit_json, edit_tensors

UP = "layers.0.mlp.up_proj"


class Fault(NamedTuple):
    """A kind of model, what is planted, and the checks that must fail."""

    kind: str
    plant: Callable[[Path], None]
    checks: set[str]


def config(*path: str, value: Any) -> Callable[[Path], None]:
    """Another value in config.json, at the end of a path of keys."""

    def edit(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        assert content[path[-1]] != value
        content[path[-1]] = value

    return lambda folder: edit_json(folder / "config.json", edit)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)  # type: ignore[arg-type]


def other_code(found: dict[str, Tensor]) -> None:
    """The lowest digit of a byte as another one."""
    packed = found[f"{UP}.codes"]
    packed[3] += 1 if int(packed[3]) % 3 < 2 else -1


def swap(first: str, second: str) -> Callable[[Path], None]:
    def change(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if f".{first}." in name]:
            other = name.replace(first, second)
            found[name], found[other] = found[other], found[name]

    return tensors(change)


def without_merges(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda content: content["model"]["merges"].clear())


FAULTS = {
    "one code": Fault("2b4t", tensors(other_code), {"codes"}),
    "one scale": Fault("2b4t", tensors(lambda t: t[f"{UP}.scale"].mul_(1.000001)), {"scales"}),
    "scale of one group": Fault("groups", tensors(lambda t: t[f"{UP}.scale"][2:3].mul_(1.000001)), {"scales"}),
    "inverse scale": Fault("2b4t", tensors(lambda t: t[f"{UP}.scale"].reciprocal_()), {"scales"}),
    "q and k swapped": Fault("2b4t", swap("q_proj", "k_proj"), {"codes", "scales"}),
    "gate and up swapped": Fault("silu", swap("gate_proj", "up_proj"), {"codes", "held-out perplexity"}),
    "embedding row": Fault("2b4t", tensors(lambda t: t["embed_tokens.weight"][5].mul_(1.001)), {"unquantised tensors"}),
    "norm": Fault("2b4t", tensors(lambda t: t["norm.weight"][:1].mul_(1.001)), {"unquantised tensors"}),
    "float layer": Fault(
        "mixed", tensors(lambda t: t["layers.1.mlp.up_proj.weight"][0].mul_(1.001)), {"unquantised tensors"}
    ),
    "norm eps": Fault("2b4t", config("model", "norm_eps", value=1e-6), {"config: model"}),
    "rope theta": Fault("2b4t", config("model", "rope_theta", value=1e2), {"config: model", "held-out perplexity"}),
    "activation": Fault("2b4t", config("model", "activation", value="silu"), {"config: model", "held-out perplexity"}),
    "context": Fault("2b4t", config("model", "context", value=64), {"config: model"}),
    "scheme": Fault("2b4t", config("quantised_layers", UP, "scheme", value="binary"), {"config: quantised layers"}),
    "inputs": Fault(
        "2b4t",
        config("quantised_layers", UP, "activation_bits", value=None),
        {"config: quantised layers", "held-out perplexity"},
    ),
    "float inputs": Fault(
        "float inputs", config("quantised_layers", UP, "activation_bits", value=8), {"config: quantised layers"}
    ),
    "packing": Fault("2b4t", config("packing", value="two_bit"), {"loads"}),
    "dtype": Fault("2b4t", config("dtype", value="bfloat16"), {"loads"}),
    "no merges": Fault("2b4t", without_merges, {"token ids of held-out text"}),
    "no tokenizer": Fault("2b4t", lambda folder: (folder / "tokenizer.json").unlink(), {"tokenizer"}),
    "missing tensor": Fault("2b4t", tensors(lambda t: t.pop(f"{UP}.scale")), {"loads"}),
    "no weights": Fault("2b4t", lambda folder: (folder / "model.safetensors").unlink(), {"loads"}),
    "broken config": Fault("2b4t", lambda folder: (folder / "config.json").write_text("{"), {"loads"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_rejected(name: str, exported: MakeExport, tmp_path: Path) -> None:
    fault = FAULTS[name]
    export = exported(fault.kind, "packed").copy(tmp_path / "copy")
    fault.plant(export.folder)
    report = export.verify()
    assert {check.name for check in report.failed} >= fault.checks
    with pytest.raises(VerificationError) as caught:
        report.raise_if_failed()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["bos_id", "eos_id"])
def test_another_special_id_is_rejected(key: str, exported: MakeExport, tmp_path: Path) -> None:
    export = exported("2b4t", "packed").copy(tmp_path / "copy")
    edit_json(export.folder / "special_tokens.json", lambda content: content.update({key: 9}))
    config(f"{key.removesuffix('_id')}_token_id", value=9)(export.folder)
    assert f"config: tokenizer.{key}" in {row.name for row in export.verify().failed}


@pytest.mark.parametrize(
    ("there", "run"), [("2b4t", "mixed"), ("mixed", "2b4t"), ("llama", "2b4t"), ("groups", "rows")]
)
def test_the_export_of_another_run_is_rejected(there: str, run: str, exported: MakeExport, tmp_path: Path) -> None:
    export = exported(there, "packed").copy(tmp_path / "copy")
    failed = {row.name for row in exported(run, "packed").run.verify(export.folder, "packed").failed}
    assert "scales" in failed
    if run != "rows":
        assert failed >= {"unquantised tensors", "config: quantised layers"} or "config: model" in failed
