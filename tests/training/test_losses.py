"""The chunked cross-entropy and its options against PyTorch's on all logits at once; what a configuration may say."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.data.config import DataConfig
from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.training.chunks import chunk_tokens
from bitnet_train.training.config import RunConfig, TrainerConfig
from bitnet_train.training.losses import cross_entropy as losses
from bitnet_train.training.losses.config import (
    CrossEntropyLoss,
    DistillationLoss,
    LossConfig,
    Reduction,
    check_loss,
    relation_block,
    teacher_block,
)
from bitnet_train.training.losses.cross_entropy import LinearLossOptions, linear_cross_entropy, linear_loss
from bitnet_train.training.module import PretrainingModule


def inputs(dtype: torch.dtype = torch.float32, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    states = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 16, dtype=dtype, requires_grad=True)
    return states, weight, torch.randint(0, vocab, (3, 7))


def plain(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, weight).flatten(0, 1).float(), targets.flatten())


@pytest.mark.parametrize("chunk", [1, 4, 21, 64])
@pytest.mark.parametrize("learning", ["sw", "s", "w", ""])
def test_loss_and_gradients_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int, learning: str) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab, device: chunk)
    states, weight, targets = inputs()
    states.requires_grad_("s" in learning)
    weight.requires_grad_("w" in learning)
    got, wanted = linear_cross_entropy(states, weight, targets), plain(states, weight, targets)
    assert got.dtype is torch.float32
    assert torch.allclose(got, wanted, rtol=1e-6)
    leaves = [t for t in (states, weight) if t.requires_grad]
    if leaves:
        pairs = zip(torch.autograd.grad(got * 3, leaves), torch.autograd.grad(wanted * 3, leaves), strict=True)
        for ours, theirs in pairs:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    else:
        assert not got.requires_grad


def test_under_autocast_products_are_bf16_and_the_softmax_float32() -> None:
    states, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(states, weight, targets)
        wanted = plain(states, weight, targets)
    assert torch.allclose(got, wanted, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(got, (states, weight)), torch.autograd.grad(wanted, (states, weight)), strict=True
    ):
        assert ours.dtype is torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_bf16_model_gets_bf16_gradients() -> None:
    states, weight, targets = inputs(torch.bfloat16)
    grads = torch.autograd.grad(linear_cross_entropy(states, weight, targets), (states, weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2


def test_no_tensor_holds_the_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab, device: 4)
    states, weight, targets = inputs(vocab=1000)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(states, weight, targets)
    assert max(t.numel() for t in kept) == weight.numel()  # the gradient of the head; the logits would be 21,000
    assert weight.numel() < 21 * 1000


def test_extreme_logits_stay_finite_and_nan_shows() -> None:
    states, weight, targets = inputs()
    assert bool(torch.isfinite(linear_cross_entropy(states * 1e4, weight, targets)))
    bad = states.detach().clone()
    bad[0, 0, 0] = float("nan")
    assert bool(linear_cross_entropy(bad, weight, targets).isnan())


def test_chunks_are_powers_of_two_and_bounded() -> None:
    assert chunk_tokens(8192, "cpu") == 512
    assert chunk_tokens(128_256, "cuda") == 512
    assert chunk_tokens(10**9, "cpu") == 64
    assert chunk_tokens(1, "mps") == 2**26


def before_there_were_options(states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients as they were computed before targets could be left out: the default must stay this."""
    states, targets, total = states.detach().flatten(0, 1), targets.flatten(), torch.zeros(())
    grad_states, grad_weight, tokens = [], None, len(targets)
    for start in range(0, tokens, 4):
        x, wanted = states[start : start + 4], targets[start : start + 4]
        logits = x @ weight.detach().t()
        log_sum = torch.logsumexp(logits.float(), dim=-1, keepdim=True)
        total = total + (log_sum - logits.gather(1, wanted[:, None]).float()).sum()
        grad = torch.exp(logits.float() - log_sum) - (torch.arange(len(weight)) == wanted[:, None]).float()
        grad = grad / tokens
        grad_states.append(grad @ weight.detach())
        part = grad.t() @ x
        grad_weight = part if grad_weight is None else grad_weight + part
    assert grad_weight is not None
    return total / tokens, torch.cat(grad_states), grad_weight


def test_the_default_is_what_it_was_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab, device: 4)
    states, weight, targets = inputs()
    got = linear_cross_entropy(states, weight, targets)
    loss, grad_states, grad_weight = before_there_were_options(states, weight, targets)
    ours = torch.autograd.grad(got, (states, weight))
    assert torch.equal(got, loss)
    assert torch.equal(ours[0].flatten(0, 1), grad_states)
    assert torch.equal(ours[1], grad_weight)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_of_minus_100_are_left_out(monkeypatch: pytest.MonkeyPatch, summed: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab, device: 4)
    states, weight, targets = inputs(dtype)
    targets[0, 2:] = targets[2, :] = -100
    got = linear_loss(states, weight, targets, LinearLossOptions(summed=summed))
    logits = F.linear(states, weight).flatten(0, 1)
    wanted = F.cross_entropy(logits, targets.flatten(), reduction="sum" if summed else "mean")
    torch.testing.assert_close(got.total, wanted)
    torch.testing.assert_close(got.nll, F.cross_entropy(logits, targets.flatten()).detach())
    pairs = (torch.autograd.grad(loss, (states, weight)) for loss in (got.total, wanted))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)
        if ours.shape == states.shape:
            assert not ours[targets == -100].any()


