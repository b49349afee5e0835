"""The configuration's own rules: saving and reading back, and what may change when a run is continued."""

import inspect
import re
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from bitnet_train.config import KINDS, VARIANTS, Config, flatten, from_plain, to_plain, to_yaml
from bitnet_train.errors import ConfigError
from bitnet_train.training.schedules.config import WsdSchedule
from bitnet_train.validation import MAY_CHANGE, check_continuation, known_keys, unknown_key, validate
from tests.composing import RECIPES, choosing, compose_config

ORIGIN = Path("runs/tiny/config.yaml")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("more", [[], ["schedule=wsd", "quant.weight.groups=row", "logger=wandb"]])
def test_a_saved_configuration_reads_back_equal(recipe: str, more: list[str]) -> None:
    cfg = compose_config(*choosing(recipe), *more)
    again = OmegaConf.to_object(from_plain(yaml.safe_load(to_yaml(cfg)), ORIGIN))
    assert again == cfg
    assert isinstance(again, Config)
    validate(again)


def test_a_saved_configuration_has_no_references_left() -> None:
    assert "${" not in to_yaml(compose_config("+recipe=tiny"))
    assert to_plain(compose_config("+recipe=tiny"))["model"]["vocab"] == 4096


def test_a_configuration_of_a_version_without_kinds_reads_back_and_continues() -> None:
    cfg = compose_config("+recipe=tiny")
    plain = to_plain(cfg)
    old = {**plain, **{key: {k: v for k, v in plain[key].items() if k != "name"} for key in KINDS}}
    assert OmegaConf.to_object(from_plain(old, ORIGIN)) == cfg
    check_continuation(old, cfg, ORIGIN)
    with pytest.raises(ConfigError, match=r"with model\.ffn=768"):
        check_continuation(old, compose_config("+recipe=tiny", "model.ffn=512"), ORIGIN)


def without_later_keys(plain: dict[str, Any]) -> dict[str, Any]:
    """As a version saved it that had none of these settings."""
    old = {key: value for key, value in plain.items() if key not in ("regulariser", "guard", "telemetry", "convert")}
    for key, later in {
        "quant": ("progressive",), "trainer": ("batch_warmup",), "optimizer": ("groups", "layer_lr_decay"),
        "init": ("overrides", "sub_norms"), "loss": ("z_loss", "reduction"),
        "model": ("name", "head_width", "attention_bias", "qk_norm"), "data": ("name",),
    }.items():  # fmt: skip
        old[key] = {k: v for k, v in old[key].items() if k not in later}
    first = ("pattern", "scheme", "threshold", "groups", "activation_bits")
    overrides = [{key: override[key] for key in first} for override in old["quant"]["overrides"]]
    old["quant"] = {**old["quant"], "overrides": overrides}
    old["quant"]["weight"] = {key: old["quant"]["weight"][key] for key in ("scheme", "threshold", "groups")}
    old["quant"]["activation"] = {"bits": old["quant"]["activation"]["bits"]}
    return old


LATER = [
    ("quant/progressive=lambda", "quant.progressive.name=none"),
    ("regulariser=codes", "regulariser.name=none"),
    ("guard.skip_non_finite=true", "guard.skip_non_finite=False"),
    ("loss.z_loss=1e-4", "loss.z_loss=0.0"),
    ("trainer.batch_warmup=[{until:10,tokens:1024}]", "trainer.batch_warmup=[]"),
    ("optimizer.layer_lr_decay=0.9", "optimizer.layer_lr_decay=1.0"),
    ("quant.weight.trainable_scale=true", "quant.weight.trainable_scale=False"),
]


def test_a_run_of_an_earlier_version_continues_while_later_keys_have_their_defaults() -> None:
    base = ("+recipe=tiny", 'quant.overrides=[{pattern:"*o_proj",groups:4}]')
    cfg = compose_config(*base)
    old = without_later_keys(to_plain(cfg))
    assert len(dict(flatten(old))) < len(dict(flatten(to_plain(cfg)))) - 20
    assert OmegaConf.to_object(from_plain(old, ORIGIN)) == cfg
    check_continuation(old, cfg, ORIGIN)
    for override, before in LATER:
        with pytest.raises(ConfigError, match=re.escape(f"was started with {before}")):
            check_continuation(old, compose_config(*base, override), ORIGIN)


