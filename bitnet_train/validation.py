"""The rules that a configuration must keep: its keys, its values, and what may change when a run is continued.

Importing this loads neither torch nor Lightning, so that a typo is answered at once.
"""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_train.benchmarking.config import BenchmarkConfig, check_benchmark
from bitnet_train.cluster.config import check_cluster
from bitnet_train.config import IN_JOBS, KINDS, VARIANTS, Command, Config, flatten, from_plain, to_plain
from bitnet_train.data.config import DataConfig, check_data, check_prepare
from bitnet_train.data.mixture import KEY as MIXTURE_KEY
from bitnet_train.data.mixture import check_mixture
from bitnet_train.errors import ConfigError, did_you_mean
from bitnet_train.evaluation.config import GenerateConfig, check_evaluate, check_generate, check_tasks_can_run
from bitnet_train.export.config import ExportConfig, check_convert
from bitnet_train.export.rules import check_formats
from bitnet_train.kernels.config import check_kernels
from bitnet_train.nn.config import DecoderConfig, check_decoder, check_init, initial_source
from bitnet_train.nn.layout import check_init_overrides, check_spec
from bitnet_train.planning.config import check_estimate
from bitnet_train.quant.progress import check_progressive
from bitnet_train.quant.spec import build_spec
from bitnet_train.secrets import is_secret
from bitnet_train.steps import as_steps
from bitnet_train.storage import check_url
from bitnet_train.training.checks import check_training
from bitnet_train.training.config import RunConfig, processes
from bitnet_train.training.losses.config import DistillationLoss
from bitnet_train.training.vision.checks import check_vision
from bitnet_train.values import check_finite, check_lists, check_sizes

# What may change when a run is continued: how long and where it runs and what it writes, not what it computes.
MAY_CHANGE = (
    "command", "run_name", "run", "paths", "resume", "export", "evaluate", "generate", "benchmark", "convert",
    "estimate", "logger", "checkpoint", "samples", "telemetry", "kernels", "guard.max_rollbacks", "cluster",
    "trainer.max_steps", "trainer.validate_every", "trainer.log_every",
    "trainer.micro_batch", "trainer.compile", "trainer.accelerator", "trainer.devices", "trainer.num_nodes",
    "trainer.strategy", "trainer.hang_timeout",
    "trainer.activation_checkpointing", "data.workers", "data.verify", "data.rebuild", "data.prepare",
)  # fmt: skip


def validate(cfg: Config) -> None:
    """Every rule between fields, before any work. Raises ConfigError with the first that is broken."""
    check_names(cfg)
    check_finite(cfg)
    for name in ("runs", "data"):
        if not getattr(cfg.paths, name):
            raise ConfigError(f"paths.{name} is empty: give a folder.")
    if cfg.on_images:
        check_vision(cfg, cfg.command.value)
        for part, default in {"generate": GenerateConfig(), "benchmark": BenchmarkConfig()}.items():
            if getattr(cfg, part) != default:
                raise ConfigError(f"{part}.* is for language models, and this recipe trains an image classifier: leave "
                                  "it out.")  # fmt: skip
        if cfg.export.formats != ExportConfig().formats:
            raise ConfigError("export.formats are of language models; a classifier has no export: leave it out.")
    else:
        _check_language(cfg)
    check_kernels(cfg.kernels)
    check_cluster(cfg.cluster, IN_JOBS)
    if cfg.submit and cfg.command is not Command.submit:
        raise ConfigError("submit=true hands a job to a cluster: it goes with command=submit.")
    check_training(cfg)
    _check_way_to_codes(cfg)
    if not cfg.on_images:
        check_formats(cfg.export, cfg.decoder, build_spec(cfg.quant))
    if set(cfg.resume) != {"from"}:
        wrong = next(iter(set(cfg.resume) - {"from"}), "from")
        raise ConfigError(f"resume.{wrong} is not a configuration key. Did you mean 'resume.from'?")
    check_generate(cfg.generate)
    check_evaluate(cfg.evaluate)
    on_the_way = cfg.command is Command.train and cfg.evaluate.every_steps is not None
    if cfg.evaluate.tasks and (cfg.command is Command.evaluate or on_the_way):
        check_tasks_can_run(cfg.evaluate)
    for key, url in (("checkpoint.mirror", cfg.checkpoint.mirror), ("export.to", cfg.export.to)):
        if url is not None:
            check_url(url, key)
    check_estimate(cfg.estimate, cfg.on_images)
    check_benchmark(cfg.benchmark)
    check_sizes(cfg)  # last, because the others know what a setting should be
    if cfg.command is Command.benchmark:
        check_benchmarked(cfg)


