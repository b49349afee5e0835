"""Single layers: which there are, that each computes something, and how exact the gradients are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitnet_train.benchmarking.config import What
from bitnet_train.benchmarking.layers import Shape, builders, kept_bytes, model_shapes, own_layer, ternary_weights
from bitnet_train.benchmarking.noise import decibels, gradient_noise
from bitnet_train.benchmarking.run_layers import LayerResult, ShapeResult
from bitnet_train.commands import benchmark
from bitnet_train.config import Config
from bitnet_train.kernels.backend import BACKENDS, choose_backend
from bitnet_train.quant.spec import GradientPolicy, build_spec
from tests.benchmarking.conftest import SMALL
from tests.composing import compose_config

CPU = torch.device("cpu")


def test_the_shapes_of_a_model_are_those_that_one_input_meets() -> None:
    cfg = compose_config(*SMALL, "model.kv_heads=1")
    assert model_shapes(cfg.model, build_spec(cfg.quant)) == [
        Shape(32, (32, 16, 16)), Shape(32, (32,)), Shape(32, (64, 64)), Shape(64, (32,)),
    ]  # fmt: skip
    assert Shape(32, (32, 16, 16)).label() == "32 x 64 (3 layers)"


def test_float_layers_are_no_shapes() -> None:
    cfg = compose_config(*SMALL, 'quant.overrides=[{pattern:"*.[qk]_proj",scheme:float}]')
    shapes = model_shapes(cfg.model, build_spec(cfg.quant))
    assert Shape(32, (32,)) in shapes
    assert all(len(shape.rows) < 3 for shape in shapes)


def test_every_layer_computes_outputs_and_gradients_of_the_same_shapes() -> None:
    shape, backend = Shape(48, (32, 16)), choose_backend(CPU).backend
    layers = [build() for build in builders(backend, shape, 20, CPU, False, 1)]
    names = [layer.name for layer in layers]
    assert names[:2] == ["nn.Linear eager", "ternary dx=bf16 dw=bf16"]
    assert "textbook eager" in names
    assert not any("fp8" in name for name in names)
    for layer in layers:
        outputs = layer.forward(layer.x)
        assert sum(y.shape[-1] for y in outputs) == 48
        assert all(y.isfinite().all() for y in outputs)
        gradients = torch.autograd.grad(list(outputs), [layer.x, *layer.leaves], [torch.ones_like(y) for y in outputs])
        assert gradients[0].shape == (20, 48)
        assert sum(g.shape[0] for g in gradients[1:]) == 48


def test_bytes_kept_for_the_backward() -> None:
    shape, backend = Shape(64, (32,)), choose_backend(CPU).backend
    found = {
        layer.name: kept_bytes(layer) for build in builders(backend, shape, 16, CPU, False, 1) if (layer := build())
    }
    # The bf16 input; its weights are parameters.
    assert found["nn.Linear eager"] == 16 * 64 * 2
    # int8 codes of the input and of the weights, a float32 scale per token and per row.
    assert found["ternary dx=bf16 dw=bf16"] == 16 * 64 + 16 * 4 + 32 * 64 + 32 * 4
    # Quantised input and weights as floats, and more.
    assert found["textbook eager"] > 16 * 64 * 2 + 32 * 64 * 2


@pytest.mark.parametrize("name", [n for n, b in BACKENDS.items() if b.unsupported(CPU) is None and n != "triton"])
def test_the_noise_of_each_policy_is_that_of_the_facts(name: str) -> None:
    backend = BACKENDS[name]
    weights, _ = ternary_weights(backend, Shape(256, (512,)), CPU, "int8", 1)
    found = {
        policy: gradient_noise(backend, weights, 512, GradientPolicy(*policy), 1)
        for policy in (("bf16", "bf16"), ("int8", "bf16"), ("fp8", "bf16"), ("int8", "int8"))
    }
    assert found["bf16", "bf16"]["dx_gaussian"] == pytest.approx(52, abs=4)
    assert found["bf16", "bf16"]["dx_heavy"] == pytest.approx(52, abs=4)
    assert found["bf16", "bf16"]["dw_gaussian"] == pytest.approx(53, abs=4)
    assert found["int8", "bf16"]["dx_gaussian"] == pytest.approx(42, abs=3)
    assert found["int8", "bf16"]["dx_heavy"] == pytest.approx(28, abs=5)
    assert found["fp8", "bf16"]["dx_gaussian"] == pytest.approx(32, abs=3)
    assert 30 < found["int8", "int8"]["dw_gaussian"] < found["int8", "bf16"]["dw_gaussian"]
    assert decibels(torch.ones(2).double(), torch.ones(2)) == float("inf")
    assert decibels(torch.full((4,), 10.0).double(), torch.full((4,), 11.0)) == pytest.approx(20)


def test_our_layer_is_the_op_with_its_policy() -> None:
    backend = choose_backend(CPU).backend
    x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    layer = own_layer(backend, Shape(16, (8, 8)), x, ("int8", "bf16"), False, 1)
    weights, _ = ternary_weights(backend, Shape(16, (8, 8)), CPU, "int8", 1)
    expected = x.detach().float() @ (weights.codes.float() * weights.row_scale[:, None]).t()
    torch.testing.assert_close(torch.cat(list(layer.forward(x)), 1).float(), expected, rtol=0.05, atol=0.1)


def test_speeds_and_shares_of_the_ceiling() -> None:
    result = ShapeResult(Shape(10, (20,)), 100)
    result.layers = {
        "nn.Linear compiled": LayerResult("nn.Linear compiled", [1.0], [3.0]),
        "ternary dx=int8 dw=bf16": LayerResult("ternary dx=int8 dw=bf16", [0.5], [2.0]),
    }
    result.matmuls = {"bf16 matmul": [2.0], "int8 matmul": [1.0]}
    assert result.reference == "nn.Linear compiled"
    assert result.r == 2.0
    assert result.speed("ternary dx=int8 dw=bf16") == 1.5
    assert result.share_of_ceiling("ternary dx=int8 dw=bf16") == 1.0
    assert result.tflops("nn.Linear compiled") == pytest.approx(6 * 100 * 200 / 3 / 1e12)


def test_the_command_writes_the_layers(tmp_path: Path, small: Config) -> None:
    bench = replace(small.benchmark, what=What.layers, shapes=[[32, 48], [40, 24]], tokens=[8, 16], rounds=1)
    cfg = replace(small, run_name="l", paths=replace(small.paths, runs=str(tmp_path)), benchmark=bench)
    assert benchmark.run(cfg) == 0
    folder = tmp_path / "l" / "benchmark"
    assert sorted(p.name for p in folder.iterdir()) == ["layers.json", "layers.md", "layers.png"]
    content = json.loads((folder / "layers.json").read_text())
    assert [(s["k"], s["rows"], s["tokens"]) for s in content["shapes"]] == [
        (32, [48], 8), (32, [48], 16), (40, [24], 8), (40, [24], 16),
    ]  # fmt: skip
    for shape in content["shapes"]:
        assert shape["not_measured"] == {}
        assert shape["ceiling"] == pytest.approx(3 / (2 / shape["int8_over_bf16"] + 1))
        for layer in shape["layers"].values():
            assert len(layer["forward"]) == len(layer["both"]) == 1
            assert 0 < layer["predicted_forward"] < layer["predicted_both"]
            assert layer["kept_bytes"] > 0
    page = (folder / "layers.md").read_text()
    assert page.count("| nn.Linear eager |") == 4