@pytest.mark.parametrize(("key", "name"), [("model", "decoder"), ("data", "text")])
def test_a_saved_configuration_of_an_unknown_kind_is_refused(key: str, name: str) -> None:
    plain = to_plain(compose_config("+recipe=tiny"))
    assert plain[key]["name"] == name
    with pytest.raises(ConfigError, match=f"{key}.name is 'sounds'"):
        from_plain({**plain, key: {**plain[key], "name": "sounds"}}, ORIGIN)


def test_the_model_and_the_data_are_of_one_kind() -> None:
    for choice in ("model=digits_vit", "data=digits"):
        with pytest.raises(ConfigError, match="data="):
            compose_config("+recipe=tiny", choice)
    cfg = compose_config("+recipe=digits_mlp")
    assert (cfg.classifier.pixels, cfg.images.batch_size) == (64, 64)
    for name in ("decoder", "text"):
        with pytest.raises(ConfigError, match="works on"):
            getattr(cfg, name)


def test_overrides_survive_the_round_trip() -> None:
    overrides = 'quant.overrides=[{pattern:"layers.0.*",scheme:float},{pattern:"*",groups:row}]'
    cfg = compose_config("+recipe=tiny", overrides)
    assert OmegaConf.to_object(from_plain(yaml.safe_load(to_yaml(cfg)), ORIGIN)) == cfg


def test_a_configuration_of_another_version_names_file_and_key() -> None:
    plain = to_plain(compose_config("+recipe=tiny"))
    for key, value, wanted in (
        ("optimizer", {**plain["optimizer"], "lrr": 1}, "lrr"),
        ("schedule", {"name": "spiral"}, "schedule.name is 'spiral'"),
        ("seed", "abc", "abc"),
    ):
        with pytest.raises(ConfigError, match=str(ORIGIN)) as caught:
            from_plain({**plain, key: value}, ORIGIN)
        assert wanted in str(caught.value)


ALLOWED = {
    "command": "command=prepare",
    "run_name": "run_name=other",
    "run": "run=x",
    "paths": "paths.data=elsewhere",
    "resume": "resume.from=runs/a",
    "export": "export.dtype=bfloat16",
    "evaluate": "evaluate.window=64",
    "generate": "generate.seed=7",
    "benchmark": "benchmark.rounds=3",
    "estimate": "estimate.gpus=[8]",
    "convert": "convert.tokens=64",
    "logger": "logger=wandb",
    "checkpoint": "checkpoint.every_steps=3",
    "samples": "samples.temperature=0.1",
    "telemetry": "telemetry.every_steps=7",
    "kernels": "kernels.backend=reference",
    "cluster": "cluster.nodes=1",
    "guard.max_rollbacks": "guard.max_rollbacks=5",
    "trainer.max_steps": "trainer.max_steps=900",
    "trainer.validate_every": "trainer.validate_every=7",
    "trainer.log_every": "trainer.log_every=3",
    "trainer.micro_batch": "trainer.micro_batch=4",
    "trainer.compile": "trainer.compile=false",
    "trainer.accelerator": "trainer.accelerator=cpu",
    "trainer.devices": "trainer.devices=2",
    "trainer.num_nodes": "trainer.num_nodes=2",
    "trainer.strategy": "trainer.strategy=fsdp",
    "trainer.hang_timeout": "trainer.hang_timeout=30",
    "trainer.activation_checkpointing": "trainer.activation_checkpointing=full",
    "data.workers": "data.workers=2",
    "data.verify": "data.verify=quick",
    "data.rebuild": "data.rebuild=true",
    "data.prepare": "data.prepare.processes=3",
}


