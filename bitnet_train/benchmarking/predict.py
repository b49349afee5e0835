"""What the roofline says about a contender: which style and types each of its linear layers runs in."""

from bitnet_train.benchmarking.contenders import Contender
from bitnet_train.nn.layout import block_linears
from bitnet_train.planning.roofline import DeviceRates, LinearWork, StepWork, step_prediction
from bitnet_train.quant.spec import LayerQuant, QuantSpec, build_spec
from bitnet_train.training.config import batch_plan
from bitnet_train.training.optimizers.config import MuonConfig


def predict_step(contender: Contender, rates: DeviceRates) -> dict[str, float] | None:
    """Seconds by term, or None for a library whose passes over memory are not known here."""
    cfg, compute = contender.cfg, "bf16" if contender.precision == "bf16-mixed" else "fp32"
    spec = build_spec(cfg.quant)
    linears = {}
    for block in range(cfg.decoder.layers):
        for name in block_linears(cfg.decoder):
            full = f"layers.{block}.{name}"
            work = linear_work(contender, spec.for_layer(full), spec, compute)
            if work is None:
                return None
            linears[full] = work
    plan = batch_plan(cfg.trainer, cfg.text.sequence_length)
    tokens = plan.batch_sequences * cfg.text.sequence_length
    iterations = cfg.optimizer.ns_steps if isinstance(cfg.optimizer, MuonConfig) else 0
    again = cfg.trainer.activation_checkpointing
    step = StepWork(tokens, plan.accumulation, cfg.text.sequence_length, compute, linears, iterations, again)
    return step_prediction(cfg.decoder, step, rates)


def linear_work(contender: Contender, layer: LayerQuant, spec: QuantSpec, compute: str) -> LinearWork | None:
    """How a layer of a contender runs, or None when it is not known."""
    mode = "compiled" if contender.compiled else "eager"
    if contender.layers == "torchao":
        # Its compiled passes are those of the compiled textbook: the quantisers fuse, the weights are read twice.
        style = "eager torchao" if mode == "eager" else "compiled textbook"
        return LinearWork(style, "int8", compute, compute)
    if contender.layers == "textbook" and layer.quantised:
        return LinearWork(f"{mode} textbook", compute, compute, compute)
    if contender.layers not in ("own", "textbook"):
        return None
    if not layer.quantised:
        return LinearWork(f"{mode} dense", compute, compute, compute)
    dx, dw = spec.gradient.resolve(compute)
    return LinearWork("fused ternary", "int8" if layer.activation_bits else compute, dx, dw)
