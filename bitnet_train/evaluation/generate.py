"""Text generation with a KV cache: many prompts at once, or one that streams."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.evaluation.sampling import Sampling, choose_tokens
from bitnet_train.evaluation.text_stream import TextStream
from bitnet_train.kernels.op import compute_dtype
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.kv_cache import KVCache

GREEDY = Sampling()


@torch.inference_mode()
def generate_steps(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    eos_id: int | None = None,
    seeds: list[int] | None = None,
) -> Iterator[list[int | None]]:
    """Yields, token by token, the next id of every prompt; None for a prompt that has ended.

    Prompts of different lengths are one batch, the shorter ones padded on the left and the padding hidden. A prompt
    ends after ``max_new_tokens``, at ``eos_id`` (which is not yielded), or when all together reach the model's context;
    one that is longer than the context keeps its end. Sequence i draws from a generator of its own, seeded
    ``seeds[i]`` (by default i), so that it comes out the same whatever else is in the batch (up to rounding), and
    disturbs no other random numbers.
    Raises ValueError for an empty prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("the prompt needs at least one token")
    context = model.cfg.context
    prompts = [prompt[max(0, len(prompt) - (context - 1)) :] for prompt in prompts]
    longest = max(map(len, prompts))
    count = min(max_new_tokens, context - longest)
    device = model.embed_tokens.weight.device
    generators = [torch.Generator().manual_seed(s) for s in seeds or range(len(prompts))]
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    cache = model.new_cache(len(prompts), min(context, longest + max(0, count)), padding if padding.any() else None)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    alive = [True] * len(prompts)
    for _ in range(count):
        chosen = choose_tokens(_last_logits(model, ids, cache), sampling, generators)
        alive = [living and token != eos_id for living, token in zip(alive, chosen, strict=True)]
        if not any(alive):
            return
        yield [token if living else None for living, token in zip(alive, chosen, strict=True)]
        ids = torch.tensor(chosen, device=device)[:, None]


def generate_ids(
    model: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    eos_id: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields up to ``max_new_tokens`` ids after ``prompt``, ending at ``eos_id`` or at the model's context."""
    for (token,) in generate_steps(model, [prompt], max_new_tokens, sampling=sampling, eos_id=eos_id, seeds=[seed]):
        assert token is not None
        yield token


def generate_text(
    model: Decoder,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop: tuple[str, ...] = (),
    seed: int = 0,
) -> Iterator[str]:
    """Yields the continuation of ``prompt`` piece by piece, up to the first of the strings ``stop`` (left out).

    A piece ends where the bytes so far are characters and cannot be the beginning of a stop string.
    """
    stream = TextStream(tokenizer, stop)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for token in generate_ids(model, ids, max_new_tokens, sampling=sampling, eos_id=tokenizer.eos_id, seed=seed):
        piece = stream.add(token)
        if piece:
            yield piece
        if stream.stopped:
            return
    rest = stream.end()
    if rest:
        yield rest


def generate_texts(
    model: Decoder,
    tokenizer: TextTokenizer,
    prompts: list[str],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop: tuple[str, ...] = (),
    seed: int = 0,
) -> list[str]:
    """The continuations of ``prompts``, made together as one batch.

    Prompts that leave too little of the context for ``max_new_tokens`` are made one by one, so that they shorten no
    other text.
    """
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    fitting = [i for i, prompt in enumerate(ids) if len(prompt) + max_new_tokens <= model.cfg.context]
    alone = [[i] for i in range(len(ids)) if i not in fitting]
    texts = [""] * len(ids)
    for group in [fitting, *alone] if fitting else alone:
        seeds = [seed + i for i in group]
        made = _batch(model, tokenizer, [ids[i] for i in group], max_new_tokens, seeds, sampling=sampling, stop=stop)
        for i, text in zip(group, made, strict=True):
            texts[i] = text
    return texts


def _batch(
    model: Decoder,
    tokenizer: TextTokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    seeds: list[int],
    *,
    sampling: Sampling,
    stop: tuple[str, ...],
) -> list[str]:
    streams = [TextStream(tokenizer, stop) for _ in prompts]
    texts = [""] * len(prompts)
    steps = generate_steps(model, prompts, max_new_tokens, sampling=sampling, eos_id=tokenizer.eos_id, seeds=seeds)
    ended = [False] * len(prompts)
    for tokens in steps:
        for i, token in enumerate(tokens):
            ended[i] = ended[i] or token is None
            if not ended[i] and token is not None:
                texts[i] += streams[i].add(token)
                ended[i] = streams[i].stopped
        if all(ended):
            break
    return [text + stream.end() for text, stream in zip(texts, streams, strict=True)]


def _last_logits(model: Decoder, ids: Tensor, cache: KVCache) -> Tensor:
    """Logits (batch, vocab) after the last of ids (batch, tokens); the head sees one token of each."""
    states = model.hidden_states(ids, cache=cache)[:, -1]
    weight = model.head_weight
    return F.linear(states.to(compute_dtype(weight)), weight)
