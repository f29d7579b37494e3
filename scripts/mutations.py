"""Ways to damage a run directory, each told by a number: *plainly*, or *sealed*, with every hash made right again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import safetensors.torch
import torch

import lightning_acc as la
from lightning_acc.record import manifest as manifests
from lightning_acc.record import seal
from lightning_acc.record.store import digest

KINDS = {
    "manifest": "manifest.json",
    "steps": "steps/*.safetensors",
    "parameters": "parameters/*.safetensors",
    "samples": "samples/*.safetensors",
    "info": "samples/info.parquet",
    "example info": "queries/*.info.parquet",
    "module": "module.safetensors",
    "query": "queries/val.safetensors",
    "added query": "queries/more.safetensors",
    "sidecar": "queries/more.json",
    "scores": "scores/*.parquet",
    "shards": "shards/*.parquet",
    "figures": "shards/*.json",
    "matrices": "matrices/*.safetensors",
    "cleaning": "cleaning.parquet",
    "over time": "over_time.parquet",
    "evaluation": "evaluation.json",
    "lock": "lock",
}
Files = dict[str, bytes]
Change = Callable[[Path, Path, random.Random], Any]
"""Changes a file, given another one."""


def mutate(path: Path, files: Files, seed: int) -> tuple[str, str, bool]:
    """Change the run at ``path``, which holds ``files``, in one way.

    Returns:
        The kind of file, the mutation in words, and whether the record may honestly say something else now.
    """
    chance = random.Random(seed)
    kinds = {kind: sorted(name for name in files if Path(name).match(pattern)) for kind, pattern in KINDS.items()}
    there = [kind for kind, names in kinds.items() if names]
    kind = there[seed % len(there)]
    name = chance.choice(kinds[kind])
    if kind != "lock" and chance.random() < 0.5:
        return kind, f"{name}, sealed: {_mutate_sealed(path, files, name, chance)}", True
    how = chance.choice(list(PLAIN))
    PLAIN[how](path / name, path / chance.choice([other for other in files if other != name]), chance)
    # Nothing tells of a result that is not there: it may never have been computed.
    gone = how in ("missing", "directory") and name not in json.loads(files["manifest.json"])["files"]
    return kind, f"{name}, plain: {how}", gone


# ---- bytes and names


def _flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 20))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _swap(file: Path, other: Path, chance: random.Random) -> None:
    alike = [one for one in sorted(file.parent.iterdir()) if one.suffix == file.suffix and one.is_file() and one != file]
    other = chance.choice(alike) if alike and chance.random() < 0.7 else other
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def _replaced(make: Callable[[Path], Any]) -> Change:
    def replace(file: Path, other: Path, chance: random.Random) -> None:
        file.unlink()
        make(file)

    return replace


def _written(change: Callable[[bytes, random.Random], bytes]) -> Change:
    return lambda file, other, chance: file.write_bytes(change(file.read_bytes(), chance))


RAW: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncate": lambda content, chance: content[: chance.randrange(len(content))],
    "flip": _flipped,
    "empty": lambda content, chance: b"",
    "grow": lambda content, chance: content + chance.randbytes(chance.choice((1, 100))),
    "random": lambda content, chance: chance.randbytes(chance.choice((len(content), 8, 1000))),
}
PLAIN: dict[str, Change] = {
    **{how: _written(change) for how, change in RAW.items()},
    "flip again": _written(_flipped),
    "swap": _swap,
    "missing": _replaced(lambda file: None),
    "directory": _replaced(Path.mkdir),
    "pipe": _replaced(os.mkfifo),
    "device": _replaced(lambda file: file.symlink_to("/dev/zero")),
    "loop": _replaced(lambda file: file.symlink_to(file)),
    "json": _written(lambda content, chance: json.dumps(_odd(chance)).encode()),
}


# ---- JSON


def _odd(chance: random.Random) -> Any:
    """A value where another one is expected."""
    return chance.choice(
        [
            *(0, 1, -1, 10**12, -(10**12), 2**63, 10**400, 0.5, float("nan"), float("inf"), True, False, None),
            *("", "x", "../x", "\u0000", "\ud800", "9" * 5000, [], {}, [0], {"leaf": "0"}, [[[[]]]], {"x": {"x": 0}}),
        ]
    )


def _places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Iterable[tuple[Any, Any]] = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*place, key)
        if isinstance(value, (dict, list)):
            yield from _places(value, (*place, key))


def _changed_json(content: Any, chance: random.Random, spared: tuple[str, ...] = ()) -> tuple[Any, str]:
    """JSON with one value retyped, resized, dropped, doubled or put deep inside others."""
    content = json.loads(json.dumps(content))
    *inner, key = chance.choice([place for place in _places(content) if place[0] not in spared])
    holder = content
    for step in inner:
        holder = holder[step]
    how = chance.choice(("odd", "odd", "odd", "resize", "drop", "double", "deep", "shuffle"))
    value = holder[key]
    if how == "drop":
        del holder[key]
    elif how == "double" and isinstance(holder, list):
        holder.insert(key, value)
    elif how == "deep":
        holder[key] = "DEEP"
    elif how == "shuffle" and isinstance(value, list):
        chance.shuffle(value)
    elif how == "resize" and isinstance(value, (int, float)):
        holder[key] = chance.choice((value + 1, value - 1, -value, value * 10**12, value * 0.5))
    elif how == "resize" and isinstance(value, (list, str)):
        holder[key] = chance.choice((value * 2, value[:-1], value * 1000))
    else:
        how = "odd"
        holder[key] = _odd(chance)
    return content, f"{how} {'.'.join(map(str, (*inner, key)))[:60]}"


def _json_bytes(content: Any) -> bytes:
    return json.dumps(content).replace('"DEEP"', "[" * 100_000 + "]" * 100_000).encode()


# ---- tensors


def _changed_tensors(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A safetensors file with one tensor of another type, size or content, or with other metadata, or another header."""
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(content).items()}
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.get("__metadata__")
    if metadata and chance.random() < 0.3:
        key = chance.choice(list(metadata))
        value, how = _changed_json({"it": json.loads(metadata[key])}, chance)
        return safetensors.torch.save(tensors, {**metadata, key: _json_bytes(value.get("it", {})).decode()}), f"metadata {how}"
    name = chance.choice(sorted(tensors))
    how = chance.choice([*TENSORS, "drop", "rename", "add", "header"])
    if how == "drop":
        del tensors[name]
    elif how == "rename":
        tensors[chance.choice(("x", "#", "9:0", "0:9"))] = tensors.pop(name)
    elif how == "add":
        tensors[chance.choice(("x", "9:0", "rng", "rng_batches"))] = tensors[name].clone()
    elif how == "header":
        changed, how = _changed_json(header, chance)
        words = _json_bytes(changed)
        return len(words).to_bytes(8, "little") + words + content[start:], f"header {how}"
    else:
        tensors[name] = TENSORS[how](tensors[name], chance).contiguous()
    return safetensors.torch.save(tensors, metadata), f"{how} {name}"


