"""Text generation with a KV cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.nn.decoder import Decoder


def choose_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    """One id from logits (vocab,): the most likely at temperature 0, otherwise sampled, among ``top_k`` if given."""
    logits = logits.float()
    if temperature <= 0:
        return int(logits.argmax())
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_k is not None and top_k < logits.shape[-1]:
        logits = torch.where(logits < logits.topk(top_k).values[-1], -torch.inf, logits)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))


@torch.inference_mode()
def generate_ids(
    model: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields up to ``max_new_tokens`` ids after ``prompt``, ending at ``eos_id`` or at the model's context.

    A prompt longer than the context keeps its end. Sampling draws from a generator of its own, so that it disturbs
    no other random numbers.
    """
    prompt = prompt[max(0, len(prompt) - (model.cfg.context - 1)) :]
    if not prompt:
        raise ValueError("the prompt needs at least one token")
    generator = torch.Generator().manual_seed(seed)
    device = model.embed_tokens.weight.device
    cache = model.new_cache(1, min(model.cfg.context, len(prompt) + max_new_tokens))
    ids = torch.tensor([prompt], device=device)
    for _ in range(min(max_new_tokens, model.cfg.context - len(prompt))):
        token = choose_token(model.forward(ids, cache=cache)[0, -1], temperature, top_k, generator)
        if token == eos_id:
            return
        yield token
        ids = torch.tensor([[token]], device=device)


def generate_text(
    model: Decoder,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the continuation of ``prompt`` piece by piece; a piece ends where the bytes so far are characters."""
    ids: list[int] = []
    written = ""
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for token in generate_ids(
        model, prompt_ids, max_new_tokens, temperature=temperature, top_k=top_k, eos_id=tokenizer.eos_id, seed=seed
    ):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("�") and len(text) > len(written):
            yield text[len(written) :]
            written = text
    text = tokenizer.decode(ids)
    if len(text) > len(written):
        yield text[len(written) :]
