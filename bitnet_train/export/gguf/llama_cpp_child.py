"""llama.cpp on a GGUF file, in a process of its own: a file that it aborts on must not take the caller along.

Reads a request as JSON from standard input and writes the answer as JSON to standard output, its last line.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

# Longest that a consumer may take for loading and measuring.
TIMEOUT_SECONDS = 1800
LONGEST_TOKEN = 4096


def ask_llama_cpp(path: Path, windows: list[list[int]], texts: list[str], prompt: str, tokens: int) -> dict[str, Any]:
    """What llama-cpp-python makes of a file.

    Returns ``version``, ``metadata``, ``nats`` (negative log-likelihood of all but the first id of each window),
    ``token_ids`` of each text, ``started_ids`` (with special tokens), ``back`` (the texts from their ids) and
    ``completion`` of ``prompt``, greedily. Raises RuntimeError with the end of its output when it failed.
    """
    request = {"path": str(path), "windows": windows, "texts": texts, "prompt": prompt, "tokens": tokens}
    # Not -m: the package's own imports would be loaded first, torch among them.
    done = subprocess.run(
        [sys.executable, "-P", __file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise RuntimeError(f"llama.cpp ended with {ended}: {' | '.join(lines[-3:])}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    longest = max(map(len, request["windows"]))
    room = max(longest, 2 * request["tokens"])
    model = llama_cpp.Llama(request["path"], n_ctx=room, n_batch=room, logits_all=True, verbose=False, seed=0)
    nats = 0.0
    for window in request["windows"]:
        ids = np.array(window)
        model.reset()
        model.eval(window[:-1])
        logits = model.scores[: len(ids) - 1].astype(np.float64)
        top = logits.max(-1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
        nats += float((total - logits[np.arange(len(ids) - 1), ids[1:]]).sum())
    encoded = [text.encode() for text in request["texts"]]
    token_ids = [model.tokenize(text, add_bos=False, special=False) for text in encoded]
    back = [_text(model, ids) for ids in token_ids]
    prompt = model.tokenize(request["prompt"].encode())[: request["tokens"]]
    model.reset()
    new: list[int] = []
    for token in model.generate(prompt, temp=0.0):
        if token == model.token_eos() or len(new) == request["tokens"]:
            break
        new.append(token)
    return {
        "version": llama_cpp.__version__,
        "metadata": model.metadata,
        "nats": nats,
        "token_ids": token_ids,
        "started_ids": [model.tokenize(text) for text in encoded],
        "back": back,
        "completion": _text(model, prompt + new),
        "new_tokens": len(new),
    }


def _text(model: Any, ids: list[int]) -> str:
    """The pieces of ``ids`` in a row, as streaming consumers print them.

    Not Llama.detokenize, which cuts tokens of more than 32 bytes (long runs of spaces), and not llama_detokenize, which
    takes out spaces before punctuation.
    """
    import llama_cpp

    buffer = ctypes.create_string_buffer(LONGEST_TOKEN)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    pieces = b""
    for index in ids:
        size = llama_cpp.llama_token_to_piece(vocab, index, buffer, LONGEST_TOKEN, 0, False)
        pieces += buffer.raw[: max(0, size)]
    return pieces.decode("utf-8", "replace")


if __name__ == "__main__":
    print("\n" + json.dumps(_answer(json.loads(sys.stdin.read()))))
