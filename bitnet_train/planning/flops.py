"""Floating-point (and integer) operations per token, and what devices can do at most."""

from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.layout import Role, parameter_table
from bitnet_train.nn.vision.config import ClassifierConfig, VitConfig

# Dense bf16 peak in FLOP/s, by a part of the device's name, from the vendors' data sheets.
DEVICE_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def forward_flops(cfg: DecoderConfig, sequence_length: int) -> dict[str, float]:
    """Operations of one forward pass per token by part: 2 per weight of every matmul, and causal attention.

    Attention's two products cost ``2 * 2 * heads * head_dim`` per token and visible position, on average half the
    sequence.
    """
    return {
        "linear layers": 2.0 * sum(p.size for p in parameter_table(cfg) if p.role is Role.linear),
        "attention": 4.0 * cfg.layers * cfg.attention_width * sequence_length / 2,
        "head": 2.0 * cfg.vocab * cfg.hidden,
    }


def forward_flops_per_token(cfg: DecoderConfig, sequence_length: int) -> float:
    """Operations of one forward pass per token, the sum of :func:`forward_flops`."""
    return sum(forward_flops(cfg, sequence_length).values())


def training_flops_per_token(cfg: DecoderConfig, sequence_length: int) -> float:
    """Forward and backward: three times the forward (Kaplan et al. 2020, section 2.1)."""
    return 3.0 * forward_flops_per_token(cfg, sequence_length)


def image_flops(cfg: ClassifierConfig) -> dict[str, float]:
    """Operations of one forward pass per image by part: 2 per weight of every matmul and token, and attention.

    Every patch looks at every other, so attention's two products cost ``2 * 2 * hidden * tokens`` for each.
    """
    vit = isinstance(cfg, VitConfig)
    tokens = cfg.tokens if isinstance(cfg, VitConfig) else 1
    sizes = {p.layer_name: p.size for p in parameter_table(cfg) if p.role is not Role.norm}
    head, first = sizes.pop("head"), sizes.pop("patch_embed" if vit else "input_proj")
    sizes.pop("positions", None)  # added, not multiplied
    parts = {"first layer": 2.0 * tokens * first, "linear layers": 2.0 * tokens * sum(sizes.values())}
    if vit:
        parts["attention"] = 4.0 * cfg.layers * cfg.hidden * tokens**2
    return {**parts, "head": 2.0 * head}


def training_flops_per_image(cfg: ClassifierConfig) -> float:
    """Forward and backward: three times the forward (Kaplan et al. 2020, section 2.1)."""
    return 3.0 * sum(image_flops(cfg).values())


def device_peak(name: str) -> float | None:
    """Dense bf16 peak of the device called ``name``, or None when it is not in the table."""
    return next((peak for part, peak in DEVICE_PEAKS.items() if part.lower() in name.lower()), None)
