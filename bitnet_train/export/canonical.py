"""The canonical ternary checkpoint of a run: codes, scales and the unquantised tensors, one at a time.

Every writer starts from it. The training checkpoint is memory-mapped and a layer is ternarised when it is asked for,
so that a model of any size passes through in the memory of its largest tensor.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.code_cache import keep_codes
from bitnet_train.nn.config import DecoderConfig, ResidualDtype
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import learned_scales, parameter_table, quantised_layers
from bitnet_train.nn.rotary import rotary_table
from bitnet_train.quant.spec import InputQuant, QuantSpec, input_fields
from bitnet_train.quant.weights import Codes, quantise_weight
from bitnet_train.training.distributed.checkpoint_files import read_checkpoint
from bitnet_train.training.run_folder import check_checkpoint

PREFIX = "decoder."
INPUTS_AS_THEY_ARE: dict[str, Any] = input_fields(InputQuant(None))
# Longest context of a file that readers accept: the tables of rotary positions are allocated from this number alone.
LONGEST_CONTEXT = 1 << 20


class CanonicalCheckpoint:
    """What a run trained, as it ships: ``{layer: Codes}`` and the unquantised tensors, made on access and not kept.

    Args:
        cfg: the decoder's shape.
        spec: which layers are quantised how.
        masters: every parameter of the decoder by its name, as trained; usually memory-mapped.
        step: optimizer steps done.
        origin: where the weights came from, for messages.
        fingerprint: the token shards' fingerprint that the run trained on, if it is known.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        spec: QuantSpec,
        masters: dict[str, Tensor],
        step: int,
        origin: Path,
        fingerprint: str | None = None,
    ) -> None:
        self.cfg, self.spec, self.step, self.origin, self.fingerprint = cfg, spec, step, origin, fingerprint
        self.quantised = quantised_layers(cfg, spec)
        self._masters = masters
        self._table = parameter_table(cfg)
        self._scales = learned_scales(cfg, spec)
        shapes = {p.name: p.shape for p in self._table} | self._scales
        for name in [*shapes, *masters]:
            found = tuple(masters[name].shape) if name in masters else None
            if found != shapes.get(name):
                wanted = shapes.get(name, "absent")
                raise ConfigError(
                    f"{origin} does not fit the run's config.yaml: {name} is {found or 'missing'} instead of {wanted}."
                )

    @property
    def tensor_names(self) -> list[str]:
        """Names of the parameters that stay floats: embedding, head, norms and unquantised linears."""
        return [p.name for p in self._table if p.layer_name not in self.quantised]

    @property
    def learned(self) -> dict[str, Tensor]:
        """The learned scales float32 (groups,), by parameter name."""
        return {name: self._masters[name].float() for name in self._scales}

    def codes(self, layer: str) -> Codes:
        """Codes int8 (out, in) and scale float32 (groups,) of the quantised layer called ``layer``.

        Raises ConfigError when its master weights are not finite, KeyError when it is not quantised.
        """
        scale = self.learned.get(f"{layer}.weight_scale")
        codes = quantise_weight(self._masters[f"{layer}.weight"], self.quantised[layer], scale)
        if not bool(torch.isfinite(codes.scale).all()):
            raise ConfigError(f"{self.origin}: the weights of {layer} are not finite; export an older checkpoint.")
        return codes

    def tensor(self, name: str) -> Tensor:
        """A parameter as trained, in float32, master weights too. Raises ConfigError when it is not finite."""
        tensor = self._masters[name].detach().float()
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{self.origin}: {name} is not finite; export an older checkpoint.")
        return tensor

    def with_float_activations(self) -> "CanonicalCheckpoint":
        """The same weights in layers that take their inputs as they are: what dense weights compute."""
        as_float = lambda layer: replace(layer, **INPUTS_AS_THEY_ARE)  # noqa: E731
        overrides = tuple((pattern, as_float(layer)) for pattern, layer in self.spec.overrides)
        spec = replace(self.spec, default=as_float(self.spec.default), overrides=overrides, late=())
        return CanonicalCheckpoint(self.cfg, spec, self._masters, self.step, self.origin, self.fingerprint)

    def __iter__(self) -> Iterator[tuple[str, Codes | Tensor]]:
        """(layer name, Codes) and (parameter name, tensor) in the order of ``nn.layout.parameter_table``."""
        for parameter in self._table:
            if parameter.layer_name in self.quantised:
                yield parameter.layer_name, self.codes(parameter.layer_name)
            else:
                yield parameter.name, self.tensor(parameter.name)

    def decoder(
        self,
        device: torch.device | str = "cpu",
        backend: Backend | None = None,
        *,
        number_type: torch.dtype = torch.float32,
        scale_of: Callable[[Tensor], Tensor] | None = None,
    ) -> Decoder:
        """A float32 Decoder of the run, residual stream included, in eval mode; it has codes but no master weights.

        ``number_type`` rounds unquantised tensors as an export in that type does, ``scale_of`` the scales.
        """
        codes: dict[str, Codes] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in self:
            if isinstance(value, Codes):
                scale = value.scale if scale_of is None else scale_of(value.scale)
                codes[name] = Codes(value.codes.to(device), scale.to(device))
            else:
                # A copy: the mapping of the checkpoint is read-only and must not stay open.
                tensors[name] = value.to(number_type).to(device, torch.float32, copy=True)
        return assemble_decoder(self.cfg, self.spec, codes, tensors, backend)


