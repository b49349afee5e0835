"""Image classifiers from the same layers as the decoder: an MLP and a vision transformer.

Linear layers are BitLinear or nn.Linear as the QuantSpec says for their names, and the RMSNorm in front of one is fused
with its input quantiser. The first and the last layer (``input_proj`` or ``patch_embed``, and ``head``) stay floats
unless ``quantise_ends`` is set. There are no biases. A transformer's layers have the decoder's names.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.errors import ConfigError
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.attention import attention
from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.nn.config import InitConfig, Norms
from bitnet_train.nn.init import init_weights
from bitnet_train.nn.layout import Role, check_spec, parameter_table
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.nn.vision.base import Classifier
from bitnet_train.nn.vision.config import ClassifierConfig, MlpConfig, PlainActivation, VitConfig, check_classifier
from bitnet_train.quant.activations import residual_sum
from bitnet_train.quant.spec import QuantSpec


def activated(x: Tensor, activation: PlainActivation) -> Tensor:
    """The nonlinearity, in the type of x; ``relu2`` is ``relu(x)^2`` (Primer, arXiv 2109.08668)."""
    if activation is PlainActivation.gelu:
        return F.gelu(x)
    if activation is PlainActivation.silu:
        return F.silu(x)
    return F.relu(x).square() if activation is PlainActivation.relu2 else F.relu(x)


class LayerFactory:
    """Makes the linear layers of a classifier by their full names: BitLinear or nn.Linear, as the spec says."""

    def __init__(self, cfg: ClassifierConfig, spec: QuantSpec, backend: Backend | None) -> None:
        self.table = {p.layer_name: p for p in parameter_table(cfg)}
        self.spec, self.backend = spec, backend

    def __call__(self, name: str) -> nn.Linear:
        out_features, in_features = self.table[name].shape
        quant = self.spec.for_layer(name)
        if self.table[name].role is not Role.linear or not quant.quantised:
            return nn.Linear(in_features, out_features, bias=False)
        return BitLinear(
            in_features, out_features, bias=False, quant=quant, backend=self.backend, gradient=self.spec.gradient
        )


class MlpLayer(nn.Module):
    """``proj(norm(x))``, the norm where the configuration has it."""

    def __init__(self, cfg: MlpConfig, linear: LayerFactory, number: int) -> None:
        super().__init__()
        self.proj = linear(f"layers.{number}.proj")
        self.norm = RMSNorm(cfg.hidden, cfg.norm_eps) if cfg.norm else None
        self.normed_proj = SharedInput((self.proj,), self.norm)

    def forward(self, x: Tensor) -> Tensor:
        (y,), _ = self.normed_proj(x)
        return y


class Mlp(Classifier):
    """Fully connected layers on the flattened image, a nonlinearity behind each but the last.

    Args:
        cfg: the shape; checked.
        spec: which linear layers are quantised how; checked against the layers.
        backend: kernel backend; chosen by device when None.
    """

    def __init__(self, cfg: MlpConfig, spec: QuantSpec, backend: Backend | None = None) -> None:
        super().__init__(cfg, spec)
        linear = LayerFactory(cfg, spec, backend)
        self.activation = cfg.activation
        self.input_proj = linear("input_proj")
        self.layers = nn.ModuleList(MlpLayer(cfg, linear, i) for i in range(cfg.layers - 2))
        self.norm = RMSNorm(cfg.hidden, cfg.norm_eps) if cfg.norm else None
        self.head = linear("head")
        self.first, self.last = SharedInput((self.input_proj,), None), SharedInput((self.head,), self.norm)

    def forward(self, images: Tensor) -> Tensor:
        (x,), _ = self.first(images.flatten(1))
        x = activated(x, self.activation)
        for layer in self.layers:
            x = activated(layer(x), self.activation)
        (logits,), _ = self.last(x)
        return logits


class VitAttention(nn.Module):
    """Attention of every patch to every patch; the norm before it is fused into its input quantiser."""

    def __init__(self, cfg: VitConfig, linear: LayerFactory, prefix: str, input_norm: RMSNorm) -> None:
        super().__init__()
        self.cfg = cfg
        self.q_proj, self.k_proj = linear(f"{prefix}.self_attn.q_proj"), linear(f"{prefix}.self_attn.k_proj")
        self.v_proj, self.o_proj = linear(f"{prefix}.self_attn.v_proj"), linear(f"{prefix}.self_attn.o_proj")
        self.attn_sub_norm = RMSNorm(cfg.hidden, cfg.norm_eps) if cfg.norms is Norms.pre_sub else None
        self.qkv = SharedInput((self.q_proj, self.k_proj, self.v_proj), input_norm)
        self.out = SharedInput((self.o_proj,), self.attn_sub_norm)

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The attention's result for the stream ``x + delta`` (batch, tokens, hidden), and that stream."""
        batch, tokens, _ = x.shape
        parts, stream = self.qkv(x, delta)
        q, k, v = (part.view(batch, tokens, -1, self.cfg.head_dim).transpose(1, 2) for part in parts)
        y = attention(q, k, v, None, causal=False)
        (out,), _ = self.out(y.transpose(1, 2).reshape(batch, tokens, -1))
        return out, stream