def check_given(cfg: Config, keys: Iterable[str]) -> None:
    """Raises ConfigError when ``keys``, which the command line sets, say how weights start that come from elsewhere.

    A recipe may say it: ``init.from=`` and ``resume.from=`` are added to recipes that start from nothing. So may the
    command line say that sub-norms start at 1, which ``model.norms=pre`` wants.
    """
    sources = {"init.from": initial_source(cfg.init), "resume.from": cfg.resume["from"]}
    source = next((key for key, value in sources.items() if value is not None), None)
    if source is None:
        return
    allowed = {"init.from", "init.sub_norms"} | ({"init.sub_norm_gain"} if cfg.init.sub_norm_gain == 1 else set())
    for key in keys:
        if key.partition(".")[0] == "init" and key not in allowed:
            raise ConfigError(f"{key} has no effect with {source}, which brings the weights: leave one of them out.")


def _check_language(cfg: Config) -> None:
    model, text = cfg.decoder, cfg.text
    check_decoder(model)
    spec = build_spec(cfg.quant)
    if cfg.command is Command.convert:
        check_convert(cfg.convert, spec, cfg.quant.progressive.name)
    else:
        check_spec(model, spec)  # a foreign model has layers of its own
    check_init(cfg.init, model.norms)
    check_init_overrides(model, cfg.init)
    check_data(text, model.context)
    check_prepare(text.prepare, cfg.command is Command.prepare)
    check_mixture(text, cfg.trainer.max_steps)
    if model.vocab < text.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab={model.vocab} is smaller than data.tokenizer.vocab_size={text.tokenizer.vocab_size}: "
            "raise it, or leave it out to follow the tokenizer."
        )


def _check_way_to_codes(cfg: Config) -> None:
    if not cfg.trainer.max_steps:
        return
    spec = build_spec(cfg.quant)
    check_progressive(cfg.quant.progressive, spec, cfg.trainer.max_steps)
    for change in spec.late:  # contradictions show now, not at the step where it begins
        check_spec(cfg.model, spec.at(as_steps(change.since, cfg.trainer.max_steps), cfg.trainer.max_steps))


def check_benchmarked(cfg: Config) -> None:
    """Raises ConfigError for a recipe, or a variant of it, that ``command=benchmark`` cannot run."""
    if isinstance(cfg.trainer.micro_batch, str):
        raise ConfigError(
            f"command=benchmark needs one micro-batch for everything it compares, not trainer.micro_batch="
            f"{cfg.trainer.micro_batch}: give a number, or null for the whole step at once."
        )
    if processes(cfg.trainer) > 1:
        raise ConfigError("command=benchmark times one process: add trainer.devices=1 trainer.num_nodes=1.")
    if isinstance(cfg.loss, DistillationLoss):
        raise ConfigError("command=benchmark times steps without a teacher: add loss=cross_entropy.")
    for variant in cfg.benchmark.variants:
        with_overrides(cfg, variant.overrides, f"benchmark.variants, {variant.name}")


