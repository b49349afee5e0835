"""Runs with the quantiser options on the command line: what a run on its way refuses, and what others export."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from bitnet_train.__main__ import answer
from bitnet_train.commands.sources import load_model
from bitnet_train.config import Config, from_plain, to_plain, to_yaml
from bitnet_train.data.config import DataConfig
from bitnet_train.data.prepare import prepare, shard_folder
from bitnet_train.data.tokenizer import load_tokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.decoder import Decoder
from bitnet_train.quant.config import (
    BitsProgressive,
    BitStage,
    Granularity,
    LambdaProgressive,
    LayerwiseProgressive,
    NoiseProgressive,
    OverrideConfig,
    ProgressiveConfig,
    QuantConfig,
    Statistic,
    SwitchProgressive,
    WeightQuantConfig,
)
from bitnet_train.quant.spec import build_spec
from bitnet_train.validation import validate
from tests.composing import compose_config, fresh_recipes
from tests.export.conftest import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
SHAPE = DecoderConfig(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, context=64, vocab=300)


@pytest.fixture
def make(tmp_path: Path, data_config: Callable[..., DataConfig]) -> Make:
    """Makes the folder of a run of 100 steps under a quantisation, with a checkpoint of ``step``."""

    def run(quant: QuantConfig, step: int) -> Path:
        folder = tmp_path / "runs" / f"at-{step}"
        cfg = Config(model=SHAPE, data=data_config(), quant=quant, run=str(folder))
        cfg.trainer.max_steps = 100
        cfg.paths.data, cfg.paths.runs = str(tmp_path / "data"), str(tmp_path / "runs")
        cfg.export.verify_tokens = 200
        manifest = prepare(cfg.data, Path(cfg.paths.data))
        data = {"consumed": 0, "fingerprint": manifest.fingerprint}
        for name in (f"step-{step:08d}", "last"):
            path = folder / "checkpoints" / f"{name}.ckpt"
            save_checkpoint(path, cfg.model, build_spec(cfg.quant), step, ShardDataModule=data)
        (folder / "config.yaml").write_text(to_yaml(cfg))
        load_tokenizer(shard_folder(cfg.data, Path(cfg.paths.data))).save(folder / "tokenizer")
        return folder

    return run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def execute(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = answer(list(arguments))
        out = capsys.readouterr()
        return code, " ".join(out.out.split()), out.err

    with fresh_recipes():
        yield execute


WAYS = [
    LambdaProgressive(until=0.5),
    SwitchProgressive(at=50),
    LayerwiseProgressive(until=50),
    NoiseProgressive(until=0.5),
]
COMMANDS = (
    ("command=export", "export.formats=[packed]"),
    ("command=evaluate",),
    ("command=generate", "generate.max_new_tokens=2"),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_run_on_its_way_is_refused(make: Make, run: Run, way: ProgressiveConfig) -> None:
    early = make(QuantConfig(progressive=way), 50)  # its last step was number 49, counted from 0
    for command in COMMANDS:
        code, _, error = run(*command, f"run={early}")
        assert code == 2, command
        assert f"step 50, where the weights are still on their way to codes (quant.progressive={way.name})" in error
        assert "train the run to its end" in error
        assert error.count("\n") == 1
    assert not (early / "export").exists()
    late = make(QuantConfig(progressive=way), 51)
    for command in COMMANDS:
        code, _, error = run(*command, f"run={late}")
        assert code == 0, (command, error)


def test_a_stage_of_more_bits_is_exported_as_what_it_is(make: Make, run: Run) -> None:
    way = BitsProgressive(stages=[BitStage(8, 0.2), BitStage(4, 0.5)])
    early = make(QuantConfig(progressive=way), 50)
    code, _, error = run("command=export", f"run={early}", "export.formats=[packed]")
    assert code == 2
    assert "those of layers.0.self_attn.q_proj have 4 bits (quant.weight.bits)" in error
    assert run("command=generate", f"run={early}", "generate.max_new_tokens=2")[0] == 0
    pytest.importorskip("transformers")
    code, _, error = run("command=export", f"run={early}", "export.formats=[hf-dense]")
    assert code == 0, error
    card = (early / "export" / "hf-dense" / "README.md").read_text()
    assert "of them symmetric" in card
    assert "ternary" not in card.partition("\n# ")[0]
    done = make(QuantConfig(progressive=way), 51)
    assert run("command=export", f"run={done}", "export.formats=[packed]")[0] == 0


def test_learned_scales_are_exported_and_verified(make: Make, run: Run) -> None:
    pytest.importorskip("transformers")
    folder = make(QuantConfig(WeightQuantConfig(trainable_scale=True)), 100)
    code, out, error = run("command=export", f"run={folder}", "export.formats=[packed,hf-packed]")
    assert code == 0, error
    assert "FAILED" not in out
    for name in ("packed", "hf-packed"):
        assert json.loads((folder / "export" / name / "verification.json").read_text())["passed"] is True
    assert run("command=generate", f"run={folder}", "generate.max_new_tokens=2")[0] == 0


def test_late_inputs_are_those_of_the_checkpoints_step(make: Make, run: Run) -> None:
    late = OverrideConfig("*", activation_bits=4, activation_statistic=Statistic.absmean, since=0.5)
    before = make(QuantConfig(overrides=[late]), 50)
    code, _out, error = run("command=export", f"run={before}")
    assert code == 0, error
    written = {path.name for path in (before / "export").iterdir()}
    assert {"packed"} <= written
    after = make(QuantConfig(overrides=[late]), 51)
    code, _, error = run("command=export", f"run={after}", "export.formats=[packed]")
    assert code == 2
    assert "(quant.activation.bits and quant.activation.statistic)" in error
    assert not (after / "export").exists()
    assert run("command=generate", f"run={after}", "generate.max_new_tokens=2")[0] == 0


def test_grouped_inputs_generate_from_packed_codes_what_they_generate_from_others(make: Make, run: Run) -> None:
    grouped = QuantConfig()
    grouped.activation.granularity = Granularity.group
    grouped.activation.group_size = 16
    folder = make(grouped, 100)
    code, _out, error = run("command=generate", f"run={folder}", "generate.max_new_tokens=8", "generate.prompt=def ")
    assert code == 0, error
    cfg = Config(run=str(folder), model=SHAPE, quant=grouped, data=DataConfig())
    model = load_model(cfg)
    ids = model.tokenizer.encode("def ")
    with torch.inference_mode():
        found = [model.tokenizer.bos_id, *ids]
        for _ in range(8):
            found.append(int(model.decoder(torch.tensor([found]))[0, -1].argmax()))
    greedy = run("command=generate", f"run={folder}", "generate.max_new_tokens=8", "generate.prompt='def '",
                 "generate.temperature=0")[1]  # fmt: skip
    assert greedy == " ".join(model.tokenizer.decode(found[1:]).split())


# --- configuration ---

MISTAKES = [
    (["quant.weight.bits=4"], ["quant.weight.bits=4 belongs to quant.weight.scheme=symmetric"]),
    (["quant.weight.statistic=median"], ["quant.weight.statistic=median", "absmedian"]),
    (["quant.activation.group_size=16"], ["granularity=group needs it"]),
    (["quant.activation.granularity=group", "quant.activation.group_size=7"], ["group_size=7 does not divide"]),
    (["quant/progressive=lambada"], ["quant/progressive=lambada", "mean 'lambda'"]),
    (["quant.progressive.until=0.5"], ["quant/progressive=none has no settings", "until belongs to quant/progr"]),
    (["quant.progressive.name=lambda"], ["write quant/progressive=lambda"]),
    (["quant/progressive=lambda", "quant.progressive.until=900"], ["step 900", "trainer.max_steps=600"]),
    (["quant/progressive=lambda", "quant.progressive.until=.nan"], ["nan"]),
    (["quant/progressive=lambda", "quant.progressive.shape=square"], ["quant.progressive.shape=square"]),
    (["quant/progressive=bits", "quant.progressive.stages=[{bits:8}]"], ["until"]),
    (["quant/progressive=noise", "quant=none"], ["quant=none"]),
    (['quant.overrides=[{pattern:"*",since:0.5,hadamard:true}]'], ["hadamard cannot change on the way"]),
    (['quant.overrides=[{pattern:"*",since:900,top_k:0.5}]'], ["is step 900, which must lie within the run"]),
    (['quant.overrides=[{pattern:"*",since:0.5,activation_granularity:group},'
      '{pattern:"*",since:0.9,activation_group_size:16}]'], ["granularity=group needs it"]),
    (['quant.overrides=[{pattern:"*",since:0.5,activation_granularity:group,activation_group_size:7},'
      '{pattern:"*",since:0.9,activation_group_size:16}]'], ["group_size=7 does not divide"]),
    (["model.norms=inside", "export.formats=[hf-packed]"], ["no architecture of its consumer", "model.norms=inside"]),
    (["quant=bitnet_v2", "export.formats=[hf-dense]"], ["does not rotate the inputs of"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_sentence_and_exit_code_2(run: Run, arguments: list[str], words: list[str]) -> None:
    code, _, error = run("+recipe=tiny", *arguments)
    assert code == 2, error
    assert "Traceback" not in error
    for word in words:
        assert word in error, error


def test_a_later_change_may_build_on_an_earlier_one() -> None:
    first = '{pattern:"*",since:0.5,activation_granularity:group,activation_group_size:64}'
    cfg = compose_config(
        "+recipe=tiny", f'quant.overrides=[{first},{{pattern:"*",since:0.9,activation_group_size:16}}]'
    )
    spec = build_spec(cfg.quant)
    assert [spec.at(step, 100).for_layer("a").activation_group_size for step in (0, 50, 90)] == [None, 64, 16]


def test_cfg_job_shows_every_option_with_its_default(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert answer(["+recipe=tiny", "--cfg", "job"]) == 0
    quant: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["quant"]
    assert quant["weight"] == {
        "scheme": "ternary", "bits": None, "statistic": None, "threshold": 0.5, "groups": 1, "group_rows": None,
        "trainable_scale": False,
    }  # fmt: skip
    assert quant["activation"] == {
        "bits": 8, "statistic": "absmax", "granularity": "token", "group_size": None, "top_k": 1.0, "hadamard": False,
    }  # fmt: skip
    assert quant["progressive"] == {"name": "none"}
    assert answer(["+recipe=tiny", "quant/progressive=bits", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["quant"]["progressive"]
    assert shown == {"name": "bits", "stages": [{"bits": 8, "until": 0.1}, {"bits": 4, "until": 0.2}]}


def assert_estimated(run: Run, settings: str) -> None:
    """The estimate of these settings has the parameters of the model, and needs some memory for them."""
    code, _, error = run("+recipe=tiny", *settings.split(), "command=estimate")
    assert code == 0, error
    estimate = json.loads(Path("runs/tiny/estimate/estimate.json").read_text())
    with torch.device("meta"):
        cfg = compose_config("+recipe=tiny", *settings.split())
        model = Decoder(cfg.model, build_spec(cfg.quant))
    scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight_scale"))
    assert estimate["parameters"]["total"] == sum(p.numel() for p in model.parameters()) - scales


@pytest.mark.parametrize("quant", ["bitnet_v2", "bitnet_a4_8", "mixed", "trilm", "binary", "none", "ternary"])
def test_every_shipped_quantisation_composes_is_estimated_and_reads_back(run: Run, quant: str) -> None:
    cfg = compose_config("+recipe=tiny", f"quant={quant}")
    again = from_plain(yaml.safe_load(to_yaml(cfg)), Path("config.yaml"))
    assert OmegaConf.to_object(again) == cfg
    assert_estimated(run, f"quant={quant}")


@pytest.mark.parametrize(
    "settings",
    ["model.norms=inside", "quant.weight.scheme=symmetric quant.weight.bits=4", "quant.weight.trainable_scale=true",
     "quant/progressive=layerwise", "quant.activation.granularity=group quant.activation.group_size=16"],
)  # fmt: skip
def test_estimates_of_the_options(run: Run, settings: str) -> None:
    assert_estimated(run, settings)


def test_configurations_of_older_runs_still_load() -> None:
    cfg = compose_config("+recipe=tiny")
    plain = to_plain(cfg)
    del plain["quant"]["progressive"]
    for key in ("bits", "statistic", "group_rows", "trainable_scale"):
        del plain["quant"]["weight"][key]
    for key in ("statistic", "granularity", "group_size", "top_k", "hadamard"):
        del plain["quant"]["activation"][key]
    plain["quant"]["overrides"] = [{"pattern": "*.o_proj", "scheme": "float", "threshold": None, "groups": None,
                                    "activation_bits": None}]  # fmt: skip
    old = OmegaConf.to_object(from_plain(plain, Path("config.yaml")))
    assert isinstance(old, Config)
    validate(old)
    assert build_spec(old.quant).default == build_spec(cfg.quant).default
    assert not build_spec(old.quant).for_layer("layers.0.self_attn.o_proj").quantised
    plain["quant"]["progressive"] = {"name": "spiral"}
    with pytest.raises(ConfigError, match=r"quant\.progressive\.name is 'spiral', which this version does not know"):
        from_plain(plain, Path("config.yaml"))
