"""``command=convert``: the linear layers of a checkpoint of ``transformers`` become BitLinear, checked all the way."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bitnet_train.commands.console import make_console, print_table
from bitnet_train.commands.sources import read_text
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError
from bitnet_train.export.config import convert_source
from bitnet_train.export.huggingface.foreign import ForeignCheckpoint, load_foreign, write_converted
from bitnet_train.kernels.backend import choose_backend
from bitnet_train.nn.convert import ConversionReport, convert, unquantised
from bitnet_train.quant.spec import LayerQuant, build_spec


def run(cfg: Config) -> int:
    """Load ``convert.from``, convert it, write ``convert.to``; 0, or an error and nothing written.

    Raises ConfigError for input that cannot be converted and ConversionError when a check fails.
    """
    console, settings = make_console(), cfg.convert
    assert settings.to is not None
    folder = Path(settings.to).expanduser()
    text = prose() if settings.text is None else read_text(Path(settings.text), "convert.text")
    # Checkpoints are converted on the CPU. A backend that cannot run there is refused before the weights are read.
    backend = choose_backend("cpu", cfg.kernels.backend).backend
    checkpoint = load_foreign(Path(str(convert_source(settings))).expanduser())
    examples = checkpoint.examples(settings.tokens, text, cfg.seed)
    before = checkpoint.perplexity(text)
    try:
        report = convert(
            checkpoint.model,
            build_spec(cfg.quant),
            include=settings.include,
            exclude=settings.exclude,
            examples=examples,
            backend=backend,
        )
    except ConfigError as error:
        arguments = ("include:", "exclude:")  # of the function, which are settings here
        raise ConfigError(f"convert.{error}" if str(error).startswith(arguments) else str(error)) from None
    with unquantised(checkpoint.model):
        off = checkpoint.perplexity(text)
    on = checkpoint.perplexity(text)
    print_table(console, layers_table(report))
    print_table(console, checks_table(checkpoint, report, (before, off, on)))
    obstacle = write_converted(checkpoint, report, examples, folder)
    if obstacle is None:
        console.print(f"{folder}: master weights, which transformers quantises in every forward pass", markup=False)
    else:
        console.print(
            f"{folder}: plain master weights; transformers will not quantise them: {obstacle}. Convert them in Python "
            "with bitnet_train.nn.convert.convert, each layer as LayerQuant(**quant) of bitnet_train.json.",
            markup=False,
        )
    _say_skipped(console, report)
    return 0


def prose() -> str:
    """English about Python: the language reference that every Python brings with it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def layers_table(report: ConversionReport) -> Table:
    """One row for all layers of one shape and quantisation, and one for everything left alone for one reason."""
    table = Table("modules", "count", "shape", "quantisation", "weights and biases", title="Layers")
    kinds: dict[tuple[str, ...], list[str]] = {}
    for layer in report.layers:
        quant = describe_quant(layer.quant)
        bias = "same bytes, with bias" if layer.bias else "same bytes"
        shape = " x ".join(map(str, layer.shape))
        kinds.setdefault((pattern_of(layer.names[0]), shape, quant, bias), []).append(layer.names[0])
    for (pattern, shape, quant, bias), names in kinds.items():
        table.add_row(pattern, str(len(names)), shape, quant, bias)
    skipped = Counter((pattern_of(name), reason) for name, reason in report.skipped.items())
    for (pattern, reason), count in skipped.items():
        table.add_row(pattern, str(count), "", f"left alone: {reason}", "")
    return table


def describe_quant(quant: LayerQuant) -> str:
    """The scheme, the scales, the bits of the inputs, and what else is not as usual."""
    scheme = quant.scheme if quant.bits is None else f"{quant.scheme} {quant.bits} bits"
    scales = f"groups={quant.groups}"
    if quant.groups == "row":
        scales = "scales one per row"
    elif quant.group_rows is not None:
        scales = f"scales of {quant.group_rows} rows"
    words = [scheme, scales, f"inputs {quant.activation_bits or 'float'}"]
    usual = LayerQuant(quant.scheme, bits=quant.bits)
    told = ("scheme", "groups", "group_rows", "bits", "activation_bits")
    others = [f for f in fields(usual) if f.name not in told and getattr(quant, f.name) != getattr(usual, f.name)]
    return ", ".join([*words, *(f"{f.name}={getattr(quant, f.name)}" for f in others)])


def pattern_of(name: str) -> str:
    """``name`` with every number replaced by a star."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def checks_table(
    checkpoint: ForeignCheckpoint,
    report: ConversionReport,
    perplexities: tuple[float | None, float | None, float | None],
) -> Table:
    """What was compared before and after."""
    outputs = report.outputs
    assert outputs is not None
    ratios = [s.variance / s.float_variance for s in outputs.statistics.values() if s.float_variance > 0]
    table = Table("check", "result", title="Checks")
    parameters = sum(len(layer.digests) for layer in report.layers)
    table.add_row(
        "checksums", f"{parameters} of {parameters} parameters have the same bytes (sha256 {report.digest[:16]})"
    )
    table.add_row(
        "layers", f"{len(report.layers)} converted, {report.parameters:,} weights; none that should be is left"
    )
    hooks = sum(layer.hooks for layer in report.layers)
    if hooks:
        table.add_row("hooks", f"{hooks} went along")
    table.add_row("outputs, quantisation off", f"largest difference {outputs.off:.3g}")
    change = f"largest difference {outputs.on:.3g}, relative {outputs.on_relative:.3f}, all finite"
    table.add_row("outputs, quantisation on", change)
    if ratios:
        spread = f"{min(ratios):.3f} to {max(ratios):.3f} of nn.Linear's on the same input"
        table.add_row("variance of a layer's outputs", spread)
    if outputs.unreached:
        table.add_row("not reached by the examples", f"{len(outputs.unreached)}, such as {outputs.unreached[0]}")
    before, off, on = perplexities
    if before is not None and off is not None and on is not None:
        table.add_row("perplexity", f"{before:.3f} before, {off:.3f} with quantisation off, {on:.3f} with it on")
    else:
        reason = checkpoint.tokenizer_missing
        why = f"no tokenizer: {reason}" if reason else f"{type(checkpoint.model).__name__} predicts no next token"
        table.add_row("perplexity", f"not measured ({why})")
    return table


def _say_skipped(console: Console, report: ConversionReport) -> None:
    left = [name for name, reason in report.skipped.items() if reason.endswith("is no nn.Linear")]
    if left:
        console.print(f"{len(left)} modules with matrices of their own stay float, such as {left[0]}", markup=False)
