"""``manifest.json``: what a run directory holds, with the size and hash of every file, and a hash over all of it.

Opening a run trusts nothing: the schema, the status, the hash of the manifest, every value in it and the size of each file
are checked when the run is opened, and the hash of a file and what it holds when it is read. No name in it leads outside
the directory, and no credentials get into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from torch import Tensor

from lightning_acc.credentials import without_credentials
from lightning_acc.errors import RunError
from lightning_acc.record import seal, tables
from lightning_acc.record.schema import files, keys
from lightning_acc.record.store import Store, digest

NAME = "manifest.json"
SHARED = keys.SHARED
REMEDY = "Restore it, or record the run again."
FORMAT = "lightning_acc run"
SCHEMA = 1
CONVENTION = "fixed-denominator"
"""A removed sample's loss weight becomes 0 and no other weight changes (the papers' convention; see the README)."""

_OF_A_RUN = re.compile(
    r"(manifest\.json|lock|module\.safetensors|evaluation\.json|(cleaning|over_time)\.parquet"
    r"|(ranks/\d+/)?(manifest\.json|(steps|parameters|samples)/\d{6,}(-\d+)?\.safetensors)"
    r"|samples/info\.parquet|averages/[^/]+\.safetensors|queries/[^/]+\.(safetensors|json|info\.parquet)|(scores|shards)/[^/]+\.(parquet|json)"
    r"|(matrices|bank)/[^/]+\.(safetensors|parquet|json)|report/index\.html)(\.[0-9a-f-]+\.(part|old))?"
)
"""Names of all that lightning_acc itself writes into a run directory."""
_FOLDERS = ("ranks", "steps", "parameters", "samples", "averages", "queries", "scores", "shards", "matrices", "bank", "report")
REFUSED = "refused"
"""Status of a record that turned out to be another training's than the one that was seen."""
NOT_OF_THE_HEADER = ("status", "n_steps", "files", "stopped", "reason", "hash", "format", "schema", "convention")
"""What is only known at the end, or the same in all manifests."""

FROM_OUTSIDE = ("module", "data", "logger", "checkpoints")
"""What holds the user's own words, among which there may be credentials."""

NAMED_CHECKPOINTS = ("best", "last")
"""What the list of checkpoints has beside their paths."""

_FILE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PART = re.compile(r"/ranks/\d+$")
"""Where one process of several keeps its part, whose manifest has no header."""
_PATH_LIKE = re.compile(r"[\x00-\x1f\x7f]|^[/\\]|(^|[/\\])\.\.([/\\]|$)")

Manifest = dict[str, Any]


def content_hash(manifest: Manifest) -> str:
    """Hash over everything in the manifest but the hash itself."""
    body = {key: value for key, value in manifest.items() if key != "hash"}
    return digest(json.dumps(body, sort_keys=True).encode())


def write(store: Store, manifest: Manifest) -> Manifest:
    """Seal the manifest with its hash and write it."""
    clean = {key: without_credentials(manifest[key]) for key in FROM_OUTSIDE if key in manifest}
    manifest = {**manifest, **clean, "format": FORMAT, "schema": SCHEMA, "convention": CONVENTION}
    manifest["hash"] = content_hash(manifest)
    store.write(NAME, json.dumps(manifest, indent=1).encode())
    return manifest


def identify(store: Store) -> Manifest:
    """The manifest of whatever run is or was recorded in a directory, its files unseen.

    Raises:
        RunError: there is none, or it is damaged, or written by a newer version; names the file and the remedy.
    """
    where = store.locate(NAME)
    if not store.exists():
        raise RunError(f"There is no run directory at {store}: check the path, or record a run with TrajectoryRecorder.")
    if not store.exists(NAME):
        raise RunError(
            f"{store} is not a run directory: it has no {NAME}. Name the directory that was given to TrajectoryRecorder."
        )
    try:
        manifest = seal.parsed(store.read(NAME))
        known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except ValueError:
        known = False
    if not known:
        raise RunError(f"{where} is damaged: it is not the manifest of a run. {REMEDY}")
    if type(manifest.get("schema")) is not int:
        raise RunError(f"{where} is damaged: it has no schema. {REMEDY}")
    if manifest["schema"] > SCHEMA:
        raise RunError(
            f"{where} has schema {manifest['schema']}, but this version reads up to {SCHEMA}: upgrade lightning_acc."
        )
    if manifest.get("hash") != content_hash(manifest):
        raise RunError(f"{where} is damaged: its content does not match its hash. {REMEDY}")
    return dict(manifest)


