"""Tables as Parquet files: written sealed, and looked through before anything in them is unpacked."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from lightning_acc.record import seal
from lightning_acc.record.store import Store

FREE, LARGEST_RATIO, LARGEST = 2**26, 2000, 2**34
"""A table may unpack to ``FREE`` bytes and so many times the size of its file, and no more than the last: Parquet packs a
million equal numbers into a few bytes."""
_KEY = seal.KEY.encode()


def read(data: bytes, rows: int | None = None) -> pa.Table:
    """The table in a Parquet file, of so many rows where that is known.

    Not by ``read_table``, which leaves threads at work behind: a process that ends soon after is often aborted by them
    (apache/arrow#34314, #39862).

    Raises:
        ValueError: it is no Parquet file, has another number of rows, or unpacks to much more than a table needs.
    """
    try:
        file = pyarrow.parquet.ParquetFile(pa.BufferReader(data))
        if rows is not None and file.metadata.num_rows != rows:
            raise ValueError(f"it has {file.metadata.num_rows} rows and not {rows}")
        _refuse_bombs(data, file.metadata)
        table = file.read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, KeyError, TypeError, RecursionError) as error:  # not all of Arrow's are of its own
        raise ValueError(f"no table: {' '.join(str(error).split())}") from error
    return table


def _refuse_bombs(data: bytes, metadata: pyarrow.parquet.FileMetaData) -> None:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    sizes = [(column.num_values, column.total_uncompressed_size, column.total_compressed_size) for column in columns]
    if any(min(size) < 0 for size in sizes) or sum(group.num_rows for group in groups) != metadata.num_rows:
        raise ValueError("its numbers of rows contradict each other")
    allowed = min(LARGEST, FREE + LARGEST_RATIO * len(data))
    unpacked = sum(max(8 * count, size) for count, size, _ in sizes)
    if unpacked <= allowed:
        # Words are in a dictionary and may be used any number of times.
        words = [column.path_in_schema for column in columns if column.physical_type == "BYTE_ARRAY"]
        most = sum(
            count * size for column, (count, size, _) in zip(columns, sizes, strict=True) if column.path_in_schema in words
        )
        unpacked += _length_of_words(data, words) if most > allowed else most
    if unpacked > allowed:
        raise ValueError(f"its {len(data):,} bytes unpack to {unpacked:,}")


def _length_of_words(data: bytes, paths: list[str]) -> int:
    """Bytes of the words in these columns, each counted as often as it is used."""
    file = pyarrow.parquet.ParquetFile(pa.BufferReader(data), read_dictionary=list(dict.fromkeys(paths)))
    total = 0
    for column in file.read(columns=paths, use_threads=False).columns:
        for part in column.chunks:
            while pa.types.is_list(part.type) or pa.types.is_large_list(part.type):
                part = part.flatten()
            if pa.types.is_dictionary(part.type):
                total += pc.sum(pc.binary_length(part.dictionary).take(part.indices)).as_py() or 0
    return total


def sealed(table: pa.Table, name: str) -> bytes:
    """The table as it is stored under ``name``."""
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: seal.BLANK})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return seal.sealed(buffer.getvalue(), name)


def opened(store: Store, name: str, remedy: str) -> pa.Table:
    """The table that was stored, sealed, as ``name``.

    Raises:
        DamagedResult: the file holds something else; ends with ``remedy``.
    """
    data = seal.opened(store.read(name), store, name, remedy)
    try:
        table = read(data)
    except ValueError as error:
        raise seal.damaged(store, name, remedy) from error
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != _KEY}
    return table.replace_schema_metadata(metadata)
