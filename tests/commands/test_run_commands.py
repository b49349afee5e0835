"""export, verify, evaluate and generate on a small run, as the command line runs them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_train.commands import run as run_command
from bitnet_train.config import Command, Config, to_yaml
from bitnet_train.data.config import DataConfig
from bitnet_train.data.prepare import prepare, shard_folder
from bitnet_train.data.tokenizer import load_tokenizer
from bitnet_train.errors import ConfigError, VerificationError
from bitnet_train.evaluation.compression import compressed_bits_per_byte
from bitnet_train.export import rules
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.quant.config import ActivationQuantConfig, QuantConfig, WeightQuantConfig, WeightScheme
from bitnet_train.quant.spec import build_spec
from tests.export.conftest import edit_json, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

Do = Callable[..., str]
SHAPE = DecoderConfig(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, context=64, vocab=300)


@pytest.fixture
def config(tmp_path: Path, data_config: Callable[..., DataConfig]) -> Config:
    """The configuration of a run in tmp_path/runs/small, whose folder, shards and checkpoint exist."""
    cfg = Config(model=SHAPE, data=data_config(), run_name="small", run=str(tmp_path / "runs" / "small"))
    cfg.paths.data, cfg.paths.runs = str(tmp_path / "data"), str(tmp_path / "runs")
    cfg.export.verify_tokens = 200
    manifest = prepare(cfg.data, Path(cfg.paths.data))
    save(cfg, step=5, fingerprint=manifest.fingerprint)
    save(cfg, step=7, fingerprint=manifest.fingerprint)
    folder = Path(cfg.run)
    shutil.copyfile(folder / "checkpoints" / "step-00000007.ckpt", folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(to_yaml(cfg))
    load_tokenizer(shard_folder(cfg.data, Path(cfg.paths.data))).save(folder / "tokenizer")
    return cfg


def save(cfg: Config, step: int, fingerprint: str) -> Path:
    path = Path(str(cfg.run)) / "checkpoints" / f"step-{step:08d}.ckpt"
    data = {"consumed": 0, "fingerprint": fingerprint}
    return save_checkpoint(path, cfg.model, build_spec(cfg.quant), step, seed=step, ShardDataModule=data)


@pytest.fixture
def do(config: Config, capsys: pytest.CaptureFixture[str]) -> Do:
    """Runs a command on the run; what it printed."""

    def execute(command: Command) -> str:
        config.command = command
        capsys.readouterr()
        assert run_command(config) == 0
        return capsys.readouterr().out

    return execute


@pytest.fixture
def export(do: Do, config: Config) -> Path:
    """The run's verified export."""
    pytest.importorskip("transformers")
    do(Command.export)
    return Path(str(config.run)) / "export" / "hf-packed"


def test_export_writes_measures_and_verifies(do: Do, config: Config) -> None:
    pytest.importorskip("transformers")
    out = do(Command.export)
    folder = Path(str(config.run)) / "export" / "hf-packed"
    assert str(folder) in out
    assert "step 7" in out
    assert "2.0" in out  # bits per quantised weight
    assert "FAILED" not in out
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "bitnet_train.json", "README.md", "verification.json",
    }  # fmt: skip
    assert json.loads((folder / "verification.json").read_text())["passed"] is True
    assert "FAILED" not in do(Command.verify)


def test_export_writes_every_format_that_fits_and_says_why_not_the_others(do: Do, config: Config) -> None:
    pytest.importorskip("transformers")
    out = do(Command.export)
    written = {folder.name for folder in (Path(str(config.run)) / "export").iterdir()}
    assert written == {"hf-packed", "hf-master", "hf-dense", "packed"}
    assert "gguf-i2_s left out: its rows are whole blocks of 128 weights" in " ".join(out.split())
    for name in written:
        assert f"export/{name} (step 7)" in out
        report = json.loads((Path(str(config.run)) / "export" / name / "verification.json").read_text())
        assert (report["format"], report["passed"]) == (name, True)


def test_verify_rejects_an_edited_export(do: Do, export: Path) -> None:
    edit_json(export / "config.json", lambda content: content.update(rms_norm_eps=1e-6))
    with pytest.raises(VerificationError, match="rms_norm_eps"):
        do(Command.verify)


