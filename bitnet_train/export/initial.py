"""The weights that a run starts from: those of another run, of an export, or of a checkpoint of ``transformers``."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer, load_tokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import CanonicalCheckpoint, open_checkpoint
from bitnet_train.export.gguf.reader import gguf_path, read_gguf
from bitnet_train.export.gguf.tokenizer_metadata import tokenizer_from_metadata
from bitnet_train.export.hub import download, looks_like_hub_name
from bitnet_train.export.huggingface.reader import read_model, read_tokenizer
from bitnet_train.export.huggingface.variant import Storage
from bitnet_train.export.packed.reader import is_packed, read_packed, read_packed_tokenizer
from bitnet_train.export.packed.writer import LATER_FIELDS
from bitnet_train.nn.config import DecoderConfig, Norms, shape_fields
from bitnet_train.nn.init import reset_scales
from bitnet_train.nn.layout import learned_scales, parameter_table, quantised_layers
from bitnet_train.quant.config import QuantConfig
from bitnet_train.quant.spec import QuantSpec, build_spec
from bitnet_train.quant.weights import Codes, masters_from_codes
from bitnet_train.storage import local_copy

# How a decoder runs, not what its weights are.
FREE_FIELDS = {"context", "residual_dtype"}


@dataclass(frozen=True)
class InitialWeights:
    """Every parameter of a decoder by its name, the tokenizer that they were trained with, and what they are."""

    masters: dict[str, Tensor]
    tokenizer: TextTokenizer
    description: str
    # The layers whose codes, under the run's quantisation, are what the source computes with; the others are floats.
    coded: frozenset[str] = frozenset()
    # Whether the source has none of the sub-norms of the run's model; then they are ones here.
    lacks_sub_norms: bool = False


def read_initial(source: str, cfg: DecoderConfig, spec: QuantSpec) -> InitialWeights:
    """The weights of ``init.from=source``: ``RUN`` or ``RUN@STEP``, the folder of an export or of a checkpoint, or a
    repository of the Hugging Face hub, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.

    Packed codes become master weights that ternarise to these codes and scales. Raises ConfigError when the source is
    missing, damaged, or of another shape than ``cfg``.
    """
    name, _, step = local_copy(source, "init.from").partition("@")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not looks_like_hub_name(source):
            raise ConfigError(
                f"init.from={source} does not exist: give the folder of a run, an export or a checkpoint."
            )
        folder, step = download(source, "init.from"), ""
    if (folder / "config.yaml").is_file():
        return _from_run(folder, step, cfg, spec, source)
    if step:
        raise ConfigError(f"init.from={source}: only a run has steps to choose from.")
    path = gguf_path(folder)
    if path is not None:
        model = read_gguf(path)
        tokenizer = lambda: tokenizer_from_metadata(model.metadata)  # noqa: E731
        return _weights(source, model.cfg, model.codes, model.tensors, cfg, spec, tokenizer, f"codes of {path}")
    if is_packed(folder):
        packed = read_packed(folder)
        tokenizer = lambda: read_packed_tokenizer(folder, packed.cfg.vocab)  # noqa: E731
        return _weights(source, packed.cfg, packed.codes, packed.tensors, cfg, spec, tokenizer, f"codes of {folder}")
    imported = read_model(folder)
    what = {"hf-packed": "codes", "hf-master": "master weights", "hf-dense": "weights"}[imported.storage.value]
    initial = _weights(
        source, imported.cfg, imported.codes, imported.tensors, cfg, spec, lambda: read_tokenizer(folder),
        f"{what} of {folder}",
    )  # fmt: skip
    if imported.storage is Storage.master:
        return replace(initial, coded=_quantised_in_both(initial, cfg, spec, imported.spec))
    return initial


def _quantised_in_both(
    initial: InitialWeights, cfg: DecoderConfig, spec: QuantSpec, theirs: QuantSpec
) -> frozenset[str]:
    ours, source = (set(quantised_layers(cfg, of)) for of in (spec, theirs))
    return initial.coded | frozenset(ours & source)


def _weights(
    source: str,
    found: DecoderConfig,
    codes: dict[str, Codes],
    tensors: dict[str, Tensor],
    cfg: DecoderConfig,
    spec: QuantSpec,
    tokenizer: Callable[[], TextTokenizer],
    description: str,
) -> InitialWeights:
    held = _as_held(source, {f.name: _plain(getattr(found, f.name)) for f in shape_fields()}, cfg)
    masters, coded = _masters(source, codes, tensors, held, spec)
    return InitialWeights(masters | _ones(held, cfg), tokenizer(), description, coded, held.norms is not cfg.norms)


def check_same_tokenizer(source: str, theirs: TextTokenizer, ours: TextTokenizer, key: str = "init.from") -> None:
    """Raises ConfigError when token ids mean something else in the run than in the weights that ``key`` names."""
    same = theirs.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    if not same or (theirs.bos_id, theirs.eos_id) != (ours.bos_id, ours.eos_id):
        bos, eos = (theirs.tokenizer.id_to_token(index) for index in (theirs.bos_id, theirs.eos_id))
        raise ConfigError(
            f"{key}={source} was trained with another tokenizer: use its own, with data/tokenizer=pretrained "
            f"data.tokenizer.source=FOLDER (one with its tokenizer.json) data.tokenizer.bos='{bos}' "
            f"data.tokenizer.eos='{eos}' data.tokenizer.vocab_size={theirs.vocab_size}."
        )


def _from_run(folder: Path, step: str, cfg: DecoderConfig, spec: QuantSpec, source: str) -> InitialWeights:
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        model = LATER_FIELDS | saved["model"]
        found = {field.name: model[field.name] for field in shape_fields()}
        # How the run came to its codes is of no matter here, and is a choice of dataclasses.
        settings = {key: value for key, value in saved["quant"].items() if key != "progressive"}
        quant = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(QuantConfig), settings))
        assert isinstance(quant, QuantConfig)
        theirs = build_spec(quant)
    except (OSError, yaml.YAMLError, KeyError, TypeError, OmegaConfBaseException):
        raise ConfigError(f"init.from={source}: {folder / 'config.yaml'} is not the configuration of a run.") from None
    held = _as_held(source, found, cfg)
    if step and not step.isdigit():
        raise ConfigError(f"init.from={source}: the part after @ must be a step number.")
    path = folder / "checkpoints" / (f"step-{int(step):08d}.ckpt" if step else "last.ckpt")
    canonical = open_checkpoint(path, held, theirs)
    masters = {p.name: canonical.tensor(p.name) for p in parameter_table(held)} | _ones(held, cfg)
    learned, left_out = _fitting_scales(canonical, cfg, spec, theirs)
    masters |= learned
    what = f"step {canonical.step} of {folder}{left_out}"
    initial = InitialWeights(
        masters, load_tokenizer(folder / "tokenizer"), what, frozenset(), held.norms is not cfg.norms
    )
    return replace(initial, coded=_quantised_in_both(initial, cfg, spec, theirs))


def _fitting_scales(
    canonical: CanonicalCheckpoint, cfg: DecoderConfig, spec: QuantSpec, theirs: QuantSpec
) -> tuple[dict[str, Tensor], str]:
    """The learned scales that mean the same in the run, and a clause about those that do not, to be said."""
    wanted, fitting = learned_scales(cfg, spec), {}
    for name, scale in canonical.learned.items():
        layer = name.removesuffix(".weight_scale")
        same = [(q.scheme, q.bits) for q in (spec.for_layer(layer), theirs.for_layer(layer))]
        if wanted.get(name) == tuple(scale.shape) and same[0] == same[1]:
            fitting[name] = scale
    lost = len(canonical.learned) - len(fitting)
    return fitting, f"; the learned scales of {lost} layers are left out, which quant= has otherwise" if lost else ""


def _masters(
    source: str, codes: dict[str, Codes], tensors: dict[str, Tensor], cfg: DecoderConfig, spec: QuantSpec
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Master weights by name, and the layers that are codes in the source and in the run."""
    quantised = quantised_layers(cfg, spec)
    masters: dict[str, Tensor] = {}
    coded = set()
    for parameter in parameter_table(cfg):
        layer = parameter.layer_name
        theirs = codes.get(layer)
        if layer not in quantised:
            masters[parameter.name] = tensors[parameter.name] if theirs is None else theirs.dequantise()
            continue
        groups = quantised[layer].group_count(parameter.shape[0])
        try:
            # Dense weights may be codes times scales; averaged once more, their scales would shrink.
            found = _codes_of_dense(tensors[parameter.name], groups) if theirs is None else _regrouped(theirs, groups)
            if found is None:
                masters[parameter.name] = tensors[parameter.name]
                continue
            masters[parameter.name] = masters_from_codes(found, quantised[layer])
        except ValueError as error:
            raise ConfigError(f"init.from={source}: {layer}: {error}; set quant= as it was trained.") from None
        if quantised[layer].trainable_scale:
            masters[f"{layer}.weight_scale"] = found.scale
        coded.add(layer)
    return masters, frozenset(coded)


