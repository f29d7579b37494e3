"""Streams: batches that name their samples are recorded, whatever they come from, and the names are right to the end."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import Net, data, fit, flat, record, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused
from lightning_acc.recorder.checkpoints import resume
from lightning_acc.recorder.ending import repair
from lightning_acc.scoring.selection import select

N = 21
KEYS = [(-1) ** i * (10**15 + 7919 * i) for i in range(N)]
"""Ids as a database may have them."""
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Your `IterableDataset` has `__len__`",
    "ignore:.*fork",
    "ignore:.*sync_dist",
    "ignore:Training has no validation data",
    "ignore:.*validation_step",
    "ignore:.*resuming from a checkpoint that ended before the epoch",
    "ignore:.*Checkpoint directory .* exists and is not",
    "ignore:.*is gone without an end",
    "ignore:'set_vital' is deprecated",
)
Row = dict[str, Any]


class Kept(Net):
    """Its batches say of each row whether it counts, so that a training without a sample can be had."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        losses = super().per_sample_loss(batch)
        return losses * batch["kept"] if isinstance(batch, dict) and "kept" in batch else losses


def rows(without: int | None = None, ids: list[int] | None = None) -> list[Row]:
    x, y = data(n=N).tensors
    kept = torch.ones(N, dtype=torch.float64)
    if without is not None:
        kept[without] = 0.0
    names = KEYS if ids is None else ids
    return [{"x": x[i], "y": y[i], "kept": kept[i], "id": names[i]} for i in range(N)]


class Rows(Dataset[Row]):
    def __init__(self, found: list[Row]) -> None:
        self.rows = found

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class Stream(IterableDataset[Row]):
    """The rows in another order in every epoch; workers share them out."""

    def __init__(self, found: list[Row]) -> None:
        self.rows, self.epoch = found, 0

    def __iter__(self) -> Iterator[Row]:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.epoch += 1
        worker = get_worker_info()
        yield from (self.rows[i] for i in (order if worker is None else order[worker.id :: worker.num_workers]))


class Batches:
    """No loader of torch: batches, one of them with a row twice, and rows that are another at every visit."""

    def __init__(self, found: list[Row]) -> None:
        self.rows, self.epoch = found, 0

    def __iter__(self) -> Iterator[Row]:
        generator = torch.Generator().manual_seed(100 + self.epoch)
        order = torch.randperm(N, generator=generator).tolist()
        self.epoch += 1
        for start in range(0, N, 6):
            chosen = order[start : start + 6] + order[start : start + 1]
            batch = torch.utils.data.default_collate([self.rows[i] for i in chosen])
            noise = torch.randn(batch["x"].shape, generator=generator, dtype=torch.float64)
            yield {**batch, "x": batch["x"] + 0.1 * noise}


def hugging_face(found: list[Row]) -> DataLoader[Any]:
    columns = {key: [row[key].tolist() if isinstance(row[key], Tensor) else row[key] for row in found] for key in found[0]}
    stream = datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=3).shuffle(seed=4, buffer_size=7)

    def collate(batch: list[Row]) -> dict[str, Tensor]:
        return {key: torch.tensor([row[key] for row in batch], dtype=kind[key]) for key in columns}

    kind = {"x": torch.float64, "y": torch.int64, "kept": torch.float64, "id": torch.int64}
    return DataLoader(stream, 5, collate_fn=collate)


def text_ids(batch: Any) -> list[str]:
    return [f"doc-{KEYS.index(key)}" for key in batch["id"].tolist()]


def text_in(found: list[Row]) -> list[Row]:
    return [{**row, "id": f"doc-{KEYS.index(row['id'])}"} for row in found]


