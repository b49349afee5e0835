"""How a model is trained: the ``optimizer``, ``schedule``, ``weight_decay_schedule``, ``clip``, ``guard``, ``loss``,
``regulariser``, ``trainer``, ``checkpoint``, ``logger`` and ``samples`` parts of the configuration."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Union

from bitnet_train.cluster.config import ClusterConfig
from bitnet_train.data.config import DataConfig, DatasetConfig
from bitnet_train.data.images.config import ImageDataConfig
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.config import EvaluateConfig
from bitnet_train.kernels.config import KernelConfig
from bitnet_train.nn.config import ActivationCheckpointing, DecoderConfig, InitConfig, ModelConfig, NormalInit
from bitnet_train.nn.vision.config import ClassifierConfig
from bitnet_train.quant.config import QuantConfig
from bitnet_train.training.batch_warmup import BatchPlan, BatchStage, BatchStageConfig, batch_stages, even_cuts
from bitnet_train.training.clipping.config import ClipConfig, NormClip
from bitnet_train.training.guard.config import GuardConfig
from bitnet_train.training.loggers.config import CsvLogger, LoggerConfig
from bitnet_train.training.losses.config import CrossEntropyLoss, LossConfig
from bitnet_train.training.optimizers.config import AdamWConfig, OptimizerConfig
from bitnet_train.training.regularisers.config import NoRegulariser, RegulariserConfig
from bitnet_train.training.schedules.config import ConstantSchedule, LinearSchedule, ScheduleConfig
from bitnet_train.training.telemetry.config import TelemetryConfig


class Accelerator(Enum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Strategy(Enum):
    """How several processes share the work."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"


# Lightning's names for the arithmetic of everything that is not the integer product.
PRECISIONS = ("auto", "32-true", "bf16-mixed")


@dataclass
class TrainerConfig:
    # Optimizer steps of the whole run.
    max_steps: int = 500
    # Tokens per optimizer step, over all micro-batches; null in a recipe that trains on images (data.batch_size).
    batch_tokens: int | None = 4096
    # Smaller batches before: a list of {until: step or share, tokens: N}, rising. Default none. The micro-batches of a
    # step stay as many and shrink, and torch.compile compiles once for each size. (Text only.)
    batch_warmup: list[BatchStageConfig] = field(default_factory=list)
    # Sequences (or images) per forward and backward: a number; null for the whole step at once; or auto, the largest
    # number that divides the step and fits into memory, measured before training starts (text only). Smaller means
    # gradient accumulation.
    micro_batch: Union[int, str, None] = None  # noqa: UP007
    # 32-true, bf16-mixed, or auto: bf16-mixed where the device multiplies bf16 natively.
    precision: str = "auto"
    # torch.compile of the model: true, false, or auto: on a GPU, and on a CPU for runs long enough to pay for it.
    compile: Union[bool, str] = "auto"  # noqa: UP007
    # auto, cpu or cuda.
    accelerator: Accelerator = Accelerator.auto
    # Processes on each node, one for each GPU; auto: all GPUs, or 1 on a CPU. They are started here, unless torchrun or
    # srun has done so. A step stays trainer.batch_tokens, which the processes share.
    devices: Union[int, str] = 1  # noqa: UP007
    # Machines that train together; more than 1 need srun or torchrun, which start the processes on each.
    num_nodes: int = 1
    # auto (ddp where there are several processes), ddp: every process holds the whole model (Li et al., arXiv
    # 2006.15704); fsdp: master weights, gradients and optimizer states are sharded over the processes (Zhao et al.,
    # arXiv 2304.11277; PyTorch's FSDP2), and quantised layers gather codes instead of weights.
    strategy: Strategy = Strategy.auto
    # What the backward pass of a block computes again: none; selective: its wide products, from int8 codes that are
    # kept, which takes about half the memory of none (arXiv 2205.05198 for floats); full: all but its inputs, which
    # takes the least and about a third more time (arXiv 1604.06174). The losses are the same bits. (Text only.)
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    # Minutes without a finished step, validation and saving included, after which the stacks of all processes go to
    # the run folder (hang-rank*.txt) and the run ends with exit code 5; null for any time. The first step may take
    # three times as long.
    hang_timeout: float | None = None
    # Validate every so many steps, and at the end.
    validate_every: int = 100
    # Write a row of metrics every so many steps.
    log_every: int = 10


@dataclass
class CheckpointConfig:
    # Save every so many steps; null for never.
    every_steps: int | None = 250
    # Save also when this many minutes have passed since the last save; null for never.
    every_minutes: float | None = 15.0
    # How many step-*.ckpt files stay.
    keep: int = 2
    # Where finished checkpoints are copied to while training goes on, as MIRROR/<run_name>: any URL of fsspec's, such
    # as s3://bucket/runs; null for nowhere. A run whose own folder is empty goes on from there.
    mirror: str | None = None


