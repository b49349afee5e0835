"""The distillation loss against plain autograd and PyTorch's own functions; teachers; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.config import Config, to_yaml
from bitnet_train.data.config import DataConfig
from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.collector import Collector
from bitnet_train.nn.config import Activation, DecoderConfig, NormalInit, Norms
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.config import (
    ActivationQuantConfig,
    LambdaProgressive,
    QuantConfig,
    WeightQuantConfig,
    WeightScheme,
)
from bitnet_train.quant.spec import FLOAT, QuantSpec, build_spec
from bitnet_train.training.config import RunConfig
from bitnet_train.training.losses import cross_entropy as losses
from bitnet_train.training.losses import relations
from bitnet_train.training.losses.config import DistillationLoss, HiddenDistance, RelationForm, RelationMask
from bitnet_train.training.losses.cross_entropy import LinearLossOptions, linear_loss
from bitnet_train.training.losses.distillation import Distillation, hidden_distance
from bitnet_train.training.losses.relations import relation_loss
from bitnet_train.training.module import PretrainingModule
from bitnet_train.training.step import next_token_loss
from bitnet_train.training.teachers import source
from bitnet_train.training.teachers.source import find_teacher
from bitnet_train.training.teachers.teacher import RunTeacher, load_teacher

SHAPE: dict[str, Any] = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "context": 64, "vocab": 400}
FLOATS = QuantConfig(WeightQuantConfig(WeightScheme.float), ActivationQuantConfig(None))
EVERYTHING: dict[str, Any] = {"logits": 0.7, "temperature": 3.0, "hidden": 0.5, "relations": 2.0, "z_loss": 1e-3}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    states, weight = torch.randn(3, 7, 16, dtype=dtype), torch.randn(50, 16, dtype=dtype)
    theirs, their_weight = torch.randn(3, 7, 24, dtype=dtype), torch.randn(50, 24, dtype=dtype)
    targets = torch.randint(0, 50, (3, 7))
    targets[0, :2] = -100
    return states.requires_grad_(), weight.requires_grad_(), targets, theirs, their_weight


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_kl_of_the_logits_is_pytorchs(
    monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype, temperature: float
) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab, device: chunk)
    states, weight, targets, theirs, their_weight = inputs(dtype)
    options = LinearLossOptions(z_loss=1e-2, kl=0.3, temperature=temperature)
    got = linear_loss(states, weight, targets, options, (theirs, their_weight))
    kept = targets.flatten() != -100
    ours = F.linear(states, weight).flatten(0, 1)[kept]
    taught = F.linear(theirs, their_weight).flatten(0, 1)[kept]
    kl = temperature**2 * F.kl_div(
        F.log_softmax(ours / temperature, -1), F.log_softmax(taught / temperature, -1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    wanted = F.cross_entropy(ours, targets.flatten()[kept]) + 1e-2 * ours.logsumexp(-1).square().mean() + 0.3 * kl
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got.total, wanted, **tolerance)
    torch.testing.assert_close(got.kl, kl.detach(), **tolerance)
    pairs = (torch.autograd.grad(loss, (states, weight)) for loss in (got.total, wanted))
    for mine, plain in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, plain, **tolerance)


def test_no_logits_of_all_tokens_exist_and_the_teacher_gets_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab, device: 4)
    states, weight, targets, theirs, their_weight = inputs(torch.float32)
    theirs.requires_grad_()
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    with Sizes():
        linear_loss(states, weight, targets, LinearLossOptions(kl=1.0), (theirs, their_weight)).total.backward()
    assert max(sizes) == their_weight.numel()  # 1,200; the logits of all tokens would be 1,050, their float32 as many
    assert 21 * 50 not in sizes
    assert theirs.grad is None


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    states, weight, targets, _, _ = inputs(torch.float64)
    options = LinearLossOptions(kl=1.0, temperature=2.0)
    alike = linear_loss(states, weight, targets, options, (states, weight))
    alone = linear_loss(states, weight, targets)
    assert float(alike.kl) == pytest.approx(0, abs=1e-12)
    pairs = (torch.autograd.grad(loss.total, (states, weight)) for loss in (alike, alone))
    for mine, plain in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, plain)


def plain_relations(
    student: Tensor, teacher: Tensor, heads: int, form: RelationForm, mask: RelationMask, learnt: Tensor | None = None
) -> Tensor:
    logs = []
    for x in (student, teacher):
        a = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        a = F.normalize(a, dim=-1) if form is RelationForm.cosine else a / a.shape[-1] ** 0.25
        scores = a @ a.mT
        if mask is RelationMask.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -1e9)
        rows = scores.log_softmax(-1).transpose(1, 2)  # (batch, tokens, heads, tokens)
        logs.append((rows.flatten(0, 1) if learnt is None else rows[learnt]).flatten(0, 1))
    return F.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)


@pytest.mark.parametrize("form", RelationForm)
@pytest.mark.parametrize("mask", RelationMask)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("together", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_relations_are_those_of_plain_autograd(
    monkeypatch: pytest.MonkeyPatch,
    form: RelationForm,
    mask: RelationMask,
    dtype: torch.dtype,
    together: int,
    masked: bool,
) -> None:
    monkeypatch.setattr(relations, "chunk_elements", lambda device: together * 3 * 7 * 7)
    student = torch.randn(5, 7, 12, dtype=dtype, requires_grad=True)
    teacher = torch.randn(5, 7, 24, dtype=dtype)
    learnt = torch.rand(5, 7) < 0.4 if masked else None
    got, wanted = (f(student, teacher, 3, form, mask, learnt) for f in (relation_loss, plain_relations))
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(got, wanted, **tolerance)
    mine, plain = (torch.autograd.grad(loss * 3, student)[0] for loss in (got, wanted))
    torch.testing.assert_close(mine, plain, **tolerance)


def test_relations_do_not_depend_on_which_way_the_vectors_point() -> None:
    # R is made of inner products, so a rotation of each relation head leaves it as it is.
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    turned = (x.unflatten(-1, (2, 4)) @ rotation).flatten(-2)
    for form in RelationForm:
        assert float(relation_loss(turned, x, 2, form, RelationMask.full)) == pytest.approx(0, abs=1e-12)
        assert float(relation_loss(turned, x, 1, form, RelationMask.full)) == pytest.approx(0, abs=1e-12)
        assert float(relation_loss(2 * x + 1, x, 2, form, RelationMask.full)) > 1e-4


def test_hidden_distances() -> None:
    ours, theirs = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    assert float(hidden_distance(ours, theirs, HiddenDistance.mse)) == pytest.approx((1 + 4) / 4)
    assert float(hidden_distance(ours, theirs, HiddenDistance.cosine)) == pytest.approx((0 + 1) / 2)
    second, none = torch.tensor([[False, True]]), torch.tensor([[False, False]])
    assert float(hidden_distance(ours, theirs, HiddenDistance.mse, second)) == pytest.approx((1 + 4) / 2)
    assert float(hidden_distance(ours, theirs, HiddenDistance.cosine, second)) == pytest.approx(1)
    assert float(hidden_distance(ours, theirs, HiddenDistance.mse, none)) == 0
    assert float(relation_loss(ours, theirs, 1, RelationForm.cosine, RelationMask.full, none)) == 0


def decoder(seed: int = 1, spec: QuantSpec | None = None, **fields: Any) -> Decoder:
    return build_decoder(DecoderConfig(**SHAPE | fields), QuantSpec() if spec is None else spec, NormalInit(), seed)


def test_a_collector_sees_what_the_decoder_computes_and_changes_nothing() -> None:
    model = decoder().eval()
    ids = torch.randint(0, 400, (2, 9))
    collector = Collector(frozenset({0, 1}), frozenset({1}))
    states = model.hidden_states(ids, collector=collector)
    assert torch.equal(states, model.hidden_states(ids))
    assert torch.equal(model.norm(collector.streams[1]), states)
    assert set(collector.streams) == {0, 1}
    assert [tuple(part.shape) for part in collector.projections[1]] == [(2, 9, 32), (2, 9, 16), (2, 9, 16)]
    # The second block on its own: its queries are those of its normed input.
    block = model.layers[1]
    normed = block.input_layernorm(collector.streams[0])
    torch.testing.assert_close(collector.projections[1].v, block.self_attn.v_proj(normed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("documents", [False, True])
def test_the_whole_loss_is_the_sum_of_its_parts(documents: bool) -> None:
    cfg = DistillationLoss(
        teacher="x", **EVERYTHING, hidden_layers=[0, -1], relation_heads=2, hidden_distance=HiddenDistance.cosine
    )
    student, taught_by = decoder(), decoder(2, QuantSpec(FLOAT))
    blocks = source.TeacherBlocks({0: 0, 1: 1}, {1: 1})
    teacher = RunTeacher(taught_by, blocks, {}, "")
    ids = torch.randint(0, 400, (2, 12))
    bos = 7 if documents else None
    ids[0, 5] = 7
    loss = Distillation(cfg, student.cfg)
    parts = next_token_loss(student, loss, ids, bos, teacher(ids[:, :-1], bos))
    numbers = (ids[:, :-1] == 7).cumsum(1) if documents else None
    seen = [Collector(frozenset({0, 1}), frozenset({1})) for _ in range(2)]
    states = [
        m.hidden_states(ids[:, :-1], numbers, collector=c) for m, c in zip((student, taught_by), seen, strict=True)
    ]
    ours, theirs = (F.linear(s, m.head_weight).flatten(0, 1) for s, m in zip(states, (student, taught_by), strict=True))
    nll = F.cross_entropy(ours, ids[:, 1:].flatten())
    z = 1e-3 * ours.logsumexp(-1).square().mean()
    kl = 9 * F.kl_div((ours / 3).log_softmax(-1), (theirs / 3).softmax(-1), reduction="batchmean")
    hidden = sum(1 - F.cosine_similarity(seen[0].streams[i], seen[1].streams[i], dim=-1).mean() for i in (0, 1)) / 2
    related = sum(
        plain_relations(a, b, 2, cfg.relation_form, cfg.relation_mask)
        for a, b in zip(seen[0].projections[1], seen[1].projections[1], strict=True)
    )
    distilled = 0.7 * kl + 0.5 * hidden + 2.0 * related
    torch.testing.assert_close(parts.cross_entropy, nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.z, z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.distillation, distilled, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.total, nll + z + distilled, rtol=1e-5, atol=1e-6)
    parameters = list(student.parameters())
    got = torch.autograd.grad(parts.total, parameters, retain_graph=True)
    for mine, plain in zip(got, torch.autograd.grad(nll + z + distilled, parameters), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in taught_by.parameters())


def save_run(folder: Path, cfg: RunConfig, model: Decoder, tokenizer: TextTokenizer, step: int = 3) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    whole = Config(model=cfg.model, quant=cfg.quant)
    (folder / "config.yaml").write_text(to_yaml(whole))
    state = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}
    for name in (f"step-{step:08d}.ckpt", "last.ckpt"):
        torch.save({"state_dict": state, "global_step": step}, folder / "checkpoints" / name)
    tokenizer.save(folder / "tokenizer")
    return folder


def config(teacher: Path | str, loss: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    return RunConfig(
        model=DecoderConfig(**SHAPE | model),
        data=DataConfig(sequence_length=16),
        loss=DistillationLoss(teacher=str(teacher), **(EVERYTHING if loss is None else loss)),
    )


@pytest.mark.parametrize("quant", [QuantConfig(), FLOATS, QuantConfig(progressive=LambdaProgressive(until=2))])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_is_read_with_its_own_quantisation(
    tmp_path: Path, bpe: TextTokenizer, quant: QuantConfig, precision: str
) -> None:
    model = decoder(5, build_spec(quant), layers=4, ffn=64).eval()
    folder = save_run(tmp_path / "a", RunConfig(model=model.cfg, quant=quant), model, bpe)
    teacher = load_teacher(config(f"{folder}@3"), "cpu", precision, None, bpe)
    assert isinstance(teacher, RunTeacher)
    assert teacher.identity["step"] == 3
    assert not any(p.requires_grad for p in teacher.decoder.parameters())
    assert not teacher.decoder.training
    ids = torch.randint(0, 400, (2, 16))
    enabled = precision == "bf16-mixed"
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
        taught = teacher(ids, None)
        collector = Collector(frozenset({3}), frozenset({3}))
        states = model.hidden_states(ids, collector=collector)
    # Blocks at the same share of the depth: 1 of 2 is 3 of 4.
    assert torch.equal(taught.states, states)
    assert torch.equal(taught.streams[1], collector.streams[3])
    assert all(torch.equal(a, b) for a, b in zip(taught.projections[1], collector.projections[3], strict=True))


def llama(folder: Path, tokenizer: TextTokenizer, **fields: Any) -> Path:
    """A llama checkpoint of transformers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 400, "max_position_embeddings": 64, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }  # fmt: skip
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**shape | fields)).save_pretrained(folder)
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("documents", [False, True])
def test_a_checkpoint_of_transformers_teaches_what_our_decoder_of_its_weights_does(
    tmp_path: Path, bpe: TextTokenizer, documents: bool
) -> None:
    folder = llama(tmp_path / "llama", bpe)
    teacher = load_teacher(config(folder), "cpu", "32-true", None, bpe)
    assert teacher is not None
    shape = DecoderConfig(**SHAPE, norms=Norms.pre, activation=Activation.silu)
    own = Decoder(shape, QuantSpec(FLOAT))
    from safetensors.torch import load_file

    own.load_state_dict({k.removeprefix("model."): v for k, v in load_file(folder / "model.safetensors").items()})
    ours = RunTeacher(own, teacher.blocks, {}, "")
    ids = torch.randint(0, 400, (2, 16))
    ids[0, 4] = ids[1, 9] = bpe.bos_id
    bos = bpe.bos_id if documents else None
    found, wanted = teacher(ids, bos), ours(ids, bos)
    torch.testing.assert_close(found.states, wanted.states, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.head_weight, wanted.head_weight)
    assert set(found.streams) == set(found.projections) == {1}
    torch.testing.assert_close(found.streams[1], wanted.streams[1], rtol=1e-4, atol=1e-6)
    for mine, plain in zip(found.projections[1], wanted.projections[1], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)
    assert not found.states.requires_grad