def open_checkpoint(
    path: Path, cfg: DecoderConfig, spec: QuantSpec, spec_after: Callable[[int], QuantSpec] | None = None
) -> CanonicalCheckpoint:
    """The canonical checkpoint of a training checkpoint, quantised as ``spec``, or as ``spec_after(steps done)`` where
    the run changes it on the way. Raises ConfigError when it is unreadable or does not fit."""
    if not path.exists():
        raise ConfigError(f"The checkpoint {path} does not exist.")
    try:
        check_checkpoint(path)
        content = read_checkpoint(path, weights_only=True)
        step, state = int(content["global_step"]), content["state_dict"]
        masters = {name.removeprefix(PREFIX): t for name, t in state.items() if name.startswith(PREFIX)}
        fingerprint = content.get("ShardDataModule", {}).get("fingerprint")
    except Exception as error:  # a damaged pickle raises anything
        why = str(error) if type(error) is ValueError else type(error).__name__
        raise ConfigError(f"The checkpoint {path} cannot be read ({why}): use an older one.") from None
    if spec_after is not None:
        spec = spec_after(step)
    return CanonicalCheckpoint(cfg, spec, masters, step, path, fingerprint)


def assemble_decoder(
    cfg: DecoderConfig,
    spec: QuantSpec,
    codes: dict[str, Codes],
    tensors: dict[str, Tensor],
    backend: Backend | None = None,
) -> Decoder:
    """A Decoder that computes with exactly these codes and float32 tensors, without master weights, in eval mode.

    Its residual stream is float32. ``codes`` maps layer names, ``tensors`` parameter names; all on one device. Raises
    KeyError or ValueError when one is missing or of a wrong shape.
    """
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = Decoder(replace(cfg, residual_dtype=ResidualDtype.float32), spec, backend)
    parameters = dict(model.named_parameters())
    for name in parameters:
        owner, _, attribute = name.rpartition(".")
        if owner in codes and attribute in ("weight", "weight_scale"):
            continue
        if tensors[name].shape != parameters[name].shape:
            raise ValueError(f"{name}: shape {tuple(tensors[name].shape)} instead of {tuple(parameters[name].shape)}")
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(tensors[name], requires_grad=False))
    keep_codes(model, codes)
    device = model.embed_tokens.weight.device
    cos, sin = rotary_table(cfg.head_dim, cfg.context, cfg.rope_theta)
    model.cos, model.sin = cos.to(device), sin.to(device)
    return model.eval()
