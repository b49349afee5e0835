"""Reading random training windows: flat memory-mapped .npy shards against an Arrow table through `datasets`.

    python benchmarks/shard_storage.py [tokens] [window]

Both hold the same uint16 tokens; Arrow stores them as rows of `window + 1` (its natural form, which fixes the sequence
length when preparing). Measured: windows per second in random order, in one process, files in the page cache, the two
alternating; and bytes on disk. Expected before measuring: .npy ten times faster, because Arrow rows pass through Python
lists or the formatter, and equal sizes.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bitnet_train.data.config import Verify
from bitnet_train.data.shards import Manifest, ShardWriter, TokenArray, verify_shards
from bitnet_train.data.windows import Windows

ROUNDS, READS = 7, 2000


def main() -> None:
    """Write both, read both in turns, print medians and their ratio."""
    import datasets

    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000_000
    window = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 4096, tokens, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        writer = ShardWriter(folder, "train", 4096, 100_000_000)
        writer.add(ids, 0)
        manifest = Manifest(1, {}, {"train": writer.finish()})
        verify_shards(folder, manifest, Verify.full)
        windows = Windows(TokenArray(folder, manifest, "train"), window)

        rows = (tokens - 1) // window
        starts = np.arange(rows)[:, None] * window + np.arange(window + 1)
        features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"), length=window + 1)})
        table = datasets.Dataset.from_dict({"ids": ids[starts]}, features=features)
        table.save_to_disk(str(folder / "arrow"))
        arrow = datasets.load_from_disk(str(folder / "arrow")).with_format("numpy")

        def read_npy(index: int) -> torch.Tensor:
            return windows[index]

        def read_arrow(index: int) -> torch.Tensor:
            return torch.from_numpy(arrow[index]["ids"].astype(np.int64))

        assert torch.equal(read_npy(rows - 1), read_arrow(rows - 1))
        rates: dict[str, list[float]] = {"npy": [], "arrow": []}
        for _ in range(ROUNDS):
            order = generator.integers(0, rows, READS).tolist()
            for name, read in (("npy", read_npy), ("arrow", read_arrow)):
                start = time.perf_counter()
                for index in order:
                    read(index)
                rates[name].append(READS / (time.perf_counter() - start))
        npy, arrow_rate = statistics.median(rates["npy"]), statistics.median(rates["arrow"])
        size_npy = sum(p.stat().st_size for p in folder.glob("*.npy"))
        size_arrow = sum(p.stat().st_size for p in (folder / "arrow").rglob("*") if p.is_file())
        print(f"{tokens:,} tokens, windows of {window}, medians of {ROUNDS} x {READS} random reads")
        print(f"npy    {npy:12,.0f} windows/s  {size_npy:12,} bytes")
        print(f"arrow  {arrow_rate:12,.0f} windows/s  {size_arrow:12,} bytes")
        print(f"ratio npy / arrow: {npy / arrow_rate:.1f}")


if __name__ == "__main__":
    main()
