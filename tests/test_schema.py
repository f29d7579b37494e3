"""Records whose hashes are right and whose content is nonsense end in one sentence, before anything large is allocated."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import pytorch_lightning as pl
import safetensors.torch
import torch
from problems import N, data, make, trainer
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.judge import agreement
from lightning_acc.record import manifest as manifests
from lightning_acc.record import tables
from lightning_acc.record.store import Store, digest

STEPS, PARAMETERS, SAMPLES = (f"{folder}/000000.safetensors" for folder in ("steps", "parameters", "samples"))
QUERY, INFO = "queries/val.safetensors", "samples/info.parquet"


class Described(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(data(), 7, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(data(n=16, seed=9), 16)

    def describe_samples(self) -> dict[str, Any]:
        return {"word": [str(i) for i in range(N)]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "run"
    pl.seed_everything(1)
    trainer(la.TrajectoryRecorder(path)).fit(make(hidden=4, dropout=0.1), datamodule=Described())
    return path


@pytest.fixture
def path(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run"))


def manifest_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return content


def put(path: Path, name: str, content: bytes, **facts: Any) -> None:
    """A file with another content, its hash and the manifest's made right."""
    (path / name).write_bytes(content)
    manifest = manifest_of(path)
    manifest["files"][name].update(bytes=len(content), sha256=digest(content), **facts)
    manifests.write(Store(path), manifest)


def use(path: Path) -> None:
    """Opens the run, and reads all there is in it."""
    run = la.Run(path)
    run.sample_info()
    run.audit()
    la.score(run, "sgd-ie", ray_address=None, check=0)


def test_the_record_as_it_is_can_be_used(path: Path) -> None:
    use(path)


def at(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *inner, last = key.split(":")
        for step in inner:
            manifest = manifest[step]
        manifest[last] = value

    return change


DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no layout": (lambda m: m.pop("layout"), "it does not say layout"),
    "no status": (lambda m: m.pop("status"), "it does not say status"),
    "no files": (lambda m: m.pop("files"), "it does not say files"),
    "no optimizer": (lambda m: m["optimizer"].pop("slots"), "it does not say optimizer.slots"),
    "samples": (at("n_samples", 10**12), r"its n_samples is 1000000000000 and not a whole number from 1 to 1,000,000,000"),
    "truth for a number": (at("n_samples", True), "its n_samples is True and not a whole number"),
    "negative": (at("n_steps", -3), "its n_steps is -3"),
    "a float": (at("n_steps", 12.0), r"its n_steps is 12.0"),
    "nan": (at("n_samples", float("nan")), "its n_samples is nan"),
    "more steps": (at("n_steps", 13), "its n_steps is 13, but its files hold 12"),
    "slots": (at("optimizer:slots", 10**12), r"its optimizer.slots is 1000000000000 and not a whole number from 0 to 64"),
    "groups": (at("optimizer:group_of", [0]), "its optimizer.group_of is of 1 of 4 parameters"),
    "group": (at("optimizer:group_of", [0, 0, 0, -1]), "its optimizer.group_of is"),
    "absurd layout": (at("layout", [["net.0.weight", [10**6, 10**6]]]), "its optimizer.group_of is of 4 of 1 parameters"),
    "huge layout": (
        lambda m: m["layout"][0].__setitem__(1, [2**31, 2**31]),
        "is said to hold 13 times 4,611,686,018,427",
    ),
    "twice": (lambda m: m["layout"].__setitem__(1, m["layout"][0]), "its layout names a parameter twice|times"),
    "layout of numbers": (at("layout", [1, 2, 3, 4]), "its layout is"),
    "dtype": (at("dtype", "float99"), "its dtype is 'float99' and not one of float32, float64"),
    "precision": (at("precision", "8-true"), "its precision is '8-true'"),
    "threads": (at("threads", 10**9), "its threads is 1000000000"),
    "status": (at("status", "done"), "its status is 'done'"),
    "structure": (at("batch_structure", {"list": [{"leaf": 0}]}), "its batch_structure is"),
    "deep structure": (at("batch_structure", DEEP), "its batch_structure is"),
    "source of the loss": (at("loss:source", "pickle"), "its loss.source is 'pickle' and not one of per_sample_loss"),
    "reduction of the loss": (at("loss:reduction", "max"), "its loss.reduction is 'max' and not one of mean"),
    "loss": (at("loss:vectorised", 1), "its loss.vectorised is 1 and not true or false"),
    "module": (at("module:class", 3), "its module.class is 3 and not a text"),
    "arguments": (at("module:hyper_parameters", [1]), r"its module.hyper_parameters is \[1\]"),
    "evaluation": (at("evaluation_modules", ["nowhere"]), "is not a record of the module .*nowhere"),
    "steps backwards": (lambda m: m["files"][PARAMETERS]["steps"].reverse(), "its steps are not those of the run, in order"),
    "steps beyond": (lambda m: m["files"][PARAMETERS]["steps"].__setitem__(12, 99), "its steps are not those of the run"),
    "snapshots": (at(f"files:{PARAMETERS}:count", 10**9), r"parameters/000000.safetensors is said to hold 1,000,000,000 times"),
    "no count": (lambda m: m["files"][STEPS].pop("count"), f"of {STEPS} it does not say count"),
    "contents": (at(f"files:{SAMPLES}:count", 10**9), f"{SAMPLES} is said to hold 1,000,000,000"),
    "hash": (at(f"files:{STEPS}:sha256", "abc"), f"of {STEPS} its sha256 is 'abc'"),
    "strange name": (lambda m: m["files"].update({"steps/x.safetensors": m["files"][STEPS]}), "has no place in a run"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_makes_no_sense_is_refused(path: Path, case: str) -> None:
    change, message = MANIFESTS[case]
    manifest = manifest_of(path)
    change(manifest)
    manifests.write(Store(path), manifest)
    with pytest.raises(la.RunError, match=message) as error:
        use(path)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("ecord the run again.")


def test_json_without_an_end_is_no_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"[" * 10**6)
    with pytest.raises(la.RunError, match=r"manifest\.json is damaged: it is not the manifest of a run"):
        la.Run(path)
    (path / "manifest.json").write_bytes(b'{"x": ' * 10**5 + b"1" + b"}" * 10**5)
    with pytest.raises(la.RunError, match=r"manifest\.json is damaged: it is not the manifest of a run"):
        la.Run(path)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    def do(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name].clone()).contiguous()

    return do


