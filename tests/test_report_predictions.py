"""Which samples made a prediction: what is recorded of the examples, what the page embeds of a matrix, and the browser."""

from __future__ import annotations

import base64
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import pytorch_lightning as pl
import torch
from problems import Data, data, make, record, trainer
from test_report import NASTY, NASTY_LABEL, Browser, started  # noqa: F401 (a fixture)
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.judge import samples
from lightning_acc.record import manifest as manifests
from lightning_acc.record.store import Store, digest
from lightning_acc.scoring.matrices import matrix as matrices
from lightning_acc.show import predictions as shown
from lightning_acc.show import report
from lightning_acc.show.report import predictions
from lightning_acc.studies.data import DigitsDataModule
from lightning_acc.studies.data.base import png
from lightning_acc.studies.models import Classifier

EXAMPLES = 40
STORED = {"sgd-ie": 18, "tracin": 0}
"""Matrices of the run, and how many removals each is checked with."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    path = tmp_path_factory.mktemp("predictions") / "digits"
    pl.seed_everything(1)
    digits = DigitsDataModule(n_train=80, n_val=EXAMPLES, batch_size=20, label_noise=0.2, val_label_noise=True)
    fitting = trainer(la.TrajectoryRecorder(path), precision="32-true", max_epochs=6)
    fitting.fit(Classifier(64, 10, hidden=(6,), lr=0.3), datamodule=digits)
    run = la.Run(path)
    la.score(run, "sgd-ie", removals=range(10), ray_address=None, check=0)
    for method, check in STORED.items():
        la.score_matrix(run, method, ray_address=None, check=check)
    return run


def content_of(page: Path) -> dict[str, Any]:
    """What is embedded in a page, read from its HTML."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


@pytest.fixture(scope="module")
def page(run: la.Run) -> Path:
    return Path(report.write_report(run))


def losses_of(run: la.Run) -> np.ndarray:
    from lightning_acc.core.replay import Replay

    values = run.query("val").values(Replay(run).objective, run.parameters(run.n_steps)[None], each=True)
    return np.asarray(values[0].double().numpy())


def near(run: la.Run, example: int, name: str = "sgd-ie") -> list[list[int]]:
    stored = matrices.read(run.store, name, run.n_samples)
    found = []
    for (removals, scores), sign in ((stored.helpful(example, 5), 1), (stored.harmful(example, 5), -1)):
        found.append([i for (i,), score in zip(removals, scores.tolist(), strict=True) if score * sign > 0])
    return found


def test_what_is_embedded_is_what_the_matrix_says(run: la.Run, page: Path) -> None:
    content, losses = content_of(page), losses_of(run)
    own = content["predictions"]
    # The estimates, the more faithful first, then the truth, which was computed for the check.
    assert [entry["name"] for entry in own["matrices"]][:2] == ["sgd-ie", "tracin"]
    assert [entry["truth"] for entry in own["matrices"]] == [False, False, True]
    for entry in own["matrices"]:
        stored = matrices.read(run.store, entry["name"], run.n_samples)
        assert entry["conditions"] == {key: stored.conditions[key] for key in ("method", "query", "at", "readout", "dtype")}
        assert f"{entry['verdict']['word']}: {entry['verdict']['text']}" == str(stored.verdict)
        assert (entry["removals"], entry["total"], entry["pictured"]) == (len(stored.removals), EXAMPLES, EXAMPLES)
        assert entry["numbers"] == sorted(range(EXAMPLES), key=lambda example: -losses[example])
        for number, row in zip(entry["numbers"], entry["rows"], strict=True):
            assert [row[0], row[2]] == near(run, number, entry["name"])
            for embedded, scores in (row[:2], row[2:]):
                rows = [stored.removals.index((i,)) for i in embedded]
                assert scores == pytest.approx(stored.of(number)[rows].tolist(), rel=5e-3)
    assert own["matrices"][0]["verdict"]["text"].startswith("Spearman")
    assert own["matrices"][1]["verdict"]["word"] == "unchecked"
    assert own["matrices"][1]["verdict"]["text"]


