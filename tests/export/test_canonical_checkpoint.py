import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.export import canonical as canonical_module
from bitnet_train.export.canonical import open_checkpoint
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import NormalInit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.quant.weights import Codes
from tests.export.conftest import KINDS, MakeRun, SmallRun, decoder_config, save_checkpoint


def trained_decoder(run: SmallRun) -> Decoder:
    """The run's decoder with its master weights, as training holds it."""
    model = build_decoder(run.canonical.cfg, run.canonical.spec, NormalInit(), seed=0)
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("decoder."): tensor for name, tensor in state.items()})
    CodeCache(model)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_training_codes_one_by_one(kind: str, small_run: MakeRun) -> None:
    run = small_run(kind)
    modules = dict(trained_decoder(run).named_modules())
    for name, layer in run.canonical.quantised.items():
        codes, kept = run.canonical.codes(name), modules[name].kept
        assert torch.equal(codes.codes, kept.codes)
        assert torch.equal(codes.scale, kept.scale)
        assert modules[name].quant == layer


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_without_master_weights_computes_what_training_computes(kind: str, small_run: MakeRun) -> None:
    run = small_run(kind)
    ids = run.held_out.ids[:64].reshape(2, 32)
    with torch.no_grad():
        assert torch.equal(run.canonical.decoder()(ids), trained_decoder(run)(ids))


def test_one_layer_at_a_time_is_alive(small_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0
    original = canonical_module.quantise_weight

    def watched(*args: Any) -> Codes:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        codes = original(*args)
        alive.append(weakref.ref(codes.codes))
        return codes

    monkeypatch.setattr(canonical_module, "quantise_weight", watched)
    run = small_run("2b4t")
    run.write(tmp_path / "export")
    assert len(alive) == len(run.canonical.quantised)
    assert most <= 1


def test_checkpoint_is_mapped_not_read(small_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run("2b4t")
    seen: dict[str, Any] = {}
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: seen.update(kwargs) or load(*args, **kwargs))
    open_checkpoint(run.checkpoint, run.canonical.cfg, run.canonical.spec)
    assert seen["mmap"] is True
    assert seen["weights_only"] is True


def test_a_checkpoint_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    cfg, spec = decoder_config(), QuantSpec()
    with pytest.raises(ConfigError, match="does not exist"):
        open_checkpoint(tmp_path / "none.ckpt", cfg, spec)
    garbage = tmp_path / "garbage.ckpt"
    garbage.write_bytes(b"PK not a checkpoint")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_checkpoint(garbage, cfg, spec)
    good = save_checkpoint(tmp_path / "good.ckpt", cfg, spec)
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(good.read_bytes()[:-3000])
    with pytest.raises(ConfigError, match="cannot be read"):
        open_checkpoint(truncated, cfg, spec)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight is \(416, 64\) instead of \(417, 64\)"):
        open_checkpoint(good, decoder_config(vocab=417), spec)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is missing"):
        open_checkpoint(good, decoder_config(tie_embeddings=False), spec)
    with pytest.raises(ConfigError, match=r"layers.1.* instead of absent"):
        open_checkpoint(good, decoder_config(layers=1), spec)


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "norm.weight"])
def test_weights_that_are_not_finite_are_refused(name: str, small_run: MakeRun, tmp_path: Path) -> None:
    run = small_run("2b4t")
    content = torch.load(run.checkpoint, weights_only=True)
    content["state_dict"][f"decoder.{name}"].view(-1)[5] = float("nan")
    torch.save(content, tmp_path / "nan.ckpt")
    broken = open_checkpoint(tmp_path / "nan.ckpt", run.canonical.cfg, run.canonical.spec)
    run.canonical = broken
    with pytest.raises(ConfigError, match=rf"{name.removesuffix('.weight')}.*not finite"):
        run.write(tmp_path / "export")
    assert not list(tmp_path.glob("*export*"))
