"""The files of a record: the tensors each kind holds, their types and sizes, and what must be true of their numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_acc.arguments import shown
from lightning_acc.record import batches, seal
from lightning_acc.record.batches import Leaves, Structure, leaf_names
from lightning_acc.record.samples import names
from lightning_acc.record.schema import groups
from lightning_acc.record.schema.keys import AVERAGE, DTYPES, MOST_SAMPLES, NUMBERED, SHARED, Manifest, numel
from lightning_acc.record.schema.kinds import (
    STRUCTURE,
    several,
)
from lightning_acc.record.store import Store

Shape = tuple[str, ...]
STEPS: dict[str, tuple[torch.dtype, Shape]] = {
    "offsets": (torch.int64, ("ends of steps",)),
    "sample_ids": (torch.int64, ("occurrences",)),
    "contents": (torch.int64, ("occurrences",)),
    "weights": (torch.float64, ("occurrences",)),
    "batch_offsets": (torch.int64, ("ends of steps",)),
    "batch_sizes": (torch.int64, ("batches",)),
}
RANDOM: dict[str, tuple[torch.dtype, Shape]] = {
    "rng_batches": (torch.int64, ("random batches",)),
    "rng": (torch.uint8, ("random batches", "state")),
}
RANDOM_ON_GPU: dict[str, tuple[torch.dtype, Shape]] = {
    "rng_batches_cuda": (torch.int64, ("random batches on a GPU",)),
    "rng_cuda": (torch.uint8, ("random batches on a GPU", "state on a GPU")),
}
NAMED: dict[str, tuple[torch.dtype, Shape]] = {
    "names": (torch.uint8, ("bytes of names",)),
    "name_ends": (torch.int64, ("names",)),
}


def unpacked(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file and its metadata, which is JSON.

    Raises:
        ValueError: it is none.
    """
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ArithmeticError, LookupError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"it holds no tensors ({' '.join(str(error).split())[:100]})") from error
    header = seal.parsed(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, {key: seal.parsed(value) for key, value in header.get("__metadata__", {}).items()}


def sealed_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], name: str) -> bytes:
    """Tensors and JSON beside them, as a result that is stored, sealed, under ``name``."""
    words = {key: json.dumps(value) for key, value in {**metadata, seal.KEY: seal.BLANK}.items()}
    return seal.sealed(safetensors.torch.save(dict(tensors), words), name)


