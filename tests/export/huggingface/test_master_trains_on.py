"""A folder of master weights goes on training in plain ``transformers``."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from bitnet_train.export.huggingface.model_config import hf_name
from tests.export.conftest import Export, MakeExport

transformers = pytest.importorskip("transformers")

Optimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
}


def load(export: Export) -> Any:
    """As a user loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(export.folder)


def train(model: Any, export: Export, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[float]:
    """The losses of the steps on one batch, before each."""
    ids, losses = export.run.held_out.ids[:128].reshape(4, 32), []
    model.train()
    with torch.compiler.set_stance("force_eager"):
        for _ in range(steps):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["2b4t", "some float"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls(name: str, kind: str, exported: MakeExport) -> None:
    export = exported(kind, "hf-master")
    model = load(export)
    layer = next(iter(export.run.canonical.quantised))
    master = model.get_submodule(hf_name(layer)).weight
    assert master.requires_grad
    losses = train(model, export, OPTIMIZERS[name](model.parameters()))
    assert losses[-1] < 0.97 * losses[0]
    assert not torch.equal(master, export.run.canonical.tensor(f"{layer}.weight"))


def test_the_first_loss_is_the_runs(exported: MakeExport) -> None:
    export = exported("2b4t", "hf-master")
    model = load(export)
    first = train(model, export, torch.optim.SGD(model.parameters(), lr=0.0), steps=1)[0]
    ids = export.run.held_out.ids[:128].reshape(4, 32)
    with torch.no_grad():
        logits = export.run.canonical.decoder()(ids[:, :-1])
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert first == pytest.approx(float(ours), rel=1e-3)
