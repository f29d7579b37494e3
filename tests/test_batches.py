"""Batches of every kind: recorded by a real training, audited, and what is left out is what a real training leaves out."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import CLASSES, FEATURES, N, data, flat, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

import lightning_acc as la
from lightning_acc.errors import RunError
from lightning_acc.judge.samples import ExampleViews, SampleViews
from lightning_acc.record import batches
from lightning_acc.record.batches.leaves import encoded
from lightning_acc.record.samples.contents import Contents
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings("ignore:.*Skipping val loop", "ignore:Training has no validation data")
WORDS = ("", "cold", "warm water", "a longer post about the sea \u2602", "\x00zero", "two words")


class Linear(pl.LightningModule):
    """A linear classifier whose batches are of some ``kind``; leaves samples out by the weights of ``kept``, by ``number``."""

    kept = torch.ones(N, dtype=torch.float64)

    def __init__(self, kind: str = "tuple") -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Linear(FEATURES, CLASSES).double()
        self.words = nn.Embedding(50, CLASSES).double()
        self.kind = kind

    def tokens(self, texts: list[str]) -> Tensor:
        assert isinstance(texts, (list, tuple))
        assert all(isinstance(text, str) for text in texts)
        return torch.stack([self.words(torch.tensor([len(text), *(ord(c) % 50 for c in text)])).mean(0) for text in texts])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out, y, number = KINDS[self.kind].read(self, batch)
        losses = nn.functional.cross_entropy(out, y, reduction="none")
        return (losses * self.kept[number]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class Rows(Dataset[Any]):
    """Features, label, number, text and a number of Python's."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        x, y = data()[i]
        return x, y, i, WORDS[i % len(WORDS)], float(np.cos(i))


class Pair(NamedTuple):
    x: Tensor
    y: Tensor
    number: Tensor


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor
    number: Tensor
    size: int = 0

    @property
    def doubled(self) -> Tensor:
        return 2 * self.x


