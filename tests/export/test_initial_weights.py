"""``init.from``: from every format back to master weights, which are exported to the same bytes again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitnet_train.config import Config, to_yaml
from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import open_checkpoint
from bitnet_train.export.config import EmbeddingType, ExportDtype
from bitnet_train.export.initial import check_same_tokenizer, fill_weights, read_initial
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.config import Activation, DecoderConfig
from bitnet_train.nn.decoder import Decoder
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import quantise_weight
from tests.export.conftest import MakeRun, SmallRun, decoder_config, held_by, save_checkpoint

# Options under which nothing of a file is rounded a second time.
ROUND_TRIPS = [
    ("hf-packed", {}),
    ("hf-packed", {"dtype": ExportDtype.bfloat16}),
    ("hf-master", {"dtype": ExportDtype.bfloat16}),
    ("hf-master", {}),
    ("hf-dense", {}),
    ("hf-dense", {"dtype": ExportDtype.bfloat16}),
    ("packed", {}),
    ("gguf-i2_s", {}),
    ("gguf-tq2_0", {"embedding": EmbeddingType.f32}),
    ("gguf-tq1_0", {}),
]


def again(run: SmallRun, source: Path, path: Path) -> SmallRun:
    """The run that starts from an export, untrained."""
    cfg, spec = run.canonical.cfg, run.canonical.spec
    masters = read_initial(str(source), cfg, spec).masters
    state = {f"decoder.{name}": tensor for name, tensor in masters.items()}
    torch.save({"state_dict": state, "global_step": 7}, path)
    return replace(run, canonical=open_checkpoint(path, cfg, spec))


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        pytest.param(name, options, kind, id=f"{name}-{kind}-{'-'.join(str(v.value) for v in options.values())}")
        for name, options in ROUND_TRIPS
        for kind in held_by(name, **options)
    ],
)
def test_export_import_export_gives_the_same_bytes(
    name: str, options: dict[str, object], kind: str, small_run: MakeRun, tmp_path: Path
) -> None:
    run = small_run(kind)
    first = run.write(tmp_path / "first", name, **options)
    second = again(run, first, tmp_path / "again.ckpt").write(tmp_path / "second", name, **options)
    assert {p.name for p in first.iterdir()} == {p.name for p in second.iterdir()}
    for path in first.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


def test_dense_weights_of_any_kind_start_a_run(small_run: MakeRun, tmp_path: Path) -> None:
    run = small_run("llama")
    folder = run.write(tmp_path / "dense", "hf-dense")
    # As float weights they are what they are; as ternary ones they are the codes and scales that they came from.
    floats = read_initial(str(folder), run.canonical.cfg, QuantSpec(FLOAT)).masters
    ternary = read_initial(str(folder), run.canonical.cfg, run.canonical.spec).masters
    for layer, quant in run.canonical.quantised.items():
        codes = run.canonical.codes(layer)
        assert torch.equal(floats[f"{layer}.weight"], codes.dequantise())
        again = quantise_weight(ternary[f"{layer}.weight"], quant)
        assert torch.equal(again.codes, codes.codes)
        assert torch.equal(again.scale, codes.scale)
    other = small_run("unquantised")  # ordinary float weights are master weights
    folder = other.write(tmp_path / "float", "hf-dense")
    masters = read_initial(str(folder), other.canonical.cfg, QuantSpec()).masters
    assert all(torch.equal(tensor, other.canonical.tensor(name)) for name, tensor in masters.items())


@pytest.mark.parametrize(
    ("name", "kind"), [("packed", "2b4t"), ("packed", "binary"), ("hf-packed", "2b4t"), ("hf-dense", "2b4t")]
)
def test_codes_start_a_run_with_learned_scales(name: str, kind: str, small_run: MakeRun, tmp_path: Path) -> None:
    run = small_run(kind)
    spec = QuantSpec(replace(run.canonical.spec.default, trainable_scale=True))
    initial = read_initial(str(run.write(tmp_path / "export", name)), run.canonical.cfg, spec)
    assert initial.coded == frozenset(run.canonical.quantised)
    model = Decoder(run.canonical.cfg, spec)
    fill_weights(model, initial.masters)
    for layer in run.canonical.quantised:
        module, wanted = model.get_submodule(layer), run.canonical.codes(layer)
        assert isinstance(module, BitLinear)
        found = module.quantised()
        assert torch.equal(found.codes, wanted.codes), layer
        assert torch.equal(found.scale, wanted.scale), layer


def test_codes_that_learned_scales_do_not_give_are_refused(small_run: MakeRun, tmp_path: Path) -> None:
    run = small_run("2b4t")
    folder = run.write(tmp_path / "export", "packed")
    spec = QuantSpec(LayerQuant(trainable_scale=True, threshold=1.5))
    with pytest.raises(ConfigError, match="set quant= as it was trained"):
        read_initial(str(folder), run.canonical.cfg, spec)


@pytest.fixture
def run_folder(tmp_path: Path, bpe: TextTokenizer) -> Path:
    """A run's folder with two checkpoints."""
    folder, cfg = tmp_path / "run", decoder_config()
    save_checkpoint(folder / "checkpoints" / "step-00000003.ckpt", cfg, QuantSpec(), 3, seed=1)
    save_checkpoint(folder / "checkpoints" / "last.ckpt", cfg, QuantSpec(), 5, seed=2)
    (folder / "config.yaml").write_text(to_yaml(Config(model=cfg)))
    bpe.save(folder / "tokenizer")
    return folder


