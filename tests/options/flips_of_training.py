"""Flips of ``optimizer``, the schedules, ``clip``, ``guard``, ``loss``, ``regulariser``, ``trainer`` and what a run
writes on the way."""

from tests.options.flip import Flip, each, items

LONG = ("trainer.max_steps=8", "trainer.validate_every=8")
PERCENTILE = (*LONG, "clip=percentile", "clip.percentile=50", "clip.window=4", "clip.min_history=2", "clip.initial=0.3")
ZSCORE = (*LONG, "clip=zscore", "clip.z_threshold=0.1", "clip.warmup=3", "clip.alpha=0.5", "optimizer.lr=5")
ALL_AT_ONE_TENTH = "{pattern: '*', clip: {name: norm, max_norm: 0.1}}"
# A rate at which gradients spike: 2.6, 44, 31, 49, 22, 29, 29, 15 are their norms.
WILD = (*LONG, "optimizer.lr=5", "guard.outlier_sigma=0.01", "guard.window=4", "guard.min_history=2")
DISTIL = ("loss=distillation", "loss.teacher=@run@")

FLIPS: dict[str, Flip] = {
    **each({"lr": "1e-4", "weight_decay": "0.5", "layer_lr_decay": "0.5", "betas": "[0.5,0.5]", "eps": "0.1"},
           under="optimizer=adamw."),
    **each({"lr": "1e-4", "weight_decay": "0.5", "layer_lr_decay": "0.5", "adamw_lr": "0.3", "momentum": "0.5",
            "nesterov": "false", "ns_steps": "2", "adjust_lr_fn": "original", "betas": "[0.5,0.5]", "eps": "0.1"},
           "optimizer=muon", under="optimizer=muon."),
    **each({"max_norm": "0.01"}, "clip=norm", under="clip=norm."),
    **each({"start": "0.02", "max_norm": "0.1", "steps": "3", "shape": "cosine"}, *LONG, "clip=scheduled",
           "clip.start=0.01", "clip.max_norm=0.05", "clip.steps=6", under="clip=scheduled."),
    **each({"percentile": "10", "window": "2", "initial": "0.1", "min_history": "3"}, *PERCENTILE,
           under="clip=percentile."),
    **each({"z_threshold": "0.5", "target": "threshold", "alpha": "0.9", "warmup": "4", "initial": "0.05",
            "max_norm": "0.1"}, *ZSCORE, under="clip=zscore."),
    **each({"factor": "1e-4", "eps": "10", "exclude": "['*norm.weight']"}, "clip=adaptive", under="clip=adaptive."),
    **items(
        {
            "pattern": f"[{ALL_AT_ONE_TENTH}, {{pattern: '*q_proj*', clip: {{name: norm, max_norm: 0.01}}}}]",
            "clip": f"[{ALL_AT_ONE_TENTH}, {{pattern: '*o_proj*', clip: {{name: adaptive}}}}]",
        },
        f"[{ALL_AT_ONE_TENTH}, {{pattern: '*o_proj*', clip: {{name: norm, max_norm: 0.01}}}}]",
        "clip=by_pattern", under="clip=by_pattern.rules",
    ),
    "guard.skip_non_finite": Flip("guard.skip_non_finite=true", (*LONG, "optimizer.lr=1e30")),
    "guard.outlier_sigma": Flip("guard.outlier_sigma=1e6", WILD),
    "guard.window": Flip("guard.window=2", WILD),
    "guard.min_history": Flip("guard.min_history=4", WILD),
    "guard.rollback_after": Flip("guard.rollback_after=1", (*WILD, "checkpoint.every_steps=1")),
    "guard.max_rollbacks": Flip(
        "guard.max_rollbacks=1", (*WILD, "checkpoint.every_steps=1", "guard.rollback_after=1")
    ),
    **each({"z_loss": "0.1", "reduction": "sum"}, under="loss=cross_entropy."),
    **each({"teacher": "@llama@", "z_loss": "0.1", "logits": "3", "temperature": "1", "hidden": "1", "relations": "1"},
           *DISTIL, under="loss=distillation."),
    **each({"hidden_layers": "[0]", "hidden_distance": "cosine"}, *DISTIL, "loss.hidden=1", under="loss=distillation."),
    **each({"layer": "0", "relation_heads": "4", "relation_form": "cosine", "relation_mask": "causal"}, *DISTIL,
           "loss.relations=1", under="loss=distillation."),
    **each({"strength": "100", "start": "0", "ramp": "0", "distance": "absolute", "target": "scale"},
           "regulariser=codes", "regulariser.start=1", "regulariser.ramp=2", under="regulariser=codes."),
    **each({"strength": "100", "start": "1", "ramp": "2", "floor": "1.55", "temperature": "0.3"},
           "regulariser=entropy", "regulariser.floor=1.585", under="regulariser=entropy."),
    **each({"max_steps": "5", "batch_tokens": "512", "precision": "bf16-mixed", "validate_every": "2",
            "log_every": "2"}, under="trainer."),
    "trainer.micro_batch": Flip("trainer.micro_batch=2", see="micro_batches"),
    "trainer.compile": Flip("trainer.compile=true", see="compiled"),
    "trainer.devices": Flip("trainer.devices=2", see="processes"),
    "trainer.num_nodes": Flip("trainer.num_nodes=2", see="processes"),
    "trainer.strategy": Flip("trainer.strategy=fsdp", ("trainer.devices=2",), see="processes"),
    "trainer.activation_checkpointing": Flip("trainer.activation_checkpointing=full", see="recomputed"),
    "trainer.hang_timeout": Flip("trainer.hang_timeout=1e-5", see="hangs"),
    "trainer.accelerator": Flip("trainer.accelerator=cuda", see="device"),
    **items({"until": "[{until: 2, tokens: 128}]", "tokens": "[{until: 1, tokens: 64}]"}, "[{until: 1, tokens: 128}]",
            under="trainer.batch_warmup"),
    **each({"every_steps": "2", "every_minutes": "1e-9"}, "checkpoint.every_steps=null", "checkpoint.keep=4",
           under="checkpoint."),
    "checkpoint.mirror": Flip("checkpoint.mirror=memory://flip", ("checkpoint.every_steps=2",), see="mirrored"),
    "checkpoint.keep": Flip("checkpoint.keep=1", ("checkpoint.every_steps=1",)),
    **each({"every_steps": "1", "prompts": "[x]", "max_new_tokens": "3", "temperature": "0"}, "samples.every_steps=2",
           under="samples."),
    "telemetry.every_steps": Flip("telemetry.every_steps=1"),
    "telemetry.most_zeros": Flip("telemetry.most_zeros=0.1", ("telemetry.every_steps=1",), see="warned"),
    "telemetry.scale_factor": Flip("telemetry.scale_factor=1.0001", ("telemetry.every_steps=1",), see="warned"),
    **each({"project": "p", "entity": "e", "tags": "[t]", "offline": "true"}, "logger=wandb", under="logger=wandb.",
           see="wandb"),
}  # fmt: skip