@dataclass
class SamplesConfig:
    # Write texts to samples.md every so many steps; null for never.
    every_steps: int | None = 250
    # What the texts begin with.
    prompts: list[str] = field(default_factory=lambda: ["def ", "class ", '"""'])
    # Tokens per text.
    max_new_tokens: int = 96
    # Softmax temperature; 0 takes the most likely token.
    temperature: float = 0.8


@dataclass
class RunConfig:
    """Everything that decides what a training run computes and keeps; the top-level configuration adds the command."""

    # Chooses initial weights and the order of the samples.
    seed: int = 1
    # The model's shape: a decoder, or an image classifier.
    model: ModelConfig = field(default_factory=DecoderConfig)
    # What is quantised and how.
    quant: QuantConfig = field(default_factory=QuantConfig)
    # Which implementation computes the quantised layers.
    kernels: KernelConfig = field(default_factory=KernelConfig)
    # How the weights start.
    init: InitConfig = field(default_factory=NormalInit)
    # Text, tokenizer and batches; or images.
    data: DatasetConfig = field(default_factory=DataConfig)
    # The update rule and its peak rates.
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    # The learning rate over the run, as factors of optimizer.lr.
    schedule: ScheduleConfig = field(default_factory=LinearSchedule)
    # The weight decay over the run, as factors of optimizer.weight_decay; multiplies what a two_stage schedule says.
    weight_decay_schedule: ScheduleConfig = field(default_factory=ConstantSchedule)
    # Gradient clipping.
    clip: ClipConfig = field(default_factory=NormClip)
    # Which steps are skipped, and when the run goes back to a checkpoint.
    guard: GuardConfig = field(default_factory=GuardConfig)
    # What is minimised.
    loss: LossConfig = field(default_factory=CrossEntropyLoss)
    # A penalty on the weights that is added to it.
    regulariser: RegulariserConfig = field(default_factory=NoRegulariser)
    # Steps, batches, precision and hardware.
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    # When to save.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # Texts written on the way.
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    # What is watched in every layer.
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    # Where metrics go beside metrics.csv.
    logger: LoggerConfig = field(default_factory=CsvLogger)
    # What evaluate measures, and what is measured on the way.
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    # What is asked of a SLURM cluster.
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def on_images(self) -> bool:
        """Whether this is the training of an image classifier and not of a language model."""
        return isinstance(self.model, ClassifierConfig)

    @property
    def decoder(self) -> DecoderConfig:
        """``model`` where a language model is needed. Raises ConfigError when it is another."""
        if not isinstance(self.model, DecoderConfig):
            raise ConfigError(f"This works on language models, and model.name={self.model.name} classifies images.")
        return self.model

    @property
    def text(self) -> DataConfig:
        """``data`` where text is needed. Raises ConfigError when it is images."""
        if not isinstance(self.data, DataConfig):
            raise ConfigError(f"This works on text, and data.name={self.data.name} holds images.")
        return self.data

    @property
    def classifier(self) -> ClassifierConfig:
        """``model`` where an image classifier is needed. Raises ConfigError when it is another."""
        if not isinstance(self.model, ClassifierConfig):
            raise ConfigError(f"This works on image classifiers, and model.name={self.model.name} is a language model.")
        return self.model

    @property
    def images(self) -> ImageDataConfig:
        """``data`` where images are needed. Raises ConfigError when it is text."""
        if not isinstance(self.data, ImageDataConfig):
            raise ConfigError(f"This works on images, and data.name={self.data.name} is text.")
        return self.data


@dataclass(frozen=True)
class StepSize:
    """What an optimizer step reads: how many, and of what (``tokens`` or ``images``)."""

    count: int
    unit: str


def step_size(cfg: RunConfig) -> StepSize:
    """Tokens or images per optimizer step. Raises ConfigError when trainer.batch_tokens has no value for text."""
    if isinstance(cfg.data, ImageDataConfig):
        return StepSize(cfg.data.batch_size, "images")
    return StepSize(_batch_tokens(cfg.trainer), "tokens")


def consumed_by(cfg: RunConfig, steps: int) -> int:
    """Tokens or images of the first ``steps`` steps of a run whose ``trainer.micro_batch`` is a number or null."""
    per_sample = 1 if isinstance(cfg.data, ImageDataConfig) else cfg.text.sequence_length
    return step_plan(cfg).consumed(steps) * per_sample


def _batch_tokens(trainer: TrainerConfig) -> int:
    if trainer.batch_tokens is None:
        raise ConfigError("trainer.batch_tokens is null: give the number of tokens of an optimizer step.")
    return trainer.batch_tokens


