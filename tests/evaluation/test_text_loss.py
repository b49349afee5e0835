"""Loss and bits per byte against direct computations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import TextLoss, cut_windows, text_loss, windows_loss
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecoderConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, context=64, vocab=400)


@pytest.fixture
def model() -> Decoder:
    return build_decoder(CONFIG, QuantSpec(), NormalInit(std=0.2), 0).eval()


def direct_nats(model: Decoder, window: torch.Tensor) -> float:
    """-sum log p(token | those before it), one token at a time in float64."""
    with torch.no_grad():
        logits = model(window[None, :-1])[0].double()
    return -sum(float(torch.log_softmax(row, -1)[token]) for row, token in zip(logits, window[1:], strict=True))


def test_windows_loss_is_the_direct_sum(model: Decoder) -> None:
    batches = [torch.randint(0, 400, (3, 17)), torch.randint(0, 400, (1, 9))]
    lengths = np.arange(400, dtype=np.int32) % 7
    got = windows_loss(model, batches, lengths)
    windows = [window for batch in batches for window in batch]
    assert got.nats == pytest.approx(sum(direct_nats(model, w) for w in windows), rel=1e-5)
    assert got.tokens == 3 * 16 + 8
    assert got.bytes == sum(int(lengths[w[1:].numpy()].sum()) for w in windows)  # the first token is not predicted


def test_bos_keeps_attention_inside_documents(model: Decoder) -> None:
    first, second = torch.randint(1, 400, (8,)), torch.randint(1, 400, (8,))
    zero = torch.zeros(1, dtype=torch.long)
    packed = torch.cat((zero, first, zero, second))[None]
    lengths = np.ones(400, dtype=np.int32)
    inside = windows_loss(model, [packed], lengths, bos_id=0).nats
    alone = windows_loss(model, [torch.cat((zero, first, zero))[None]], lengths).nats
    alone += windows_loss(model, [torch.cat((zero, second))[None]], lengths).nats
    assert inside == pytest.approx(alone, rel=2e-3)  # ternary: positions may flip a code
    assert abs(windows_loss(model, [packed], lengths).nats - inside) > 0.01 * inside


def test_no_gradient_is_kept_and_autocast_is_respected(model: Decoder) -> None:
    batch = torch.randint(0, 400, (2, 17))
    lengths = np.ones(400, dtype=np.int32)
    exact = windows_loss(model, [batch], lengths)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = windows_loss(model, [batch], lengths)
    assert rounded.nats == pytest.approx(exact.nats, rel=0.02)
    assert rounded.nats != exact.nats
    assert all(p.grad is None for p in model.parameters())


def test_the_arithmetic_of_a_loss() -> None:
    loss = TextLoss(nats=1000 * math.log(2), tokens=250, bytes=800)
    assert loss.bits_per_byte == pytest.approx(1.25)
    assert loss.loss == pytest.approx(4 * math.log(2))
    assert loss.perplexity == pytest.approx(16)
    assert TextLoss(nats=1e6, tokens=1, bytes=1).perplexity < math.inf
    assert math.isnan(TextLoss(nats=math.nan, tokens=1, bytes=1).perplexity)


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(bpe: TextTokenizer, model: Decoder) -> None:
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    text = "def f(x): return x\n" * 5 + "é你"
    loss = text_loss(model, bpe, text, window=16)
    assert loss.tokens == len(bpe.encode(text))
    assert loss.bytes == len(text.encode())
    assert loss.loss == pytest.approx(math.log(400), rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(math.log2(400) * loss.tokens / loss.bytes, rel=1e-6)


@pytest.mark.parametrize("window", [5, 16, 60])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_texts_loss_is_that_of_its_windows(bpe: TextTokenizer, model: Decoder, window: int, batch: int) -> None:
    text = "def main(self):\n    return [x for x in range(10)]\n" * 3
    ids = torch.tensor([bpe.bos_id, *bpe.encode(text)])
    wanted = sum(direct_nats(model, ids[i : i + window + 1]) for i in range(0, len(ids) - 1, window))
    got = text_loss(model, bpe, text, window, batch)
    assert got.nats == pytest.approx(wanted, rel=1e-5)
    assert got.tokens == len(ids) - 1
    assert got.bytes == len(text.encode())


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 11, 31])
def test_cut_windows_predict_every_token_but_the_first_once(count: int) -> None:
    ids = torch.arange(count)
    batches = list(cut_windows(ids, window=5, batch=2))
    assert [token for b in batches for w in b for token in w[1:].tolist()] == list(range(1, count))
    assert [token for b in batches for w in b for token in w[:-1].tolist()] == list(range(count - 1))
    assert all(b.shape[0] <= 2 and 2 <= b.shape[1] <= 6 for b in batches)


def test_an_empty_text_has_no_loss(bpe: TextTokenizer, model: Decoder) -> None:
    with pytest.raises(ConfigError, match="empty"):
        text_loss(model, bpe, "", 16)


def test_predicting_the_loss_of_cross_entropy(model: Decoder) -> None:
    batch = torch.randint(0, 400, (4, 33))
    with torch.no_grad():
        wanted = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    assert windows_loss(model, [batch], np.ones(400, dtype=np.int32)).loss == pytest.approx(wanted.item(), rel=1e-5)
