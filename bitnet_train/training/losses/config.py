"""What is minimised: the ``loss`` part of the configuration."""

import math
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig, ModelConfig


class Reduction(Enum):
    """How the losses of tokens become one number: their mean over a forward pass, or their sum over the step."""

    mean = "mean"
    sum = "sum"


class HiddenDistance(Enum):
    """How two hidden states are compared: mean squared difference, or one minus the cosine of their angle."""

    mse = "mse"
    cosine = "cosine"


class RelationForm(Enum):
    """How two tokens are related by their vectors: ``a . b / sqrt(width)``, or the cosine of their angle."""

    scaled_dot = "scaled_dot"
    cosine = "cosine"


class RelationMask(Enum):
    """Which tokens a token is related to: all of the sequence, or itself and those before it."""

    full = "full"
    causal = "causal"


@dataclass
class LossConfig:
    """Base of the losses; every subclass is an option of the ``loss`` group."""

    name: str = MISSING


@dataclass
class CrossEntropyLoss(LossConfig):
    name: str = "cross_entropy"
    # Adds this times the mean of log(Z)^2, Z the softmax's normaliser, which keeps the logits from drifting; 0 for
    # none. PaLM (arXiv 2204.02311, section 5) and OLMo 2 (arXiv 2501.00656) use 1e-4.
    z_loss: float = 0.0
    # mean: over the tokens of a forward pass (targets of -100 are not counted), and over the micro-batches of a step.
    # sum: over all tokens of the step, however it is cut into micro-batches, as BitNet b1.58 2B4T is fine-tuned
    # (arXiv 2504.12285, on supervised fine-tuning). Gradients, and what clip compares with its threshold, are then as
    # many times larger as a step has tokens.
    reduction: Reduction = Reduction.mean


@dataclass
class DistillationLoss(LossConfig):
    """Cross-entropy, and what a teacher knows, each with its weight (BitDistill, arXiv 2510.13998, equation 13)."""

    name: str = "distillation"
    # Who teaches: a run (RUN for its last checkpoint, or RUN@STEP), or a causal language model of transformers (its
    # folder, or its name on the Hugging Face hub). It must have the same tokenizer. A relative folder is looked for
    # from where the command is run, whenever the run is started or continued.
    teacher: str | None = None
    # As in loss=cross_entropy.
    z_loss: float = 0.0
    # Weight of temperature^2 * KL(teacher || student) of the next token's distribution, a mean over tokens (Hinton et
    # al., arXiv 1503.02531). BitDistill's 10 (classification) and 1 (summarisation) stand before a KL without the
    # factor temperature^2, so at its temperature of 5 they are 0.4 and 0.04 here.
    logits: float = 1.0
    # Both distributions are softmax(logits / temperature). BitDistill takes 5.
    temperature: float = 5.0
    # Weight of the distance between hidden states behind blocks, a mean over blocks and the tokens that are learnt; 0
    # for none. The teacher must be as wide as the student.
    hidden: float = 0.0
    # Blocks of the student (from 0, or negative from the end) whose output states are compared. The teacher's are the
    # same ones, or those at the same share of the depth.
    hidden_layers: list[int] = field(default_factory=lambda: [-1])
    # mse (TinyBERT, arXiv 1909.10351) or cosine (DistilBERT, arXiv 1910.01108).
    hidden_distance: HiddenDistance = HiddenDistance.mse
    # Weight of the relations between the queries, between the keys and between the values of one block, each a
    # KL(teacher || student) averaged over relation heads and the tokens that are learnt, each seeing all the others
    # (MiniLMv2, arXiv 2012.15828); 0 for none.
    # BitDistill takes 1e5 (classification) and 1e3 (summarisation) with relation_form=cosine, where the KL is tiny.
    relations: float = 0.0
    # The student's block whose relations are compared (from 0, or negative from the end); null for the one three
    # quarters of the way up. BitDistill found one late block better than all (section 4.4).
    layer: int | None = None
    # The queries of all heads are cut into so many equal parts (keys and values too), each with its own relations;
    # null for model.heads. The teacher may have another number of heads and another width.
    relation_heads: int | None = None
    # scaled_dot: softmax(A @ A.T / sqrt(width)), MiniLMv2 and equation 12 of BitDistill. cosine: vectors of length 1
    # and no factor, BitDistill's Algorithm 1.
    relation_form: RelationForm = RelationForm.scaled_dot
    # full (both papers), or causal.
    relation_mask: RelationMask = RelationMask.full


LOSS_CONFIGS: dict[str, type[LossConfig]] = {"cross_entropy": CrossEntropyLoss, "distillation": DistillationLoss}


