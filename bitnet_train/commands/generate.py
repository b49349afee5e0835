"""``command=generate``: a run or an export continues a prompt; the text appears as it is made."""

from bitnet_train.commands.sources import load_model
from bitnet_train.config import Config
from bitnet_train.evaluation.generate import generate_text


def run(cfg: Config) -> int:
    """Print ``generate.prompt`` and its continuation to standard output, and nothing else there."""
    model = load_model(cfg)
    options = cfg.generate
    print(options.prompt, end="", flush=True)
    pieces = generate_text(
        model.decoder, model.tokenizer, options.prompt, options.max_new_tokens,
        temperature=options.temperature, top_k=options.top_k, seed=options.seed,
    )  # fmt: skip
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
