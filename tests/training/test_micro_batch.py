"""trainer.micro_batch=auto: what is chosen, no trace left behind, and the same losses as with its number."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet_train.__main__ import answer
from bitnet_train.errors import ConfigError
from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import build_spec
from bitnet_train.training import micro_batch
from bitnet_train.training.config import RunConfig, TrainerConfig, batch_plan
from bitnet_train.training.device import Choices
from bitnet_train.training.micro_batch import GpuMemory, MicroBatch, ProcessMemory, find_micro_batch, optimizer_bytes
from bitnet_train.training.module import PretrainingModule
from bitnet_train.training.optimizers.build import build_optimizer
from tests.composing import compose_config
from tests.training.conftest import SETTINGS, Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = DecoderConfig(hidden=32, layers=2, heads=2, kv_heads=2, ffn=64, context=64, vocab=97)
# 12 sequences a step.
CFG = RunConfig(model=SMALL, trainer=TrainerConfig(batch_tokens=12 * 16, micro_batch="auto"))
CFG.data.sequence_length = 16


def choices(compiled: bool = False) -> Choices:
    return Choices("cpu", "bf16-mixed", compiled, "", "")


def new_decoder(cfg: RunConfig = CFG) -> Decoder:
    return build_decoder(cfg.model, build_spec(cfg.quant), cfg.init, cfg.seed)


class Machine:
    """A pretended memory: a pass over n sequences takes ``fixed + each * n`` beside the optimizer's state."""

    how = "pretended"

    def __init__(self, available: int, fixed: int, each: int, each_compiled: int, raises_above: int) -> None:
        self.available = available + optimizer_bytes(CFG)
        self.fixed, self.each, self.each_compiled, self.raises_above = fixed, each, each_compiled, raises_above
        self.passes: list[tuple[int, bool]] = []

    def growth(self, run: Callable[[], None]) -> int:
        run()
        size, compiled = self.passes[-1]
        return self.fixed + (self.each_compiled if compiled else self.each) * size

    def build(self, decoder: Decoder) -> Callable[[bool], PretrainingModule]:
        machine = self

        class Module(PretrainingModule):
            compiled = False

            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                assert batch.shape[1] == CFG.data.sequence_length + 1
                machine.passes.append((len(batch), self.compiled))
                if len(batch) > machine.raises_above:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return super().training_step(batch, batch_idx)

        def build(compiled: bool) -> PretrainingModule:
            module = Module(CFG, decoder, 0, False)
            module.compiled = compiled
            return module

        return build


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[MicroBatch, list[tuple[int, bool]]]]:
    """The choice on a pretended machine, and the (size, compiled) of every pass."""

    def find(
        available: int,
        *,
        fixed: int = 10**6,
        each: int = 10**6,
        each_compiled: int = 10**6,
        raises_above: int = 99,
        compiled: bool = False,
    ) -> tuple[MicroBatch, list[tuple[int, bool]]]:
        machine, decoder = Machine(available, fixed, each, each_compiled, raises_above), new_decoder()
        monkeypatch.setattr(micro_batch, "_meter", lambda device: machine)
        monkeypatch.setattr(micro_batch, "SHARE", {"cpu": 1.0})
        monkeypatch.setattr(micro_batch, "SIGNIFICANT", 10**6)
        found = find_micro_batch(CFG, decoder, choices(compiled), machine.build(decoder))
        return found, machine.passes

    return find


@pytest.mark.parametrize(
    ("available", "size"), [(2_000_000, 1), (4_000_000, 3), (6_999_999, 4), (7_000_000, 6), (10**9, 12)]
)
def test_the_largest_divisor_that_fits(find: Any, available: int, size: int) -> None:
    found, passes = find(available)
    assert (found.size, found.sequences) == (size, 12)
    # Without memory for a second size that the first vouches for there is no line.
    assert {s for s, _ in passes} == ({1} if size == 1 else {1, 2, size})
    if size > 1:
        assert found.fixed_bytes == 10**6 + optimizer_bytes(CFG)
        assert found.bytes_per_sequence == 10**6
    assert f"micro-batch: {size} of the step's 12 sequences" in found.sentence()


def test_running_out_of_memory_while_trying_means_a_divisor_less(find: Any) -> None:
    found, passes = find(10**9, raises_above=3)
    assert found.size == 3
    assert [s for s, _ in passes] == [1, 1, 2, 12, 6, 4, 3]