def test_without_a_counted_token_the_loss_and_its_gradients_are_zero() -> None:
    states, weight, targets = inputs()
    for summed in (False, True):
        options = LinearLossOptions(z_loss=0.1, summed=summed)
        loss = linear_loss(states, weight, torch.full_like(targets, -100), options).total
        assert float(loss.detach()) == 0
        assert not any(bool(grad.any()) for grad in torch.autograd.grad(loss, (states, weight)))


@pytest.mark.parametrize("summed", [False, True])
def test_z_loss_is_its_coefficient_times_the_squared_log_of_the_normaliser(summed: bool) -> None:
    states, weight, targets = inputs(torch.float64)
    targets[1, :3] = -100
    got = linear_loss(states, weight, targets, LinearLossOptions(z_loss=0.01, summed=summed))
    logits = F.linear(states, weight).flatten(0, 1)
    kept = targets.flatten() != -100
    squares = torch.logsumexp(logits, -1).square()[kept]
    nll = F.cross_entropy(logits, targets.flatten(), reduction="sum" if summed else "mean")
    wanted = nll + 0.01 * (squares.sum() if summed else squares.mean())
    torch.testing.assert_close(got.total, wanted)
    torch.testing.assert_close(got.z, squares.mean().detach())
    pairs = (torch.autograd.grad(loss, (states, weight)) for loss in (got.total, wanted))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equal_logits_have_the_loss_of_a_uniform_distribution() -> None:
    # logsumexp of 50 zeros is log 50, whatever the target.
    states, weight, targets = torch.zeros(1, 5, 16), torch.randn(50, 16), torch.arange(5)[None]
    got = linear_loss(states, weight, targets, LinearLossOptions(z_loss=2.0))
    log = torch.tensor(50.0).log()
    torch.testing.assert_close(got.nll, log)
    torch.testing.assert_close(got.total, log + 2 * log**2)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_sum_is_over_the_tokens_of_the_step_however_it_is_cut(accumulation: int) -> None:
    cfg = RunConfig(
        model=DecoderConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=32, context=32, vocab=50),
        loss=CrossEntropyLoss(reduction=Reduction.sum),
        trainer=TrainerConfig(batch_tokens=64, micro_batch=8 // accumulation),
        data=DataConfig(sequence_length=8),
    )
    module = PretrainingModule(cfg, build_decoder(cfg.model, QuantSpec(), cfg.init, 1), 0, False)
    ids = torch.randint(0, 50, (8, 9))
    for part in ids.chunk(accumulation):
        # As Lightning divides.
        (module.training_step(part, 0) / accumulation).backward()
    grads = [p.grad.clone() for p in module.decoder.parameters() if p.grad is not None]
    module.zero_grad()
    mean = linear_cross_entropy(module.decoder.hidden_states(ids[:, :-1]), module.decoder.head_weight, ids[:, 1:])
    (mean * 64).backward()
    wanted = [p.grad for p in module.decoder.parameters()]
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    total = sum(float(parts.total.detach()) for parts in module._parts)
    assert total == pytest.approx(float(mean.detach()) * 64, rel=1e-5)
    assert [float(p.cross_entropy.detach()) for p in module._parts] == pytest.approx(
        [float(p.total.detach()) * accumulation / 64 for p in module._parts], rel=1e-5
    )


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (CrossEntropyLoss(z_loss=-1.0), "loss.z_loss is -1"),
        (CrossEntropyLoss(z_loss=float("nan")), "loss.z_loss is nan"),
        (DistillationLoss(), "loss.teacher is not set"),
        (DistillationLoss(teacher="a", logits=0.0), "learns nothing from the teacher"),
        (DistillationLoss(teacher="a", temperature=0.0), "loss.temperature is 0"),
        (DistillationLoss(teacher="a", hidden=1.0, hidden_layers=[4]), "names block 4, and model.layers=4"),
        (DistillationLoss(teacher="a", hidden=1.0, hidden_layers=[-1, 3]), "none twice"),
        (DistillationLoss(teacher="a", hidden=1.0, hidden_layers=[]), "at least one block"),
        (DistillationLoss(teacher="a", relations=1.0, layer=-5), "loss.layer names block -5"),
        (DistillationLoss(teacher="a", relations=1.0, relation_heads=7), "use a divisor of 64"),
        (DistillationLoss(teacher="a", relations=-1.0), "loss.relations is -1"),
        (DistillationLoss(teacher="a", layer=99), "loss.layer has no effect with loss.relations=0"),
        (DistillationLoss(teacher="a", hidden_layers=[55]), "loss.hidden_layers has no effect with loss.hidden=0"),
        (
            DistillationLoss(teacher="a", logits=0, hidden=1, temperature=3),
            "temperature has no effect with loss.logits=0",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(loss: LossConfig, sentence: str) -> None:
    model = DecoderConfig(hidden=256, layers=4, heads=4, kv_heads=1, vocab=97)
    with pytest.raises(ConfigError, match=sentence):
        check_loss(loss, model)


def test_blocks_are_found_by_their_share_of_the_depth() -> None:
    assert [teacher_block(block, 4, 4) for block in range(4)] == [0, 1, 2, 3]
    assert [teacher_block(block, 4, 12) for block in range(4)] == [2, 5, 8, 11]
    assert [teacher_block(block, 12, 4) for block in (2, 5, 8, 11)] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="block 0 has none at the same depth"):
        teacher_block(0, 12, 4)
    late = DistillationLoss(teacher="a", relations=1.0)
    assert [relation_block(late, layers) for layers in (1, 2, 4, 24, 30)] == [0, 1, 3, 18, 22]
