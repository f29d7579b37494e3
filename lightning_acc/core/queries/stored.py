"""Queries as files of a run: those recorded with it, and those added since."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_acc.arguments import shown
from lightning_acc.core.queries.query import Query
from lightning_acc.errors import RequestError, RunError
from lightning_acc.record import manifest, seal
from lightning_acc.record.batches import TakenApart
from lightning_acc.record.record import Record
from lightning_acc.record.schema import files
from lightning_acc.record.store import digest
from lightning_acc.record.writer import RunWriter

ADD_AGAIN = "store it again with run.add_query"


def add(record: Record, name: str, data: Iterable[Any]) -> Query:
    """Store the batches of ``data`` beside a finished run as the query ``name``, and return it.

    Raises:
        RequestError: the name or the data cannot be used, or the name is that of a query recorded with the run.
    """
    if isinstance(name, str) and _file(name) in record.manifest["files"]:
        raise RequestError(f"The query {name!r} was recorded with the run and stays as it is: choose another name.")
    query = Query(name, data, like=record.structure())
    encoded = query.encoded()
    record.store.write(_file(name), encoded)
    about = {"run_id": record.manifest["run_id"], "sha256": digest(encoded), "n_examples": query.n_examples}
    record.store.write(_sidecar(name), seal.to_json(about, _sidecar(name)))
    return query


def record_as(writer: RunWriter, name: str, data: Iterable[Any]) -> None:
    """Record the batches of ``data`` with the run in the making as the query ``name``."""
    query = Query(name, data, like=writer.header["batch_structure"])
    writer.write_file(_file(name), query.encoded(), n_examples=query.n_examples)


def find(record: Record, query: str | Query) -> Query:
    """The query itself, or the one stored with the run under that name.

    Raises:
        RequestError: there is none.
        RunError: its file is damaged, or of another run.
    """
    if isinstance(query, Query):
        return query
    name, known = query, record.query_names()
    if not isinstance(name, str) or name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none, as training had no validation data"
        raise RequestError(
            f"This run has no query {shown(name)}: {has}. Add one with run.add_query(name, loader), or pass a Query."
        )
    file = record.manifest["files"].get(_file(name))
    if file is None:
        data, remedy = _read_added(record, name), f"{ADD_AGAIN.capitalize()}."
    else:
        data, remedy = manifest.read_file(record.store, _file(name), file["sha256"], file["bytes"]), manifest.REMEDY
    try:
        recorded = files.query_batches(*files.unpacked(data))
    except ValueError as error:
        raise RunError(f"{record.store.locate(_file(name))} is no query: {error}. {remedy}") from error
    return Query(name, (TakenApart(leaves, structure) for structure, leaves in recorded))


def _file(name: str) -> str:
    return f"queries/{name}.safetensors"


def _sidecar(name: str) -> str:
    """What tells of an added query which run it belongs to, and its hash."""
    return f"queries/{name}.json"


def _read_added(record: Record, name: str) -> bytes:
    store, where = record.store, record.store.locate(_file(name))
    about = seal.from_json(store, _sidecar(name), ADD_AGAIN)
    data = store.read(_file(name))
    if about.get("sha256") != digest(data):
        raise RunError(f"{where} is damaged: its content does not match its hash. {ADD_AGAIN.capitalize()}.")
    if about.get("run_id") != record.manifest["run_id"]:
        raise RunError(f"{where} belongs to another run, {about.get('run_id')}. {ADD_AGAIN.capitalize()}.")
    return data