def test_a_run_gives_its_last_step_or_the_one_asked_for(run_folder: Path) -> None:
    cfg = decoder_config()
    last, third = (read_initial(f"{run_folder}{step}", cfg, QuantSpec()) for step in ("", "@3"))
    assert (last.description, third.description) == (f"step 5 of {run_folder}", f"step 3 of {run_folder}")
    for initial, file in ((last, "last"), (third, "step-00000003")):
        saved = torch.load(run_folder / "checkpoints" / f"{file}.ckpt", weights_only=True)["state_dict"]
        model = Decoder(cfg, QuantSpec())
        fill_weights(model, initial.masters)
        assert all(torch.equal(p, saved[f"decoder.{n}"]) for n, p in model.named_parameters())


def refused(source: str, pattern: str, spec: QuantSpec | None = None, **fields: object) -> None:
    cfg: DecoderConfig = decoder_config(**fields)
    with pytest.raises(ConfigError, match=pattern) as caught:
        read_initial(source, cfg, spec or QuantSpec())
    assert "\n" not in str(caught.value)


def test_what_cannot_be_a_start_is_one_sentence(run_folder: Path, small_run: MakeRun, tmp_path: Path) -> None:
    run = small_run("2b4t")
    packed, other = run.write(tmp_path / "packed", "packed"), run.write(tmp_path / "hf", "hf-packed")
    refused(f"{tmp_path}/none", "does not exist: give the folder of a run, an export or a checkpoint")
    (tmp_path / "empty").mkdir()
    refused(f"{tmp_path}/empty", "config.json is missing")
    refused(f"{run_folder}@4", "step-00000004.ckpt does not exist")
    refused(f"{run_folder}@x", "must be a step number")
    refused(f"{packed}@3", "only a run has steps")
    for source in (run_folder, packed, other):
        refused(str(source), "is of another model: set model.layers=2 model.ffn=96.", layers=3, ffn=128)
        refused(str(source), "set model.activation=relu2.", activation=Activation.silu)
    for source in (packed, other):
        refused(str(source), "none that the layer's quantiser makes; set quant=", QuantSpec(LayerQuant("binary")))
        read_initial(str(source), decoder_config(), QuantSpec(LayerQuant(groups=2)))  # two groups of the same scale
    grouped = small_run("groups").write(tmp_path / "groups", "packed")
    refused(str(grouped), "its 4 scales are not those of 1 groups; set quant=")
    read_initial(str(packed), decoder_config(context=64), QuantSpec())  # a shorter context is free
    (run_folder / "config.yaml").write_text("seed: 1")
    refused(str(run_folder), "is not the configuration of a run")


def test_token_ids_must_mean_the_same(bpe: TextTokenizer, tmp_path: Path) -> None:
    check_same_tokenizer("x", bpe, bpe)
    with pytest.raises(ConfigError, match=r"another tokenizer: use its own.*vocab_size=400"):
        check_same_tokenizer("x", bpe, replace(bpe, bos_id=5))
    definition = json.loads(bpe.tokenizer.to_str())
    vocabulary = definition["model"]["vocab"]
    first, second = sorted(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    swapped = type(bpe.tokenizer).from_str(json.dumps(definition))
    with pytest.raises(ConfigError, match="another tokenizer"):
        check_same_tokenizer("x", TextTokenizer(swapped, bpe.bos_id, bpe.eos_id), bpe)
