from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.export.tensor_file import TensorFileWriter, TensorInfo


def test_the_library_reads_what_was_written_in_any_order(tmp_path: Path) -> None:
    tensors = {
        "codes": torch.randint(0, 255, (3, 7), dtype=torch.uint8),
        "float": torch.randn(5, 3),
        "scale": torch.randn(1).bfloat16(),
        "rows": torch.randn(4, 6).t(),
    }
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    with TensorFileWriter(path, infos, {"step": "3"}) as file:
        for name in ("scale", "codes", "rows", "float"):
            file.write(name, tensors[name])
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert path.stat().st_size % 8 == sum(info.bytes for info in infos.values()) % 8


def test_a_forgotten_or_wrong_tensor_is_an_error(tmp_path: Path) -> None:
    infos = {"a": TensorInfo(torch.float32, (2,)), "b": TensorInfo(torch.float32, (2,))}
    with (
        pytest.raises(ValueError, match="1 tensors were not written, among them b"),
        TensorFileWriter(tmp_path / "x", infos, {}) as file,
    ):
        file.write("a", torch.zeros(2))
    with TensorFileWriter(tmp_path / "x", {"a": infos["a"]}, {}) as file:
        with pytest.raises(ValueError, match="announced"):
            file.write("a", torch.zeros(3))
        file.write("a", torch.zeros(2))
