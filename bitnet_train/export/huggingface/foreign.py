"""Checkpoints of ``transformers`` of any architecture: loaded, given inputs, written once their layers are BitLinear.

What is written are the master weights. Where ``transformers`` can quantise them itself in every forward pass (its
AutoBitLinear: ternary at half the mean, one scale per tensor, 8-bit inputs), ``quantization_config`` says so, and the
folder is loaded back and compared before it takes its place.
"""

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.errors import ConfigError, ConversionError
from bitnet_train.export.folder import ORIGIN_FILE, read_json, replaced_folder, write_json
from bitnet_train.export.huggingface.probes import relative_error
from bitnet_train.export.huggingface.verify import import_transformers, quiet
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.convert import ConversionReport
from bitnet_train.nn.convert_checks import evaluating
from bitnet_train.nn.convert_plan import places_of
from bitnet_train.quant.spec import LayerQuant

# Of a layer of the consumer on our input, by the type of the weights: its activations are rounded to that type.
CONSUMER_TOLERANCE = {torch.float32: 5e-3, torch.float64: 5e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# What a checkpoint's folder holds beside config and weights that its user needs: tokenizer, templates, processors.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
NOT_COMPANIONS = ("config.json", "generation_config.json", ORIGIN_FILE)
PERPLEXITY_WINDOW = 256
PERPLEXITY_TOKENS = 4096
# More than that many tokens of any text take.
MOST_CHARACTERS = 16 * PERPLEXITY_TOKENS


@dataclass
class ForeignCheckpoint:
    """A model of ``transformers`` on the CPU in its own type, in eval mode, and its tokenizer if it has one."""

    folder: Path
    model: Any
    tokenizer: Any
    # Why there is no tokenizer, or None.
    tokenizer_missing: str | None

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return type(self.model).__name__ in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())

    def encode(self, text: str) -> list[int]:
        """Token ids of the beginning of ``text``, without special tokens."""
        ids: list[int] = self.tokenizer(text[:MOST_CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def longest(self, tokens: int) -> int:
        """``tokens``, or the positions that the model has, if they are fewer."""
        config = self.model.config
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        return min([tokens, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])

    def examples(self, tokens: int, text: str, seed: int) -> dict[str, Tensor]:
        """Inputs of two sequences, ``tokens`` in all, of the text's ids or random ones; or of two random images.

        Raises ConfigError for a model that takes something else.
        """
        model, generator = self.model, torch.Generator().manual_seed(seed)
        kind = getattr(model, "main_input_name", "input_ids")
        if kind == "pixel_values":
            size = getattr(model.config, "image_size", 224)
            height, width = size if isinstance(size, list | tuple) else (size, size)
            channels = getattr(model.config, "num_channels", 3)
            images = torch.randn(2, channels, height, width, generator=generator)
            return {"pixel_values": images.to(model.dtype)}
        if kind != "input_ids":
            raise ConfigError(
                f"{self.folder}: the model takes {kind}, and inputs are made of token ids or images here."
            )
        length = self.longest(max(1, tokens // 2))
        ids = self.encode(text) if self.tokenizer is not None else []
        if len(ids) >= 2 * length:
            batch = torch.tensor(ids[: 2 * length]).reshape(2, length)
        else:
            batch = torch.randint(model.get_input_embeddings().num_embeddings, (2, length), generator=generator)
        made = {"input_ids": batch}
        return made | ({"decoder_input_ids": batch} if model.config.is_encoder_decoder else {})

    def perplexity(self, text: str) -> float | None:
        """Of up to 4,096 tokens of ``text`` in windows of 256; None for a model or a folder that has none."""
        if self.tokenizer is None or not self.causal:
            return None
        ids = torch.tensor(self.encode(text)[: PERPLEXITY_TOKENS + 1])
        window, nats, count = self.longest(PERPLEXITY_WINDOW), 0.0, 0
        with evaluating(self.model):
            for start in range(0, len(ids) - 1, window):
                part = ids[None, start : start + window + 1]
                logits = self.model(input_ids=part[:, :-1]).logits
                nats += float(F.cross_entropy(logits[0].float(), part[0, 1:], reduction="sum"))
                count += part.shape[1] - 1
        return math.exp(min(700.0, nats / count)) if count else None


def load_foreign(folder: Path) -> ForeignCheckpoint:
    """The checkpoint in ``folder``, loaded by ``transformers`` in the type it is stored in.

    Raises ConfigError when it is quantised already, lacks weights, has weights to spare, holds anything but
    safetensors, or needs code of its own.
    """
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise ConfigError(f"{folder} is quantised already (quantization_config in its config.json).")
    transformers = import_transformers()
    with quiet(transformers):
        try:
            architecture = _architecture(transformers, folder, config)
            model, info = architecture.from_pretrained(
                folder, dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except Exception as error:
            raise ConfigError(f"transformers cannot load {folder}: {_first_line(error)}.") from None
        for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, beside its model,")):
            if info[key]:
                raise ConfigError(f"{folder} {what} {sorted(map(str, info[key]))[0]}: it would not be the same model.")
        tokenizer, missing = None, "the folder has none"
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:
                missing = f"it cannot be loaded ({_first_line(error)})"
    return ForeignCheckpoint(folder, model.eval(), tokenizer, None if tokenizer is not None else missing)


def _architecture(transformers: Any, folder: Path, config: dict[str, Any]) -> Any:
    """The class that the checkpoint was saved by, or the automatic one, so that no head is lost or made up."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else []:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    kind = config.get("model_type")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".:") if lines else type(error).__name__


def online_obstacle(layers: list[LayerQuant]) -> str | None:
    """Why ``transformers`` cannot quantise master weights as these layers do, or None when it can."""
    for layer in layers:
        if (layer.scheme, layer.threshold) != ("ternary", 0.5):
            return f"it ternarises at half the mean, and these weights are {layer.scheme} at {layer.threshold:g}"
        if layer.groups != 1:
            return f"it has one scale per tensor, and these have quant.weight.groups={layer.groups}"
        if layer.activation_bits != 8:
            inputs = "stay floats" if layer.activation_bits is None else f"have {layer.activation_bits} bits"
            return f"it quantises inputs to 8 bits, and these {inputs} (quant.activation.bits)"
        plain = LayerQuant()
        if layer != plain:
            others = [f.name for f in fields(plain) if getattr(layer, f.name) != getattr(plain, f.name)]
            return f"it has no setting for the {' and '.join(others).replace('_', ' ')} of these"
    return None


def write_converted(
    checkpoint: ForeignCheckpoint, report: ConversionReport, examples: Mapping[str, Tensor], folder: Path
) -> str | None:
    """Write the master weights to ``folder``, whole or not at all; None, or why transformers will not quantise them.

    Raises ConversionError when the weights in the written file are not the model's.
    """
    obstacle = online_obstacle([layer.quant for layer in report.layers])
    with replaced_folder(folder) as partial, quiet(import_transformers()):
        checkpoint.model.save_pretrained(partial)
        for pattern in COMPANIONS:
            for path in sorted(checkpoint.folder.glob(pattern)):
                if path.name not in NOT_COMPANIONS and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, partial / path.name)
        if (partial / "pytorch_model.bin").exists() or not any(partial.glob("*.safetensors")):
            raise ConversionError(f"{folder}: transformers wrote no safetensors.")
        config = read_json(partial / "config.json")
        if obstacle is None:
            write_json(
                partial / "config.json", config | {"quantization_config": _quantisation(checkpoint.model, report)}
            )
            obstacle = _consumer_obstacle(checkpoint, report, examples, partial)
        if obstacle is not None:
            write_json(partial / "config.json", config)
            _check_stored(checkpoint.model, type(checkpoint.model).from_pretrained(partial, dtype="auto"))
        write_json(partial / ORIGIN_FILE, _record(checkpoint, report, obstacle))
    return obstacle


def _quantisation(model: nn.Module, report: ConversionReport) -> dict[str, Any]:
    converted = {name for layer in report.layers for name in layer.names}
    floats = [name for name, _, _, m in places_of(model) if isinstance(m, nn.Linear) and name not in converted]
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "use_rms_norm": False,
        "modules_to_not_convert": [_entry(name, converted) for name in floats],
    }


def _entry(name: str, converted: set[str]) -> str:
    """``name`` for modules_to_not_convert, which also takes the modules below it and all whose path ends so."""
    catches = any(other.startswith(f"{name}.") or other.endswith(name) for other in converted)
    return f"{re.escape(name)}$" if catches else name


def _consumer_obstacle(
    checkpoint: ForeignCheckpoint, report: ConversionReport, examples: Mapping[str, Tensor], folder: Path
) -> str | None:
    """Why the folder, loaded by transformers, is not the converted model; None when it is."""
    ours = checkpoint.model
    with torch.compiler.set_stance("force_eager"):
        try:
            theirs = type(ours).from_pretrained(folder, dtype="auto", local_files_only=True).eval()
        except Exception as error:
            return f"it does not load this architecture quantised: {_first_line(error)}"
        from transformers.integrations.bitnet import AutoBitLinear

        found = {name for name, _, _, m in places_of(theirs) if isinstance(m, AutoBitLinear)}
        converted = {name for layer in report.layers for name in layer.names}
        if found != converted:
            return f"it would quantise {len(found)} layers, not these {len(converted)} ({min(found ^ converted)})"
        _check_stored(ours, theirs)
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                seen.setdefault(name, (inputs[0].detach(), output.detach()))

            return hook

        handles = [
            module.register_forward_hook(keep(name))
            for name, module in ours.named_modules()
            if isinstance(module, BitLinear)
        ]
        try:
            with evaluating(ours):
                ours(**examples)
        finally:
            for handle in handles:
                handle.remove()
        with evaluating(theirs):
            for name, (x, y) in seen.items():
                deviation = relative_error(y, theirs.get_submodule(name)(x))
                if deviation > CONSUMER_TOLERANCE[y.dtype]:
                    return f"its {name} gives other outputs on the same inputs ({deviation:.1e})"
    return None


def _check_stored(ours: Any, theirs: Any) -> None:
    """Raises ConversionError when a weight that was written and loaded back is not the model's."""
    stored = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if (
            name not in stored
            or not torch.equal(stored[name].cpu(), tensor.cpu())
            or stored[name].dtype != tensor.dtype
        ):
            raise ConversionError(f"{name} is not the same when it is loaded back; nothing was written.")


def _record(checkpoint: ForeignCheckpoint, report: ConversionReport, obstacle: str | None) -> dict[str, Any]:
    """bitnet_train.json of a converted checkpoint; ``quant`` of a layer are the fields of its LayerQuant."""
    return {
        "format": "converted",
        "from": str(checkpoint.folder),
        "architecture": type(checkpoint.model).__name__,
        "quantised_by_transformers": obstacle is None,
        "layers": {
            name: {
                "quant": asdict(layer.quant),
                "sha256": layer.digests,
            }
            for layer in report.layers
            for name in layer.names
        },
        "left_alone": report.skipped,
        "sha256": report.digest,
    }
