"""Reading tables."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet


def read(data: bytes) -> pa.Table:
    """The table in a Parquet file.

    Not by ``read_table``, which leaves threads at work behind: a process that ends soon after is often aborted by them
    (apache/arrow#34314, #39862).
    """
    return pyarrow.parquet.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
