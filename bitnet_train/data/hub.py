"""Data sets of the Hugging Face hub, and local ones in the same formats, read with ``datasets``."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bitnet_train.data.config import HubCorpus
from bitnet_train.data.document import Document, held_out, stamp
from bitnet_train.data.units import Unit
from bitnet_train.errors import ConfigError

# Rows that are decoded at a time.
ROWS = 1000
# The reader of ``datasets`` for a file, by its name's ending (before .gz, .zst, ...).
READERS = {"parquet": "parquet", "json": "json", "jsonl": "json", "csv": "csv", "arrow": "arrow", "txt": "text"}
# What save_to_disk leaves in a folder: of several splits, of one.
SAVED = ("dataset_dict.json", "state.json")


class HubSource:
    """The rows of one split, in the data set's order; nothing is asked of the hub before the first of them."""

    def __init__(self, cfg: HubCorpus) -> None:
        if not cfg.path:
            raise ConfigError("data.corpus.path is not set: give a hub repository such as NAME/DATASET, or a folder.")
        self.cfg = cfg
        place = Path(cfg.path).expanduser()
        self.local = place if place.exists() else None
        if self.local is None and (cfg.path.startswith(("/", ".", "~")) or cfg.path.count("/") > 1):
            raise ConfigError(f"data.corpus.path={cfg.path} does not exist.")
        self.saved = self.local is not None and any((self.local / name).is_file() for name in SAVED)
        for field, wrong in (
            ("revision", self.local is not None),
            ("subset", self.saved or place.is_file()),
            ("data_files", self.saved or place.is_file()),
        ):
            if wrong and getattr(cfg, field) is not None:
                what = "what save_to_disk wrote" if self.saved else "a local file" if place.is_file() else "local"
                raise ConfigError(f"data.corpus.{field} has no meaning here: {cfg.path} is {what}.")
        self._builder: Any = None

    def documents(self) -> Iterator[Document]:
        cfg = self.cfg
        for index, text in enumerate(self._texts(cfg.split, cfg.max_documents)):
            yield Document(text, cfg.validation_split is None and held_out(index, cfg.validation_every))
        if cfg.validation_split is not None:
            for text in self._texts(cfg.validation_split, None):
                yield Document(text, True)

    def units(self, limit: int) -> list[Unit]:
        """Rows of about ``limit`` bytes; of what is streamed its files, or everything with a ``max_documents``
        (:mod:`bitnet_train.data.units`).
        """
        cfg = self.cfg
        found = self._units_of(cfg.split, False, limit, cfg.max_documents)
        return found if cfg.validation_split is None else found + self._units_of(cfg.validation_split, True, limit)

    def _units_of(self, split: str, validation: bool, limit: int, most: int | None = None) -> list[Unit]:
        every = self.cfg.validation_every if self.cfg.validation_split is None else None
        with _in_one_sentence(self.cfg):
            rows = self._split(split)
            if not hasattr(rows, "data"):  # streamed
                shards = 1 if most is not None else rows.num_shards
                parts: list[tuple[int, int | None]] = (
                    [(i, shards) for i in range(shards)] if shards > 1 else [(0, None)]
                )
            else:
                count = len(rows) if most is None else min(most, len(rows))
                step = max(1, limit * len(rows) // max(1, rows.data.nbytes))
                parts = [(start, min(count, start + step)) for start in range(0, count, step)]

        def documents(part: tuple[int, int | None]) -> Iterator[Document]:
            return (Document(text, validation) for text in self._texts(split, most, part))

        return [Unit(f"{split}[{part[0]}:{part[1]}]", partial(documents, part), every) for part in parts]

    def identity(self) -> dict[str, str]:
        """Local files' stamps, or the commit of the hub repository, for which it is asked."""
        if self.local is not None:
            root = self.local
            inside = (p for p in root.rglob("*") if p.is_file())
            seen = (p for p in inside if not any(part.startswith(".") for part in p.relative_to(root).parts))
            return {"files": stamp([root] if root.is_file() else sorted(seen))}
        with _in_one_sentence(self.cfg):
            return {"commit": str(self._open().hash)}

    def identity_since(self, recorded: dict[str, str]) -> dict[str, str]:
        """What it is compared with shards that were made earlier: a hub repository is not asked again."""
        return self.identity() if self.local is not None else {"commit": recorded.get("commit", "")}

    def _texts(self, split: str, limit: int | None, part: tuple[int, int | None] = (0, None)) -> Iterator[str]:
        """Texts of a split, or of a ``part``: of rows from the first number up to the second, of what is streamed the
        file of the first number among as many as the second.
        """
        field = self.cfg.text_field
        with _in_one_sentence(self.cfg):
            rows = self._split(split)
            columns = rows.column_names
            if columns is not None and field not in columns:
                raise ConfigError(
                    f"data.corpus.text_field={field} is no column of {self.cfg.path}, which has {', '.join(columns)}."
                )
            if limit is not None:
                rows = rows.take(limit)
            number = 0
            if part[1] is not None and hasattr(rows, "data"):
                rows, number = rows.select(range(part[0], part[1])), part[0]
            elif part[1] is not None:
                rows = rows.shard(part[1], part[0])
            for batch in rows.select_columns([field]).iter(batch_size=ROWS):
                for text in batch[field]:
                    number += 1
                    if text is None or text == "":
                        continue
                    if not isinstance(text, str):
                        raise ConfigError(
                            f"{self.cfg.path}, {split}, row {number}: column '{field}' holds {type(text).__name__}, no "
                            "text (data.corpus.text_field)."
                        )
                    yield text

    def _split(self, split: str) -> Any:
        import datasets

        if self.saved:
            found = datasets.load_from_disk(str(self.local))
            named = found if isinstance(found, dict) else {str(found.split or "train"): found}
            if split not in named:
                raise ConfigError(f"{self.cfg.path} has no split '{split}', only {', '.join(named)}.")
            return named[split]
        builder = self._open()
        if self.cfg.streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)

    def _open(self) -> Any:
        """The data set's builder, of one commit for all that is read."""
        if self._builder is None:
            import datasets

            datasets.disable_progress_bars()
            cfg = self.cfg
            if self.local is not None and self.local.is_file():
                endings = [ending for ending in self.local.name.split(".")[1:] if ending in READERS]
                if not endings:
                    raise ConfigError(
                        f"data.corpus.path={cfg.path} is no {', '.join(sorted(READERS))} file: data/corpus=files reads "
                        "any text."
                    )
                path, files = READERS[endings[-1]], [str(self.local)]
            else:
                path, files = str(self.local or cfg.path), cfg.data_files  # type: ignore[assignment]
            self._builder = datasets.load_dataset_builder(path, cfg.subset, data_files=files, revision=cfg.revision)
        return self._builder


@contextmanager
def _in_one_sentence(cfg: HubCorpus) -> Iterator[None]:
    """What ``datasets`` raises (it has no base class for it) becomes a ConfigError with the reason's first line."""
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        here = Path(cfg.path).expanduser().exists()
        hint = "" if here else " (prepared shards need no hub; a private or gated data set needs `hf auth login`)"
        raise ConfigError(f"data.corpus.path={cfg.path} cannot be read: {reason.rstrip('.')}{hint}.") from None