SOURCES: dict[str, tuple[Callable[[list[Row]], Any], Any]] = {
    "iterable": (lambda found: DataLoader(Stream(found), 5), "id"),
    "texts": (lambda found: DataLoader(Stream(found), 5), text_ids),
    "texts in the batch": (lambda found: DataLoader(Stream(text_in(found)), 5), "id"),
    "workers": (lambda found: DataLoader(Stream(found), 4, num_workers=2), "id"),
    "map-style": (lambda found: DataLoader(Rows(found), 5, shuffle=True), "id"),
    "hugging face": (hugging_face, "id"),
    "stateful": (lambda found: StatefulDataLoader(Stream(found), 5), "id"),
    "stateful workers": (lambda found: StatefulDataLoader(Stream(found), 4, num_workers=2), text_ids),
    "stateful map-style": (lambda found: StatefulDataLoader(Rows(found), 5, shuffle=True), "id"),
    "no loader": (Batches, "id"),
}


def module(**options: Any) -> Kept:
    torch.manual_seed(0)
    return Kept(hidden=5, activation="gelu", optimizer={"momentum": 0.9, "lr": 0.05}, **options).double()


def train(loader: Any, *callbacks: Any, **options: Any) -> Tensor:
    """Train with the loader, or with what makes it, for some draw random numbers as they are made."""
    pl.seed_everything(1)
    loader = loader() if callable(loader) else loader
    net = module()
    ckpt_path = options.pop("ckpt_path", None)
    trainer(*callbacks, **options).fit(net, loader, ckpt_path=ckpt_path)
    return flat(net)


HELD_OUT = [data(n=8, seed=5).tensors]


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_recorded_of_a_stream_is_its_training(tmp_path: Path, source: str) -> None:
    loader, sample_id = SOURCES[source]
    base = train(lambda: loader(rows()), la.TrajectoryRecorder(tmp_path / "run", sample_id=sample_id))
    assert torch.equal(base, train(lambda: loader(rows())))
    run = la.Run(tmp_path / "run")
    assert run.n_samples == N
    assert run.audit().max_abs_error == 0
    names = run.sample_names
    assert names is not None
    texts = "texts" in source
    expected = [f"doc-{i}" for i in range(N)] if texts or sample_id is text_ids else KEYS
    assert sorted(names) == sorted(expected)
    place = {name: i for i, name in enumerate(expected)}
    for t, step in enumerate(run.steps):  # what each row is called is what the batch itself says of it
        (leaves,) = run.batches(t)
        if source != "texts in the batch":
            assert leaves["id"].tolist() == [KEYS[place[names[i]]] for i in step.sample_ids.tolist()]
        assert torch.equal(leaves["x"], torch.stack([rows()[place[names[i]]]["x"] for i in step.sample_ids.tolist()])) or (
            source == "no loader"
        )
    firsts = list(dict.fromkeys(i for step in run.steps for i in step.sample_ids.tolist()))
    assert firsts == list(range(N))  # numbers are in the order of the first visit

    samples = [2, 11, 17]
    query = la.Query("held-out", HELD_OUT)
    asked = [str(expected[i]) for i in samples]
    scores = la.score(run, "loo", asked, query, keep_shifts=True, ray_address=None, check=0)
    assert scores.removals == [(run.sample_number(expected[i]),) for i in samples]
    assert scores.shifts is not None
    for sample, shift in zip(samples, scores.shifts, strict=True):
        change = train(lambda sample=sample: loader(rows(without=sample))) - base
        assert float((shift - change).norm() / change.norm()) < 1e-9


def test_a_row_may_be_there_twice_and_change_between_visits(tmp_path: Path) -> None:
    train(Batches(rows()), la.TrajectoryRecorder(tmp_path / "run", sample_id="id"))
    run = la.Run(tmp_path / "run")
    ids = run.steps[0].sample_ids.tolist()
    assert ids == [0, 1, 2, 3, 4, 5, 0]
    visits = [run.batches(t)[0]["x"][step.sample_ids == 3] for t, step in enumerate(run.steps)]
    assert len(torch.unique(torch.cat(visits), dim=0)) >= 3


def test_batches_in_any_order_are_recorded(tmp_path: Path) -> None:
    """What a loader with ``in_order=False`` delivers is not the same every time, but is known."""
    loader = DataLoader(Rows(rows()), 5, shuffle=True, num_workers=2, in_order=False)
    train(loader, la.TrajectoryRecorder(tmp_path / "run", sample_id="id"))
    run = la.Run(tmp_path / "run")
    assert run.audit().max_abs_error == 0
    names = run.sample_names
    assert names is not None
    for t, step in enumerate(run.steps):
        assert run.batches(t)[0]["id"].tolist() == [names[i] for i in step.sample_ids.tolist()]