def _one_set(value: float) -> Callable[[torch.Tensor, random.Random], torch.Tensor]:
    def one_set(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
        changed = tensor.clone()
        if changed.numel():
            number = torch.tensor(value if changed.is_floating_point() or value == value else 0.0, dtype=torch.float64)
            changed.view(-1)[chance.randrange(changed.numel())] = number.to(changed.dtype)
        return changed

    return one_set


def _shuffled(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return tensor[chance.sample(range(len(tensor)), len(tensor))] if tensor.ndim else tensor + 1


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
TENSORS: dict[str, Callable[[torch.Tensor, random.Random], torch.Tensor]] = {
    "dtype": lambda tensor, chance: tensor.to(chance.choice(DTYPES)),
    "longer": lambda tensor, chance: torch.cat([tensor, tensor[-1:]]) if tensor.ndim else tensor[None],
    "shorter": lambda tensor, chance: tensor[:-1] if tensor.ndim else tensor[None],
    "none": lambda tensor, chance: tensor[:0] if tensor.ndim else tensor[None],
    "flat": lambda tensor, chance: tensor.reshape(-1),
    "deeper": lambda tensor, chance: tensor[..., None],
    "huge": _one_set(2.0**62),
    "negative": _one_set(-1.0),
    "more": _one_set(3.0),
    "nan": _one_set(float("nan")),
    "shuffled": _shuffled,
}


# ---- tables


def _changed_table(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A Parquet file with a column of another type, other rows, other metadata, or a bomb."""
    table = pyarrow.parquet.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    metadata = dict(table.schema.metadata or {})
    how = chance.choice([*TABLES, *["metadata"] * 4])
    if how == "metadata":
        key = chance.choice([key for key in metadata if key != b"seal"] or [b"x"])
        if key == b"verdict" and chance.random() < 0.7:
            metadata[key] = _json_bytes(_changed_json(json.loads(metadata[key]), chance)[0])
        else:
            metadata[key] = chance.choice((b"", b"x", b"nan", b"-1", b"1e400", b"\xff", b"None", b"true", b"loo", b"[" * 10**5))
        if chance.random() < 0.3:
            del metadata[key]
        how = f"metadata {key!r}"
    else:
        name = chance.choice(table.column_names)
        table, how = TABLES[how](table, name, chance), f"{how} {name}"
    buffer = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), buffer, store_schema=chance.random() < 0.7)
    return buffer.getvalue().to_pybytes(), how


def _with(make: Callable[[pa.ChunkedArray, int], Any]) -> Callable[[pa.Table, str, random.Random], pa.Table]:
    """The table with a column made of another one, given also how long that is."""
    return lambda table, name, chance: table.set_column(table.column_names.index(name), name, make(table[name], len(table)))


def _repeated(word: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([word]))


TABLES: dict[str, Callable[[pa.Table, str, random.Random], pa.Table]] = {
    "drop": lambda table, name, chance: table.drop_columns([name]),
    "rename": lambda table, name, chance: table.rename_columns(
        [f"{one}2" if one == name else one for one in table.column_names]
    ),
    "text": _with(lambda column, n: pa.array([str(value)[:50] for value in column.to_pylist()], pa.string())),
    "number": _with(lambda column, n: pa.array(range(n), pa.int64())),
    "float": _with(lambda column, n: pa.array(range(n), pa.float32())),
    "lists": _with(lambda column, n: pa.array([[value] for value in range(n)], pa.list_(pa.int64()))),
    "nulls": _with(lambda column, n: pa.nulls(n, column.type)),
    "null": _with(lambda column, n: pa.array([None, *column.to_pylist()[1:]][:n], column.type)),
    "words": _with(lambda column, n: _repeated("x" * 2**20, n)),
    "twice": lambda table, name, chance: table.append_column(name, table[name]),
    "new": lambda table, name, chance: table.append_column("new", _repeated("x" * 2**20, len(table))),
    "longer": lambda table, name, chance: pa.concat_tables([table, table.slice(0, 1)]),
    "shorter": lambda table, name, chance: table.slice(0, max(0, len(table) - 1)),
    "none": lambda table, name, chance: table.slice(0, 0),
    "shuffled": lambda table, name, chance: table.take(chance.sample(range(len(table)), len(table))),
    "many": lambda table, name, chance: pa.concat_tables([table.slice(0, 1)] * 2000),
    "bomb": lambda table, name, chance: pa.table({"x": _repeated("x" * 10**6, 10**5)}),
}


# ---- all hashes made right again


def _mutate_sealed(path: Path, files: Files, name: str, chance: random.Random) -> str:
    content = files[name]
    manifest = json.loads(files["manifest.json"])
    if name == "manifest.json":
        changed, how = _changed_json(manifest, chance, spared=("hash",))
        _write_manifest(path, changed)
        return how
    others = [other for other in files if Path(other).suffix == Path(name).suffix and other != name]
    if chance.random() < 0.25:
        how = chance.choice([*RAW, "flip", "swap"])
        content = files[chance.choice(others)] if how == "swap" and others else RAW.get(how, _flipped)(content, chance)
    elif name.endswith(".json"):
        changed, how = _changed_json(json.loads(content), chance, spared=("seal",))
        content = _json_bytes(changed)
    else:
        content, how = (_changed_table if name.endswith(".parquet") else _changed_tensors)(content, chance)
    if name in manifest["files"]:
        manifest["files"][name].update(bytes=len(content), sha256=digest(content))
        _write_manifest(path, manifest)
    elif name == "queries/more.safetensors":
        sidecar = {**json.loads(files["queries/more.json"]), "sha256": digest(content)}
        del sidecar["seal"]
        (path / "queries/more.json").write_bytes(seal.to_json(sidecar, "queries/more.json"))
    else:
        blank = re.sub(rb"lightning_acc:sha256:[0-9a-f]{64}", seal.BLANK.encode(), content)
        with contextlib.suppress(la.RunError):  # where there is no place for a seal any more
            content = seal.sealed(blank, name)
    (path / name).write_bytes(content)
    return how


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with contextlib.suppress(RecursionError, ValueError):  # what cannot be hashed is sealed by nobody
        manifest["hash"] = manifests.content_hash(json.loads(_json_bytes(manifest)))
    (path / "manifest.json").write_bytes(_json_bytes(manifest))