def read(store: Store, unfinished: bool = False) -> Manifest:
    """Read and check the manifest of a finished run; with ``unfinished`` also that of a run that was not finished.

    Raises:
        RunError: there is no run, it is unfinished, damaged, or written by a newer version; names the file and the remedy.
    """
    manifest, where = identify(store), store.locate(NAME)
    if manifest.get("status") == REFUSED:
        raise RunError(f"{store} is no run: its recording was refused. {manifest.get('reason')}")
    _refuse_names_outside(where, manifest)
    fault = keys.fault_of(manifest, part=_PART.search(store.path) is not None)
    if fault:
        raise RunError(f"{where} is no manifest of a run: {fault}. {REMEDY}")
    if manifest["status"] != "complete" and not unfinished:
        raise RunError(
            f"{store} is half written: the training that recorded it has not finished, or was killed. Wait for it, resume it "
            "from a checkpoint (trainer.fit(..., ckpt_path=...)), take the whole steps that are there "
            "(la.Run(path, partial=True), or lightning-acc repair), or delete the directory and record the run again."
        )
    sizes = store.sizes(manifest["files"])
    for name, file in manifest["files"].items():
        size = sizes[name]
        if size != file["bytes"]:
            state = "is missing" if size < 0 else f"is truncated: {size:,} bytes instead of {file['bytes']:,}"
            raise RunError(f"{store.locate(name)} {state}. {REMEDY}")
    return manifest


def checkpoints_within(steps: Mapping[str, int], n_steps: int) -> dict[str, int]:
    """Of the checkpoints of a manifest those of its first ``n_steps``, with the ``best``, and the ``last`` written."""
    kept = {name: step for name, step in steps.items() if step <= n_steps and name != "last"}
    paths = [step for name, step in kept.items() if name not in NAMED_CHECKPOINTS]
    best = {"best": kept.pop("best")} if "best" in kept else {}
    return {**best, "last": paths[-1], **kept} if paths else {}


def own_files(store: Store) -> tuple[list[str], list[str]]:
    """The files in a directory that lightning_acc writes there, by their names, and all others."""
    names = store.walk(_FOLDERS)
    own = [name for name in names if _OF_A_RUN.fullmatch(name)]
    return own, sorted(set(names) - set(own))


def remove_run(store: Store) -> None:
    """Delete a run and what was computed of it, and nothing else; the lock stays."""
    own, _ = own_files(store)
    store.remove(*(name for name in own if name != "lock"))
    store.remove_empty_folders()


def _refuse_names_outside(where: str, manifest: Manifest) -> None:
    files = manifest.get("files")
    for name in files if isinstance(files, dict) else ():
        if not _FILE.fullmatch(name):
            raise RunError(
                f"{where} names the file {name!r}, which is not one of a run directory or lies outside of it, and is refused: "
                "get the run anew from whoever recorded it."
            )


def check_columns(where: str, columns: Iterable[str]) -> None:
    """Refuse column names that could be taken for paths, as they become parts of names elsewhere.

    Raises:
        RunError: one leads outside a directory or holds control characters.
    """
    for name in columns:
        if _PATH_LIKE.search(name):
            raise RunError(f"{where} has a column {name!r}, which is a path: rename it in describe_samples, and record again.")


def fault(store: Store, name: str, words: str) -> RunError:
    """What is wrong with a file of a run."""
    return RunError(f"{store.locate(name)} is none of a run: {words}. {REMEDY}")


def load(store: Store, manifest: Manifest, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file the manifest names, and its metadata, once they are what they should be.

    Raises:
        RunError: they are not.
    """
    facts = manifest["files"][name]
    try:
        tensors, metadata = files.unpacked(read_file(store, name, facts["sha256"], facts["bytes"]))
    except ValueError as error:
        raise fault(store, name, str(error)) from error
    wrong = files.fault_of(name, tensors, metadata, manifest)
    if wrong:
        raise fault(store, name, wrong)
    return tensors, metadata


def description(store: Store, manifest: Manifest, name: str, rows: int | None) -> pa.Table | None:
    """The table of what is described, of so many ``rows``, in a file of the record; None where there is no such file.

    Raises:
        RunError: it is none.
    """
    facts = manifest["files"].get(name)
    if facts is None:
        return None
    try:
        table = tables.read(read_file(store, name, facts["sha256"], facts["bytes"]), rows)
    except ValueError as error:
        raise fault(store, name, str(error)) from error
    check_columns(store.locate(name), table.column_names)
    return table


def read_file(store: Store, name: str, sha256: str, size: int | None = None) -> bytes:
    """Read a file the manifest names and check its hash, and before, where it can be had at once, its size.

    Raises:
        RunError: the content is not what was written.
    """
    data = store.read(name, size)
    if digest(data) != sha256:
        raise RunError(f"{store.locate(name)} is damaged: its content does not match its hash in the manifest. {REMEDY}")
    return data
