"""Parquet files, read a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitnet_train.errors import ConfigError

# Rows in memory at a time; a reader holds one row group's column beside them.
ROWS = 1024


def read_rows(
    path: Path, columns: list[str], groups: tuple[int, int | None] = (0, None)
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a parquet file in its order, each with its number from 1 on, only ``columns`` of them; of row groups
    ``groups`` from the first up to the second. Raises ConfigError for a damaged file or a lacking column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            lacking = next((column for column in columns if column not in file.schema_arrow.names), None)
            if lacking is not None:
                raise ConfigError(f"{path} has no column '{lacking}', only {', '.join(file.schema_arrow.names)}")
            chosen = range(file.num_row_groups)[slice(*groups)]
            number = sum(file.metadata.row_group(group).num_rows for group in range(groups[0]))
            for batch in file.iter_batches(batch_size=ROWS, columns=columns, row_groups=list(chosen)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {str(error).splitlines()[0].rstrip('.')}.") from None


def row_group_bytes(path: Path) -> list[int]:
    """Bytes of each row group before compression. Raises ConfigError for a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {str(error).splitlines()[0].rstrip('.')}.") from None
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def read_texts(path: Path, column: str, groups: tuple[int, int | None] = (0, None)) -> Iterator[str]:
    """The texts in one column of a parquet file; rows without text are left out. Raises ConfigError as above, and for a
    column that holds something else.
    """
    key = "(data.corpus.text_field)"
    try:
        for number, row in read_rows(path, [column], groups):
            text = row[column]
            if text is None or text == "":
                continue
            if not isinstance(text, str):
                raise ConfigError(f"{path} row {number}: column '{column}' holds {type(text).__name__}, no text {key}.")
            yield text
    except ConfigError as error:
        raise ConfigError(f"{error} {key}." if "has no column" in str(error) else str(error)) from None
