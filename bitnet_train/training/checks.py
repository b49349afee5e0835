"""Rules that the training settings must keep. No torch here, so that a mistake is answered at once."""

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import initial_source
from bitnet_train.nn.layout import trained_parameters
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.clipping.config import check_clip
from bitnet_train.training.config import PRECISIONS, RunConfig, micro_batches, step_plan
from bitnet_train.training.distributed.checks import check_processes
from bitnet_train.training.guard.config import check_guard
from bitnet_train.training.losses.config import check_loss
from bitnet_train.training.optimizers.config import check_optimizer
from bitnet_train.training.regularisers.config import check_regulariser
from bitnet_train.training.schedules.checks import check_schedule
from bitnet_train.training.telemetry.config import check_telemetry


def check_training(cfg: RunConfig) -> None:
    """Raises ConfigError for training settings that are out of range or do not fit together."""
    check_trainer(cfg)
    parameters = trained_parameters(cfg.model, build_spec(cfg.quant))
    check_optimizer(cfg.optimizer, parameters)
    check_clip(cfg.clip, [p.name for p in parameters], cfg.trainer.max_steps)
    check_telemetry(cfg.telemetry)
    check_loss(cfg.loss, cfg.model)
    check_guard(cfg.guard)
    if cfg.guard.rollback_after is not None and cfg.checkpoint.every_steps is None:
        raise ConfigError(
            "guard.rollback_after goes back to checkpoints that the step decides, not the clock: set "
            "checkpoint.every_steps."
        )
    if cfg.trainer.max_steps == 0:
        return  # no step, no schedule
    check_schedule(cfg.schedule, cfg.trainer.max_steps)
    check_regulariser(cfg.regulariser, cfg.model, build_spec(cfg.quant), cfg.trainer.max_steps)
    check_schedule(cfg.weight_decay_schedule, cfg.trainer.max_steps, "weight_decay_schedule")


def check_trainer(cfg: RunConfig) -> None:
    """Raises ConfigError when the trainer, checkpoint or sample settings are out of range."""
    trainer = cfg.trainer
    source = initial_source(cfg.init)
    if trainer.max_steps < (0 if source is not None else 1):
        raise ConfigError(
            f"trainer.max_steps is {trainer.max_steps}; it must be at least 1 (or 0 with init.from=, which saves those "
            "weights as a run)."
        )
    check_processes(cfg)
    for name in ("batch_tokens", "validate_every", "log_every"):
        value = getattr(trainer, name)
        if value is not None and value < 1:
            raise ConfigError(f"trainer.{name} is {value}; it must be at least 1.")
    if trainer.precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={trainer.precision} is unknown: use one of {', '.join(PRECISIONS)}.")
    if trainer.compile not in (True, False, "auto"):
        raise ConfigError(f"trainer.compile={trainer.compile} is unknown: use true, false or auto.")
    for value, name in (
        (cfg.checkpoint.every_steps, "checkpoint.every_steps"),
        (cfg.checkpoint.every_minutes, "checkpoint.every_minutes"),
        (cfg.samples.every_steps, "samples.every_steps"),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}; it must be positive, or null for never.")
    if cfg.checkpoint.keep < 1:
        raise ConfigError(f"checkpoint.keep is {cfg.checkpoint.keep}; at least 1 checkpoint must stay.")
    if cfg.samples.max_new_tokens < 1 or cfg.samples.temperature < 0:
        raise ConfigError("samples.max_new_tokens must be at least 1 and samples.temperature at least 0.")
    if trainer.micro_batch == "auto":
        micro_batches(trainer, cfg.text.sequence_length)
    elif isinstance(trainer.micro_batch, str):
        raise ConfigError(
            f"trainer.micro_batch={trainer.micro_batch} is unknown: use a number of sequences, null or auto."
        )
    else:
        step_plan(cfg)