METHODS = ("loo", "acc-sgd-ie", "sgd-ie", "tracin")


def test_a_data_set_has_the_same_scores_with_its_ids_and_without(tmp_path: Path) -> None:
    """Where ids are 0 to n - 1 they are the numbers; where they are others, the scores are the same under other numbers."""
    plain, other = rows(ids=list(range(N))), rows()
    query = la.Query("held-out", HELD_OUT)
    scores = {}
    for name, found, options in (
        ("counted", plain, {}),
        ("ids", plain, {"sample_id": "id"}),
        ("keys", other, {"sample_id": "id"}),
    ):
        loader = DataLoader(Rows(found), 5, shuffle=True)
        train(loader, la.TrajectoryRecorder(tmp_path / name, **options), max_epochs=2)
        run = la.Run(tmp_path / name)
        scores[name] = [la.score(run, m, None, query, ray_address=None, save=False, check=0).values for m in METHODS]
    counted, ids, keys = (la.Run(tmp_path / name) for name in ("counted", "ids", "keys"))
    assert ids.sample_names is None
    assert ids.sample_number(5) == 5
    assert "sample_id" not in counted.manifest
    for a, b in zip(counted.steps, ids.steps, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
    np.testing.assert_array_equal(scores["counted"], scores["ids"])
    numbers = [keys.sample_number(key) for key in KEYS]
    assert sorted(numbers) == list(range(N)) != numbers
    np.testing.assert_allclose(np.array(scores["keys"])[:, numbers], scores["counted"], rtol=1e-12, atol=1e-16)
    with pytest.raises(la.RequestError, match=r"have no names, but the numbers 0 to 20.*sample_id"):
        counted.sample_number("doc-1")


# ---- runs that end early, or go on


class Stop(pl.Callback):
    def __init__(self, step: int, how: str = "error", wait: Path | None = None) -> None:
        self.step, self.how, self.wait = step, how, wait

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("stopped")


def draft(recorder: Any) -> None:
    """Have what is recorded by now written for the time being, as happens every few seconds."""
    recorder._write.own.flush(for_good=False)
    recorder._write.own.wait()


class Drafts(pl.Callback):
    def __init__(self, recorder: la.TrajectoryRecorder) -> None:
        self.recorder = recorder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        draft(self.recorder)


def test_a_training_that_is_killed_leaves_its_names(tmp_path: Path) -> None:
    recorder = la.TrajectoryRecorder(tmp_path / "run", sample_id=text_ids)
    arguments = (DataLoader(Stream(rows()), 5), recorder, Drafts(recorder), Stop(3, "kill"))
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()[:15]
    run = la.Run(tmp_path / "run", partial=True)
    assert (run.n_steps, run.n_samples) == (3, 15)
    assert run.sample_names == [f"doc-{i}" for i in order]
    assert run.audit().max_abs_error == 0
    assert repair(tmp_path / "run") == 3
    whole = la.Run(tmp_path / "run")
    assert whole.sample_names == run.sample_names
    assert la.score(whole, "sgd-ie", query=la.Query("held-out", HELD_OUT), ray_address=None, check=0).names[(0,)] == (
        f"doc-{order[0]}"
    )


@pytest.mark.parametrize("start", [2, 4])
def test_a_resumed_stream_goes_on_with_its_numbers(tmp_path: Path, start: int) -> None:
    """Also with those of samples that come only later: what was numbered after the checkpoint is forgotten."""

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)

    def recorder(**options: Any) -> la.TrajectoryRecorder:
        return la.TrajectoryRecorder(tmp_path / "run", **{"sample_id": text_ids, **options})

    class Later(Stream):
        """Begins with other rows."""

        def __iter__(self) -> Iterator[Row]:
            yield from reversed(self.rows)

    options = {"enable_checkpointing": True, "max_epochs": 3}
    with pytest.raises(RuntimeError, match="stopped"):
        train(DataLoader(Stream(rows()), 3), recorder(), keep(), Stop(5), **options)
    before = la.Run(tmp_path / "run")
    assert (before.n_steps, before.n_samples) == (5, 15)
    first = before.sample_names
    assert first is not None
    path = tmp_path / f"step={start}.ckpt"
    assert resume.difference(before.manifest, {**before.manifest, "n_samples": 99}) is None
    other = resume.difference(before.manifest, {**before.manifest, "sample_id": "id"})
    assert other == "its sample_id is 'id', but was 'a function of the batch'"
    with pytest.raises(RecordingRefused, match=r"Some ids .*, such as 'doc-\d+' and -?\d+: let all be of one kind"):
        train(DataLoader(Later(rows()), 3), recorder(sample_id="id"), keep(), ckpt_path=path, **options)
    final = train(DataLoader(Later(rows()), 3), recorder(), keep(), ckpt_path=path, **options)
    run = la.Run(tmp_path / "run")
    assert torch.equal(run.parameters(run.n_steps), final)
    assert run.audit().max_abs_error == 0
    assert run.n_samples == N
    names = run.sample_names
    assert names is not None
    kept = first[: 3 * start]
    assert names == kept + [name for i in reversed(range(N)) if (name := f"doc-{i}") not in kept]
    for t, step in enumerate(run.steps):
        assert [f"doc-{KEYS.index(key)}" for key in run.batches(t)[0]["id"].tolist()] == [
            names[i] for i in step.sample_ids.tolist()
        ]


