"""Parquet files, read a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitnet_train.errors import ConfigError

# Rows in memory at a time; a reader holds one row group's column beside them.
ROWS = 1024


def read_rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, only ``columns`` of them. Raises ConfigError for a damaged file or a lacking column.

    A numbered row is the caller's: rows come in the file's order.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            lacking = next((column for column in columns if column not in file.schema_arrow.names), None)
            if lacking is not None:
                raise ConfigError(f"{path} has no column '{lacking}', only {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=ROWS, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {str(error).splitlines()[0].rstrip('.')}.") from None


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts in one column of a parquet file; rows without text are left out. Raises ConfigError as above, and for a
    column that holds something else.
    """
    key = "(data.corpus.text_field)"
    try:
        for number, row in enumerate(read_rows(path, [column]), start=1):
            text = row[column]
            if text is None or text == "":
                continue
            if not isinstance(text, str):
                raise ConfigError(f"{path} row {number}: column '{column}' holds {type(text).__name__}, no text {key}.")
            yield text
    except ConfigError as error:
        raise ConfigError(f"{error} {key}." if "has no column" in str(error) else str(error)) from None