def test_teachers_that_do_not_fit_are_refused(tmp_path: Path, bpe: TextTokenizer) -> None:
    model = decoder(5, QuantSpec(FLOAT), layers=3, hidden=48, context=8)
    run = save_run(tmp_path / "a", RunConfig(model=model.cfg, quant=FLOATS), model, bpe)
    logits = {"logits": 1.0}
    for cfg, sentence in (
        (config(tmp_path / "none"), "none does not exist"),
        (config(tmp_path), "neither a run .no config.yaml. nor a checkpoint"),
        (config(f"{run}@4"), "steps saved there: 3"),
        (config(f"{run}@x"), "must be a step number"),
        (config(f"{tmp_path}@3"), "only a run has steps"),
        (config(run, logits, vocab=401), "set model.vocab=400"),
        (config(run, logits), "reads at most 8 tokens"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            find_teacher(cfg)
    short = config(run)
    short.data.sequence_length = 8
    for loss, sentence in (
        ({"hidden": 1.0}, "is 48 wide where model.hidden=32"),
        ({"relations": 1.0}, "has 3 blocks and model.layers=2, so block 0 has none"),
        ({"relations": 1.0, "relation_heads": 16}, "does not divide the widths of loss.teacher"),
    ):
        short.loss = DistillationLoss(teacher=str(run), **loss, layer=0)
        with pytest.raises(ConfigError, match=sentence):
            find_teacher(short)
    short.loss = DistillationLoss(teacher=str(run))  # of another shape, but logits are logits
    assert load_teacher(short, "cpu", "32-true", None, bpe) is not None
    other = TextTokenizer(bpe.tokenizer, bpe.bos_id, 5)
    with pytest.raises(ConfigError, match=r"loss.teacher=.* was trained with another tokenizer"):
        load_teacher(short, "cpu", "32-true", None, other)
    (run / "config.yaml").write_text("model: 3\n")
    with pytest.raises(ConfigError, match="no run's configuration"):
        find_teacher(short)


def test_checkpoints_of_transformers_that_cannot_teach_are_refused(
    tmp_path: Path, bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = llama(tmp_path / "llama", bpe)
    with pytest.raises(ConfigError, match=r"was trained with another tokenizer"):
        load_teacher(config(folder), "cpu", "32-true", None, TextTokenizer(bpe.tokenizer, bpe.bos_id, 5))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be loaded with transformers"):
        load_teacher(config(folder), "cpu", "32-true", None, bpe)
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "no_such_model"}))
    with pytest.raises(ConfigError, match="no_such_model"):
        find_teacher(config(folder))
    # Logits that are not the head's: Granite divides them.
    from transformers import GraniteConfig, GraniteForCausalLM

    granite = GraniteConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=400, max_position_embeddings=64, logits_scaling=8.0, bos_token_id=bpe.bos_id,
        eos_token_id=bpe.eos_id,
    )  # fmt: skip
    GraniteForCausalLM(granite).save_pretrained(tmp_path / "granite")
    bpe.tokenizer.save(str(tmp_path / "granite/tokenizer.json"))
    with pytest.raises(ConfigError, match="not its output embedding times its final states"):
        load_teacher(config(tmp_path / "granite"), "cpu", "32-true", None, bpe)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match="transformers, which is not installed"):
        find_teacher(config(folder))


