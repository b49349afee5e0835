"""How many tokens' logits exist at a time. Free of torch, as the memory estimate needs it too."""

# Logits of a chunk: 2^22 in float32 are 16 MB, about a CPU's outer cache, and 2^26 are 256 MB on a GPU.
CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}


def chunk_elements(device: str) -> int:
    """Elements of a chunk of scores on a kind of device."""
    return CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"])


def chunk_tokens(vocab: int, device: str) -> int:
    """Tokens per chunk of the loss on a kind of device: a power of two, at least 64."""
    tokens = chunk_elements(device) // vocab
    return max(64, 1 << max(tokens, 1).bit_length() - 1)
