"""Who is compared: each contender is a configuration, a kind of layer, a precision and whether it is compiled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bitnet_train.benchmarking.config import BASELINES
from bitnet_train.benchmarking.peers import PEERS, load_peer, peer_obstacle
from bitnet_train.benchmarking.textbook import textbook
from bitnet_train.errors import ConfigError
from bitnet_train.kernels.backend import choose_backend
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.layout import quantised_layers
from bitnet_train.quant.config import ActivationQuantConfig, QuantConfig, WeightQuantConfig, WeightScheme
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.config import RunConfig
from bitnet_train.training.device import Choices, choose

REFERENCE = "dense"


@dataclass(frozen=True)
class Contender:
    """What is built and timed; can be sent to another process.

    ``cfg`` is a whole configuration, ``layers`` one of ``own`` (as ``cfg.quant`` says), ``textbook`` and the names in
    :data:`peers.PEERS`; ``precision`` and ``compiled`` are what the automatic settings came to.
    """

    name: str
    about: str
    cfg: RunConfig
    layers: str
    device: str
    precision: str
    compiled: bool

    def decoder(self) -> Decoder:
        """The model with initial weights, on the CPU."""
        decoder = self._decoder()
        decoder.checkpoint_activations(self.cfg.trainer.activation_checkpointing)
        return decoder

    def _decoder(self) -> Decoder:
        cfg = self.cfg
        backend = choose_backend(self.device, cfg.kernels.backend).backend
        if self.layers == "own":
            return build_decoder(cfg.decoder, build_spec(cfg.quant), cfg.init, cfg.seed, backend)
        decoder = build_decoder(cfg.decoder, build_spec(unquantised()), cfg.init, cfg.seed, backend)
        if self.layers == "textbook":
            return textbook(decoder, set(quantised_layers(cfg.decoder, build_spec(cfg.quant))))
        load_peer(self.layers)
        return PEERS[self.layers](decoder)


def unquantised() -> QuantConfig:
    """What ``quant=none`` composes to."""
    weight = WeightQuantConfig(scheme=WeightScheme.float)
    return QuantConfig(weight=weight, activation=ActivationQuantConfig(bits=None))


@dataclass(frozen=True)
class Line:
    """The contenders that take part, in the order of the tables, and why each other one does not."""

    contenders: list[Contender]
    not_measured: dict[str, str]


def line_up(cfg: RunConfig, wanted: Sequence[str] | None, variants: Mapping[str, RunConfig]) -> Line:
    """The baselines of these names (all when None) and the variants of the recipe.

    Raises ConfigError when the recipe quantises nothing.
    """
    if not build_spec(cfg.quant).quantised:
        raise ConfigError(
            "command=benchmark compares a ternary recipe with its unquantised twin, and this recipe quantises nothing: "
            "choose quant=ternary."
        )
    choices = choose(cfg)
    contenders, missing = [], {}
    for name in BASELINES:
        if wanted is not None and name not in wanted:
            continue
        obstacle = _obstacle(name, choices)
        if obstacle is None:
            contenders.append(_baseline(name, cfg, choices))
        else:
            missing[name] = obstacle
    for name, varied in variants.items():
        contenders.append(_contender(name, "a variant of the recipe", varied, "own", choose(varied)))
    if not contenders:
        raise ConfigError(
            f"None of the chosen contenders can run here: {'; '.join(f'{k}: {v}' for k, v in missing.items())}."
        )
    return Line(contenders, missing)


def _obstacle(name: str, choices: Choices) -> str | None:
    if name in PEERS:
        return peer_obstacle(name, choices.device)
    if name == "textbook_bf16_compiled" and not choices.compile:
        return f"compilation is off here ({choices.why_compile})"
    if name == "dense_eager" and not choices.compile:
        return f"dense itself is not compiled here ({choices.why_compile})"
    return None


def _contender(
    name: str,
    about: str,
    cfg: RunConfig,
    layers: str,
    choices: Choices,
    precision: str | None = None,
    compiled: bool | None = None,
) -> Contender:
    precision = choices.precision if precision is None else precision
    compiled = choices.compile if compiled is None else compiled
    return Contender(name, about, cfg, layers, choices.device, precision, compiled)


def _baseline(name: str, cfg: RunConfig, choices: Choices) -> Contender:
    about = BASELINES[name]
    dense = replace(cfg, quant=unquantised())
    if name == "ternary":
        return _contender(name, about, cfg, "own", choices)
    if name == "dense":
        return _contender(name, about, dense, "own", choices)
    if name == "dense_eager":
        return _contender(name, about, dense, "own", choices, compiled=False)
    if name == "textbook_fp32_eager":
        return _contender(name, about, cfg, "textbook", choices, "32-true", False)
    if name == "textbook_bf16_compiled":
        return _contender(name, about, cfg, "textbook", choices, "bf16-mixed", True)
    if choices.device == "cpu":
        # torchao 0.18 casts for autocast on CUDA only: on a CPU its backward would multiply two types and fails.
        about = f"{about}; float32 and eager, as its backward fails under bf16 autocast on a CPU"
        return _contender(name, about, cfg, name, choices, "32-true", False)
    return _contender(name, about, cfg, name, choices)