def test_examples_and_samples_stand_there_as_they_were_described(run: la.Run, page: Path) -> None:
    content, losses = content_of(page), losses_of(run)
    digits = DigitsDataModule(n_train=80, n_val=EXAMPLES, batch_size=20, label_noise=0.2, val_label_noise=True)
    digits.setup()
    told, trained = digits.describe_examples("val"), digits.describe_samples()
    assert told is not None
    assert 0 < sum(told["corrupted"]) < EXAMPLES
    assert run.example_info("val") == pa.table(told)
    for number in range(EXAMPLES):
        one = content["predictions"]["examples"][0][str(number)]
        assert base64.b64decode(one["image"].partition(",")[2]) == told["image"][number]
        assert one["label"] == told["label"][number]
        assert one.get("corrupted", False) == told["corrupted"][number]
        assert one.get("true_label", one["label"]) == told["true_label"][number]
        assert one["loss"] == pytest.approx(losses[number], rel=5e-3)
        if "said" in one:
            assert one["said"] in set(digits.class_names) - {one["label"]}
            assert losses[number] > np.log(2) - 1e-6  # another class is likelier
        else:
            assert losses[number] < np.log(10)
    entries = content["predictions"]["matrices"]
    needed = {what for entry in entries for row in entry["rows"] for what in (*row[0], *row[2])}
    assert len(needed) > 20
    labels = next(column for column in content["columns"] if column["key"] == "label")
    for sample in needed:
        one = content["samples"][str(sample)]
        assert base64.b64decode(one["image"].partition(",")[2]) == trained["image"][sample]
        assert labels["levels"][labels["codes"][sample]] == trained["label"][sample]
    pictures = re.findall(r"data:image/png;base64,[^\"]+", page.read_text())
    described = [*content["samples"].values(), *content["predictions"]["examples"][0].values()]
    assert sorted(pictures) == sorted(one["image"] for one in described)  # each once, however often it is shown