class VitFeedForward(nn.Module):
    """``down(norm(act(up(x))))``, with the inner norm only where ``norms`` is pre_sub."""

    def __init__(self, cfg: VitConfig, linear: LayerFactory, prefix: str, input_norm: RMSNorm) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.up_proj, self.down_proj = linear(f"{prefix}.mlp.up_proj"), linear(f"{prefix}.mlp.down_proj")
        self.ffn_sub_norm = RMSNorm(cfg.ffn, cfg.norm_eps) if cfg.norms is Norms.pre_sub else None
        self.up, self.down = SharedInput((self.up_proj,), input_norm), SharedInput((self.down_proj,), self.ffn_sub_norm)

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The FFN's result for the stream ``x + delta``, and that stream."""
        (inner,), stream = self.up(x, delta)
        (out,), _ = self.down(activated(inner, self.activation))
        return out, stream


class VitBlock(nn.Module):
    """Attention and FFN, each added to the residual stream where the stream is read next."""

    def __init__(self, cfg: VitConfig, linear: LayerFactory, number: int) -> None:
        super().__init__()
        prefix = f"layers.{number}"
        self.input_layernorm = RMSNorm(cfg.hidden, cfg.norm_eps)
        self.self_attn = VitAttention(cfg, linear, prefix, self.input_layernorm)
        self.post_attention_layernorm = RMSNorm(cfg.hidden, cfg.norm_eps)
        self.mlp = VitFeedForward(cfg, linear, prefix, self.post_attention_layernorm)

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream before this block's FFN, and the FFN's result that the next reader adds to it."""
        attended, x = self.self_attn(x, delta)
        result, x = self.mlp(x, attended)
        return x, result


class Vit(Classifier):
    """A vision transformer (arXiv 2010.11929): patches to tokens, blocks, the tokens' mean, norm, head.

    Args: as :class:`Mlp`.
    """

    def __init__(self, cfg: VitConfig, spec: QuantSpec, backend: Backend | None = None) -> None:
        super().__init__(cfg, spec)
        linear = LayerFactory(cfg, spec, backend)
        self.patch = cfg.patch
        self.patch_embed = linear("patch_embed")
        self.positions = nn.Embedding(cfg.tokens, cfg.hidden)
        self.layers = nn.ModuleList(VitBlock(cfg, linear, i) for i in range(cfg.layers))
        self.norm = RMSNorm(cfg.hidden, cfg.norm_eps)
        self.head = linear("head")
        self.first, self.last = SharedInput((self.patch_embed,), None), SharedInput((self.head,), self.norm)

    def forward(self, images: Tensor) -> Tensor:
        (tokens,), _ = self.first(patches(images, self.patch))
        # The residual stream is float32 whatever the type of the matmuls.
        x: Tensor = tokens.float() + self.positions.weight
        delta: Tensor | None = None
        for block in self.layers:
            x, delta = block(x, delta)
        (logits,), _ = self.last(residual_sum(x, delta).mean(dim=1))
        return logits


def patches(images: Tensor, size: int) -> Tensor:
    """images (batch, channels, height, width) as (batch, tokens, channels * size * size), row by row."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)


# Config type -> module.
CLASSIFIERS: dict[type[ClassifierConfig], type[Mlp] | type[Vit]] = {MlpConfig: Mlp, VitConfig: Vit}


def build_classifier(
    cfg: ClassifierConfig, spec: QuantSpec, init: InitConfig, seed: int, backend: Backend | None = None
) -> Classifier:
    """A classifier with initialised weights on the CPU. Raises ConfigError when ``cfg`` or ``spec`` make none."""
    if type(cfg) not in CLASSIFIERS:
        raise ConfigError(f"model.name={cfg.name} has no entry in bitnet_train.nn.vision.model.CLASSIFIERS")
    check_classifier(cfg)
    check_spec(cfg, spec)
    model = CLASSIFIERS[type(cfg)](cfg, spec, backend)  # type: ignore[arg-type]
    init_weights(model, init, seed)
    return model
