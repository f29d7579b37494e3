"""The manifest: every key that is read, what its value has to be, and which numbers must agree with which."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lightning_acc.record.schema.kinds import (
    FLAG,
    HASH,
    MAPPING,
    PLAIN,
    SHAPE,
    STRUCTURE,
    TEXT,
    Kind,
    among,
    first_fault,
    named,
    several,
    whole,
)

MOST_SAMPLES = 10**9
SCORED = {"float32": torch.float32, "float64": torch.float64}
"""What scores are computed in. Narrower parameters are rounded by more than one sample moves them in many a step: without
the sample the same training would differ by it and by chance."""
DTYPES = {**SCORED, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What parameters may be of."""
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")

Manifest = Mapping[str, Any]

OF_ANY: dict[str, Kind] = {
    "run_id": TEXT,
    "status": among("recording", "complete"),
    "files": MAPPING,
    "batch_structure": STRUCTURE,
}
"""In every manifest, also that of one process of several (``ranks/``), which has nothing else but ``n_steps``."""
HEADER: dict[str, Kind] = {
    "n_samples": whole(1, MOST_SAMPLES),
    "threads": whole(1, 4096),
    "module": MAPPING,
    "module.class": TEXT,
    "module.hyper_parameters": MAPPING,
    "data": MAPPING,
    "logger": MAPPING.or_none(),
    "dtype": among(*DTYPES),
    "layout": several(SHAPE),
    "optimizer.name": TEXT,
    "optimizer.group_of": several(whole(0, 10**6).or_none()),
    "optimizer.slots": whole(0, 64),
    "evaluation_modules": several(TEXT),
    "loss.independent_rows": FLAG,
    "loss.vectorised": FLAG,
}
WHERE_GIVEN: dict[str, Kind] = {
    "created": TEXT,
    "packages": MAPPING,
    "world_size": whole(1, 10**6),
    "trainer": named(PLAIN),
    "settings": named(PLAIN),
    "final_settings": named(PLAIN),
    "device": among("cpu", "cuda"),
    "tf32": FLAG,
    "precision": among(*PRECISIONS),
    "matmul_precision": among("highest", "high", "medium"),
    "loss.source": among("per_sample_loss", "reductions", "training_step"),
    "loss.reduction": among("mean", "sum", "weighted"),
    "loss.penalised": FLAG,
    "optimizer.rests": FLAG,
    "loss.batch_norm": TEXT.or_none(),
    "loss.mixed_rows": TEXT,
    "sample_id": TEXT,
    "logger.project": TEXT.or_none(),
    "logger.group": TEXT.or_none(),
    "logger.id": TEXT.or_none(),
    "resumed_at": several(whole(0, 10**12)),
    "checkpoints": named(whole(0, 10**12)),
    "compiled": FLAG,
    "skipped": several(whole(0, 10**12)),
    "stopped": TEXT.or_none(),
    "reason": TEXT,
}
AT_THE_END: dict[str, Kind] = {"n_steps": whole(1, 10**12)}

FILE: dict[str, Kind] = {"bytes": whole(0, 2**50), "sha256": HASH}
COUNT = {"count": whole(1, 10**12)}
BY_FOLDER: dict[str, dict[str, Kind]] = {
    "steps": COUNT,
    "parameters": {**COUNT, "steps": several(whole(0, 10**12))},
    "samples": COUNT,
}
"""What the manifest says of the numbered files of a folder, beside their size and hash."""
SHARED = "shared.safetensors"
"""The file of those tensors of the batches that belong to no sample."""
AVERAGE = re.compile(r"averages/[a-z0-9-]{1,40}\.safetensors")
AVERAGED: dict[str, Kind] = {"callback": TEXT}
"""The same of an average of the parameters that a callback kept."""
NAMES = {"names": whole(1, MOST_SAMPLES)}
"""What it says of a file of steps in which samples were seen first that the batches name."""
NUMBERED = re.compile(r"(steps|parameters|samples)/(\d{6,18})(-\d{1,18})?\.safetensors")