def test_every_key_that_may_change_is_tried_below() -> None:
    assert set(MAY_CHANGE) <= set(ALLOWED), "add the new key to ALLOWED"


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_a_continued_run_may_change(key: str) -> None:
    # guard.max_rollbacks says nothing about a run that never goes back.
    base = ["+recipe=tiny", "optimizer=adamw", "guard.skip_non_finite=true", "guard.rollback_after=2"]
    changed = compose_config(*base, ALLOWED[key])
    assert changed != compose_config(*base), "the override changes nothing"
    check_continuation(to_plain(compose_config(*base)), changed, ORIGIN)


REFUSED = {
    "seed": "seed=2",
    "model.ffn": "model.ffn=1024",
    "quant.weight.scheme": "quant.weight.scheme=binary",
    "quant.overrides": 'quant.overrides=[{pattern:"*o_proj",scheme:float}]',
    "init.name": "init=normal",
    "data.corpus.name": "data=files",
    "data.sequence_length": "data.sequence_length=128",
    "optimizer.lr": "optimizer.lr=1e-4",
    "optimizer.betas": "optimizer.betas=[0.9,0.99]",
    "schedule.name": "schedule=cosine",
    "schedule.warmup": "schedule.warmup=9",
    "weight_decay_schedule.name": "weight_decay_schedule=linear",
    "clip.max_norm": "clip.max_norm=2",
    "trainer.batch_tokens": "trainer.batch_tokens=8192",
    "trainer.precision": "trainer.precision=32-true",
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_continued_run_refuses_other_changes_by_name(key: str) -> None:
    saved = to_plain(compose_config("+recipe=tiny"))
    with pytest.raises(ConfigError) as caught:
        check_continuation(saved, compose_config("+recipe=tiny", REFUSED[key]), ORIGIN)
    for part in (f"with {key}=", str(ORIGIN), "run_name", "resume.from=runs/tiny"):
        assert part in str(caught.value)


def test_every_variant_carries_the_name_it_is_registered_under() -> None:
    for options in VARIANTS.values():
        for name, option in options.items():
            assert option().name == name


def test_every_field_is_known_to_the_suggestions() -> None:
    known = set(known_keys())
    assert {key for key, _ in flatten(to_plain(Config()))} <= known
    assert {"schedule.decay", "schedule.stages", "data.corpus.path", "clip.window", "data.tokenizer", "model"} <= known


def test_unknown_keys_are_answered_by_what_is_near() -> None:
    assert "'optimizer.lr'" in unknown_key("optimiser.lr")
    assert "schedule=wsd has warmup, warmup_start, warmup_shape, decay, shape, final" in unknown_key(
        "schedule.dekay", WsdSchedule
    )
    assert "Did you mean" not in unknown_key("xyzzy")


def dataclasses_below(kind: Any) -> list[Any]:
    """``kind`` and the dataclasses of its fields."""
    return [kind, *(below for f in fields(kind) if is_dataclass(f.type) for below in dataclasses_below(f.type))]


def uncommented(kind: Any) -> list[str]:
    """The fields of a config dataclass that have no comment above them."""
    found = []
    lines = inspect.getsource(kind).splitlines()
    for above, line in pairwise(lines):
        field = re.match(r"    (\w+):", line)
        if field and field[1] != "name" and not above.strip().startswith("#"):
            found.append(f"{kind.__name__}.{field[1]}")
    return found


def test_options_are_documented_where_they_are_declared() -> None:
    variants = [option for options in (*VARIANTS.values(), *KINDS.values()) for option in options.values()]
    kinds = dataclasses_below(Config) + [below for option in variants for below in dataclasses_below(option)]
    missing = {field for kind in kinds for field in uncommented(kind)}
    # Explained by their class, by the base class or by the comment on the field before.
    explained = {
        "BpeTokenizer.vocab_size", "DataConfig.corpus", "DataConfig.tokenizer", "PretrainedTokenizer.eos",
        "PretrainedTokenizer.vocab_size", "TwoStageSchedule.stages",
        "WandbLogger.entity", "WandbLogger.project", "WandbLogger.tags",
    }  # fmt: skip
    assert missing <= explained