DDP = {"strategy": "ddp_fork", "devices": 2}


class Shares(Stream):
    """Every process has its own half of the rows, and both have the first."""

    def __iter__(self) -> Iterator[Row]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        yield from [self.rows[0], *self.rows[1 + rank :: 2]]


@pytest.mark.parametrize("sample_id", ["id", text_ids])
def test_two_ranks_name_their_samples_in_one_way(tmp_path: Path, sample_id: Any) -> None:
    def loader(without: int | None = None) -> DataLoader[Any]:
        return DataLoader(Shares(rows(without)), 4)

    base = train(loader(), la.TrajectoryRecorder(tmp_path / "run", sample_id=sample_id), max_epochs=2, **DDP)
    run = la.Run(tmp_path / "run")
    assert run.audit().ok
    assert run.n_samples == N
    names = run.sample_names
    assert names is not None
    called = KEYS if sample_id == "id" else [f"doc-{i}" for i in range(N)]
    assert sorted(names) == sorted(called)
    assert names[:7] == [called[i] for i in (0, 1, 3, 5, 2, 4, 6)]
    assert run.steps[0].sample_ids.tolist() == [0, 1, 2, 3, 0, 4, 5, 6]
    for t, step in enumerate(run.steps):
        ids = [key for leaves in run.batches(t) for key in leaves["id"].tolist()]
        assert [called[KEYS.index(key)] for key in ids] == [names[i] for i in step.sample_ids.tolist()]
    samples = [0, 8, 13]
    query = la.Query("held-out", HELD_OUT)
    asked = [str(called[i]) for i in samples]
    shifts = la.score(run, "loo", asked, query, keep_shifts=True, ray_address=None, check=0).shifts
    assert shifts is not None
    for sample, shift in zip(samples, shifts, strict=True):
        change = train(loader(sample), max_epochs=2, **DDP) - base
        assert float((shift - change).norm() / change.norm()) < 1e-9


# ---- what is no id


