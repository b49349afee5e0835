"""Parameters by kind, from the layout alone: no weight is allocated."""

import math
from dataclasses import dataclass

from bitnet_train.nn.config import ModelConfig
from bitnet_train.nn.layout import Role, learned_scales, parameter_table
from bitnet_train.quant.spec import QuantSpec


@dataclass(frozen=True)
class ParameterCounts:
    """Elements by kind; ``linear`` maps each weight scheme in use to its share of the blocks' linear layers.

    Biases count among the norms, which are vectors of floats like them.
    """

    embedding: int
    head: int
    norms: int
    linear: dict[str, int]

    @property
    def total(self) -> int:
        """All parameters; a tied head counts once, as the embedding."""
        return self.embedding + self.head + self.norms + sum(self.linear.values())

    @property
    def quantised(self) -> int:
        """Parameters that become codes."""
        return sum(count for scheme, count in self.linear.items() if scheme != "float")

    @property
    def quantised_share(self) -> float:
        """Share of all parameters that become codes."""
        return self.quantised / self.total


def count_parameters(cfg: ModelConfig, spec: QuantSpec) -> ParameterCounts:
    """Count the parameters of the model that ``cfg`` and ``spec`` describe."""
    roles = dict.fromkeys(Role, 0)
    linear: dict[str, int] = {}
    for parameter in parameter_table(cfg):
        roles[parameter.role] += parameter.size
        if parameter.role is Role.linear:
            scheme = spec.for_layer(parameter.layer_name).scheme
            linear[scheme] = linear.get(scheme, 0) + parameter.size
    return ParameterCounts(roles[Role.embedding], roles[Role.head], roles[Role.norm] + roles[Role.bias], linear)


def count_scales(cfg: ModelConfig, spec: QuantSpec) -> int:
    """Learned scales of all layers."""
    return sum(math.prod(shape) for shape in learned_scales(cfg, spec).values())
