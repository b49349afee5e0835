"""The audit: what is really quantised, counted in the built model and held against what the recipe says."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from bitnet_train.errors import ConfigError
from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import Role, parameter_table
from bitnet_train.nn.vision.base import Classifier


@dataclass(frozen=True)
class AuditReport:
    """Counts of a model's linear layers and parameters by weight scheme."""

    linears: dict[str, int]
    parameters: dict[str, int]
    total_parameters: int

    @property
    def quantised_linears(self) -> int:
        """Linear layers whose weights are codes."""
        return sum(count for scheme, count in self.linears.items() if scheme != "float")

    @property
    def quantised_share(self) -> float:
        """Share of all parameters that are codes."""
        return sum(count for scheme, count in self.parameters.items() if scheme != "float") / self.total_parameters

    def sentence(self) -> str:
        """One line for the start of a run."""
        counts = ", ".join(f"{count} {scheme}" for scheme, count in sorted(self.linears.items(), reverse=True))
        return (
            f"{sum(self.linears.values())} linear layers ({counts}); {self.quantised_share:.1%} of "
            f"{self.total_parameters:,} parameters are quantised"
        )


def audit(model: Decoder | Classifier) -> AuditReport:
    """Count what is quantised in ``model`` and compare every linear layer between first and last with ``model.spec``.

    Raises ConfigError when a layer that the spec quantises is not a BitLinear of that kind, or the other way round.
    """
    modules = dict(model.named_modules())
    wrong = []
    table = parameter_table(model.cfg)
    for parameter in table:
        if parameter.role is not Role.linear:
            continue
        layer, wanted = modules.get(parameter.layer_name), model.spec.for_layer(parameter.layer_name)
        actual = layer.quant if isinstance(layer, BitLinear) else None
        if actual != (wanted if wanted.quantised else None):
            found = "missing" if layer is None else type(layer).__name__ if actual is None else str(actual)
            wrong.append(f"{parameter.layer_name} should be {wanted.scheme} and is {found}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigError(f"The model is not quantised as the recipe says: {wrong[0]}{more}.")
    used = {id(layer) for shared in modules.values() if isinstance(shared, SharedInput) for layer in shared.layers}
    owned = {id(module) for module in modules.values()}
    if not used <= owned:
        raise ConfigError("A linear layer was replaced after the model was built; the forward still runs the old one.")
    ends = {p.layer_name for p in table if p.role in (Role.embedding, Role.head)}
    linears: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name not in ends:
            scheme = module.quant.scheme if isinstance(module, BitLinear) else "float"
            linears[scheme] += 1
            parameters[scheme] += module.weight.numel()
    return AuditReport(dict(linears), dict(parameters), sum(p.numel() for p in model.parameters()))