class Tuples(Net):
    """Batches of x, y and more."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        return super().per_sample_loss(tuple(batch[:2]))


def pairs(*more: Any) -> DataLoader[Any]:
    return DataLoader(torch.utils.data.TensorDataset(*data(n=N).tensors, *more), 5)


def test_a_place_in_a_tuple_has_the_ids(tmp_path: Path) -> None:
    net = Tuples().double()
    run = record(tmp_path / "run", net, pairs(torch.tensor(KEYS)), recorder={"sample_id": 2}, max_epochs=1)
    assert run.sample_names == KEYS
    assert run.manifest["sample_id"] == "2"


REFUSED: dict[str, tuple[Any, str]] = {
    "no such key": ("uid", r"no sample_id='uid', for it is a list: name a key"),
    "no such place": (5, r"no sample_id=5, for it is a list"),
    "failing": (lambda batch: batch["id"], r"The function sample_id fails on a training batch \(TypeError: list indices"),
    "too few": (lambda batch: batch[2][:3], r"are 3, but its batch has 5 rows"),
    "floats": (0, r"are of shape \(5, 5\) and not one for each row"),
    "of another type": (lambda batch: batch[2].double(), r"hold \d+\.0, which is neither an integer nor a text"),
    "truth values": (lambda batch: batch[2] > 0, r"hold (True|False), which is neither"),
    "none": (lambda batch: None, r"are None and not one for each row"),
    "nones": (lambda batch: [None] * len(batch[2]), r"hold None, which is neither an integer nor a text"),
    "one for all": (lambda batch: "doc", r"are 'doc' and not one for each row"),
    "no text": (lambda batch: ["\ud800"] * len(batch[2]), r"which is no text in UTF-8"),
    "mixed": (
        lambda batch: [int(i) if i % 2 else f"doc-{i}" for i in batch[2]],
        r"Some ids of samples are integers and others texts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_id_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    sample_id, message = REFUSED[name]
    with pytest.raises(RecordingRefused, match=message) as found:
        record(tmp_path / "run", Tuples().double(), pairs(torch.arange(N) + 7), recorder={"sample_id": sample_id})
    assert len(str(found.value).splitlines()) == 1
    assert not (tmp_path / "run/manifest.json").exists()


def test_an_argument_that_says_nothing_is_refused() -> None:
    with pytest.raises(la.RequestError, match=r"sample_id=1.5 does not say where the ids are"):
        la.TrajectoryRecorder("run", sample_id=1.5)  # type: ignore[arg-type]


def test_without_ids_a_stream_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for loader in (DataLoader(Stream(rows()), 5), Batches(rows())):
        with pytest.raises(RecordingRefused, match=r"no ids: .*pass TrajectoryRecorder\(\.\.\., sample_id=\.\.\.\)"):
            train(loader, la.TrajectoryRecorder(tmp_path / "run"))


def mixing(batch: list[Row]) -> Any:
    mixed = torch.utils.data.default_collate(batch)
    return {**mixed, "x": 0.7 * mixed["x"] + 0.3 * mixed["x"].flip(0)}


class MixingOnItsWay(Kept):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "x": 0.7 * batch["x"] + 0.3 * batch["x"].flip(0)} if self.trainer.training else batch


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_several_samples_are_found_in_streams_too(tmp_path: Path, workers: int) -> None:
    loader = DataLoader(Stream(rows()), 4, collate_fn=mixing, num_workers=workers)
    with pytest.raises(RecordingRefused, match=r"^A row of a batch is made of several samples: the collate_fn mixing"):
        train(loader, la.TrajectoryRecorder(tmp_path / "run", sample_id="id"))
    recorder = la.TrajectoryRecorder(tmp_path / "allowed", sample_id="id", mixed_rows="as-they-are")
    train(loader, recorder)
    assert la.Run(tmp_path / "allowed").audit().ok


@pytest.mark.parametrize("source", ["iterable", "no loader"])
def test_rows_that_a_hook_mixes_are_found_in_streams_too(tmp_path: Path, source: str) -> None:
    loader, _ = SOURCES[source]
    with pytest.raises(RecordingRefused, match=r"made of several samples: MixingOnItsWay.on_after_batch_transfer"):
        trainer(la.TrajectoryRecorder(tmp_path / "run", sample_id="id")).fit(MixingOnItsWay().double(), loader(rows()))


# ---- what is shown of named samples, and how they are asked for


class Described(pl.LightningDataModule):
    """Tells of the rows in an order of its own, and of one that is never seen."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        super().__init__()
        self.columns = columns

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream(rows()), 5)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(n=8, seed=5), 8)

    def describe_samples(self) -> dict[str, list[Any]]:
        return self.columns