def fault_of(manifest: Manifest, part: bool = False) -> str | None:
    """The first thing wrong with a manifest, in words that go on after its name; None where all is as it should be.

    Args:
        manifest: its content.
        part: whether it is that of one process of several.
    """
    needed = {**OF_ANY, **({} if part else HEADER), **(AT_THE_END if manifest.get("status") == "complete" else {})}
    fault = first_fault(manifest, needed) or first_fault(manifest, WHERE_GIVEN, optional=True)
    if fault:
        return fault
    for name, facts in manifest["files"].items():
        folder = NUMBERED.fullmatch(name)
        average = AVERAGE.fullmatch(name)
        of_folder = name.partition("/")[0] in (*BY_FOLDER, "averages") and name.endswith(".safetensors")
        loose = of_folder and folder is None and average is None
        if loose:
            return f"its file {name!r} has no place in a run"
        if not isinstance(facts, dict):
            return f"it tells no size and hash of {name}"
        fault = first_fault(facts, {**FILE, **(BY_FOLDER[folder[1]] if folder else AVERAGED if average else {})})
        fault = fault or (first_fault(facts, NAMES, optional=True) if folder and folder[1] == "steps" else None)
        if fault:
            return f"of {name} {fault}"
    return next(_contradictions(manifest, part), None)


def numel(manifest: Manifest) -> int:
    """Number p of trained parameters."""
    return sum(math.prod(shape) for _, shape in manifest["layout"])


def _contradictions(manifest: Manifest, part: bool) -> Iterator[str]:
    """Numbers of a manifest that contradict each other."""
    files: dict[str, dict[str, Any]] = {folder: {} for folder in BY_FOLDER}
    for name in sorted(manifest["files"]):
        if found := NUMBERED.fullmatch(name):
            files[found[1]][name] = manifest["files"][name]
    complete = manifest["status"] == "complete"
    for folder in ("steps", "samples"):
        for name, facts in files[folder].items():
            if 8 * facts["count"] > facts["bytes"]:
                yield f"{name} is said to hold {facts['count']:,} in {facts['bytes']:,} bytes"
    recorded = sum(facts["count"] for facts in files["steps"].values())
    whole_training = complete and not manifest.get("stopped")
    if complete and (recorded < manifest["n_steps"] or (whole_training and recorded != manifest["n_steps"])):
        yield f"its n_steps is {manifest['n_steps']:,}, but its files hold {recorded:,}"
    named = sum(facts.get("names", 0) for facts in files["steps"].values())
    if named and manifest.get("n_samples") != named:
        yield f"its n_samples is {manifest.get('n_samples')}, but its files name {named:,} samples"
    late = [name for name, step in manifest.get("checkpoints", {}).items() if complete and step > manifest["n_steps"]]
    if late:
        yield f"its checkpoint {late[0]} is of step {manifest['checkpoints'][late[0]]:,} of {manifest['n_steps']:,}"
    if part:
        return
    p, size = numel(manifest), DTYPES[manifest["dtype"]].itemsize
    if not p:
        yield "its layout has no parameters"
    if len(manifest["optimizer"]["group_of"]) != len(manifest["layout"]):
        yield f"its optimizer.group_of is of {len(manifest['optimizer']['group_of'])} of {len(manifest['layout'])} parameters"
    if len({name for name, _ in manifest["layout"]}) != len(manifest["layout"]):
        yield "its layout names a parameter twice"
    last = -1
    for name, facts in files["parameters"].items():
        if facts["count"] != len(facts["steps"]) or facts["count"] * p * size > facts["bytes"]:
            yield f"{name} is said to hold {facts['count']:,} times {p:,} parameters in {facts['bytes']:,} bytes"
        for step in facts["steps"]:
            if step <= last or (whole_training and step > manifest["n_steps"]):
                yield f"of {name} its steps are not those of the run, in order"
            last = step
    if complete and 0 not in next(iter(files["parameters"].values()), {"steps": []})["steps"][:1]:
        yield "it has no parameters of before the first step"