FLIPS |= each({"lr": "1e-4", "weight_decay": "0.5", "layer_lr_decay": "0.5", "betas": "[0.5,0.5]", "eps": "0.1",
               "block_size": "64"}, "optimizer=adamw_8bit", under="optimizer=adamw_8bit.",
              see="trained_eagerly")  # fmt: skip
for optimizer in ("adamw", "adamw_8bit", "muon"):
    FLIPS |= items(
        {"pattern": "[{pattern: layers.1.*, lr: 0}]", "lr": "[{pattern: layers.0.*, lr: 0.5}]",
         "weight_decay": "[{pattern: layers.0.*, lr: 0, weight_decay: 9}, {pattern: layers.1.*, weight_decay: 9}]"},
        "[{pattern: layers.0.*, lr: 0}]", f"optimizer={optimizer}", under=f"optimizer={optimizer}.groups",
        see="trained_eagerly" if optimizer == "adamw_8bit" else "trained",
    )  # fmt: skip

RATE = {"share": "0.5", "lr": "1", "shape": "linear", "final": "0.5"}
DECAY = {"weight_decay": "1", "weight_decay_shape": "linear", "weight_decay_final": "0.1"}


def two_stages(first: dict[str, str], last: str = "0.5", **changes: str) -> str:
    """Two stages, of which the first is ``first`` with ``changes``, and the last takes the share ``last``."""
    settings = ", ".join(f"{key}: {value}" for key, value in (first | changes).items())
    return f"[{{{settings}}},{{share: {last}, lr: 0.4, final: 0.1}}]"


ENDS = {"linear": {"final": "0.3"}, "cosine": {"final": "0.3"}, "exponential": {"final": "0.3"}, "constant": {},
        "polynomial": {"power": "2", "final": "0.3"}, "inverse_sqrt": {"timescale": "1", "decay": "0.5"},
        "wsd": {"decay": "5", "shape": "cosine", "final": "0.3"}, "two_stage": {}}  # fmt: skip
for schedule in ("schedule", "weight_decay_schedule"):
    of_stages = f"{schedule}.stages=[{{share: 0.5, lr: 1, final: 0.5}},{{share: 0.5, lr: 0.4, final: 0.1}}]"
    for kind, own in ENDS.items():
        on = (*LONG, f"{schedule}={kind}", *((of_stages,) if kind == "two_stage" else ()))
        name = f"{schedule}={kind}."
        warm = (f"{schedule}.warmup=3", *((f"{schedule}.decay=4",) if kind == "wsd" else ()))
        FLIPS |= each({"warmup": "2", "warmup_start": "0.5", "warmup_shape": "cosine"}, *on, *warm, under=name)
        FLIPS |= each(own, *on, *warm, under=name)
        if kind == "inverse_sqrt":
            cooling = (f"{schedule}.decay=0.5",)
            FLIPS |= each({"shape": "cosine", "final": "0.3"}, *on, *warm, *cooling, under=name)

    changed = {"share": two_stages(RATE, "0.25", share="0.75"), "lr": two_stages(RATE, lr="0.9"),
               "shape": two_stages(RATE, shape="cosine"), "final": two_stages(RATE, final="0.6")}  # fmt: skip
    of_two = (*LONG, f"{schedule}=two_stage")
    FLIPS |= items(changed, two_stages(RATE), *of_two, under=f"{schedule}=two_stage.stages")

changed = {"weight_decay": "0.9", "weight_decay_shape": "cosine", "weight_decay_final": "0.3"}
FLIPS |= items(
    {key: two_stages(RATE | DECAY, **{key: value}) for key, value in changed.items()}, two_stages(RATE | DECAY),
    *LONG, "schedule=two_stage", under="schedule=two_stage.stages",
)  # fmt: skip
# Stages of the weight decay itself say it with lr, shape and final.
for key, value in changed.items():
    stages = two_stages(RATE, **{key: value})
    FLIPS[f"weight_decay_schedule=two_stage.stages[].{key}"] = Flip(
        f"weight_decay_schedule.stages={stages}", (*LONG, "weight_decay_schedule=two_stage"), refused=True
    )
