"""What ``loss.teacher`` names: found, and checked against the student, before any weights are read."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tokenizers import Tokenizer

from bitnet_train.data.shards import TOKENIZER_FILE
from bitnet_train.data.tokenizer import TextTokenizer, load_tokenizer, one_special_id
from bitnet_train.errors import ConfigError
from bitnet_train.export.initial import check_same_tokenizer
from bitnet_train.nn.config import DecoderConfig, shape_fields
from bitnet_train.quant.config import PROGRESSIVE_CONFIGS, ProgressiveConfig, QuantConfig
from bitnet_train.quant.progress import finished_spec
from bitnet_train.quant.spec import QuantSpec, build_spec
from bitnet_train.training.config import RunConfig
from bitnet_train.training.losses.config import (
    DistillationLoss,
    check_relation_heads,
    hidden_blocks,
    relation_block,
    teacher_block,
)
from bitnet_train.variants import variant_from


@dataclass(frozen=True)
class TeacherShape:
    """What must fit the student: blocks, widths, rows of the head, and the longest sequence (None: any)."""

    layers: int
    hidden: int
    queries: int
    keys: int
    vocab: int
    context: int | None


@dataclass(frozen=True)
class TeacherBlocks:
    """The student's block -> the teacher's, for hidden states and for relations."""

    hidden: dict[int, int]
    relations: dict[int, int]


@dataclass(frozen=True)
class RunSource:
    """A run as the teacher: its shape, its quantisation and the checkpoint."""

    name: str
    folder: Path
    checkpoint: Path
    cfg: DecoderConfig
    spec: QuantSpec
    progressive: ProgressiveConfig
    max_steps: int
    digest: str

    def spec_after(self, done: int) -> QuantSpec:
        """How its last step computed. Raises ConfigError while it was still on its way to codes."""
        where = f"loss.teacher={self.name}"
        return finished_spec(self.progressive, self.spec, done, self.max_steps, self.cfg.layers, where)

    @property
    def shape(self) -> TeacherShape:
        """For :func:`check_shape`."""
        cfg = self.cfg
        keys = cfg.kv_heads * cfg.head_dim
        return TeacherShape(cfg.layers, cfg.hidden, cfg.hidden, keys, cfg.vocab, cfg.context)


@dataclass(frozen=True)
class TransformersSource:
    """A causal language model of ``transformers`` as the teacher: where it is and its configuration."""

    name: str
    config: Any
    digest: str

    @property
    def shape(self) -> TeacherShape:
        """For :func:`check_shape`. Raises ConfigError when its configuration lacks a number."""
        config = self.config.get_text_config()
        try:
            heads = int(config.num_attention_heads)
            head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
            kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
            context = getattr(config, "max_position_embeddings", None)
            return TeacherShape(
                int(config.num_hidden_layers), int(config.hidden_size), heads * head_dim, kv_heads * head_dim,
                int(config.vocab_size), None if context is None else int(context),
            )  # fmt: skip
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"loss.teacher={self.name} is no causal language model ({error}).") from None


def find_teacher(cfg: RunConfig) -> RunSource | TransformersSource | None:
    """The teacher of a configuration, or None when its loss has none.

    Raises ConfigError when it is missing, when it is no model, or when it does not fit the student.
    """
    if not isinstance(cfg.loss, DistillationLoss):
        return None
    name = str(cfg.loss.teacher)
    folder, _, step = name.partition("@")
    path = Path(folder).expanduser()
    source: RunSource | TransformersSource
    if (path / "config.yaml").is_file():
        source = _run_source(name, path, step)
    elif step:
        raise ConfigError(f"loss.teacher={name}: {path} is no run (it has no config.yaml), and only a run has steps.")
    else:
        source = _transformers_source(name, path)
    teacher_blocks(cfg, source.shape)
    return source


def check_tokenizer(source: RunSource | TransformersSource, ours: TextTokenizer) -> None:
    """Raises ConfigError when the teacher means other words than the student by the same ids."""
    if isinstance(source, RunSource):
        theirs = load_tokenizer(source.folder / "tokenizer")
    else:
        theirs = _tokenizer_of(source, ours)
    check_same_tokenizer(source.name, theirs, ours, "loss.teacher")


def _tokenizer_of(source: TransformersSource, ours: TextTokenizer) -> TextTokenizer:
    """The teacher's tokenizer; special ids that its configuration does not name are taken to be the student's."""
    path = Path(source.name)
    try:
        if path.is_dir():
            tokenizer = Tokenizer.from_file(str(path / TOKENIZER_FILE))
        else:
            tokenizer = Tokenizer.from_pretrained(source.name)
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"loss.teacher={source.name} has no readable {TOKENIZER_FILE} ({error}).") from None
    config = source.config.get_text_config()
    bos, eos = one_special_id(config.bos_token_id), one_special_id(config.eos_token_id)
    return TextTokenizer(tokenizer, ours.bos_id if bos is None else bos, ours.eos_id if eos is None else eos)


def teacher_blocks(cfg: RunConfig, shape: TeacherShape) -> TeacherBlocks:
    """Which blocks of a teacher of this shape belong to the student's. Raises ConfigError when it does not fit."""
    loss, model = cfg.loss, cfg.decoder
    assert isinstance(loss, DistillationLoss)
    if shape.vocab != model.vocab:
        raise ConfigError(
            f"loss.teacher={loss.teacher} has a vocabulary of {shape.vocab} and model.vocab={model.vocab}: they must "
            f"be equal; with the teacher's tokenizer (data/tokenizer=pretrained) set model.vocab={shape.vocab}."
        )
    if shape.context is not None and shape.context < cfg.text.sequence_length:
        raise ConfigError(
            f"loss.teacher={loss.teacher} reads at most {shape.context} tokens: shorten data.sequence_length="
            f"{cfg.text.sequence_length}."
        )
    if loss.hidden and shape.hidden != model.hidden:
        raise ConfigError(
            f"loss.hidden compares hidden states, and loss.teacher={loss.teacher} is {shape.hidden} wide where "
            f"model.hidden={model.hidden}: set loss.hidden=0 (loss.relations has no such limit)."
        )
    related = relation_block(loss, model.layers)
    if related is not None:
        check_relation_heads(loss, model, shape.queries, shape.keys, f"loss.teacher={loss.teacher}")
    return TeacherBlocks(
        {block: teacher_block(block, model.layers, shape.layers) for block in hidden_blocks(loss, model.layers)},
        {} if related is None else {related: teacher_block(related, model.layers, shape.layers)},
    )


