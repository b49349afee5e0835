"""Windows over the tokens: each token but the first predicted exactly once."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from bitnet_train.data.config import DataConfig
from bitnet_train.data.prepare import prepare, shard_folder
from bitnet_train.data.shards import TokenArray
from bitnet_train.data.windows import Windows, document_numbers


@pytest.fixture
def tokens(data_config: Callable[..., DataConfig], tmp_path: Path) -> TokenArray:
    cfg = data_config(shard_tokens=97)
    return TokenArray(shard_folder(cfg, tmp_path), prepare(cfg, tmp_path), "train")


@pytest.mark.parametrize("length", [2, 7, 16, 100])
def test_partial_windows_predict_every_token_but_the_first_once(tokens: TokenArray, length: int) -> None:
    ids = torch.from_numpy(tokens.slice(0, len(tokens)))
    windows = Windows(tokens, length, partial=True)
    parts = [windows[i] for i in range(len(windows))]
    assert torch.equal(torch.cat([part[1:] for part in parts]), ids[1:])  # targets
    assert torch.equal(torch.cat([part[:-1] for part in parts]), ids[:-1])  # inputs
    assert all(len(part) == length + 1 for part in parts[:-1])
    assert 2 <= len(parts[-1]) <= length + 1


@pytest.mark.parametrize("length", [2, 7, 16, 100])
def test_training_windows_are_full_and_leave_less_than_one(tokens: TokenArray, length: int) -> None:
    ids = torch.from_numpy(tokens.slice(0, len(tokens)))
    windows = Windows(tokens, length)
    parts = [windows[i] for i in range(len(windows))]
    assert all(len(part) == length + 1 for part in parts)
    targets = torch.cat([part[1:] for part in parts])
    assert torch.equal(targets, ids[1 : 1 + len(targets)])
    assert 0 <= len(ids) - 1 - len(targets) < length


def test_a_limit_counts_predicted_tokens(tokens: TokenArray) -> None:
    windows = Windows(tokens, 16, partial=True, limit=40)
    assert [len(windows[i]) - 1 for i in range(len(windows))] == [16, 16, 8]
    assert len(Windows(tokens, 16, limit=40)) == 2
    assert len(Windows(tokens, 16, partial=True, limit=10**9)) == len(Windows(tokens, 16, partial=True))


def test_a_window_outside_is_an_index_error_so_iteration_ends(tokens: TokenArray) -> None:
    windows = Windows(tokens, 16)
    assert len(list(windows)) == len(windows)
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


@pytest.mark.parametrize("partial", [True, False])
def test_no_tokens_are_no_windows(tokens: TokenArray, partial: bool) -> None:
    tokens.starts = tokens.starts[:1]
    assert len(Windows(tokens, 16, partial)) == 0


def test_loader_processes_read_the_same_windows(tokens: TokenArray) -> None:
    windows = Windows(tokens, 16)
    windows[0]  # the memory maps are open
    copy = pickle.loads(pickle.dumps(windows))
    assert not copy.tokens.files._open  # open files are not shipped to the processes
    batches = list(DataLoader(windows, batch_size=8, num_workers=1))
    assert torch.equal(torch.cat(batches), torch.stack([windows[i] for i in range(len(windows))]))
    assert torch.equal(copy[3], windows[3])


def test_document_numbers_change_at_each_bos_and_only_there() -> None:
    ids = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    assert document_numbers(ids, 0).tolist() == [[0, 0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1]]