def with_one(value: float, place: int = 1) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return change


FILES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "a key is missing": (STEPS, lambda t: t.pop("weights"), "it has no weights"),
    "half of the random states": (STEPS, lambda t: t.pop("rng_batches"), "it has no rng_batches"),
    "dtype": (
        STEPS,
        changed("weights", lambda w: w.float()),
        r"its weights is torch.float32 of shape \(72,\) and not",
    ),
    "shape": (STEPS, changed("sample_ids", lambda i: i[:-1]), "its contents is torch.int64 of shape"),
    "too few": (STEPS, changed("offsets", lambda o: o[:-1]), r"its offsets is torch.int64 of shape \(12,\)"),
    "backwards": (STEPS, changed("offsets", lambda o: o.flip(0)), "its offsets do not increase from 0 to 72"),
    "beyond": (STEPS, changed("offsets", with_one(2**40, -1)), "its offsets do not increase from 0 to 72"),
    "a sample that is none": (STEPS, changed("sample_ids", with_one(N)), r"its sample_ids go from 0 to 24, beyond 0 to 23"),
    "a negative sample": (STEPS, changed("sample_ids", with_one(-1)), "its sample_ids go from -1"),
    "a content that is none": (STEPS, changed("contents", with_one(2**40)), "its contents go from"),
    "an infinite weight": (STEPS, changed("weights", with_one(float("inf"))), "its weights are not all finite"),
    "batches": (STEPS, changed("batch_sizes", with_one(6)), "its batch_sizes do not add up"),
    "a random state": (STEPS, changed("rng", lambda rng: rng[:, :-1]), "its rng holds no states of a random number generator"),
    "a batch that is none": (STEPS, changed("rng_batches", with_one(99)), "its rng_batches go from"),
    "parameters of another dtype": (PARAMETERS, changed("theta", lambda t: t.long()), "its theta is torch.int64"),
    "fewer parameters": (PARAMETERS, changed("theta", lambda t: t[:, 1:]), "is said to hold 13 times 39 parameters in"),
    "more parameters": (
        PARAMETERS,
        changed("theta", lambda t: t.repeat(1, 2)),
        r"its theta is torch.float64 of shape \(13, 78\)",
    ),
    "no number": (PARAMETERS, changed("theta", with_one(float("nan"))), "its theta is not all finite"),
    "a content twice": (SAMPLES, changed("#", with_one(0)), "do not number the contents from 0"),
    "a number too large": (SAMPLES, changed("#", with_one(24)), "do not number the contents from 0"),
    "other leaves": (SAMPLES, lambda t: t.update(x=t.pop("0")), r"its leaves are \['1', 'x'\] and not \['0', '1'\]"),
    "a shorter leaf": (SAMPLES, changed("0", lambda x: x[1:]), "its leaves are of different numbers of samples"),
    "labels beyond": (SAMPLES, changed("1", with_one(77)), r"fails on the batches of step \d+: IndexError"),
    "features of another width": (SAMPLES, changed("0", lambda x: x[:, 1:]), "fails on the batches of step 0: RuntimeError"),
    "a query without a leaf": (QUERY, lambda t: t.pop("0:1"), r"of batch 0 its leaves are \['0'\] and not \['0', '1'\]"),
    "a query of other batches": (QUERY, lambda t: t.update({"9:0": t.pop("0:0")}), "its '9:0' is of none of its 1 batches"),
    "a query's labels": (QUERY, changed("0:1", with_one(77)), "The query 'val' cannot be evaluated .IndexError"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_makes_no_sense_is_refused(path: Path, case: str) -> None:
    name, change, message = FILES[case]
    content = (path / name).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = safetensors.torch.load(content)
    change(tensors)
    put(path, name, safetensors.torch.save(tensors, header.get("__metadata__")))
    with pytest.raises(la.InfluenceError, match=message) as error:
        use(path)
    assert "\n" not in str(error.value)


METADATA = {
    "[]": "its groups are no list of 12 lists",
    "{": "Expecting",
    "[[{}]]": "its groups are no list of 12 lists",
    "[" * 10**5: "it is nested too deeply",
    json.dumps([[{"lr": 0.2}]] * 12): "of its groups it does not say step",
    json.dumps([[7]] * 12): "its groups are .* and not hyper-parameters",
}


@pytest.mark.parametrize("text", METADATA, ids=range(len(METADATA)))
def test_groups_that_make_no_sense_are_refused(path: Path, text: str) -> None:
    put(path, STEPS, safetensors.torch.save(safetensors.torch.load((path / STEPS).read_bytes()), {"groups": text}))
    with pytest.raises(la.RunError, match=METADATA[text]):
        use(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": float("nan")}, "of its groups its lr is nan and not null, truth values, texts and finite numbers"),
        ({"lr": None}, "cannot be used"),
        ({"lr": "fast"}, "cannot be used"),
        ({"momentum": 0.9}, "need 1 slots, but the record has 0"),
        ({"dtypes": {"lr": "int8"}}, "its dtypes is"),
        ({"dtypes": {"speed": "float32"}}, "cannot be used"),
        ({"step": 0}, "its step is 0"),
        ({"gradient_clip_algorithm": "none"}, "its gradient_clip_algorithm is 'none'"),
        ({"gradient_clip_val": float("nan")}, "its gradient_clip_val is nan"),
        ({"gradient_clip_val": [1]}, "its gradient_clip_val is"),
    ],
)
def test_hyper_parameters_that_no_optimizer_takes_are_refused(path: Path, changes: dict[str, Any], message: str) -> None:
    content = (path / STEPS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    groups = json.loads(header["__metadata__"]["groups"])
    groups[3][0].update(changes)
    put(path, STEPS, safetensors.torch.save(safetensors.torch.load(content), {"groups": json.dumps(groups)}))
    with pytest.raises(la.RunError, match=message):
        use(path)


def parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, buffer, **options)
    return bytes(buffer.getvalue().to_pybytes())