def with_overrides(cfg: Config, overrides: list[str], origin: str) -> Config:
    """``cfg`` with ``key=value`` settings of a run on top, validated. Raises ConfigError, which names ``origin``."""
    node = OmegaConf.structured(cfg)
    try:
        for line in overrides:
            key, _, value = line.lstrip("+").replace("/", ".").partition("=") if "=" in line else (line, "", None)
            if value is None or key.split(".")[0] not in {f.name for f in fields(RunConfig)}:
                raise ConfigError(f"'{line}' is no key=value setting of a run.")
            options = VARIANTS.get(key)
            if options is not None and value in options:
                OmegaConf.update(node, key, OmegaConf.structured(options[value]), merge=False)
            else:
                node.merge_with_dotlist([line])
        plain = OmegaConf.to_object(node)
        assert isinstance(plain, Config)
        plain.benchmark = BenchmarkConfig()
        validate(plain)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {str(error).splitlines()[0]}.") from None
    return plain


def check_names(cfg: Config) -> None:
    """Raises ConfigError when a variant's ``name`` was set by hand: it tells the dataclass and does not choose it."""
    for key, options in (KINDS | VARIANTS).items():
        value: Any = cfg
        for part in key.split("."):
            value = getattr(value, part, None)
        if value is None:
            continue  # a part of the other kind of data
        if options.get(value.name) is not type(value):
            group = key.replace(".", "/")
            how = f"choose {group}= with an option of that kind" if key in KINDS else f"write {group}={value.name}"
            raise ConfigError(f"{key}.name={value.name} does not choose anything: {how}.")


def check_kinds(node: DictConfig) -> None:
    """Raises ConfigError when the model and the data are not for each other."""
    model, data = (OmegaConf.get_type(node, key) for key in KINDS)
    if (model is DecoderConfig) != (data is DataConfig):
        what = "a language model, and data= holds images" if model is DecoderConfig else "an image classifier"
        wanted = "data=stdlib" if model is DecoderConfig else "data=digits"
        lacks = "" if model is DecoderConfig else ", and data= holds text"
        raise ConfigError(f"model= is {what}{lacks}: choose data of the model's kind, such as {wanted}.")


def check_keys(node: DictConfig, prefix: str = "") -> None:
    """Raises ConfigError for a key that its dataclass lacks (``+optimizer.lrr=1`` adds one) or that was taken away."""
    kind = OmegaConf.get_type(node)
    if not is_dataclass(kind):
        return
    known = {f.name for f in fields(kind)}
    for key in map(str, node):
        name = f"{prefix}{key}"
        if key not in known:
            raise ConfigError(unknown_key(name, kind))
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            check_keys(child, f"{name}.")
    for key in sorted(known - set(map(str, node))):
        raise ConfigError(f"{prefix}{key} is missing from the configuration.")


def check_interpolations(node: DictConfig, prefix: str = "") -> None:
    """Raises ConfigError for a list or a part of the configuration that is ``${...}`` of something else.

    OmegaConf converts single values to the declared type and takes anything else as it is.
    """
    for key in node:
        child, name = node._get_node(key), f"{prefix}{key!s}"
        if isinstance(child, DictConfig | ListConfig) and child._is_interpolation():
            found = node[key]
            kind = child._metadata.ref_type
            fits = isinstance(found, type(child)) and (not is_dataclass(kind) or _is_a(found, kind))
            if fits and is_dataclass(item := child._metadata.element_type):
                fits = all(_is_a(part, item) for part in found)
            if not fits and not (found is None and child._is_optional()):
                given: Any = child._value()
                raise ConfigError(f"{name} is {given}, which stands for something else: give its settings.")
        elif isinstance(child, DictConfig) and not (child._is_none() or child._is_missing()):
            check_interpolations(child, f"{name}.")


def _is_a(node: Any, kind: Any) -> bool:
    own = OmegaConf.get_type(node)
    return isinstance(own, type) and issubclass(own, kind)