def test_verify_compares_with_the_step_that_was_exported(do: Do, export: Path, config: Config) -> None:
    checkpoints = Path(str(config.run)) / "checkpoints"
    shutil.copyfile(checkpoints / "step-00000005.ckpt", checkpoints / "last.ckpt")
    assert "against step 7" in do(Command.verify)
    (checkpoints / "step-00000007.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"made from step 7, whose checkpoint .* no longer keeps"):
        do(Command.verify)


def test_verify_without_an_export(do: Do, config: Config) -> None:
    with pytest.raises(ConfigError, match="export first"):
        do(Command.verify)
    config.export.formats = ["hf-packed"]
    with pytest.raises(ConfigError, match="hf-packed does not exist: export first"):
        do(Command.verify)


def test_export_without_transformers_writes_what_needs_none(
    do: Do, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    out = " ".join(do(Command.export).split())
    assert "hf-packed left out: it is verified with transformers and accelerate, not installed here: pip install" in out
    assert [folder.name for folder in (Path(str(config.run)) / "export").iterdir()] == ["packed"]


def test_a_named_format_without_its_consumer_writes_nothing(
    do: Do, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    config.export.formats = ["packed", "hf-packed"]
    with pytest.raises(ConfigError, match=r"export\.formats: hf-packed: .* pip install"):
        do(Command.export)
    assert not (Path(str(config.run)) / "export").exists()


def test_a_format_that_cannot_hold_the_model_is_named(do: Do, config: Config) -> None:
    config.quant, config.export.formats = QuantConfig(WeightQuantConfig(groups=4)), ["hf-packed"]
    with pytest.raises(ConfigError, match="hf-packed cannot hold this model: it holds one scale per tensor"):
        do(Command.export)
    assert not (Path(str(config.run)) / "export").exists()
    config.export.formats = None
    out = " ".join(do(Command.export).split())
    assert "hf-packed left out: it holds one scale per tensor" in out
    assert {folder.name for folder in (Path(str(config.run)) / "export").iterdir()} >= {"packed"}


def test_evaluate_measures_run_and_export_alike(do: Do, export: Path, config: Config) -> None:
    on_run = do(Command.evaluate)
    config.run = str(export)
    on_export = do(Command.evaluate)
    assert "bits per byte" in on_run
    assert "gzip -9" in on_run
    assert "xz -9" in on_run
    assert on_run.splitlines()[1:] == on_export.splitlines()[1:]
    assert "step 7" in on_run
    assert "export" in on_export.splitlines()[0]


def test_evaluate_on_a_text_file(do: Do, config: Config, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("def héllo(x):\r\n    return x\r\n".encode() * 20)
    config.evaluate.text = str(text)
    config.evaluate.window = 8
    out = do(Command.evaluate)
    assert f"{len(text.read_bytes()):,} bytes" in out
    assert "windows of 8" in out
    assert f"{compressed_bits_per_byte(text.read_bytes())['xz -9']:.4f}" in out


def test_an_unquantised_run_can_be_evaluated_and_generates(do: Do, config: Config) -> None:
    config.quant = QuantConfig(WeightQuantConfig(WeightScheme.float), ActivationQuantConfig(None))
    assert "bits per byte" in do(Command.evaluate)
    assert do(Command.generate).startswith("def ")


@pytest.mark.parametrize(
    ("content", "pattern"), [(None, "cannot be read: No such file"), (b"", "is empty"), (b"a\xff\xfe", "not UTF-8")]
)
def test_texts_that_cannot_be_measured(
    content: bytes | None, pattern: str, do: Do, config: Config, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    config.evaluate.text = str(text)
    with pytest.raises(ConfigError, match=pattern):
        do(Command.evaluate)
    config.evaluate.text = str(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        do(Command.evaluate)


def test_an_export_copied_elsewhere(do: Do, export: Path, config: Config, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def return self\n" * 9)
    config.evaluate.text = str(tmp_path / "text.txt")
    config.run = str(export)
    config.generate.max_new_tokens = 9
    figures, words = do(Command.evaluate), do(Command.generate)
    copy = tmp_path / "far" / "away" / "model"
    shutil.copytree(export, copy)
    fresh = Config(run=str(copy), evaluate=config.evaluate, generate=config.generate)
    config.__dict__.update(fresh.__dict__)
    config.evaluate.window = 16  # the run trained with 16, which only its config.yaml knows
    assert do(Command.evaluate).splitlines()[1:] == figures.splitlines()[1:]
    assert do(Command.generate) == words
    config.evaluate.text = None
    with pytest.raises(ConfigError, match=r"give evaluate.text=FILE"):
        do(Command.evaluate)


def test_generate_prints_prompt_and_continuation_only(do: Do, export: Path, config: Config) -> None:
    config.generate.prompt, config.generate.max_new_tokens = "class [bold]", 12
    words = do(Command.generate)
    assert words.startswith("class [bold]")
    assert words.endswith("\n")
    assert do(Command.generate) == words
    config.run = str(export)
    assert do(Command.generate) == words


def test_runs_that_are_not_complete(do: Do, config: Config) -> None:
    folder = Path(str(config.run))
    shards = shard_folder(config.data, Path(config.paths.data))
    shards.rename(shards.with_name("moved"))
    with pytest.raises(ConfigError, match="do not exist: work from the folder that it was trained in"):
        do(Command.export)
    shards.with_name("moved").rename(shards)
    save(config, step=7, fingerprint="of other shards").replace(folder / "checkpoints" / "last.ckpt")
    with pytest.raises(ConfigError, match="does not hold the token shards"):
        do(Command.evaluate)
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    for command in (Command.export, Command.verify, Command.evaluate, Command.generate):
        with pytest.raises(ConfigError, match="saved no checkpoint yet"):
            do(command)


def test_folders_that_are_no_run(do: Do, export: Path, config: Config, tmp_path: Path) -> None:
    run = config.run
    config.run = str(export)
    with pytest.raises(ConfigError, match=f"no config.yaml.; the run is {run}"):
        do(Command.verify)
    config.run = str(tmp_path)
    with pytest.raises(ConfigError, match="neither a run"):
        do(Command.generate)


def test_the_whole_way_on_the_command_line(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitnet_train.__main__ import answer
    from tests.composing import fresh_recipes

    monkeypatch.chdir(tmp_path)
    with fresh_recipes():
        assert answer(["command=evaluate", "run=runs/small"]) == 0
        assert "bits per byte" in capsys.readouterr().out
        assert answer(["command=generate", "run=runs/small/export/hf-packed", "generate.max_new_tokens=3"]) == 0
        assert answer(["command=verify", "run=runs/small"]) == 0
        edit_json(export / "config.json", lambda content: content.update(eos_token_id=9))
        assert answer(["command=verify", "run=runs/small"]) == 4
        errors = capsys.readouterr().err
        assert "eos_token_id" in errors
        assert errors.count("\n") == 1
        (export / "model.safetensors").write_bytes(b"short")
        assert answer(["command=generate", "run=runs/small/export/hf-packed"]) == 2
        assert "damaged" in capsys.readouterr().err
