"""Contents are told apart by their bytes, whether they are compared or hashed, and what is written on the way is all there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from problems import fit, make, record
from torch import Tensor

import lightning_acc as la
from lightning_acc.record import writer
from lightning_acc.record.batches import Leaves
from lightning_acc.record.collecting import numbering, staging
from lightning_acc.record.collecting.numbering import Numbering
from lightning_acc.record.collecting.staging import BATCHES, Staging
from lightning_acc.record.writer import RunWriter


def in_order(leaves: Leaves, known: dict[bytes, int]) -> list[int]:
    """The numbers as they are defined: of the bytes of each row, in the order in which they are met."""
    parts = [leaf.reshape(len(leaf), -1).view(torch.uint8) for _, leaf in sorted(leaves.items())]
    keys = [b"".join(part[row].numpy().tobytes() for part in parts) for row in range(len(parts[0]))]
    return [known.setdefault(key, len(known)) for key in keys]


@pytest.mark.parametrize("room", [0, 300, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_numbers_are_those_of_the_bytes(room: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbering, "KEPT_BYTES", room)
    torch.manual_seed(0)
    values = torch.randint(0, 3, (40, 3)).to(dtype)
    labels = torch.randint(0, 2, (40,))
    number, known, stored = Numbering(), {}, {}
    for visit in range(30):
        ids = torch.randint(0, 40, (8 if visit % 3 else 5,))  # one sample more than once in a batch, too
        leaves = {"x": values[ids].clone(), "y": labels[ids]}
        if visit % 4 == 3:
            leaves["x"][2] = leaves["x"][2].roll(1)  # as augmentation does
        found, new, contents = number(leaves, None if visit % 5 == 4 else ids.tolist())
        assert found == in_order(leaves, known)
        for row, one in enumerate(new):
            assert one not in stored
            stored[one] = {name: leaf[row] for name, leaf in contents.items()}
        assert all(torch.equal(stored[one][name], leaves[name][row]) for row, one in enumerate(found) for name in leaves)


def test_zeros_of_two_signs_differ_and_nan_is_itself() -> None:
    number = Numbering()

    def of(value: float, sample: int = 0) -> list[int]:
        return number({"x": torch.tensor([[value, 1.0]])}, [sample])[0]

    assert [of(0.0), of(-0.0), of(float("nan")), of(0.0), of(-0.0), of(float("nan"))] == [[0], [1], [2], [0], [1], [2]]
    assert of(float("nan"), 1) == of(float("nan"), 1) == [2]
    assert number({"x": torch.tensor([[0.0, 1.0]], dtype=torch.float64)}, [0])[0] == [3]


def test_a_batch_may_change_once_it_is_handed_over() -> None:
    torch.manual_seed(0)
    numbers, known, visits = Staging(), {}, []
    values = torch.randint(0, 9, (60, 3)).float()
    for _ in range(3 * BATCHES + 1):
        ids = torch.randint(0, 60, (8,))
        leaves = {"x": values[ids].clone(), "y": ids[:, None].expand(8, 2)}
        visits.append((numbers.add(leaves, ids.tolist()), {name: leaf.clone() for name, leaf in leaves.items()}))
        leaves["x"].zero_()  # as a training step may that normalises in place
    ((_, parts),) = numbers.take().items()
    stored = {one: (leaves["x"][row], leaves["y"][row]) for new, leaves in parts for row, one in enumerate(new)}
    assert sorted(stored) == list(range(len(stored)))
    assert numbers.new_bytes == len(stored) * (3 * 4 + 2 * 8)
    for found, leaves in visits:
        assert found.tolist() == in_order(leaves, known)
        for one, x, y in zip(found.tolist(), leaves["x"], leaves["y"], strict=True):
            assert torch.equal(stored[one][0], x)
            assert torch.equal(stored[one][1], y)
    assert not numbers.take()


def test_numbers_that_cannot_be_given_end_the_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = fit(make(hidden=4), None)
    monkeypatch.setattr(staging, "BATCHES", 2)
    monkeypatch.setattr(writer, "SECONDS", 0.0)
    monkeypatch.setattr(writer, "SHARE", float("inf"))
    honest, calls = Numbering.__call__, itertools.count()

    def fails(self: Numbering, leaves: Leaves, ids: Sequence[int] | None = None) -> tuple[list[int], list[int], Leaves]:
        if next(calls) == 5:
            raise MemoryError("no room for more contents")
        return honest(self, leaves, ids)

    def written_at_once(self: RunWriter, for_good: bool = True) -> None:  # else a busy disk decides how much is there
        flush(self, for_good)
        self.wait()

    flush = RunWriter.flush
    monkeypatch.setattr(RunWriter, "flush", written_at_once)
    monkeypatch.setattr(Numbering, "__call__", fails)
    with pytest.warns(UserWarning, match="has ended, and the training goes on without it: MemoryError: no room for more"):
        recorded = fit(make(hidden=4), None, la.TrajectoryRecorder(tmp_path / "run"))
    assert torch.equal(alone, recorded)
    assert next(calls) == 6  # what came later would have had numbers of others
    run = la.Run(tmp_path / "run", partial=True)
    assert run.n_steps == 5
    assert run.audit().max_abs_error == 0


@pytest.mark.parametrize("most", [1, 4, 1000])
def test_what_is_written_for_the_time_being_and_for_good_is_the_same_record(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(run: la.Run) -> list[Tensor]:
        steps = [part for step in run.steps for part in (step.sample_ids, step.weights, step.contents)]
        return [*steps, *(run.parameters(t) for t in run.snapshots)]

    record(tmp_path / "once", make(hidden=4))
    monkeypatch.setattr(writer, "SECONDS", 0.0)
    monkeypatch.setattr(writer, "SHARE", float("inf"))
    monkeypatch.setattr(writer, "MOST_DRAFTS", most)
    record(tmp_path / "often", make(hidden=4))
    once, often = la.Run(tmp_path / "once"), la.Run(tmp_path / "often")
    assert all(torch.equal(a, b) for a, b in zip(told(once), told(often), strict=True))
    assert sorted(once.manifest["files"]) == sorted(often.manifest["files"])
    written = {str(path.relative_to(often.path)) for path in Path(often.path).rglob("*.safetensors")}
    assert written == {name for name in often.manifest["files"] if name.endswith(".safetensors")}
