"""AdamW with moments of 8 bits: near AdamW, a decay that may change, checkpoints without torchao, skipped steps."""

from typing import Any

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.init import build_decoder
from bitnet_train.planning.optimizer_state import optimizer_state
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.training.guard.rule import skip_step
from bitnet_train.training.micro_batch import optimizer_bytes
from bitnet_train.training.optimizers import config as config_module
from bitnet_train.training.optimizers.build import build_optimizer, set_rates
from bitnet_train.training.optimizers.config import AdamW8bitConfig, AdamWConfig, OptimizerConfig
from tests.composing import compose_config
from tests.training.test_muon import take_gradients, through_a_file, weights

# The FFN's matrices and the embedding have 4096 numbers and more, the others and the norms fewer.
CFG = DecoderConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=160, context=64, vocab=160)
SETTINGS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic is the same without torch.compile, which takes ten seconds."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def small() -> Any:
    return build_decoder(CFG, QuantSpec(), NormalInit(), 3)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        take_gradients(model, step)
        set_rates(optimizer, 0.01 / (step + 1), 0.1 * (step % 3))
        optimizer.step()


def trained(cfg: OptimizerConfig, steps: int = 6) -> tuple[Any, torch.optim.Optimizer]:
    model = small()
    optimizer = build_optimizer(cfg, model)
    train(model, optimizer, range(steps))
    return model, optimizer


def test_it_follows_adamw() -> None:
    """With the same gradients: the moments' rounding changes what is far below the largest of their block."""

    def after(cfg: OptimizerConfig) -> dict[str, torch.Tensor]:
        model, generator = small(), torch.Generator().manual_seed(0)
        optimizer = build_optimizer(cfg, model)
        for step in range(8):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            set_rates(optimizer, 0.01 / (step + 1), 0.1 * (step % 3))
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    exact, ours = after(AdamWConfig(**SETTINGS)), after(AdamW8bitConfig(**SETTINGS))
    finer, start = after(AdamW8bitConfig(**SETTINGS, block_size=64)), dict(small().named_parameters())
    for name, value in exact.items():
        far, near = ((other[name] - value).norm() / (value - start[name]).norm() for other in (ours, finer))
        if value.numel() < 4096:
            assert far < 1e-5, name
        else:
            assert 1e-3 < far < 0.05, (name, far)
            assert near < far


def test_without_a_gradient_to_speak_of_only_the_decay_is_left() -> None:
    model = small()
    optimizer = build_optimizer(AdamW8bitConfig(lr=0.5, weight_decay=0.1), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] * (1 - 0.5 * 0.1) if p.dim() > 1 else before[name]), name
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.5, 0.1), (0.5, 0.0)}


def test_a_new_weight_decay_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's compiled update has the decay as a constant, and its rate as a tensor."""
    seen: list[tuple[Any, Any]] = []

    def compiled(function: Any, **_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            seen.append((type(arguments[6]), arguments[9]))
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    trained(AdamW8bitConfig(**SETTINGS), 4)
    assert set(seen) == {(torch.Tensor, 0.0)}


def test_a_checkpoint_is_plain_tensors_and_goes_on_bit_for_bit() -> None:
    model, optimizer = trained(AdamW8bitConfig(**SETTINGS), 3)
    saved, halfway = through_a_file(optimizer.state_dict()), through_a_file(model.state_dict())
    kinds = {type(v) for state in saved["state"].values() for v in state.values()}
    assert kinds == {torch.Tensor, dict}
    train(model, optimizer, range(3, 6))
    twin = small()
    twin.load_state_dict(halfway)
    again = build_optimizer(AdamW8bitConfig(**SETTINGS), twin)
    again.load_state_dict(saved)
    train(twin, again, range(3, 6))
    assert torch.equal(weights(model), weights(twin))


def test_another_adamw_starts_without_a_past_and_says_so() -> None:
    saved = trained(AdamWConfig(**SETTINGS), 2)[1].state_dict()
    optimizer = build_optimizer(AdamW8bitConfig(**SETTINGS), small())
    with pytest.warns(UserWarning, match="had another algorithm in the checkpoint"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_a_fork_may_have_other_blocks() -> None:
    model, optimizer = trained(AdamW8bitConfig(**SETTINGS), 3)
    saved = through_a_file(optimizer.state_dict())
    for size in (64, 5120):  # the second divides the FFN's matrices and not those of 4096 numbers
        fork = build_optimizer(AdamW8bitConfig(**SETTINGS, block_size=size), model)
        fork.load_state_dict(saved)
        for parameter, state in fork.state.items():
            before = optimizer.state[parameter]["exp_avg"]
            if parameter.numel() >= 4096:
                moment = state["exp_avg"]
                assert getattr(moment, "block_size", size) == size
                float_moment = moment.dequantize() if hasattr(moment, "dequantize") else moment
                torch.testing.assert_close(float_moment, before.dequantize(), rtol=0.1, atol=float(before.scale.max()))
        take_gradients(model, 7)
        fork.step()


def test_a_skipped_step_leaves_weights_and_moments() -> None:
    model, optimizer = trained(AdamW8bitConfig(**SETTINGS), 2)
    before, state = weights(model), through_a_file(optimizer.state_dict())["state"]
    take_gradients(model, 9)
    skip_step(optimizer, torch.tensor(True))
    optimizer.step()
    assert torch.equal(before, weights(model))
    after = optimizer.state_dict()["state"]
    for number, values in state.items():
        for key, value in values.items():
            pairs = value.items() if isinstance(value, dict) else [(None, value)]
            for inner, tensor in pairs:
                assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(
                    after[number][key] if inner is None else after[number][key][inner]))  # fmt: skip


def test_its_bytes_are_a_quarter_and_are_estimated() -> None:
    _, optimizer = trained(AdamW8bitConfig(**SETTINGS), 1)
    saved = optimizer.state_dict()["state"].values()
    tensors = [t for state in saved for v in state.values() for t in (v.values() if isinstance(v, dict) else [v])]
    held = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor) and t.dim())
    assert held == optimizer_state(AdamW8bitConfig(), CFG).bytes
    assert held < 0.5 * optimizer_state(AdamWConfig(), CFG).bytes
    settings = ("+recipe=tiny", "optimizer=adamw_8bit")
    assert optimizer_bytes(compose_config(*settings)) < 0.3 * optimizer_bytes(
        compose_config("+recipe=tiny", "optimizer=adamw")
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"block_size": 0}, "optimizer.block_size is 0"), ({"betas": [0.9, 1.0]}, "optimizer.betas must be two")],
)
def test_settings_that_cannot_be(settings: dict[str, Any], sentence: str) -> None:
    values = [f"optimizer.{key}={value}" for key, value in settings.items()]
    with pytest.raises(ConfigError, match=sentence):
        compose_config("+recipe=tiny", "optimizer=adamw_8bit", *values)


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'pip install "bitnet-train\[lowbit\]"'):
        compose_config("+recipe=tiny", "optimizer=adamw_8bit")
