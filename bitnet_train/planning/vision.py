"""What the recipe of an image classifier will cost, from its configuration alone: no images, and nothing is trained."""

from dataclasses import asdict, dataclass
from typing import Any

from bitnet_train.export.config import ExportDtype
from bitnet_train.nn.layout import parameter_table, quantised_layers
from bitnet_train.nn.vision.config import ClassifierConfig
from bitnet_train.planning.curve import CurvePoint, characteristic_points
from bitnet_train.planning.flops import image_flops, training_flops_per_image
from bitnet_train.planning.memory import FLOAT32, TrainingMemory, compute_bytes
from bitnet_train.planning.optimizer_state import optimizer_state
from bitnet_train.planning.parameters import ParameterCounts, count_parameters, count_scales
from bitnet_train.planning.sizes import ExportSize, checkpoint_bytes, export_sizes
from bitnet_train.quant.spec import QuantSpec, build_spec
from bitnet_train.training.batch_warmup import BatchPlan
from bitnet_train.training.config import RunConfig, step_plan
from bitnet_train.training.optimizers.config import OptimizerConfig


@dataclass(frozen=True)
class ImageEstimate:
    """The figures of one recipe; bytes, operations, steps and images."""

    parameters: ParameterCounts
    forward_flops: dict[str, float]
    training_flops_per_image: float
    batch: BatchPlan
    steps: int
    images: int
    memory: TrainingMemory
    precision: str
    checkpoint_bytes: int
    # What the weights take in several packings; a classifier has no exports.
    exports: list[ExportSize]
    export_dtype: str
    curve: list[CurvePoint]

    @property
    def forward_flops_per_image(self) -> float:
        """Operations of one forward pass per image."""
        return sum(self.forward_flops.values())

    @property
    def training_flops(self) -> float:
        """Operations of the whole run, validation not counted."""
        return self.training_flops_per_image * self.images

    def as_dict(self) -> dict[str, Any]:
        """For estimate.json: every field, and the sums that are properties."""
        plain = asdict(self)
        plain["parameters"] |= {
            "total": self.parameters.total,
            "quantised": self.parameters.quantised,
            "quantised_share": self.parameters.quantised_share,
        }
        plain["forward_flops_per_image"] = self.forward_flops_per_image
        plain["training_flops"] = self.training_flops
        plain["memory"]["total"] = self.memory.total
        return plain


def estimate_images(cfg: RunConfig, dtype: ExportDtype) -> ImageEstimate:
    """Everything that can be known about the run of a classifier before it starts."""
    model, spec, plan = cfg.classifier, build_spec(cfg.quant), step_plan(cfg)
    return ImageEstimate(
        parameters=count_parameters(model, spec),
        forward_flops=image_flops(model),
        training_flops_per_image=training_flops_per_image(model),
        batch=plan,
        steps=cfg.trainer.max_steps,
        images=cfg.trainer.max_steps * plan.batch_sequences,
        memory=_memory(model, spec, cfg.trainer.precision, cfg.optimizer, plan.micro_batch),
        precision=cfg.trainer.precision,
        checkpoint_bytes=checkpoint_bytes(model, spec, cfg.optimizer),
        exports=export_sizes(model, spec, dtype),
        export_dtype=dtype.value,
        curve=characteristic_points(cfg),
    )


def _memory(
    cfg: ClassifierConfig, spec: QuantSpec, precision: str, optimizer: OptimizerConfig, images: int
) -> TrainingMemory:
    """As :func:`bitnet_train.planning.memory.training_memory`, for a micro-batch of ``images``."""
    counts, compute = count_parameters(cfg, spec), compute_bytes(precision)
    shapes = {p.layer_name: p.shape for p in parameter_table(cfg)}
    rows = sum(shapes[name][0] for name in quantised_layers(cfg, spec))
    scales = FLOAT32 * count_scales(cfg, spec)
    # Autocast converts the weights of float layers; positions are added as they are.
    positions = shapes["positions"][0] * shapes["positions"][1] if "positions" in shapes else 0
    floats = counts.embedding - positions + counts.head + counts.linear.get("float", 0)
    # What does not grow with the batch is counted above.
    one, two = (saved_bytes(cfg, spec, compute != FLOAT32, number) for number in (1, 2))
    return TrainingMemory(
        master_weights=FLOAT32 * counts.total + scales,
        gradients=FLOAT32 * counts.total + scales,
        optimizer_state=optimizer_state(optimizer, cfg).bytes + 2 * scales,
        code_buffers=counts.quantised + FLOAT32 * rows,
        compute_copies=0 if compute == FLOAT32 else compute * floats,
        activations={"images": FLOAT32 * cfg.pixels * images, "kept for the backward pass": (two - one) * images},
    )


def saved_bytes(cfg: ClassifierConfig, spec: QuantSpec, bf16: bool, images: int) -> int:
    """Bytes that autograd keeps of ``images`` images for the backward pass, parameters and the images aside.

    Measured by a forward pass of the eager modules on the CPU: a classifier is small, and torch is loaded here alone.
    """
    import torch

    from bitnet_train.nn.kept import counting_kept
    from bitnet_train.nn.vision.model import CLASSIFIERS

    model = CLASSIFIERS[type(cfg)](cfg, spec)  # type: ignore[arg-type]
    batch = torch.zeros(images, cfg.channels, cfg.image_size, cfg.image_size)
    own = (*model.parameters(), *model.buffers(), batch)
    with counting_kept(own) as kept, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(batch)
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.zeros(images, dtype=torch.long))
    del loss
    return kept.nbytes