def _codes_of_dense(weight: Tensor, groups: int) -> Codes | None:
    """The codes and scales that weights (out, in) are products of, or None when a group has several magnitudes."""
    magnitudes = weight.abs().reshape(groups, -1)
    scale = magnitudes.amax(1)
    if not bool(((magnitudes == 0) | (magnitudes == scale[:, None])).all() and (scale > 0).all()):
        return None
    return Codes(weight.sign().to(torch.int8), scale)


def _regrouped(codes: Codes, groups: int) -> Codes:
    """The same codes with a scale for each of ``groups``; a file may hold one per row. Raises ValueError."""
    scales = codes.row_scale().reshape(groups, -1)
    if not torch.equal(scales, scales[:, :1].expand_as(scales)):
        raise ValueError(f"its {len(codes.scale)} scales are not those of {groups} groups")
    return Codes(codes.codes, scales[:, 0].clone())


def _as_held(source: str, found: dict[str, Any], cfg: DecoderConfig) -> DecoderConfig:
    """``cfg`` as the source has it: without sub-norms where only the run's model has them.

    Raises ConfigError when anything else differs.
    """
    without = found["norms"] == Norms.pre.value and cfg.norms is Norms.pre_sub
    held = replace(cfg, norms=Norms.pre) if without else cfg
    _check_fields(source, found, held)
    return held


