"""``command=generate``: a run or an export continues a prompt; the text appears as it is made."""

import sys
from pathlib import Path

from bitnet_train.commands.sources import LoadedModel, load_model, read_text
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.config import GenerateConfig
from bitnet_train.evaluation.generate import generate_text, generate_texts
from bitnet_train.evaluation.sampling import Sampling
from bitnet_train.nn.code_cache import pack_kept_codes


def run(cfg: Config) -> int:
    """Print prompts and their continuations to standard output, and nothing else there.

    One text streams; several are made as one batch and printed in order, an empty line between them.
    """
    options = cfg.generate
    prompts = [options.prompt] * options.samples
    if options.prompts_file is not None:
        text = read_text(Path(options.prompts_file), "generate.prompts_file")
        prompts = [line for line in text.splitlines() if line]
        if not prompts:
            raise ConfigError(f"generate.prompts_file={options.prompts_file} holds no prompt: write one on each line.")
    model = load_model(cfg)
    pack_kept_codes(model.decoder)
    _warn(model, prompts, options.max_new_tokens)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    if len(prompts) == 1:
        _stream(model, options, prompts[0], sampling)
        return 0
    texts = generate_texts(
        model.decoder, model.tokenizer, prompts, options.max_new_tokens,
        sampling=sampling, stop=tuple(options.stop), seed=options.seed,
    )  # fmt: skip
    print("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))
    return 0


def _warn(model: LoadedModel, prompts: list[str], wanted: int) -> None:
    """Says on standard error where the model's context ends a text before it has its tokens."""
    context = model.decoder.cfg.context
    longest = max(len(model.tokenizer.encode(prompt)) + 1 for prompt in prompts)
    if longest + wanted > context:
        room = max(1, context - longest)
        print(
            f"The longest prompt has {longest} tokens, the model's context {context}: there is room for {room} of "
            f"generate.max_new_tokens={wanted}.",
            file=sys.stderr,
        )


def _stream(model: LoadedModel, options: GenerateConfig, prompt: str, sampling: Sampling) -> None:
    print(prompt, end="", flush=True)
    pieces = generate_text(
        model.decoder, model.tokenizer, prompt, options.max_new_tokens,
        sampling=sampling, stop=tuple(options.stop), seed=options.seed,
    )  # fmt: skip
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