class Encoding(Mapping[str, Any]):
    """A mapping with attributes, as ``transformers.BatchEncoding`` is."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __getattr__(self, key: str) -> Any:
        try:
            return self.entries[key]
        except KeyError:
            raise AttributeError(key) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclasses.dataclass
class Kind:
    """How a batch is made of samples, and what the module reads of it: logits, labels, and the numbers of the samples."""

    made: Callable[[list[Any]], Any]
    read: Callable[[Any, Any], tuple[Tensor, Tensor, Tensor]]


def named(samples: list[Any]) -> dict[str, Any]:
    return dict(zip(("x", "y", "number", "text", "score"), default_collate(samples), strict=True))


def some(samples: list[Any], **more: Any) -> dict[str, Any]:
    return {**{key: value for key, value in named(samples).items() if key in ("x", "y", "number")}, **more}


def plain(module: Any, b: Any) -> tuple[Tensor, Tensor, Tensor]:
    return module.net(b["x"]), b["y"], b["number"]


def times(key: str) -> Callable[[Any, Any], tuple[Tensor, Tensor, Tensor]]:
    """Logits times what is there under ``key``."""
    return lambda module, b: (module.net(b["x"]) * b[key], b["y"], b["number"])


def objects(module: Any, b: Any) -> tuple[Tensor, Tensor, Tensor]:
    assert [type(entry) for entry in b["meta"]] == [dict] * len(b["meta"])
    scale = torch.tensor([[entry["score"] or 1.0] for entry in b["meta"]], dtype=torch.float64)
    return module.net(b["x"]) * scale, b["y"], b["number"]


KINDS: dict[str, Kind] = {
    "tuple": Kind(default_collate, lambda module, b: (module.net(b[0]), b[1], b[2])),
    "text beside": Kind(named, plain),
    "text alone": Kind(
        lambda samples: {
            "text": [s[3] for s in samples],
            "y": [int(s[1]) for s in samples],
            "number": default_collate(samples)[2],
        },
        lambda module, b: (module.tokens(b["text"]), torch.tensor(b["y"]), b["number"]),
    ),
    "texts in a tuple": Kind(
        lambda samples: (tuple(s[3] for s in samples), default_collate(samples)[1], default_collate(samples)[2]),
        lambda module, b: (module.tokens(b[0]) + 0 * int(isinstance(b[0], tuple)), b[1], b[2]),
    ),
    "named tuple": Kind(lambda s: Pair(*default_collate(s)[:3]), lambda module, b: (module.net(b.x), b.y, b[2])),
    "dataclass": Kind(
        lambda s: Batch(*default_collate(s)[:3], size=len(s)),
        lambda module, b: (module.net(b.doubled) / b.size, b.y, b.number),
    ),
    "encoding": Kind(lambda s: Encoding(some(s)), lambda module, b: (module.net(b.x), b.y, b["number"])),
    "numpy": Kind(
        lambda s: some(s, x=named(s)["x"].numpy()[:, ::-1], y=named(s)["y"].numpy()),
        lambda module, b: (module.net(torch.from_numpy(b["x"].copy())), torch.as_tensor(b["y"]), b["number"]),
    ),
    "number in a tensor": Kind(lambda s: some(s, t=torch.tensor(2 + s[0][4], dtype=torch.float64)), times("t")),
    "number of a batch": Kind(lambda s: some(s, t=2 + s[0][4], split="train", whole=True), times("t")),
    "number a sample": Kind(
        lambda s: some(s, t=[sample[4] for sample in s]),
        lambda module, b: (module.net(b["x"]) * torch.tensor(b["t"], dtype=torch.float64)[:, None], b["y"], b["number"]),
    ),
    "objects": Kind(
        lambda s: some(s, meta=[{"path": sample[3], "score": None if i == 0 else sample[4]} for i, sample in enumerate(s)]),
        objects,
    ),
    "shared": Kind(
        lambda s: some(s, t=torch.linspace(0.5, 2, CLASSES, dtype=torch.float64), eye=np.eye(2), none=None), times("t")
    ),
}
QUERY_ROWS = 8


def loader(kind: str, **options: Any) -> DataLoader[Any]:
    return DataLoader(Rows(), 7, collate_fn=KINDS[kind].made, **{"shuffle": True, **options})


def train(kind: str, kept: Tensor, *callbacks: Any) -> Linear:
    module = Linear(kind)
    module.kept = kept
    pl.seed_everything(1)
    held_out = DataLoader(Rows(), QUERY_ROWS, collate_fn=KINDS[kind].made)
    trainer(*callbacks, limit_val_batches=1, max_epochs=2).fit(module, loader(kind), held_out)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recorded_and_loo_is_real_retraining(tmp_path: Path, kind: str) -> None:
    everything = torch.ones(N, dtype=torch.float64)
    base = flat(train(kind, everything))
    assert torch.equal(flat(train(kind, everything, la.TrajectoryRecorder(tmp_path / "run"))), base)
    run = la.Run(tmp_path / "run", module=Linear(kind))
    report = run.audit()
    assert report.ok
    assert run.query_names() == ["val"]
    samples = (0, 5, 23)
    scores = la.score(run, "loo", samples, keep_shifts=True, ray_address=None, check=0, save=False)
    assert scores.shifts is not None
    for sample, shift in zip(samples, scores.shifts, strict=True):
        kept = everything.clone()
        kept[sample] = 0
        change = flat(train(kind, kept)) - base
        assert float((shift - change).norm() / change.norm()) < 1e-9
    linear = la.score(run, "sgd-ie", samples, ray_address=None, check=0, save=False).values
    assert np.isfinite(linear).all()
    assert abs(linear - scores.values).max() < abs(scores.values).max()
    matrix = la.score_matrix(run, "sgd-ie", removals=samples, examples=[0, 3], ray_address=None, check=0)
    whole = la.score_matrix(run, "sgd-ie", removals=samples, ray_address=None, check=0)
    torch.testing.assert_close(torch.tensor(matrix.values), torch.tensor(whole.values)[:, [0, 3]], rtol=1e-5, atol=1e-9)


def taken(batch: Any, like: batches.Structure | None) -> Any:
    """A batch of 4 samples as it is taken apart, or why it is refused."""
    try:
        leaves, structure = batches.flatten(batch, 4, like)
    except RunError as error:
        return str(error)
    return {name: (leaf.tolist(), leaf.requires_grad) for name, leaf in leaves.items()}, structure


def test_a_batch_is_taken_apart_the_same_after_another_one() -> None:
    x, y = torch.randn(4, 3), torch.arange(4)
    others: list[Any] = [
        (x.clone().requires_grad_(), y),
        (x, y, y),
        (x,),
        [x, y],
        (x, y[:2]),
        (x.T, y),
        (x.to_sparse(), y),
        (x, torch.tensor(1)),
        (x, None),
        (x, (y, y)),
        (x.numpy(), y),
        (nn.Parameter(x), y),
    ]
    as_dicts = [dict(zip("xyz", parts, strict=False)) for parts in others]
    for first, second in [
        ((x, y), others),
        ([x, y], others),
        ({"x": x, "y": y}, [*as_dicts, {"y": y, "x": x}, {"x": x, "z": y}]),
    ]:
        _, structure = batches.flatten(first, 4)
        assert taken(first, structure)[1] is structure
        for batch in second:
            assert taken(batch, structure) == taken(batch, None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_apart_is_put_together_as_it_was(kind: str) -> None:
    for batch in loader(kind, shuffle=False):
        leaves, structure = batches.flatten(batch)
        again = batches.unflatten(json.loads(json.dumps(structure)), leaves)
        assert_same(again, batch)
        stored = batches.unpacked(batches.packed({name: leaf.contiguous() for name, leaf in leaves.items()}))
        assert_same(batches.unflatten(structure, stored), batch)
        single = batches.rows(leaves, torch.tensor([2]))
        assert batches.batch_size(single) == 1
        together = batches.stacked([batches.row(leaves, i) for i in range(batches.batch_size(leaves))])
        assert {name: leaf.tolist() for name, leaf in together.items()} == {
            name: leaf.tolist() for name, leaf in leaves.items()
        }
        assert len(set(batches.digests({name: leaf.contiguous() for name, leaf in leaves.items()}))) == batches.batch_size(
            leaves
        )


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, expected, strict=True)
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
            if not isinstance(expected, dict):
                assert_same(getattr(found, key), expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif dataclasses.is_dataclass(expected):
        assert type(found) is type(expected)
        assert_same(vars(found), vars(expected))
    else:
        assert found == expected
        assert type(found) is type(expected)


ELSEWHERE = """
import sys, collections
import lightning_acc as la
run = la.Run(sys.argv[1])
from lightning_acc.record import batches
assert "test_batches" not in sys.modules
(leaves,) = run.batches(0)
batch = batches.unflatten(run.structure(), leaves)
print(type(batch).__module__, type(batch).__name__, [float(batch.x.sum()), batch.y.tolist()])
assert "test_batches" not in sys.modules
"""


class Armed:
    """Runs code when it is gone, and when an attribute is set."""

    fired: ClassVar[list[str]] = []

    def __del__(self) -> None:
        self.fired.append("deleted")


@dataclasses.dataclass
class Deleting(Armed):
    x: Any = None


@dataclasses.dataclass
class Setting:
    x: Any = None


Setting.x = property(lambda self: None, lambda self, value: Armed.fired.append("set"))  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Deleting, Setting])
def test_no_code_of_a_class_is_run_for_a_batch(kind: type[Any]) -> None:
    """A record may name any class that is imported here."""
    place = f"{kind.__module__}:{kind.__qualname__}"
    structure = {"dataclass": {"class": place, "fields": {"x": {"leaf": "x"}}}}
    Armed.fired.clear()
    made = batches.unflatten(structure, {"x": torch.ones(3)})
    assert torch.equal(made.x, torch.ones(3))
    del made
    assert not Armed.fired


@pytest.mark.parametrize("kind", ["named tuple", "dataclass"])
def test_another_process_imports_no_class_for_a_batch(tmp_path: Path, kind: str) -> None:
    train(kind, torch.ones(N, dtype=torch.float64), la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run")
    (leaves,) = run.batches(0)
    here = batches.unflatten(run.structure(), leaves)
    assert type(here) is {"named tuple": Pair, "dataclass": Batch}[kind]
    there = subprocess.run([sys.executable, "-c", ELSEWHERE, run.path], capture_output=True, text=True, check=True).stdout
    assert there.strip().endswith(str([float(here.x.sum()), here.y.tolist()]))
    assert there.split()[0] != "test_batches"


def test_texts_are_shown_and_take_few_files(tmp_path: Path) -> None:
    train("text beside", torch.ones(N, dtype=torch.float64), la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run")
    assert [name for name in run.manifest["files"] if name.startswith("samples/")] == ["samples/000000.safetensors"]
    views = SampleViews(run)
    assert [views[i].text for i in range(6)] == list(WORDS)
    assert [views[i].label for i in range(3)] == [str(int(label)) for label in data().tensors[1][:3]]
    examples = ExampleViews(run, run.query("val"))
    assert [examples[i].text for i in range(6)] == list(WORDS)
    content = run.content_of(3)
    assert content is not None
    assert batches.readable(content)["text"] == WORDS[3]


def test_the_same_inputs_are_told_without_their_labels() -> None:
    tensors = {"#": torch.arange(3), "x": torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0]]), "y": torch.tensor([0, 1, 0])}
    contents = Contents({"file": tensors}, {}, lambda name, fault: RunError(fault))
    assert len(set(contents.digests())) == 3
    first, second, third = contents.digests(numbers=False)
    assert first == second != third
    words = {"#": torch.arange(2), **batches.packed(encoded("words", ["ab", "ac"])), "y": torch.tensor([0, 0])}
    of_texts = Contents({"file": words}, {}, lambda name, fault: RunError(fault))
    assert len(set(of_texts.digests(numbers=False))) == 2  # texts of one length are no numbers
    alone = Contents({"file": {"#": torch.arange(2), "y": torch.tensor([0, 1])}}, {}, lambda name, fault: RunError(fault))
    assert len(set(alone.digests(numbers=False))) == 2  # there is nothing else


def test_of_two_runs_a_sample_is_the_same_whatever_its_batches_were_said_to_be(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        pl.seed_everything(seed)
        trainer(la.TrajectoryRecorder(tmp_path / name), max_epochs=1).fit(
            Linear("number of a batch"), loader("number of a batch")
        )
    assert la.Run(tmp_path / "one").content_digests() == la.Run(tmp_path / "two").content_digests()


REFUSED: dict[str, tuple[Any, str]] = {
    "list of tensors": (lambda s: some(s, x=[sample[0] for sample in s]), r"a list of 7 tensors, one a sample.*: stack them"),
    "two views": (lambda s: some(s, x=torch.cat([named(s)["x"]] * 2)), r"'x' of a batch of 7 samples has 14 rows.* \(7, 2, "),
    "sparse": (lambda s: some(s, x=named(s)["x"].to_sparse()), r"under 'x' a tensor that is sparse.*make it dense"),
    "time first": (lambda s: some(s, x=named(s)["x"].T.contiguous()), r"'x' .* \(5, 7\), whose second dimension.*transpose"),
    "packed": (
        lambda s: some(s, x=nn.utils.rnn.pack_sequence([sample[0] for sample in s])),
        r"under 'x' a PackedSequence.*: pad it",
    ),
    "a sample left out": (
        lambda s: default_collate(s[:-1]),
        r"No tensor of a batch of 7 samples has a row for each \('0' has 6",
    ),
    "something else": (lambda s: some(s, x=object()), r"under 'x' a object, which cannot be recorded"),
    "NumPy's texts": (lambda s: some(s, t=np.array([sample[3] for sample in s])), r"under 't' a NumPy array of <U\d+"),
    "numbers as keys": (lambda s: {**some(s), 3: 4}, r"the key 3; use strings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    made, message = REFUSED[case]
    with pytest.raises(RecordingRefused, match=message) as error:
        trainer(la.TrajectoryRecorder(tmp_path / "run")).fit(Linear("text beside"), DataLoader(Rows(), 7, collate_fn=made))
    assert "\n" not in str(error.value)


def test_a_query_whose_samples_cannot_be_counted_is_refused() -> None:
    with pytest.raises(RunError, match=r"disagree on the number of samples: 'x' has 4, 'y' has 3"):
        la.Query("odd", [{"x": torch.ones(4, 2), "y": torch.ones(3)}])
    query = la.Query("shared", [{"x": torch.ones(4, 2), "y": torch.ones(4), "weight": torch.ones(3)}])
    assert query.n_examples == 4
    assert query.picked([2]).n_examples == 1


def test_what_is_shared_in_training_is_shared_in_a_query_of_any_size(tmp_path: Path) -> None:
    train("shared", torch.ones(N, dtype=torch.float64), la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run", module=Linear("shared"))
    first = [sample for sample, _ in zip(Rows(), range(CLASSES), strict=False)]  # as many as the shared tensor has entries
    run.add_query("few", [KINDS["shared"].made(first)])
    whole = la.score_matrix(run, "sgd-ie", "few", removals=[4], ray_address=None, check=0).values
    for example in range(CLASSES):
        run.add_query(f"one-{example}", [KINDS["shared"].made([first[example]])])
        alone = la.score(run, "sgd-ie", [4], f"one-{example}", ray_address=None, check=0, save=False).values
        assert whole[0, example] == pytest.approx(alone[0], rel=1e-5)


class Sparse(Linear):
    """Word vectors whose gradients hold the words of the batch alone."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__("text alone")
        self.words.sparse = sparse
        self.net.requires_grad_(False)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_sparse_gradient_is_the_dense_one(tmp_path: Path, sparse: bool) -> None:
    def fitted(kept: Tensor, *callbacks: Any) -> Tensor:
        module = Sparse(sparse)
        module.kept = kept
        pl.seed_everything(1)
        trainer(*callbacks, max_epochs=2).fit(module, loader("text alone"))
        return flat(module)

    everything = torch.ones(N, dtype=torch.float64)
    base = fitted(everything, la.TrajectoryRecorder(tmp_path / "run"))
    assert torch.equal(base, fitted(everything))
    run = la.Run(tmp_path / "run")
    assert run.audit().ok
    run.add_query("few", [KINDS["text alone"].made([Rows()[i] for i in range(4)])])
    shifts = la.score(run, "loo", [3, 9], "few", keep_shifts=True, ray_address=None, check=0, save=False).shifts
    assert shifts is not None
    for sample, shift in zip((3, 9), shifts, strict=True):
        kept = everything.clone()
        kept[sample] = 0
        change = fitted(kept) - base
        assert float((shift - change).norm() / change.norm()) < 1e-9
    assert np.isfinite(la.score(run, "sgd-ie", [3, 9], "few", ray_address=None, check=0, save=False).values).all()