def taught_module(folder: Path, tokenizer: TextTokenizer, compiled: bool) -> PretrainingModule:
    if not folder.exists():
        model = decoder(5, QuantSpec(FLOAT))
        save_run(folder, RunConfig(model=model.cfg, quant=FLOATS), model, tokenizer)
    cfg = config(folder)
    student = decoder()
    CodeCache(student)
    teacher = load_teacher(cfg, "cpu", "bf16-mixed", None, tokenizer)
    return PretrainingModule(cfg, student, 0, compiled, teacher)


def test_the_teacher_is_in_no_state_and_no_optimizer(tmp_path: Path, bpe: TextTokenizer) -> None:
    module = taught_module(tmp_path / "a", bpe, False)
    assert all(name.startswith(("decoder.", "clip_rule.")) for name in module.state_dict())
    theirs = {id(p) for p in module.teacher.decoder.parameters()}  # type: ignore[union-attr]
    assert not theirs & {id(p) for p in module.parameters()}
    assert not theirs & {id(p) for g in module.configure_optimizers().param_groups for p in g["params"]}
    module.train()
    assert not module.teacher.decoder.training  # type: ignore[union-attr]
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["teacher"]["step"] == 3


@pytest.mark.slow
def test_the_compiled_loss_agrees(tmp_path: Path, bpe: TextTokenizer) -> None:
    ids, found = torch.randint(0, 400, (2, 17)), []
    for compiled in (False, True):
        module = taught_module(tmp_path / "a", bpe, compiled)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module.training_step(ids, 0)
        loss.backward()
        grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(grads)))
    (eager, eager_grad), (compiled_loss, compiled_grad) = found
    torch.testing.assert_close(compiled_loss, eager, rtol=5e-3, atol=0)
    assert F.cosine_similarity(eager_grad, compiled_grad, dim=0) > 0.97


def test_a_loss_without_its_teacher_is_an_error() -> None:
    loss = Distillation(DistillationLoss(teacher="x"), DecoderConfig(**SHAPE))
    with pytest.raises(ValueError, match="needs a teacher"):
        loss(torch.randn(1, 2, 32), torch.randn(400, 32), torch.zeros(1, 2, dtype=torch.long))
