"""layers.csv against what the model itself says, and the warnings."""

import csv
import io
from pathlib import Path

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.nn.bit_linear import BitLinear, SharedInput, quantiser_input
from bitnet_train.nn.config import Activation, DecoderConfig, Norms
from bitnet_train.nn.decoder import Decoder
from bitnet_train.quant.activations import quantise_tokens
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.training.telemetry import layers
from bitnet_train.training.telemetry.config import TelemetryConfig, check_telemetry
from bitnet_train.training.telemetry.layers import COLUMNS
from tests.training.conftest import Workspace


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_rows_of_a_run_and_of_a_continued_one(workspace: Workspace) -> None:
    workspace.run("trainer.max_steps=6", "telemetry.every_steps=2", "run_name=whole")
    whole = rows(workspace.folder / "runs" / "whole" / "layers.csv")
    assert tuple(whole[0]) == COLUMNS
    assert sorted({int(row["step"]) for row in whole}) == [2, 4, 6]
    names = {row["layer"] for row in whole}
    assert "layers.0.self_attn.q_proj" in names
    assert len(whole) == 3 * len(names)
    for row in whole:
        assert 0.1 < float(row["zeros"]) < 0.6
        assert 0 <= float(row["flips"]) < 0.5
        assert float(row["scale"]) > 0
        assert float(row["input_absmax"]) > 0
        # absmax: every token has at least one input at the end of the codes
        assert 0 < float(row["input_saturated"]) < 0.2
        assert 0 < float(row["grad_norm_clipped"]) <= float(row["grad_norm"]) * 1.0001
    # the same as overall figures, weighted by size
    metrics = rows(workspace.folder / "runs" / "whole" / "metrics.csv")[-1]
    assert min(float(r["zeros"]) for r in whole[-len(names) :]) <= float(metrics["codes/zeros"])


def test_null_writes_nothing(workspace: Workspace) -> None:
    workspace.run("trainer.max_steps=2", "telemetry.every_steps=null", "run_name=none")
    assert not (workspace.folder / "runs" / "none" / "layers.csv").exists()


@pytest.mark.parametrize("norms", list(Norms))
def test_the_quantiser_input_is_what_was_quantised(norms: Norms) -> None:
    cfg = DecoderConfig(hidden=32, layers=2, heads=2, kv_heads=1, ffn=48, context=16, vocab=40, norms=norms,
                        activation=Activation.silu)  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(cfg, QuantSpec())
    names = {id(m): name for name, m in model.named_modules()}
    seen = {}

    def look(module: SharedInput, _: object, options: dict, returned: tuple) -> None:  # type: ignore[type-arg]
        x = quantiser_input(module, options, returned)
        for layer, output in zip(module.layers, returned[0], strict=True):
            assert isinstance(layer, BitLinear)
            codes, values = layer.quantised(), quantise_tokens(x).dequantise()
            torch.testing.assert_close(output, values @ codes.dequantise().t(), rtol=1e-3, atol=1e-4)
            seen[names[id(layer)]] = True

    for module in model.modules():
        if isinstance(module, SharedInput):
            module.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(torch.randint(40, (2, 8)))
    assert len(seen) == 14


@pytest.mark.parametrize(
    "cfg", [TelemetryConfig(0), TelemetryConfig(most_zeros=0.0), TelemetryConfig(most_zeros=1.5),
            TelemetryConfig(scale_factor=1.0)]
)  # fmt: skip
def test_impossible_settings_are_refused(cfg: TelemetryConfig) -> None:
    with pytest.raises(ConfigError, match="telemetry"):
        check_telemetry(cfg)


def test_a_layer_that_stands_still_is_said(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "STILL_CODES", 1)
    settings = ("telemetry.every_steps=1", "samples.every_steps=null", "checkpoint.every_steps=null")
    # So slow that none of its codes moves, while the others learn.
    slow = "optimizer.groups=[{pattern: 'layers.0.mlp.up_proj.*', lr: 1e-9}]"
    code, output = workspace.run(*settings, "trainer.max_steps=4", slow, "run_name=slow")
    assert code == 0, output
    text = " ".join(output.split())
    assert text.count("no code of layers.0.mlp.up_proj changed in the last 3 steps that were logged") == 1
    assert "warning at step 3: no code of layers.0.mlp.up_proj" in text
    assert text.count("no code of") == 1
    # Not for those that are told to stay, wherever they stand among the groups; all that move are looked at.
    for pattern, said in (("layers.0.mlp.up_proj.*", 0), ("embed_tokens.*", 0)):
        frozen = f"optimizer.groups=[{{pattern: '{pattern}', lr: 0}}]"
        text = workspace.run(*settings, "trainer.max_steps=4", frozen, f"run_name={pattern[:5]}")[1]
        assert text.count("no code of") == said, text
    both = "optimizer.groups=[{pattern: '*', lr: 1e-9}, {pattern: 'embed_tokens.*', lr: 0}]"
    text = " ".join(workspace.run(*settings, "trainer.max_steps=2", both, "run_name=all")[1].split())
    assert "warning at step 1: no code of any layer changed" in text


def test_a_collapsing_layer_is_said(workspace: Workspace) -> None:
    settings = ("trainer.max_steps=3", "telemetry.every_steps=1", "telemetry.most_zeros=0.05")
    text = " ".join(workspace.run(*settings)[1].split())
    assert "warning at step 1:" in text
    assert "of the codes of layers.0.self_attn.q_proj are zero" in text
    assert text.count("of the codes of layers.0.self_attn.q_proj are zero") == 1