def repeated(word: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([word]))


def test_descriptions_of_other_samples_are_refused(path: Path) -> None:
    put(path, INFO, parquet(pa.table({"word": ["x"] * (N + 1)})))
    with pytest.raises(la.RunError, match=r"info\.parquet is none of a run: it has 25 rows and not 24"):
        la.Run(path).sample_info()
    put(path, INFO, b"PAR1" + b"x" * 50 + b"PAR1")
    with pytest.raises(la.RunError, match=r"info\.parquet is none of a run: no table"):
        la.Run(path).sample_info()


BOMBS = {
    "a word for all": lambda: pa.table({"word": repeated("x" * 10**6, 10**5)}),  # 100 GB
    "numbers": lambda: pa.table({f"x{i}": pa.array(np.zeros(10**6, np.int8)) for i in range(100)}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_tables_that_unpack_without_end_are_refused_packed(bomb: str) -> None:
    with pytest.raises(ValueError, match=r"its [\d,]+ bytes unpack to [\d,]+"):
        tables.read(parquet(BOMBS[bomb](), store_schema=False))
    honest = pa.table({"word": ["cat", "dog"] * 10**5, "picture": [os.urandom(10)] * 2 * 10**5})
    assert tables.read(parquet(honest)).equals(honest)


IRREGULAR: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", IRREGULAR)
@pytest.mark.parametrize("name", ["manifest.json", STEPS, "scores/sgd-ie.parquet", "evaluation.json", "queries/more.json"])
def test_what_is_no_file_is_not_read(path: Path, name: str, what: str) -> None:
    la.Run(path).add_query("more", [tuple(data(n=5).tensors)])
    for method in ("loo", "sgd-ie"):
        la.score(path, method, ray_address=None, check=0)
    la.evaluate(path)
    (path / name).unlink()
    IRREGULAR[what](path / name)
    if what == "directory" and name.startswith(("scores", "queries")):
        return  # nothing tells of a result that is not there

    def read() -> None:
        run = la.Run(path)
        run.query("more")
        agreement.read(run)
        la.evaluate(run)

    with pytest.raises(la.RunError, match=rf"{name} is no regular file"):
        read()


def test_a_file_that_has_grown_is_refused_unread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = la.Run(path)
    with open(path / STEPS, "ab") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(la.RunError, match=rf"{STEPS} has 1,099,511,627,776 bytes and not"):
        len(run.steps[0].sample_ids)


def test_opening_reads_the_manifest_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Store.read

    def noted(self: Store, name: str, *arguments: Any) -> bytes:
        read.append(name)
        return original(self, name, *arguments)

    monkeypatch.setattr(Store, "read", noted)
    la.Run(path)
    assert read == ["manifest.json"]


def test_a_run_in_the_making_lacks_what_is_known_at_the_end(path: Path) -> None:
    manifest = manifest_of(path)
    for key in ("n_steps", "stopped"):
        manifest.pop(key)
    manifests.write(Store(path), {**manifest, "status": "recording"})
    assert manifests.read(Store(path), unfinished=True)["status"] == "recording"
    with pytest.raises(la.RunError, match="half written"):
        la.Run(path)


def test_a_module_of_other_shapes_is_told(path: Path) -> None:
    with pytest.raises(
        la.RunError, match=r"its parameter 'net.0.weight' is of shape \(5, 5\), the recorded one of shape \(4, 5\)"
    ):
        la.Run(path, module=make(hidden=5)).audit()


def test_an_error_of_the_users_own_function_stays_one(path: Path) -> None:
    def fails(module: torch.nn.Module, batch: Any) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(la.RequestError, match="The query 'own' cannot be evaluated") as error:
        la.score(path, "loo", [0], la.Query("own", [tuple(data(n=5).tensors)], fails), ray_address=None, check=0)
    assert isinstance(error.value.__cause__, KeyError)


def test_the_schema_knows_what_the_replay_knows() -> None:
    from lightning_acc.core.modules.precision import PRECISIONS
    from lightning_acc.record.schema import keys

    assert set(keys.PRECISIONS) == set(PRECISIONS)