ORDER = [*range(N - 1, 3, -1), 1, 0, 2]
TOLD = {
    "id": [*(f"doc-{i}" for i in ORDER), "doc-99"],
    "label": [*(f"class {i % 3}" for i in ORDER), "none"],
    "corrupted": [*(i == 6 for i in ORDER), True],
}
"""Of all rows but number 3."""


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    path = tmp_path_factory.mktemp("described") / "run"
    pl.seed_everything(1)
    recorder = la.TrajectoryRecorder(path, sample_id=text_ids)
    trainer(recorder, max_epochs=2).fit(module(), datamodule=Described(TOLD))
    run = la.Run(path)
    la.score(run, "sgd-ie", ray_address=None, check=0)
    la.score(run, "loo", ray_address=None, check=0)
    return la.Run(path)


def test_descriptions_are_told_by_the_ids(described: la.Run) -> None:
    info, names = described.sample_info(), described.sample_names
    assert info is not None
    assert names is not None
    assert len(info) == N
    labels = dict(zip(names, info["label"].to_pylist(), strict=True))
    assert labels == {f"doc-{i}": None if i == 3 else f"class {i % 3}" for i in range(N)}
    groups = select(described, "group:label")
    assert isinstance(groups, dict)
    assert {names[i] for i in groups["label class 1"]} == {f"doc-{i}" for i in range(N) if i % 3 == 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": ["a"] * N}, r"the table has no column 'id': add one"),
        ({"id": ["doc-1"] * N}, r"the same id in several rows"),
        ({"id": KEYS}, r"none of the ids in the first batches"),
    ],
)
def test_descriptions_without_the_ids_are_left_out_with_a_warning(tmp_path: Path, columns: Any, message: str) -> None:
    recorder = la.TrajectoryRecorder(tmp_path / "run", sample_id=text_ids)
    with pytest.warns(UserWarning, match=rf"describe_samples\(\) tells is not recorded, for .*{message}"):
        trainer(recorder, max_epochs=1).fit(module(), datamodule=Described(columns))
    assert la.Run(tmp_path / "run").sample_info() is None


def test_samples_are_asked_for_by_their_ids(described: la.Run, tmp_path: Path) -> None:
    number = described.sample_number("doc-7")
    scores = la.score(described, "sgd-ie", ["doc-7", ["doc-2", "doc-7", number]], ray_address=None, check=0, save=False)
    assert scores.removals == [(number,), tuple(sorted([described.sample_number("doc-2"), number]))]
    assert scores.names == {(number,): "doc-7"}
    assert scores.labels[0] == f"{number} doc-7"
    matrix = la.score_matrix(described, "sgd-ie", removals=["doc-7"], ray_address=None, check=0, save=False)
    assert matrix.removals == [(number,)]
    with pytest.raises(la.RequestError, match=r"no sample 'doc-77' in this run: its 21 samples are called by the ids .* 'doc-"):
        la.score(described, "sgd-ie", ["doc-77"], ray_address=None)
    file = tmp_path / "removals"
    file.write_text(f"doc-7, 3\n{number}  # the same alone\n")
    assert select(described, str(file)) == [tuple(sorted({number, 3})), (number,)]