def unknown_key(key: str, kind: Any = None) -> str:
    """The sentence for a key that does not exist; ``kind`` is the dataclass where it was looked for, if known."""
    if key.startswith(f"{MIXTURE_KEY}."):  # free names, checked with the corpus that they belong to
        return f"{key} is not given yet: write it with a plus, +{key}=VALUE."
    parent, _, leaf = key.rpartition(".")
    options = VARIANTS.get(parent, {})
    chosen = next((name for name, option in options.items() if option is kind), None)
    if chosen is not None:
        group = parent.replace(".", "/")
        own = [f.name for f in fields(kind) if f.name != "name"]
        others = [name for name, option in options.items() if leaf in {f.name for f in fields(option)}]
        has = f"{group}={chosen} has {', '.join(own)}" if own else f"{group}={chosen} has no settings"
        hint = f" {leaf} belongs to {group}={' and '.join(others)}." if others else did_you_mean(leaf, own)
        return f"{key} is not a configuration key: {has}.{hint}"
    if elsewhere := _of_another_kind(key, kind):
        return f"{key} is not a configuration key where {elsewhere}."
    siblings = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    near = did_you_mean(leaf, siblings)
    if near and parent:
        near = near.replace("'", f"'{parent}.", 1)
    return f"{key} is not a configuration key.{near or did_you_mean(key, known_keys())}"


def _of_another_kind(key: str, kind: Any) -> str:
    """The clause about a key of ``model`` or ``data`` that only other kinds than ``kind`` have; empty for others."""
    group, _, rest = key.partition(".")
    kinds = KINDS.get(group, {})
    own = next((name for name, option in kinds.items() if option is kind), None)
    having = [name for name, option in kinds.items() if rest.split(".")[0] in {f.name for f in fields(option)}]
    if own is None or not having or own in having:
        return ""
    return f"{group}.name is {own}: it belongs to {' and '.join(having)}"


def known_keys() -> list[str]:
    """Every key of every variant, and every part of the configuration that holds keys."""
    found = {key: None for key, _ in flatten(to_plain(Config()))}
    for prefix, options in (KINDS | VARIANTS).items():
        found |= {f"{prefix}.{f.name}": None for option in options.values() for f in fields(option)}
    for key in list(found):
        while "." in key:
            key = key.rpartition(".")[0]
            found[key] = None
    return list(found)


def to_config(node: DictConfig) -> Config:
    """The typed configuration of a composed one, validated. Raises ConfigError."""
    check_keys(node)
    check_interpolations(node)
    check_kinds(node)
    cfg = OmegaConf.to_object(node)
    assert isinstance(cfg, Config)
    check_lists(cfg)
    check_no_secrets(cfg)
    validate(cfg)
    return cfg


def check_no_secrets(cfg: Config) -> None:
    """Raises ConfigError when a setting holds a key or token: config.yaml, pages and W&B would show it."""
    for key, value in flatten(to_plain(cfg)):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and is_secret(text):
                raise ConfigError(
                    f"{key} holds a key, a token or a password: settings are written to config.yaml and shown, so "
                    "leave it in the environment (WANDB_API_KEY, HF_TOKEN), or use `wandb login` and `hf auth login`."
                )


def may_change(key: str) -> bool:
    """Whether a run can be continued with another value of ``key``."""
    return any(key == may or key.startswith(f"{may}.") for may in MAY_CHANGE)


def check_continuation(saved: dict[str, Any], cfg: Config, origin: Path) -> None:
    """Raises ConfigError, naming the key, when ``cfg`` would change what the saved run computes.

    A key that the saved run lacks is of a later version; its default is what the run did without it.
    """
    filled = OmegaConf.to_container(from_plain(saved, origin), resolve=True, enum_to_str=True)
    old, new = dict(flatten(filled)), dict(flatten(to_plain(cfg)))
    for key in [*new, *(k for k in old if k not in new)]:
        if old.get(key) != new.get(key) and not may_change(key):
            raise ConfigError(
                f"{origin} was started with {key}={old.get(key)}, and this command says {new.get(key)}: restore it, "
                f"choose another run_name, or fork with resume.from={origin.parent} run_name=NAME."
            )