def test_a_compiled_run_is_tried_compiled(find: Any) -> None:
    found, passes = find(7_000_000, each_compiled=3 * 10**6, compiled=True)
    assert found.size == 2
    assert [s for s, compiled in passes if compiled] == [6, 6, 4, 4, 3, 3, 2, 2]  # once to compile, once to measure
    found, passes = find(7_000_000, each_compiled=500_000, compiled=True)
    assert found.size == 12
    assert [s for s, compiled in passes if compiled] == [6, 6, 12, 12]
    found, passes = find(10**10, compiled=True)
    assert found.size == 12
    assert not any(compiled for _, compiled in passes), "an eager step that fits by far needs no compiling"


def test_no_room_for_one_sequence_says_what_to_change(find: Any) -> None:
    for compiled in (False, True):
        with pytest.raises(ConfigError, match="Not even one sequence fits") as caught:
            find(1_500_000, compiled=compiled)
        for part in ("1 x 16 tokens", "data.sequence_length", "model.layers"):
            assert part in str(caught.value)
        assert ("trainer.compile=false" in str(caught.value)) == compiled
    with pytest.raises(ConfigError, match="runs out of memory"):
        find(10**9, raises_above=0)
    # Less than the gradients: on a CPU nothing is tried.
    with pytest.raises(ConfigError, match="Not even one sequence fits"):
        find(10_000)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = new_decoder()

    def broken(self: PretrainingModule, batch: Tensor, batch_idx: int) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(PretrainingModule, "training_step", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        find_micro_batch(CFG, decoder, choices(), lambda compiled: PretrainingModule(CFG, decoder, 0, compiled))


def test_the_search_leaves_no_trace() -> None:
    decoder = new_decoder()
    weights = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    random, deterministic = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    found = find_micro_batch(CFG, decoder, choices(), lambda compiled: PretrainingModule(CFG, decoder, 0, compiled))
    assert found.size == 12
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in decoder.state_dict().items())
    assert all(module.kept is None for module in decoder.modules() if isinstance(module, BitLinear | SharedInput))
    assert not decoder._load_state_dict_post_hooks


def test_optimizer_state_is_known_before_it_exists() -> None:
    decoder = new_decoder()
    optimizer = build_optimizer(CFG.optimizer, decoder)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    real = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert optimizer_bytes(CFG) == real >= 8 * sum(p.numel() for p in decoder.parameters())


def test_resident_memory_sees_the_peak_that_is_gone() -> None:
    meter = ProcessMemory(10**9)
    big, small = 200 * 2**20, 50 * 2**20
    for size in (big, small):
        grown = meter.growth(lambda size=size: torch.ones(size, dtype=torch.uint8).max())
        assert 0.9 * size < grown < size + 40 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory_sees_the_peak_that_is_gone() -> None:
    meter = GpuMemory()
    assert meter.growth(lambda: torch.ones(2**24, dtype=torch.uint8, device="cuda").sum()) >= 2**24
    assert meter.available > 0


def test_where_nothing_can_be_measured_the_estimate_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(available: int) -> ProcessMemory:
        raise PermissionError(13, "Permission denied")

    decoder = new_decoder()
    monkeypatch.setattr(micro_batch, "ProcessMemory", refuse)

    def find(free: int) -> MicroBatch:
        monkeypatch.setattr(micro_batch, "available_memory", lambda: free)
        return find_micro_batch(CFG, decoder, choices(), lambda compiled: pytest.fail("no pass was to be made"))

    planned = micro_batch._planned(CFG, 4, "bf16-mixed")
    assert find(int(planned / 0.8) + 2).size == 4
    assert find(int(planned / 0.8) - 2).size == 3
    assert "estimated" in find(10**9).sentence()
    with pytest.raises(ConfigError, match="Not even one"):
        find(1000)
    monkeypatch.setattr(micro_batch, "available_memory", lambda: None)
    with pytest.raises(ConfigError, match="does not tell how much memory is free; give a number"):
        find_micro_batch(CFG, decoder, choices(), lambda compiled: pytest.fail("no pass was to be made"))