def step_sequences(trainer: TrainerConfig, sequence_length: int) -> int:
    """Sequences per optimizer step. Raises ConfigError when data.sequence_length does not divide the step's tokens."""
    batch_tokens = _batch_tokens(trainer)
    sequences, rest = divmod(batch_tokens, sequence_length)
    if rest or sequences < 1:
        raise ConfigError(
            f"trainer.batch_tokens={batch_tokens} is no multiple of data.sequence_length={sequence_length}: "
            f"use {max(1, round(batch_tokens / sequence_length)) * sequence_length}."
        )
    return sequences


def processes(trainer: TrainerConfig) -> int:
    """Processes that train together. ``devices=auto`` counts as one here: training puts a number in its place."""
    return (trainer.devices if isinstance(trainer.devices, int) else 1) * trainer.num_nodes


def micro_batches(trainer: TrainerConfig, sequence_length: int) -> list[int]:
    """Every micro-batch, ascending, that cuts each step into equal parts, those of trainer.batch_warmup included, with
    as many for every process. Raises ConfigError when there is none."""
    sequences, world = step_sequences(trainer, sequence_length), processes(trainer)
    found = even_cuts(sequences, _stages(trainer, sequence_length), world)
    if not found:
        raise ConfigError(
            f"The {sequences} sequences of a step, or those of a stage of trainer.batch_warmup, cannot be shared "
            f"evenly by {world} processes (trainer.devices x trainer.num_nodes)."
        )
    return found


def _stages(trainer: TrainerConfig, sequence_length: int) -> tuple[BatchStage, ...]:
    return batch_stages(trainer.batch_warmup, trainer.max_steps, _batch_tokens(trainer), sequence_length)


def batch_plan(trainer: TrainerConfig, sequence_length: int) -> BatchPlan:
    """Raises ConfigError when trainer.batch_tokens, data.sequence_length and trainer.micro_batch do not divide.

    Training and the estimate put a number in the place of ``micro_batch=auto`` before; for others that is an error.
    """
    sequences = step_sequences(trainer, sequence_length)
    if isinstance(trainer.micro_batch, str):
        raise ConfigError(
            f"trainer.micro_batch={trainer.micro_batch} is resolved where training starts: give this command a number."
        )
    world = processes(trainer)
    micro = _share(sequences, world, "sequences") if trainer.micro_batch is None else trainer.micro_batch
    if micro < 1 or sequences % micro:
        raise ConfigError(
            f"trainer.micro_batch={micro} does not divide the {sequences} sequences of a step "
            "(trainer.batch_tokens / data.sequence_length)."
        )
    pieces, warmup = sequences // micro, _stages(trainer, sequence_length)
    for number, stage in enumerate(warmup):
        if stage.sequences % pieces:
            cuts = ", ".join(map(str, even_cuts(sequences, warmup, world)))
            raise ConfigError(
                f"trainer.batch_warmup[{number}] has {stage.sequences} sequences, which the {pieces} "
                f"micro-batches of a step cannot share evenly: use a multiple of {pieces * sequence_length} "
                f"tokens, or a trainer.micro_batch of {cuts}."
            )
    return BatchPlan(sequences, micro, _share(pieces, world, "micro-batches"), warmup, world)


def _share(count: int, world: int, of: str) -> int:
    """What each of ``world`` processes has of ``count`` ``of`` a step. Raises ConfigError when it is not the same."""
    if count % world:
        raise ConfigError(
            f"The {count} {of} of a step cannot be shared evenly by {world} processes (trainer.devices x "
            "trainer.num_nodes): change the number of processes, the batch or trainer.micro_batch."
        )
    return count // world


def image_plan(trainer: TrainerConfig, batch_size: int) -> BatchPlan:
    """How the images of a step are cut. Raises ConfigError when trainer.micro_batch does not divide data.batch_size."""
    if isinstance(trainer.micro_batch, str):
        raise ConfigError(
            f"trainer.micro_batch={trainer.micro_batch} is for text: give a number of images, or null for the whole "
            "step."
        )
    world = processes(trainer)
    micro = _share(batch_size, world, "images") if trainer.micro_batch is None else trainer.micro_batch
    if micro < 1 or batch_size % micro:
        raise ConfigError(f"trainer.micro_batch={micro} does not divide data.batch_size={batch_size}.")
    return BatchPlan(batch_size, micro, _share(batch_size // micro, world, "micro-batches"), processes=world)


def step_plan(cfg: RunConfig) -> BatchPlan:
    """The cut of a step of this run, of sequences or of images. Raises ConfigError when the numbers do not divide."""
    if isinstance(cfg.data, ImageDataConfig):
        return image_plan(cfg.trainer, cfg.data.batch_size)
    return batch_plan(cfg.trainer, cfg.text.sequence_length)