def hidden_blocks(cfg: DistillationLoss, layers: int) -> list[int]:
    """The student's blocks of ``loss.hidden_layers``, from 0; none when ``loss.hidden`` is 0. Raises ConfigError."""
    return [_block("loss.hidden_layers", number, layers) for number in cfg.hidden_layers] if cfg.hidden else []


def relation_block(cfg: DistillationLoss, layers: int) -> int | None:
    """The student's block of ``loss.layer``, from 0; None when ``loss.relations`` is 0. Raises ConfigError."""
    if not cfg.relations:
        return None
    return 3 * layers // 4 if cfg.layer is None else _block("loss.layer", cfg.layer, layers)


def relation_heads(cfg: DistillationLoss, model: DecoderConfig) -> int:
    """``loss.relation_heads``, or the student's attention heads."""
    return model.heads if cfg.relation_heads is None else cfg.relation_heads


def teacher_block(block: int, layers: int, teacher_layers: int) -> int:
    """The teacher's block at the share of the depth of the student's ``block`` (of ``layers``). Raises ConfigError."""
    above, rest = divmod((block + 1) * teacher_layers, layers)
    if rest or above < 1:
        raise ConfigError(
            f"loss.teacher has {teacher_layers} blocks and model.layers={layers}, so block {block} has none at the "
            "same depth there: choose others with loss.layer and loss.hidden_layers, or set loss.hidden=0 "
            "loss.relations=0."
        )
    return above - 1


def _block(key: str, number: int, layers: int) -> int:
    if not -layers <= number < layers:
        raise ConfigError(f"{key} names block {number}, and model.layers={layers}: use 0 to {layers - 1}.")
    return number % layers


def check_loss(cfg: LossConfig, model: ModelConfig) -> None:
    """Raises ConfigError for weights that are negative or not finite, and for what the model does not have."""
    if isinstance(cfg, CrossEntropyLoss):
        _check_weights(cfg, "z_loss")
    if not isinstance(cfg, DistillationLoss):
        return
    if not isinstance(model, DecoderConfig):
        raise ConfigError(f"loss={cfg.name} is for language models: use loss=cross_entropy.")
    _check_weights(cfg, "z_loss", "logits", "hidden", "relations")
    if not cfg.teacher:
        raise ConfigError("loss.teacher is not set: give the folder of a run (RUN or RUN@STEP) or of a checkpoint.")
    if not (cfg.logits or cfg.hidden or cfg.relations):
        raise ConfigError(
            "loss=distillation with loss.logits=0, loss.hidden=0 and loss.relations=0 learns nothing from the teacher: "
            "give one of them a weight, or use loss=cross_entropy."
        )
    if not (cfg.temperature > 0 and math.isfinite(cfg.temperature)):
        raise ConfigError(f"loss.temperature is {cfg.temperature:g}; it must be positive.")
    _check_idle(cfg)
    blocks = hidden_blocks(cfg, model.layers)
    if cfg.hidden and (not blocks or len(set(blocks)) < len(blocks)):
        raise ConfigError("loss.hidden_layers must name at least one block, and none twice.")
    if relation_block(cfg, model.layers) is not None:
        check_relation_heads(cfg, model, model.hidden, model.kv_heads * model.head_dim, "the model")


# What says how each part of distillation is computed.
DETAILS = {
    "logits": ("temperature",),
    "hidden": ("hidden_layers", "hidden_distance"),
    "relations": ("layer", "relation_heads", "relation_form", "relation_mask"),
}


def _check_idle(cfg: DistillationLoss) -> None:
    """Raises ConfigError for a setting of a part that has no weight."""
    default = DistillationLoss()
    for part, details in DETAILS.items():
        changed = next((name for name in details if getattr(cfg, name) != getattr(default, name)), None)
        if changed is not None and not getattr(cfg, part):
            raise ConfigError(
                f"loss.{changed} has no effect with loss.{part}=0: leave it out, or give loss.{part} a weight."
            )


def check_relation_heads(cfg: DistillationLoss, model: DecoderConfig, queries: int, keys: int, whose: str) -> None:
    """Raises ConfigError when the relation heads do not divide widths of queries and of keys, those of ``whose``."""
    heads = relation_heads(cfg, model)
    if heads < 1 or queries % heads or keys % heads:
        widths = f"{queries} for queries and {keys} for keys and values"
        key = "loss.relation_heads" if cfg.relation_heads is not None else "loss.relation_heads (model.heads)"
        raise ConfigError(
            f"{key} is {heads}, which does not divide the widths of {whose} ({widths}): use a divisor of "
            f"{math.gcd(queries, keys)}."
        )


def _check_weights(cfg: LossConfig, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"loss.{name} is {value:g}; it must be zero or positive.")
