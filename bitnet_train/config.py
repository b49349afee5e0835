"""The whole configuration as one dataclass, assembled from the parts' own, and how it is written and read back.

Importing this loads neither torch nor Lightning, so that a typo is answered at once.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bitnet_train.benchmarking.config import BenchmarkConfig
from bitnet_train.data.config import CORPUS_CONFIGS, TOKENIZER_CONFIGS, DataConfig
from bitnet_train.data.images.config import IMAGE_SOURCE_CONFIGS, ImageDataConfig
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.config import GenerateConfig
from bitnet_train.export.config import ConvertConfig, ExportConfig
from bitnet_train.nn.config import INIT_CONFIGS, DecoderConfig
from bitnet_train.nn.vision.config import VISION_CONFIGS
from bitnet_train.planning.config import EstimateConfig
from bitnet_train.quant.config import PROGRESSIVE_CONFIGS
from bitnet_train.training.clipping.config import CLIP_CONFIGS
from bitnet_train.training.config import RunConfig
from bitnet_train.training.loggers.config import LOGGER_CONFIGS
from bitnet_train.training.losses.config import LOSS_CONFIGS
from bitnet_train.training.optimizers.config import OPTIMIZER_CONFIGS
from bitnet_train.training.regularisers.config import REGULARISER_CONFIGS
from bitnet_train.training.schedules.config import SCHEDULE_CONFIGS


class Command(Enum):
    """One job on a configuration; each has a file in ``bitnet_train/commands``."""

    train = "train"
    prepare = "prepare"
    estimate = "estimate"
    export = "export"
    verify = "verify"
    evaluate = "evaluate"
    generate = "generate"
    report = "report"
    benchmark = "benchmark"
    convert = "convert"
    submit = "submit"


# What a job on a cluster can do.
IN_JOBS = [command.value for command in Command if command is not Command.submit]


# Commands that read the configuration of the run they work on.
ON_A_RUN = (Command.export, Command.verify, Command.evaluate, Command.generate, Command.report)


@dataclass
class PathsConfig:
    # Where runs are kept.
    runs: str = "runs"
    # Where prepared token shards are kept.
    data: str = "data"


@dataclass
class Config(RunConfig):
    # What to do: train, prepare, estimate, export, verify, evaluate, generate, report, benchmark, convert or submit.
    command: Command = Command.train
    # Name of the run's folder under paths.runs; null for the recipe's name.
    run_name: str | None = None
    # The run folder that export, verify, evaluate, generate and report work on (evaluate and generate also take an
    # export's folder, report that of a sweep).
    run: str | None = None
    # Folders.
    paths: PathsConfig = field(default_factory=PathsConfig)
    # resume.from=runs/NAME@STEP starts a new run from a checkpoint of another (without @STEP: its last one).
    resume: dict[str, Any] = field(default_factory=lambda: {"from": None})
    # Formats of export.
    export: ExportConfig = field(default_factory=ExportConfig)
    # What generate writes.
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    # GPUs that estimate plans for.
    estimate: EstimateConfig = field(default_factory=EstimateConfig)
    # What benchmark compares.
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    # What convert reads and writes.
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    # With command=submit: hand the script to SLURM's sbatch, and do not only show it.
    submit: bool = False


# Where the configuration has a choice of variants: key -> name -> dataclass. These are Hydra's config groups too.
VARIANTS: dict[str, dict[str, Any]] = {
    "init": INIT_CONFIGS,
    "quant.progressive": PROGRESSIVE_CONFIGS,
    "data.corpus": CORPUS_CONFIGS,
    "data.tokenizer": TOKENIZER_CONFIGS,
    "data.source": IMAGE_SOURCE_CONFIGS,
    "optimizer": OPTIMIZER_CONFIGS,
    "schedule": SCHEDULE_CONFIGS,
    "weight_decay_schedule": SCHEDULE_CONFIGS,
    "clip": CLIP_CONFIGS,
    "loss": LOSS_CONFIGS,
    "regulariser": REGULARISER_CONFIGS,
    "logger": LOGGER_CONFIGS,
}


# Variants whose options are files, conf/model/NAME.yaml and conf/data/NAME.yaml: each says by its ``name`` which
# dataclass it fills; one without a name is of the first.
KINDS: dict[str, dict[str, Any]] = {
    "model": {"decoder": DecoderConfig, **VISION_CONFIGS},
    "data": {"text": DataConfig, "images": ImageDataConfig},
}


# Variants that configurations of older runs lack.
SINCE_LATER = ("quant.progressive", "regulariser")


def to_plain(cfg: Config) -> dict[str, Any]:
    """Plain dictionaries and strings, as config.yaml holds them."""
    plain: dict[str, Any] = _plain(asdict(cfg))
    return plain


def _plain(value: Any) -> Any:
    """With the names of enumerations and lists for tuples, as OmegaConf.to_container does in fifty times as long."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def to_yaml(cfg: Config) -> str:
    """The text of config.yaml, which :func:`from_plain` reads back to an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(cfg)))


def from_plain(plain: dict[str, Any], origin: Path) -> DictConfig:
    """The structured configuration of a saved one, each variant of its own type. Raises ConfigError if it is none."""
    base = OmegaConf.structured(Config)
    saved = OmegaConf.create(with_kinds(plain))
    for key, options in (KINDS | VARIANTS).items():
        if "." in key and OmegaConf.select(base, key) is None:
            continue  # a part of the other kind of data
        name = OmegaConf.select(saved, f"{key}.name")
        if name is None and key in SINCE_LATER:
            continue  # a run from before this choice existed, which is what its default does
        if name is None:
            raise ConfigError(f"{origin} is not the configuration of a run: it has no {key}.name.")
        if name not in options:
            raise ConfigError(f"{origin}: {key}.name is '{name}', which this version does not know.")
        OmegaConf.update(base, key, OmegaConf.structured(options[name]), merge=False)
    try:
        merged = OmegaConf.merge(base, saved)
    except Exception as error:
        raise ConfigError(f"{origin} is not a configuration of this version: {str(error).splitlines()[0]}.") from None
    assert isinstance(merged, DictConfig)
    return merged


def with_kinds(plain: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with ``model.name`` and ``data.name``, which those of older versions lack."""
    filled = dict(plain)
    for key, options in KINDS.items():
        if isinstance(filled.get(key), dict):
            filled[key] = {"name": next(iter(options)), **filled[key]}
    return filled


def flatten(plain: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists are leaves."""
    if isinstance(plain, dict) and plain:
        for key, value in plain.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, plain