def test_the_setting_is_a_number_null_or_auto() -> None:
    assert compose_config("+recipe=tiny", "trainer.micro_batch=auto").trainer.micro_batch == "auto"
    assert compose_config("+recipe=tiny", "trainer.micro_batch=null").trainer.micro_batch is None
    for wrong, said in (("fast", "use a number of sequences, null or auto"), ("0", "does not divide")):
        with pytest.raises(ConfigError, match=said):
            compose_config("+recipe=tiny", f"trainer.micro_batch={wrong}")
    with pytest.raises(ConfigError, match="is no multiple of"):
        compose_config("+recipe=tiny", "trainer.micro_batch=auto", "trainer.batch_tokens=1000")
    with pytest.raises(ConfigError, match="give this command a number"):
        batch_plan(CFG.trainer, 16)


def run(workspace: Workspace, *arguments: str) -> int:
    """The command in this process, which has torch loaded and whose memory can be pretended."""
    try:
        return answer([*SETTINGS, f"data.corpus.path={workspace.folder}/corpus", *arguments])
    finally:
        torch.use_deterministic_algorithms(False)


def rows(run_name: str) -> list[dict[str, str]]:
    with Path(f"runs/{run_name}/metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def chosen(run_name: str) -> dict[str, Any]:
    content = json.loads(Path(f"runs/{run_name}/provenance.json").read_text())
    return dict(content["sessions"][-1]["chosen"])


def test_a_run_with_auto_is_the_run_with_its_number_set_by_hand(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace.folder)
    # 64 sequences of 32 tokens by a wide FFN take about 1.5 MB each.
    settings = ("trainer.batch_tokens=2048", "model.ffn=4096", "trainer.max_steps=2", "samples.every_steps=null")
    settings += ("data.validation_tokens=1000",)
    monkeypatch.setattr(micro_batch, "available_memory", lambda: 80_000_000)
    assert run(workspace, *settings, "trainer.micro_batch=auto", "run_name=auto") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    number = chosen("auto")["micro_batch"]
    assert 1 <= number < 64
    assert 64 % number == 0
    assert f"micro-batch: {number} of the step's 64 sequences" in said
    assert f"({64 // number} x {number} sequences of 32)" in said
    search = chosen("auto")["micro_batch_search"]
    assert search["fixed_bytes"] + number * search["bytes_per_sequence"] <= search["limit_bytes"] == 64_000_000
    assert run(workspace, *settings, f"trainer.micro_batch={number}", "run_name=hand") == 0
    different = ("step_seconds", "tokens_per_second", "mfu", "seconds", "memory")
    for a, b in zip(rows("auto"), rows("hand"), strict=True):
        same = {key for key in a if not any(part in key for part in different)}
        assert {"step", "train/loss", "val/loss", "grad_norm"} <= same
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
    # Continued with another number, and then with auto on a machine with more memory.
    more = [s for s in settings if "max_steps" not in s] + ["schedule=constant", "run_name=grown"]
    assert run(workspace, *more, "trainer.max_steps=1", "trainer.micro_batch=16") == 0
    monkeypatch.setattr(micro_batch, "available_memory", lambda: 10**10)
    assert run(workspace, *more, "trainer.max_steps=2", "trainer.micro_batch=auto") == 0
    assert chosen("grown")["micro_batch"] == 64
    assert [row["step"] for row in rows("grown")] == ["1", "2"]


def test_the_precision_of_gradients_is_said_and_recorded(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace.folder)
    short = ("trainer.max_steps=1", "samples.every_steps=null", "trainer.validate_every=9")
    for name, more, line in (
        (
            "a",
            ("trainer.precision=bf16-mixed", "quant.gradient.dw=auto"),
            "gradients: dX in int8, dW in bf16 (quant.gradient)",
        ),
        ("b", ("trainer.precision=32-true", "quant.gradient.dw=int8"), "gradients: dX in fp32, dW in int8"),
        ("c", ("quant=none",), None),
    ):
        assert run(workspace, *short, *more, f"run_name={name}") == 0
        said = capsys.readouterr().out
        assert line in said if line else "gradients:" not in said
    assert chosen("a")["gradients"] == {"dx": "int8", "dw": "bf16"}
    assert chosen("b")["gradients"] == {"dx": "fp32", "dw": "int8"}
    assert "gradients" not in chosen("c")