def test_what_leaves_the_package_has_the_ids(described: la.Run, tmp_path: Path) -> None:
    from lightning_acc.judge import exports
    from lightning_acc.judge.agreement import stored_scores
    from lightning_acc.judge.samples import SampleViews
    from lightning_acc.show.report import collect
    from lightning_acc.show.tracking import panels

    scores = stored_scores(described)["sgd-ie"]
    exports.write_ranking_csv(described, scores, tmp_path / "ranking.csv")
    header, *lines = [line.split(",") for line in (tmp_path / "ranking.csv").read_text().splitlines()[1:]]
    assert header[:3] == ["rank", "sample", "name"]
    assert len(lines) == N
    for line in lines:
        row = dict(zip(header, line, strict=True))
        assert described.sample_number(row["name"]) == int(row["sample"])
        i = int(row["name"].removeprefix("doc-"))
        assert row["label"] == ("" if i == 3 else f"class {i % 3}")
    page = next(column for column in collect(described)["columns"] if column["key"] == "@name")
    assert [page["levels"][code] for code in page["codes"]] == described.sample_names
    views = SampleViews(described)
    assert views[3].called == f"#3 {(described.sample_names or [])[3]}"
    ranking = panels.ranking(scores, None, panels.Pictures(views)).data
    assert {row[1] for row in ranking} == {f"{i} {name}" for i, name in enumerate(described.sample_names or [])}
    cleaned = described.cleaned_dataset(["doc-7", "doc-11"])
    assert cleaned["name"] == [name for name in described.sample_names or [] if name not in ("doc-7", "doc-11")]
    source = datasets.Dataset.from_dict({"id": [f"doc-{i}" for i in range(N + 4)], "i": list(range(N + 4))})
    assert described.cleaned_dataset(["doc-7"], source)["i"] == [i for i in range(N + 4) if i != 7]
    with pytest.raises(la.RequestError, match="no column 'id' to find its rows by"):
        described.cleaned_dataset(["doc-7"], source.remove_columns("id"))


def test_several_runs_of_a_stream_have_a_mean(tmp_path: Path) -> None:
    for seed in (1, 2):
        loader = DataLoader(Stream(rows()), 4 + seed)
        train(loader, la.TrajectoryRecorder(tmp_path / str(seed), sample_id="id"), max_epochs=2)
    runs = [la.Run(tmp_path / str(seed)) for seed in (1, 2)]
    query = la.Query("held-out", HELD_OUT)
    asked = [str(KEYS[4]), str(KEYS[9])]
    mean = la.score(runs, "sgd-ie", asked, query, ray_address=None, check=0, save=False)
    each = [la.score(run, "sgd-ie", asked, query, ray_address=None, check=0, save=False).values for run in runs]
    np.testing.assert_allclose(mean.values, np.mean(each, axis=0), rtol=1e-12)


def test_names_that_were_tampered_with_are_found(tmp_path: Path) -> None:
    from lightning_acc.record.samples.names import packed
    from lightning_acc.record.schema import files

    train(DataLoader(Stream(rows()), 5), la.TrajectoryRecorder(tmp_path / "run", sample_id="id"), max_epochs=1)
    run = la.Run(tmp_path / "run")
    (name,) = [name for name in run.manifest["files"] if name.startswith("steps/")]
    tensors, metadata = run._load(name)

    def fault(**changed: Any) -> str | None:
        meta = {**metadata, **({"names": changed.pop("kind")} if "kind" in changed else {})}
        return files.fault_of(name, {**tensors, **changed}, meta, run.manifest)

    assert fault() is None
    assert "its name_ends do not increase" in str(fault(name_ends=tensors["name_ends"].flip(0)))
    assert "its name_ends do not increase" in str(fault(name_ends=tensors["name_ends"] - 1))
    assert "not one of integers, texts" in str(fault(kind="pickles"))
    assert "its names are no integers" in str(fault(names=tensors["names"] | 64))
    assert "name_ends" in str(fault(name_ends=tensors["name_ends"][:-1]))
    twice, kind = packed(["a", "b", "a"])
    from lightning_acc.record.samples.names import SampleNames, unpacked

    with pytest.raises(ValueError, match="twice"):
        SampleNames(unpacked(twice, {"names": "texts"}))
    assert kind == {"names": '"texts"'}


def test_ids_of_any_length_and_letters_come_back(tmp_path: Path) -> None:
    from lightning_acc.record.samples.names import packed, unpacked

    for names in ([2**70, -(2**70), 0, 5], ["", "ä b\n", "文", "x" * 1000], [""]):
        tensors, metadata = packed(names)
        assert unpacked(tensors, {"names": metadata["names"].strip('"')}) == names


def test_a_fit_with_a_shared_helper_counts_as_before(tmp_path: Path) -> None:
    """Without ``sample_id`` nothing is named."""
    fit(module(), data(n=N), la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run")
    assert run.sample_names is None
    assert all("names" not in facts for facts in run.manifest["files"].values())