def _ones(held: DecoderConfig, cfg: DecoderConfig) -> dict[str, Tensor]:
    """The parameters that only the run's model has: sub-norms, at one."""
    there = {p.name for p in parameter_table(held)}
    return {p.name: torch.ones(p.shape) for p in parameter_table(cfg) if p.name not in there}


def _check_fields(source: str, found: dict[str, Any], cfg: DecoderConfig) -> None:
    wrong = [
        f"model.{field.name}={_yaml(found[field.name])}"
        for field in shape_fields()
        if field.name not in FREE_FIELDS and found[field.name] != _plain(getattr(cfg, field.name))
    ]
    if found["vocab"] != cfg.vocab:  # which follows it where nobody set it, and cannot be smaller
        wrong.append(f"data.tokenizer.vocab_size={found['vocab']}")
    if wrong:
        raise ConfigError(f"init.from={source} is of another model: set {' '.join(wrong)}.")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def fill_weights(model: torch.nn.Module, masters: dict[str, Tensor]) -> None:
    """Copy ``masters`` into the parameters of the same names. Raises KeyError when one is missing.

    Learned scales that ``masters`` lacks start at the statistic of their weights.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("weight_scale"):
                parameter.copy_(masters[name])
        reset_scales(model)
        for name, parameter in model.named_parameters():
            if name.endswith("weight_scale") and name in masters:
                parameter.copy_(masters[name])
