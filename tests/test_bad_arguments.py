"""Whatever is passed to the public interface that cannot be used ends in one sentence that names it, not in a traceback."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import Data, N, data, fit, make, record, trainer
from torch.utils.data import DataLoader, Dataset

import lightning_acc as la
from lightning_acc.cli.main import main
from lightning_acc.judge import exports
from lightning_acc.recorder.checks.refusals import RecordingRefused
from lightning_acc.scoring.over_time import influence_over_time

NAN, INF = float("nan"), float("inf")
NO_DEVICE = ["x", "gpu", "cpu:0", "cuda:x", "cuda:", "cuda:99", "meta", "", 3, True]
HUGE = 10**5000  # which Python refuses to print


class Described(Data):
    """Labels that a table program takes for formulas."""

    def describe_samples(self) -> dict[str, Any]:
        texts = ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\tx", "\rx", "-1", "+1", "-1.5e3", "plain", "a=b", ""]
        return {"label": (texts * N)[:N], "true_label": ["=cmd|' /C calc'!A0"] * N}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("bad") / "run", make())


@pytest.fixture(scope="module")
def scores(run: la.Run) -> la.Scores:
    return la.score(run, "sgd-ie", ray_address=None, check=0)


def query(function: Any) -> la.Query:
    return la.Query("mine", DataLoader(data(n=4), 4), function)


def losses(module: Any, batch: Any) -> torch.Tensor:
    values: torch.Tensor = module.per_sample_loss(batch)
    return values


def scored(*words: Any, **arguments: Any) -> Callable[[la.Run], Any]:
    options = {"method": "sgd-ie", "ray_address": None, "check": 0, "save": False, "progress": False, **arguments}
    return lambda run: la.score(run, *words, **options)


def cleaned(**arguments: Any) -> Callable[[la.Run], Any]:
    options = {"method": "sgd-ie", "fractions": [0.1], "seeds": 2, "ray_address": None, "test": "val", "controls": []}
    return lambda run: la.clean(run, **{**options, "save": False, "progress": False, **arguments})


def planned(**arguments: Any) -> Callable[[la.Run], Any]:
    return lambda run: la.plan(run, **{"ray_address": None, "progress": False, **arguments})


BAD: dict[str, dict[str, list[Any]]] = {
    "score": {
        "removals": [
            *(3, 0.5, "all", b"ab", True, object(), ["x"], [None], [True], [0.5], [NAN], [-1], [N], [HUGE], [[0, N]], [[[0]]]),
            *({"a": "x"}, {"a": None}, {"a": [0.5]}, {"a": {0: 1}}, [{0: 1}], [["0"]], np.array([0.5]), np.array([[[0]]])),
            *(np.array(3), torch.tensor(3), np.array([True, False]), torch.tensor([True, False]), torch.tensor([0.5]), [1j]),
            *(np.array([-1]), np.array(["a"]), [np.array([True])], [torch.tensor([True, False])], np.array([2**63], np.uint64)),
        ],
        "method": ["x", 3, None, ["sgd-ie"], {}, ""],
        "query": [3, None, "test", "", ["val"], losses, b"val", "../val"],
        "readout": ["x", 3, ["exact"], True, ""],
        "dtype": ["x", "int64", torch.float64, 3, ["float64"], {}, np.float64],
        "device": [*NO_DEVICE, None, ["cpu"], torch.device("cpu"), b"cpu", f"cuda:{10**50}", np.array(["auto", "cpu"])],
        "memory_gb": [NAN, INF, -INF, 0, -1, "2", None, True, [2], 1j, np.array([1.0, 2.0])],
        "at": ["x", "along:0", 0, -1, 1.5, True, None, [], [0], ["x"], {}, HUGE, [NAN], b"end"],
        "bank_gb": [NAN, INF, -1, "2", None, True, [1]],
        "check": ["yes", "1", -1, 1.5, NAN, True, None, [3], np.array([1, 2]), {}],
        "confirm": [-1, 1.5, True, "3", None, NAN, [1]],
        "directions": [3, "x", -1],  # sgd-ie has none
        "followed": [3, "x"],
        "trainings": [3, "x"],
        "ray_address": [5, "nowhere", ["local"], True, "", b"local"],
    },
    "clean": {
        "method": ["x", 3, [3], [], {}, [["sgd-ie"]]],
        "at": ["x", 0, -1, 1.5, True, [], [0]],
        "fractions": [[0], [1], [NAN], ["0.1"], "0.1", 0.1, None, [], [-0.1], [1.5], [True], [None], [INF], [[0.1]]],
        "seeds": [0, 1, -1, 2.5, NAN, "2", True, None, [0, 1]],
        "test": [3, "x", ["val"]],
        "controls": ["random", ["x"], 3, [3], None],
        "device": NO_DEVICE,
        "memory_gb": [NAN, INF, 0, "2"],
        "ray_address": [5, "nowhere"],
    },
    "plan": {
        "removals": [3, "x", [N]],
        "query": [3, "x"],
        "dtype": ["x", 3],
        "device": NO_DEVICE,
        "workers": [0, -1, 1.5, "2", True, NAN],
        "memory_gb": [NAN, INF, 0, -1, "2"],
        "ray_address": [5, "nowhere"],
    },
}
CALLS = {"score": scored, "clean": cleaned, "plan": planned}


def low_rank(**options: Any) -> Callable[[la.Run], Any]:
    return scored(**{"method": "acc-low-rank", **options})


OTHERS: dict[str, Callable[[la.Run], Any]] = {
    **{f"acc-low-rank directions={value!r}": low_rank(directions=value) for value in (-1, 1.5, "3", True, NAN, [1])},
    **{f"acc-low-rank followed={value!r}": low_rank(followed=value) for value in (-1, 1.5, "3", True, NAN, [1])},
    **{f"acc-low-rank trainings={value!r}": low_rank(trainings=value) for value in (0, -1, 1.5, "3", True, NAN, [1])},
    **{
        f"influence over time, memory_gb={value!r}": lambda run, v=value: influence_over_time(run, [0], memory_gb=v)
        for value in (NAN, INF, 0, "2", None)
    },
    "acc-low-rank both": low_rank(directions=1, followed=1),
    **{f"Run {path!r}": lambda _, path=path: la.Run(path) for path in (3, None, b"x", ["x"], "", "a\0b", True)},
    **{f"score {path!r}": lambda _, path=path: la.score(path) for path in (3, None, b"x", [])},
    **{
        f"score_matrix examples={examples!r}": lambda run, e=examples: la.score_matrix(
            run, examples=e, ray_address=None, check=0
        )
        for examples in (3, "all", [-1], [0.5], [True], [None], [10**9], [[0]], b"1")
    },
    **{f"score_matrix device={d!r}": lambda run, d=d: la.score_matrix(run, device=d, ray_address=None) for d in NO_DEVICE},
    **{f"score_matrix of {path!r}": lambda _, path=path: la.score_matrix(path) for path in (3, None)},
    **{f"plan {path!r}": lambda _, path=path: la.plan(path) for path in (3, None)},
    **{f"clean {path!r}": lambda _, path=path: la.clean(path) for path in (3, None)},
    **{f"write_report {path!r}": lambda _, path=path: la.write_report(path) for path in (3, None)},
    "Run module=3": lambda run: la.Run(run.store.url, module=3),
    "Run module=class": lambda run: la.Run(run.store.url, module=type(make())),
    "Run trust=3": lambda run: la.Run(run.store.url, trust=3),
    "Run trust=[3]": lambda run: la.Run(run.store.url, trust=[3]),
    **{f"parameters {t!r}": lambda run, t=t: run.parameters(t) for t in ("x", -1, 1.5, True, None, 10**9, NAN, [0])},
    **{f"query {name!r}": lambda run, name=name: run.query(name) for name in (3, None, "x", ["val"], b"val")},
    **{f"add_query {name!r}": lambda run, name=name: run.add_query(name, data()) for name in (3, None, "", "a b", "val", b"x")},
    **{
        f"add_query data {i}": lambda run, given=given: run.add_query("x", given)
        for i, given in enumerate((3, None, [], "abc", {"x": torch.zeros(3, 5)}, [torch.zeros(0, 5)], [["a"]], [object()]))
    },
    **{f"Query function {i}": lambda _, f=f: query(f) for i, f in enumerate((3, "loss", lambda module: 0, lambda: 0))},
    "Query data": lambda _: la.Query("x", 3),  # type: ignore[arg-type]
    **{
        f"cleaned_dataset {i}": lambda run, drop=drop: run.cleaned_dataset(drop)
        for i, drop in enumerate(
            (3, 0.1, None, "abc", "0", [0.5], ["0"], [-1], [N], [[0]], [True], [None], range(N), {0: 1}, [NAN], np.array([0.5]))
        )
    },
    **{f"cleaned_dataset of {i}": lambda run, of=of: run.cleaned_dataset([0], of) for i, of in enumerate((3, [1, 2], "x"))},
}
DROPS: list[dict[str, Any]] = [
    *({"fraction": value} for value in (-0.1, 1.5, NAN, "0.1", True, [0.1], INF)),
    *({"count": value} for value in (-1, 1.5, NAN, "3", True, [1])),
    {},
    {"fraction": 0.1, "count": 1},
]


def one_sentence(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    assert ":" in text or ";" in text, text  # the remedy follows
    return text


@pytest.mark.parametrize(
    ("call", "argument", "value"),
    [
        pytest.param(call, argument, value, id=f"{call}-{argument}-{i}")
        for call, arguments in BAD.items()
        for argument, values in arguments.items()
        for i, value in enumerate(values)
    ],
)
def test_a_bad_argument_is_one_sentence(run: la.Run, call: str, argument: str, value: Any) -> None:
    with pytest.raises(la.RequestError) as error:
        CALLS[call](**{argument: value})(run)
    one_sentence(error.value)


@pytest.mark.parametrize("call", OTHERS)
def test_any_other_bad_argument_is_one_sentence(run: la.Run, call: str) -> None:
    with pytest.raises(la.InfluenceError) as error:
        OTHERS[call](run)
    one_sentence(error.value)


@pytest.mark.parametrize("arguments", DROPS, ids=repr)
def test_no_share_and_no_count_are_one_sentence(scores: la.Scores, arguments: dict[str, Any]) -> None:
    with pytest.raises(la.RequestError) as error:
        exports.ids_to_drop(scores, **arguments)
    one_sentence(error.value)


@pytest.mark.parametrize("ids", [3, "12", ["1"], [0.5], [-1], [True], [[1]], None, [NAN], {0: 1}, np.array([0.5])])
def test_what_is_no_id_is_not_written(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(la.RequestError) as error:
        exports.write_ids(ids, tmp_path / "ids.txt")
    one_sentence(error.value)
    assert not (tmp_path / "ids.txt").exists()


@pytest.mark.parametrize("path", [3, None, b"x", ["x"]])
def test_what_is_no_path_is_not_written(run: la.Run, scores: la.Scores, path: Any) -> None:
    for write in (lambda: exports.write_ids([1], path), lambda: exports.write_ranking_csv(run, scores, path)):
        with pytest.raises(la.RequestError) as error:
            write()
        assert "path" in one_sentence(error.value)


NO_VALUES: dict[str, Any] = {
    "float": lambda module, batch: 0.5,
    "item": lambda module, batch: float(losses(module, batch).sum()),
    "int": lambda module, batch: 3,
    "none": lambda module, batch: None,
    "list": lambda module, batch: losses(module, batch).tolist(),
    "array": lambda module, batch: np.zeros(4),
    "complex": lambda module, batch: losses(module, batch) * 1j,
    "integers": lambda module, batch: losses(module, batch).long(),
    "booleans": lambda module, batch: losses(module, batch) > 0,
    "too many": lambda module, batch: losses(module, batch).repeat(2),
    "pair": lambda module, batch: (losses(module, batch), losses(module, batch)),
    "wrong key": lambda module, batch: batch["x"],
    "wrong index": lambda module, batch: batch[7],
    "wrong attribute": lambda module, batch: module.nothing(batch),
    "wrong shapes": lambda module, batch: module.net(batch[0][:, :2]).sum(1),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize("method", ["sgd-ie", "tracin", "loo", "acc-sgd-ie", "acc-low-rank"])
@pytest.mark.parametrize("kind", NO_VALUES)
def test_functions_that_give_no_values_are_one_sentence(run: la.Run, kind: str, method: str) -> None:
    with pytest.raises(la.RequestError) as error:
        scored(method=method, removals=[0], query=query(NO_VALUES[kind]))(run)
    assert "'mine'" in one_sentence(error.value)


DETACHED: dict[str, Any] = {
    "detached": lambda module, batch: losses(module, batch).detach(),
    "counted": lambda module, batch: (losses(module, batch) > 1).double(),
    "no_grad": torch.no_grad()(losses),
    "constant": lambda module, batch: torch.ones(4, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", DETACHED)
def test_what_has_no_gradient_is_read_exactly_alone(run: la.Run, kind: str) -> None:
    with pytest.raises(la.RequestError, match=r"'mine' .*gradient.*readout='exact'") as error:
        scored(method="sgd-ie", query=query(DETACHED[kind]))(run)
    one_sentence(error.value)
    exact = scored(method="sgd-ie", removals=[0, 1], query=query(DETACHED[kind]), readout="exact")(run)
    assert np.isfinite(exact.values).all()


def test_errors_of_a_function_keep_their_cause(run: la.Run) -> None:
    with pytest.raises(la.RequestError) as error:
        scored(removals=[0], query=query(NO_VALUES["wrong index"]))(run)
    assert isinstance(error.value.__cause__, IndexError)


def test_what_is_as_good_is_taken(run: la.Run, scores: la.Scores) -> None:
    expected = scored(removals=[0, 1])(run).values
    for removals in (np.array([0, 1]), torch.tensor([0, 1]), (0, 1), range(2), iter([0, 1]), [np.int32(0), torch.tensor(1)]):
        np.testing.assert_array_equal(
            scored(removals=removals, memory_gb=np.float32(2), check=np.int64(0))(run).values, expected
        )
    assert exports.ids_to_drop(scores, count=np.int64(2)) == exports.ids_to_drop(scores, count=2)
    assert torch.equal(run.parameters(np.int64(1)), run.parameters(1))  # type: ignore[arg-type]


def test_a_fraction_that_is_named_twice_counts_once(run: la.Run) -> None:
    table = cleaned(fractions=[0.1, 0.1])(run)
    assert table["method"].to_pylist() == ["sgd-ie"]


CLI = [
    *(
        ["score", "RUN", "--ray-address=null", option]
        for option in ("--check=yes", "--check=-1", "--memory-gb=.nan", "--method=x")
    ),
    *(["score", "RUN", "--ray-address=null", option] for option in ("--removals=FILE", "--removals=random:0", "--removals=x")),
    *(["score", "RUN", "--ray-address=null", "--check=0", option] for option in ("--confirm=3", "--query=x", "--top=-1")),
    ["score", "RUN", "--ray-address=nowhere"],
    ["plan", "RUN", "--workers=0"],
    ["plan", "RUN", "--memory-gb=-1"],
    ["clean", "RUN", "--fractions", "2", "--ray-address=null"],
    ["clean", "RUN", "--seeds=1", "--ray-address=null"],
    ["export", "RUN", "--scores=sgd-ie", "--ids=IDS", "--fraction=.nan"],
    ["export", "RUN", "--scores=sgd-ie"],
    ["export", "RUN", "--scores=x", "--ids=IDS"],
]


@pytest.mark.parametrize("words", CLI, ids=lambda words: " ".join(words))
def test_options_are_one_line(run: la.Run, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    la.score(run, "sgd-ie", ray_address=None, check=0)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    places = {"RUN": run.store.url, "FILE": str(tmp_path / "binary"), "IDS": str(tmp_path / "ids")}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert said.startswith("lightning-acc: ")
    assert len(said.splitlines()) == 1


RECORDER: list[dict[str, Any]] = [
    {"parameters": "x"},
    {"parameters": 3},
    *({"budget_gb": value, "parameters": "every-k"} for value in (NAN, 0, -1, "4", None)),
    *({name: value} for name in ("batch_norm", "mixed_rows", "on_error") for value in ("no", 0, None)),
]


@pytest.mark.parametrize("verb", [la.evaluate, la.plan, la.clean, la.write_report], ids=lambda verb: verb.__name__)
def test_what_is_no_run_is_one_sentence(verb: Any) -> None:
    with pytest.raises(la.RequestError, match="run=3 is no path") as error:
        verb(3)
    one_sentence(error.value)


@pytest.mark.parametrize("arguments", RECORDER, ids=repr)
def test_a_recorder_that_cannot_record_is_one_sentence(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(la.RequestError, match=r"^(parameters|budget_gb|batch_norm|mixed_rows|on_error)=") as error:
        record(tmp_path / "run", make(), recorder=arguments)
    one_sentence(error.value)


class Short(Dataset[Any]):
    """Says that it holds fewer samples than it gives."""

    def __init__(self, length: int) -> None:
        self.whole, self.length = data(), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.whole[index]


class Indices:
    def __init__(self, *indices: int) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


@pytest.mark.parametrize("indices", [range(N), [0, 1, -1, 2], [3, 10]])
def test_ids_beyond_the_length_of_the_data_set_are_refused(tmp_path: Path, indices: Any) -> None:
    loader = DataLoader(Short(10), 4, sampler=Indices(*indices))
    with pytest.raises(RecordingRefused, match=r"index (1\d|-1).*10 samples.*__len__"):
        fit(make(), loader, la.TrajectoryRecorder(tmp_path / "run"))


def test_cells_that_a_table_program_would_compute_are_text(tmp_path: Path) -> None:
    module = make()
    pl.seed_everything(0)
    recorder = la.TrajectoryRecorder(tmp_path / "run")
    trainer(recorder).fit(module, datamodule=Described())
    run = la.Run(tmp_path / "run")
    scores = la.score(run, "sgd-ie", {"=group": [0, 1], "plain": [2, 3], "a": [4]}, ray_address=None, check=0)
    exports.write_ranking_csv(run, scores, tmp_path / "groups.csv")
    with open(tmp_path / "groups.csv", newline="") as file:
        names = [row["name"] for row in csv.DictReader(list(file)[1:])]
    assert sorted(names) == ["'=group", "a", "plain"]
    exports.write_ranking_csv(run, la.score(run, "sgd-ie", ray_address=None, check=0), tmp_path / "ranking.csv")
    with open(tmp_path / "ranking.csv", newline="") as file:
        file.readline()
        rows = {int(row["sample"]): row for row in csv.DictReader(file)}
    labels = [rows[i]["label"] for i in range(12)]
    quoted = ["'=1+1", "'+cmd", "'-2+3", "'@SUM(A1)", "'\tx", "'\nx"]
    assert labels == [*quoted, "-1", "+1", "-1.5e3", "plain", "a=b", ""]
    assert {row["true_label"] for row in rows.values()} == {"'=cmd|' /C calc'!A0"}
    assert all(np.isfinite(float(row["score"])) for row in rows.values())
    assert any(row["score"].startswith("-") for row in rows.values())


def test_the_table_is_as_long_as_promised() -> None:
    count = sum(len(values) for arguments in BAD.values() for values in arguments.values())
    assert count + len(OTHERS) + len(DROPS) + len(NO_VALUES) + len(DETACHED) + len(CLI) > 120
