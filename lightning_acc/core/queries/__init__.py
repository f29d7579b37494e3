"""Questions: what is read of the parameters (``query``), when (``moments``), and where it is stored (``stored``)."""

from lightning_acc.core.queries.query import Query
from lightning_acc.core.queries.stored import add, find, record_as

__all__ = ["Query", "add", "find", "record_as"]