def test_where_there_is_no_room_the_worst_keep_their_pictures(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    content = report.collect(run)["predictions"]
    assert len(json.dumps(content)) < predictions.BYTES
    monkeypatch.setattr(predictions, "FIRST", 4)
    monkeypatch.setattr(predictions, "ROWS_BYTES", 4_000)
    monkeypatch.setattr(predictions, "BYTES", 10_000)
    whole = report.collect(run)
    small = whole["predictions"]
    first = small["matrices"][0]
    assert 4 < len(first["numbers"]) < EXAMPLES == first["total"]
    assert first["numbers"] == content["matrices"][0]["numbers"][: len(first["numbers"])]
    assert 0 < first["pictured"] < len(first["numbers"])
    pictured = [number for number in first["numbers"] if "image" in small["examples"][0][number]]
    assert pictured[:2] == first["numbers"][:2]
    labels = next(column for column in whole["columns"] if column["key"] == "label")
    assert len(labels["codes"]) == run.n_samples
    added = {i: one for i, one in whole["samples"].items() if i >= 10}
    assert len(json.dumps(small)) + len(json.dumps(added)) < 16_000


@pytest.fixture
def browser(started: Browser, page: Path) -> Iterator[Browser]:  # noqa: F811 (the fixture)
    started.complaints.clear()
    started.requests.clear()
    started.open(page)
    yield started
    assert started.complaints == []
    assert [url for url in started.requests if not url.startswith(("file:", "data:"))] == []


PICKED = "Number(document.querySelector('#predictions [aria-selected=true]').dataset.example)"
NEAR = """[...document.querySelectorAll('#predictions .near')].map(box => [...box.children].map(
  card => Number([...card.children].map(line => line.textContent.match(/#(\\d+)$/)).find(found => found)[1])))"""


def test_an_example_that_is_picked_shows_its_samples(run: la.Run, browser: Browser) -> None:
    order = sorted(range(EXAMPLES), key=lambda example: -losses_of(run)[example])
    assert browser.see("document.querySelector('#predictions').hidden") is False
    assert browser.see("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))").count("#predictions") == 1
    assert (browser.see(PICKED), browser.see(NEAR)) == (order[0], near(run, order[0]))
    assert browser.see("location.hash") == ""  # nobody picked anything yet
    browser.click(f"#predictions [data-example='{order[2]}']")
    assert (browser.see(PICKED), browser.see(NEAR)) == (order[2], near(run, order[2]))
    assert browser.see("location.hash") == f"#prediction={order[2]}"
    assert browser.see("document.querySelector('#predictions input').value") == str(order[2])
    assert browser.see("document.querySelectorAll('#predictions [aria-selected=true]').length") == 1
    text = browser.see("document.querySelector('#predictions .example').textContent")
    assert f"Example #{order[2]}" in text
    assert f"loss {losses_of(run)[order[2]]:.3}"[:8] in text
    assert "number 3 of 40 from the highest" in text
    assert browser.see("document.querySelector('#predictions .example img').naturalWidth") == 8
    assert browser.see("[...document.querySelectorAll('#predictions .near img')].every(image => image.naturalWidth === 8)")


def test_the_keyboard_steps_through_the_examples(run: la.Run, browser: Browser) -> None:
    order = sorted(range(EXAMPLES), key=lambda example: -losses_of(run)[example])
    browser.see("document.querySelector('#predictions .list').focus()")
    for key, place in (("ArrowDown", 1), ("ArrowRight", 2), ("ArrowUp", 1), ("End", 39), ("ArrowDown", 39), ("Home", 0)):
        browser.press(key)
        assert browser.see(PICKED) == order[place]
        assert browser.see(NEAR) == near(run, order[place])
        assert browser.see("location.hash") == f"#prediction={order[place]}"
        active = "document.querySelector('#predictions .list').getAttribute('aria-activedescendant')"
        assert browser.see(active) == f"example-{place}"
        assert f"Example #{order[place]}" in browser.see("document.querySelector('#said').textContent")
        inside = """((list, item) => item.top >= list.top - 1 && item.bottom <= list.bottom + 1)(
          document.querySelector('#predictions .list').getBoundingClientRect(),
          document.querySelector('#predictions [aria-selected=true]').getBoundingClientRect())"""
        assert browser.see(inside)


def change(browser: Browser, selector: str, value: str) -> None:
    """Choose or enter a value."""
    box = f"document.querySelector('#predictions {selector}')"
    browser.see(f"(box => {{ box.value = '{value}'; box.dispatchEvent(new Event('change')); }})({box})")


def test_any_example_is_found_by_its_number(run: la.Run, browser: Browser) -> None:
    for number in (17, 0, 39):
        change(browser, "input", str(number))
        assert (browser.see(PICKED), browser.see(NEAR)) == (number, near(run, number))
    change(browser, "input", "40")
    assert browser.see("document.querySelector('#predictions [role=status]').textContent") == "is not here"
    assert browser.see(PICKED) == 39


def test_a_link_names_the_example_and_the_matrix(run: la.Run, page: Path, browser: Browser) -> None:
    def follow(part: str) -> None:
        browser.call("Page.navigate", url="about:blank")
        browser.call("Page.navigate", url=page.as_uri() + part)
        while browser.see("document.readyState") != "complete" or browser.see("location.protocol") != "file:":
            pass

    follow("#prediction=23&by=tracin")
    assert (browser.see(PICKED), browser.see(NEAR)) == (23, near(run, 23, "tracin"))
    assert browser.see("scrollY") > 100
    verdict = "document.querySelector('#predictions .verdict').textContent"
    assert browser.see(verdict).startswith("unchecked ")
    follow("#prediction=999&by=nothing")
    assert browser.see(NEAR) == near(run, browser.see(PICKED))
    follow("#prediction=5")
    assert (browser.see(PICKED), browser.see(NEAR)) == (5, near(run, 5))
    assert "Spearman" in browser.see(verdict)
    browser.see("location.hash = '#prediction=6'")
    browser.see("new Promise(done => setTimeout(done, 50))")
    assert browser.see(PICKED) == 6
    # Another matrix keeps the example, and says so in the link.
    change(browser, "select", "1")
    assert (browser.see(PICKED), browser.see(NEAR)) == (6, near(run, 6, "tracin"))
    assert browser.see("location.hash") == "#prediction=6&by=tracin"


@pytest.mark.parametrize("dark", [False, True])
def test_narrow_and_dark_are_readable(page: Path, browser: Browser, dark: bool) -> None:
    for width in (1280, 400):
        browser.open(page, width, dark)
        assert browser.see("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        boxes = "[...document.querySelectorAll('#predictions > *, .picked > *, .near > *')]"
        wrong = f"{boxes}.map(one => one.getBoundingClientRect()).filter(box => box.right > innerWidth || box.width < 40)"
        assert browser.see(f"{wrong}.length") == 0
    assert browser.see("[...document.querySelectorAll('select, input')].every(box => box.labels.length === 1 || box.ariaLabel)")


class Nasty(Data):
    """Texts and labels that try to break out of the page."""

    def describe_samples(self) -> dict[str, Any]:
        return {"text": [f"{NASTY} {i}" for i in range(24)], "label": [NASTY_LABEL] * 24}

    def describe_examples(self, query: str) -> dict[str, Any] | None:
        assert query == "val"
        texts = [f"{NASTY} of {i}" for i in range(16)]
        return {"text": texts, "label": [NASTY_LABEL] * 16, "image": [b"<svg onload=alert(1)>"] * 16}


def recorded(path: Path, module: pl.LightningDataModule, **options: Any) -> la.Run:
    pl.seed_everything(1)
    trainer(la.TrajectoryRecorder(path), **options).fit(make(hidden=4), datamodule=module)
    return la.Run(path)


def test_what_was_described_is_text_and_nothing_else(started: Browser, tmp_path: Path) -> None:  # noqa: F811
    run = recorded(tmp_path / "run", Nasty())
    run.add_query("more", DataLoader(data(n=6, seed=8), 4))
    assert run.example_info("more") is None
    la.score(run, "sgd-ie", ray_address=None, check=0)
    la.score_matrix(run, "sgd-ie", ray_address=None, check=0)
    la.score_matrix(run, "sgd-ie", "more", [4, 1], removals=[[3, 5], [7]], ray_address=None, check=0)
    page = Path(report.write_report(run))
    assert NASTY not in page.read_text()
    started.complaints.clear()
    started.open(page)
    number = started.see(PICKED)
    text = started.see("document.querySelector('#predictions .example').textContent")
    assert f"{NASTY} of {number}" in text
    assert NASTY_LABEL in text
    assert started.see("document.querySelectorAll('#predictions script, #predictions img, #predictions b b').length") == 0
    change(started, "select", "1")
    assert started.see("[...document.querySelectorAll('#predictions [role=option]')].length") == 2
    cards = started.see("[...document.querySelectorAll('#predictions .near > *')].map(card => card.textContent)")
    assert any("2 samples removed together#3 #5" in card for card in cards)
    # Of examples that nobody described the numbers are shown.
    seen = started.see("document.querySelector('#predictions .example').textContent")
    x, y = data(n=6, seed=8)[started.see(PICKED)]
    assert ", ".join(f"{value:.3g}" for value in x.tolist()) in seen
    assert f"label {int(y)}" in seen
    assert started.complaints == []


def test_a_run_without_a_matrix_has_no_such_section(started: Browser, tmp_path: Path) -> None:  # noqa: F811
    run = record(tmp_path / "run", make())
    la.score(run, "sgd-ie", ray_address=None, check=0)
    assert report.collect(run)["predictions"] is None
    started.complaints.clear()
    started.open(Path(report.write_report(run)))
    assert started.see("document.querySelector('#predictions').hidden") is True
    assert started.see("document.querySelectorAll('nav a[href=\"#predictions\"]').length") == 0
    assert started.complaints == []


def test_a_matrix_of_another_question_is_shown_by_number(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    la.score(run, "sgd-ie", ray_address=None, check=0)
    x, y = data(n=5, seed=9).tensors
    la.score_matrix(run, "sgd-ie", la.Query("val", [(x, y)]), ray_address=None, check=0)
    own = report.collect(run)["predictions"]
    (entry,) = own["matrices"]
    assert not entry["losses"]
    assert entry["missing"].startswith("The query val is not stored with the run")
    stored = matrices.read(run.store, entry["name"], run.n_samples)
    assert entry["numbers"] == sorted(range(5), key=lambda example: -np.abs(stored.of(example)).max())
    # A matrix of another record is left out, and so are the blocks of one that is not finished.
    for name, conditions in (("part-x-y", stored.conditions), ("other", {**stored.conditions, "manifest_hash": "f" * 64})):
        matrices.write(run.store, name, la.ScoreMatrix(stored.removals, stored.examples, conditions, stored.values.T))
    assert list(shown.stored_matrices(run)) == [entry["name"]]


def test_examples_that_nobody_described_are_what_the_model_sees(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make())
    assert run.example_info("val") is None
    images = np.random.default_rng(0).random((3, 2, 3, 5, 6), dtype=np.float32)
    query = la.Query("images", [(torch.from_numpy(batch), torch.tensor([7, 8])) for batch in images])
    views = samples.ExampleViews(run, query)
    for number in range(6):
        view = views[number]
        picture = samples.opened_picture(view.image or b"")
        assert picture is not None
        assert picture.size == (6, 5)
        pixels = images[number // 2, number % 2]
        expected = ((pixels - pixels.min()) / np.ptp(pixels)).transpose(1, 2, 0)
        np.testing.assert_allclose(np.array(picture) / 255, expected, atol=0.005)
        assert view.label == str(7 + number % 2)


class Failing(Data):
    """Tells of its examples in a way that cannot be recorded."""

    def __init__(self, tell: Callable[[], Any]) -> None:
        super().__init__()
        self.tell = tell

    def describe_examples(self, query: str) -> Any:
        np.random.rand()
        return self.tell()


def _raise() -> Any:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("tell", "message"),
    [
        (_raise, "KeyError: 'no such thing'"),
        (lambda: {"label": ["a"] * 15}, "it gives 15 rows for 16 examples"),
        (lambda: {"label": ["a"], "text": ["b", "c"]}, "ArrowInvalid"),
        (lambda: 7, "describe_examples"),
    ],
)
def test_a_description_that_fails_costs_neither_training_nor_record(tmp_path: Path, tell: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=re.escape(message)):
        run = recorded(tmp_path / "run", Failing(tell))
    plain = recorded(tmp_path / "plain", Data())
    assert run.example_info("val") is None
    assert run.parameters(run.n_steps).equal(plain.parameters(plain.n_steps))
    assert run.query_names() == ["val"]


def test_of_a_limited_validation_the_first_examples_are_described(tmp_path: Path) -> None:
    class Batches(Nasty):
        def val_dataloader(self) -> Any:
            return DataLoader(data(n=16, seed=9), 8)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
        run = recorded(tmp_path / "run", Batches(), limit_val_batches=1)
    info = run.example_info("val")
    assert info is not None
    assert info["text"].to_pylist() == [f"{NASTY} of {i}" for i in range(8)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"label": ["x"] * 17}), "it has 17 rows and not 16"),
        (pa.table({"../x": ["x"] * 16}), "has a column '../x', which is a path"),
        (None, "no table"),
    ],
)
def test_a_description_of_others_is_refused(tmp_path: Path, table: pa.Table | None, message: str) -> None:
    run = recorded(tmp_path / "run", Nasty())
    name = "queries/val.info.parquet"
    buffer = pa.BufferOutputStream()
    if table is not None:
        pa.parquet.write_table(table, buffer)
    content = buffer.getvalue().to_pybytes()
    path = tmp_path / "run"
    (path / name).write_bytes(content)
    with pytest.raises(la.RunError, match=r"val\.info\.parquet"):
        la.Run(path).example_info("val")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name].update(bytes=len(content), sha256=digest(content))
    manifests.write(Store(path), manifest)
    with pytest.raises(la.RunError, match=message):
        la.Run(path).example_info("val")
    assert name in manifests.own_files(run.store)[0]  # overwriting the run deletes it too


def test_a_picture_in_a_description_is_seen_as_it_is(tmp_path: Path) -> None:
    image = png(np.zeros((8, 8)))
    view = samples._described(0, {"image": [image], "label": [3], "corrupted": ["yes"]})
    assert (view.image, view.label, view.corrupted) == (image, "3", None)