def _run_source(name: str, folder: Path, step: str) -> RunSource:
    if step and not step.isdigit():
        raise ConfigError(f"loss.teacher={name}: the part after @ must be a step number.")
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DecoderConfig), saved["model"]))
        # A choice of dataclasses, which runs of before it had the choice lack.
        way = saved["quant"].get("progressive") or {"name": "none"}
        progressive = variant_from(way, PROGRESSIVE_CONFIGS, "quant.progressive")
        max_steps = int(saved["trainer"]["max_steps"])
        settings = {key: value for key, value in saved["quant"].items() if key != "progressive"}
        quant = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(QuantConfig), settings))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"loss.teacher={name}: {folder / 'config.yaml'} is no run's configuration ({reason})."
        ) from None
    assert isinstance(cfg, DecoderConfig)
    assert isinstance(quant, QuantConfig)
    checkpoints = folder / "checkpoints"
    path = checkpoints / (f"step-{int(step):08d}.ckpt" if step else "last.ckpt")
    if not path.exists():
        there = ", ".join(str(int(p.stem[5:])) for p in sorted(checkpoints.glob("step-*.ckpt"))) or "none"
        raise ConfigError(f"loss.teacher={name}: {path} does not exist; steps saved there: {there}.")
    spec = build_spec(quant)
    shape = {f.name: getattr(cfg, f.name) for f in shape_fields()}
    digest = _digest({"model": _plain(shape), "quant": _plain(asdict(quant))})
    source = RunSource(name, folder, path, cfg, spec, progressive, max_steps, digest)
    if step:
        source.spec_after(int(step))
    return source


def _transformers_source(name: str, path: Path) -> TransformersSource:
    first = Path(path.parts[0]) if path.parts else path
    if not path.is_dir() and (len(path.parts) != name.count("/") + 1 or len(path.parts) > 2 or first.exists()):
        raise ConfigError(f"loss.teacher={name} does not exist: give the folder of a run or of a checkpoint.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"loss.teacher={name} is neither a run (no config.yaml) nor a checkpoint (no config.json).")
    transformers = import_transformers(name)
    try:
        where = str(path) if path.is_dir() else name
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "" if path.is_dir() else " is no folder here, and no model of the Hugging Face hub that can be had"
        raise ConfigError(f"loss.teacher={name}{where} ({reason}).") from None
    digest = _digest({"config": config.to_dict(), "commit": getattr(config, "_commit_hash", None)})
    return TransformersSource(str(path) if path.is_dir() else name, config, digest)


def import_transformers(name: str) -> Any:
    """The ``transformers`` module. Raises ConfigError when it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"loss.teacher={name} is no run, and other checkpoints are read with transformers, which is not installed: "
            'pip install "bitnet-train[export]", or give the folder of a run.'
        ) from None
    return transformers


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _plain(content: Any) -> Any:
    return json.loads(json.dumps(content, default=lambda value: getattr(value, "value", str(value))))