def opened_tensors(store: Store, name: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``sealed_tensors`` packed.

    Raises:
        DamagedResult: the file holds something else; ends with ``remedy``.
    """
    data = seal.opened(store.read(name), store, name, remedy)
    try:
        tensors, metadata = unpacked(data)
    except ValueError as error:
        raise seal.damaged(store, name, remedy) from error
    return tensors, {key: value for key, value in metadata.items() if key != seal.KEY}


def fault_of(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], manifest: Manifest) -> str | None:
    """The first thing wrong with what a file of the record holds, in words that go on after its name; None where nothing is."""
    if name == SHARED:
        return next(_shared_faults(tensors, manifest), None)
    if AVERAGE.fullmatch(name):
        return next(_average_faults(tensors, manifest), None)
    found = NUMBERED.fullmatch(name)
    if found is None:
        return None
    facts = manifest["files"][name]
    checks = {"steps": _steps_faults, "parameters": _parameters_faults, "samples": _samples_faults}
    return next(checks[found[1]](tensors, metadata, facts, manifest), None)


def _steps_faults(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], facts: Manifest, manifest: Manifest
) -> Iterator[str]:
    random = "rng" in tensors or "rng_batches" in tensors
    yield from _shape_faults(tensors, {**STEPS, **(RANDOM if random else {})}, {"ends of steps": facts["count"] + 1})
    occurrences, batches = len(tensors["sample_ids"]), len(tensors["batch_sizes"])
    yield from _ends_faults("offsets", tensors["offsets"], occurrences)
    yield from _ends_faults("batch_offsets", tensors["batch_offsets"], batches)
    stored = sum(one["count"] for name, one in manifest["files"].items() if name.startswith("samples/") and "count" in one)
    yield from _range_faults("sample_ids", tensors["sample_ids"], manifest.get("n_samples", MOST_SAMPLES))
    yield from _range_faults("contents", tensors["contents"], stored)
    yield from _range_faults("batch_sizes", tensors["batch_sizes"], occurrences + 1)
    if not torch.isfinite(tensors["weights"]).all():
        yield "its weights are not all finite"
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), tensors["batch_sizes"].cumsum(0)])[tensors["batch_offsets"]]
    if not torch.equal(sums, tensors["offsets"]):
        yield "its batch_sizes do not add up to the occurrences of each step"
    if random:
        yield from _range_faults("rng_batches", tensors["rng_batches"], batches)
        if not all(map(_is_random_state, tensors["rng"])):
            yield "its rng holds no states of a random number generator"
    if "rng_cuda" in tensors or "rng_batches_cuda" in tensors:
        yield from _shape_faults(tensors, RANDOM_ON_GPU, {"state on a GPU": 16})  # a seed and an offset
        yield from _range_faults("rng_batches_cuda", tensors["rng_batches_cuda"], batches)
    yield from groups.faults(metadata.get("groups"), tensors["batch_offsets"].diff().tolist(), manifest)
    if "names" in facts:
        yield from _shape_faults(tensors, NAMED, {"names": facts["names"]})
        try:
            names.unpacked(tensors, metadata)
        except ValueError as error:
            yield str(error)


def _parameters_faults(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], facts: Manifest, manifest: Manifest
) -> Iterator[str]:
    shape = {"snapshots": facts["count"], "parameters": numel(manifest)}
    yield from _shape_faults(tensors, {"theta": (DTYPES[manifest["dtype"]], ("snapshots", "parameters"))}, shape)
    if not torch.isfinite(tensors["theta"]).all():
        yield "its theta is not all finite"


def _average_faults(tensors: Mapping[str, Tensor], manifest: Manifest) -> Iterator[str]:
    kinds: dict[str, tuple[torch.dtype, Shape]] = {
        "steps": (torch.int64, ("steps",)),
        "weights": (torch.float64, ("steps",)),
        "theta": (DTYPES[manifest["dtype"]], ("parameters",)),
    }
    yield from _shape_faults(tensors, kinds, {"parameters": numel(manifest)})
    steps = tensors["steps"]
    if not len(steps) or bool((steps.diff() <= 0).any()):
        yield "its steps do not increase"
    yield from _range_faults("steps", steps, manifest.get("n_steps", 10**12) + 1)
    if not (torch.isfinite(tensors["weights"]).all() and torch.isfinite(tensors["theta"]).all()):
        yield "its weights and its theta are not all finite"


def _samples_faults(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], facts: Manifest, manifest: Manifest
) -> Iterator[str]:
    yield from _shape_faults(tensors, {"#": (torch.int64, ("contents",))}, {"contents": facts["count"]})
    names = list(filter(batches.has_rows, leaf_names(manifest["batch_structure"])))
    fault = leaves_fault({name: leaf for name, leaf in tensors.items() if name != "#"}, names, facts["count"])
    if fault:
        yield fault


def _shared_faults(tensors: Mapping[str, Tensor], manifest: Manifest) -> Iterator[str]:
    names = [name for name in leaf_names(manifest["batch_structure"]) if not batches.has_rows(name)]
    if set(tensors) != set(names):
        yield f"its tensors are {shown(sorted(tensors))} and not {shown(sorted(names))}"


def query_batches(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> list[tuple[Structure, Leaves]]:
    """The batches in a file of a query, whose tensors are named ``<batch>:<leaf>``.

    Raises:
        ValueError: it is none.
    """
    structures = metadata.get("structures")
    if not several(STRUCTURE).holds(structures) or not structures:
        raise ValueError(f"its structures are {shown(structures)} and not {several(STRUCTURE).words}")
    leaves: list[Leaves] = [{} for _ in structures]
    for name, leaf in tensors.items():
        number, _, leaf_name = name.partition(":")
        if not (number.isdecimal() and len(number) < 10 and int(number) < len(leaves)):
            raise ValueError(f"its {shown(name)} is of none of its {len(leaves)} batches")
        leaves[int(number)][leaf_name] = leaf
    for i, (structure, batch) in enumerate(zip(structures, leaves, strict=True)):
        fault = leaves_fault(batch, leaf_names(structure))
        if fault:
            raise ValueError(f"of batch {i} {fault}")
    ordered = [{name: batch[name] for name in leaf_names(s)} for s, batch in zip(structures, leaves, strict=True)]
    return [(structure, batches.unpacked(batch)) for structure, batch in zip(structures, ordered, strict=True)]


def leaves_fault(leaves: Mapping[str, Tensor], names: list[str], count: int | None = None) -> str | None:
    """What is wrong with leaves, as they are stored; None where nothing is.

    Args:
        leaves: the tensors by name.
        names: what they must be called.
        count: of how many samples they must be.
    """
    if set(leaves) != set(names):
        return f"its leaves are {shown(sorted(leaves))} and not {shown(sorted(names))}"
    if any(not leaf.ndim for name, leaf in leaves.items() if batches.has_rows(name)):
        return "its leaves are of different numbers of samples"
    ragged = [name for name in names if batches.is_ragged(name)]
    for name in ragged:
        lengths, flat = leaves[name + batches.LENGTH], leaves[name]
        if lengths.dtype != torch.int64 or lengths.ndim != 1 or next(_range_faults("", lengths, len(flat) + 1), None):
            return f"its {name + batches.LENGTH} are no lengths"
        words = batches.is_words(name) and (flat.dtype != torch.uint8 or flat.ndim != 1)
        if int(lengths.sum()) != len(flat) or words:
            return f"its {name} is not of the lengths beside it"
    sizes = {len(leaf) for name, leaf in leaves.items() if name not in ragged and batches.has_rows(name)}
    if len(sizes) != 1:
        return "its leaves are of different numbers of samples"
    if count is not None and sizes != {count}:
        return f"its leaves are not of {count:,} samples each"
    return None


def _shape_faults(
    tensors: Mapping[str, Tensor], kinds: Mapping[str, tuple[torch.dtype, Shape]], sizes: dict[str, int]
) -> Iterator[str]:
    """Tensors that are missing, of another dtype, or of a size that ``sizes`` or an earlier tensor gives otherwise."""
    for name, (dtype, shape) in kinds.items():
        tensor = tensors.get(name)
        if tensor is None:
            yield f"it has no {name}"
            return
        expected = tuple(sizes.setdefault(word, size) for word, size in zip(shape, tensor.shape, strict=False))
        if tensor.dtype != dtype or tensor.shape != expected or tensor.ndim != len(shape):
            wanted = f"{dtype} of shape ({', '.join(str(sizes.get(word, word)) for word in shape)})"
            yield f"its {name} is {tensor.dtype} of shape {tuple(tensor.shape)} and not {wanted}"


def _ends_faults(name: str, ends: Tensor, last: int) -> Iterator[str]:
    if int(ends[0]) != 0 or int(ends[-1]) != last or bool((ends.diff() <= 0).any()):
        yield f"its {name} do not increase from 0 to {last:,}"


def _range_faults(name: str, values: Tensor, end: int) -> Iterator[str]:
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= end):
        yield f"its {name} go from {int(values.min()):,} to {int(values.max()):,}, beyond 0 to {end - 1:,}"


def _is_random_state(state: Tensor) -> bool:
    try:
        torch.Generator().set_state(state.clone())  # memory that is not aligned, as inside a file, crashes it
    except (RuntimeError, TypeError):
        return False
    return True
