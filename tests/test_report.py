"""The report page in a real browser, and what a ranking is exported to."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import select as ready_files
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from problems import data, make, record, trainer
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.core import queries
from lightning_acc.core.replay import Replay, parameters_at
from lightning_acc.errors import RequestError
from lightning_acc.judge import cleaning_table, exports
from lightning_acc.judge.agreement import stored_scores
from lightning_acc.scoring import scores
from lightning_acc.scoring.selection import select
from lightning_acc.show import report
from lightning_acc.show.headline import headline
from lightning_acc.show.report import samples
from lightning_acc.show.tracking import dashboard
from lightning_acc.studies.data.base import png

N = 60
NASTY = '</script><script>alert(1)</script><img src=x onerror="alert(1)"><!-- &quot;'
NASTY_LABEL = "<b>bold</b>"
CITIES = ("Bergen", "<i>Oslo</i>", "=1+1")


class Browser:
    """A headless Chromium, spoken to through its DevTools pipe."""

    def __init__(self, executable: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        adopt = (
            "import fcntl, os, sys\n"
            "fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]\n"
            "os.dup2(fds[0], 3); os.dup2(fds[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
        )
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", adopt, str(to_browser), str(from_browser), executable, *options],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._count = b"", 0
        self._session: str | None = None
        self.complaints: list[Any] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser and wait for it."""
        self._session = None
        self.call("Browser.close")
        self._process.wait(30)
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a DevTools command; what the page complains about meanwhile is kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = ready_files.select([self._in], [], [], 60)
            assert ready, "the browser says nothing"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        name = message.get("method")
        if name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(message["params"])
        if name == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def open(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        """Load the page from nothing, in a window of this width."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        while self.see("document.readyState") != "complete" or self.see("location.protocol") != "file:":
            pass

    def see(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector: str, shift: bool = False) -> None:
        """Click the middle of an element, as a person would."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, modifiers=8 if shift else 0)

    def point(self, selector: str) -> None:
        """Move the pointer to the middle of an element."""
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def place(self, selector: str) -> tuple[float, float]:
        """Where the middle of an element is in the window, after scrolling to it."""
        self.see(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        # Scrolling is told to the page with the next frame.
        self.see("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")
        element = f"document.querySelector({json.dumps(selector)})"
        box = self.see(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())")
        return float(box[0]), float(box[1])

    def press(self, key: str, shift: bool = False) -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 if shift else 0)

    def type(self, selector: str, text: str) -> None:
        """Write into a box what a person would, in the place of what is there."""
        self.see(f"(box => {{ box.focus(); box.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)
        self.see("new Promise(done => setTimeout(done, 200))")  # the page waits for the next letter

    def downloaded(self, button: str, folder: Path, name: str) -> str:
        """What is in the file that a button gives."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        (folder / name).unlink(missing_ok=True)
        self.click(button)
        for _ in range(200):
            if (folder / name).exists():
                return (folder / name).read_text()
            self.see("new Promise(done => setTimeout(done, 20))")
        raise AssertionError(f"{button} gave no {name}")

    def copied(self, button: str, first: str = "") -> str:
        """What a button puts on the clipboard, after this JavaScript."""
        self.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # a page that nobody looks at may not read it
        self.see("navigator.clipboard.writeText('what was there before')")
        self.see(first)
        self.click(button)
        self.see("new Promise(done => setTimeout(done, 100))")
        return str(self.see("navigator.clipboard.readText()"))


class Described(pl.LightningDataModule):
    """60 samples with pictures, labels of which some are known to be wrong, and texts that try to break out of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.train, self.val = data(n=N), data(n=16, seed=9)
        self.labels = [NASTY_LABEL if int(y) == 0 else f"class {int(y)}" for _, y in self.train]
        self.corrupted = [i % 6 == 0 for i in range(N)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, 10, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, 16)

    def describe_samples(self) -> dict[str, Any]:
        return {
            "image": [png(np.full((8, 8), i / N)) for i in range(N)],
            "text": [f"{NASTY} {i}" for i in range(N)],
            "label": self.labels,
            "true_label": ["class 7" if wrong else label for label, wrong in zip(self.labels, self.corrupted, strict=True)],
            "corrupted": self.corrupted,
            "age": [None if i == 7 else 20 + i % 40 for i in range(N)],
            "city": [CITIES[i % 3] for i in range(N)],
            "score": [[i, i + 1] for i in range(N)],  # the name of another column, and no value for a cell
        }


def removal_curves(accuracy: bool = True) -> pa.Table:
    rows = []
    for i, (method, fraction) in enumerate([("none", 0.0), *((m, f) for m in ("random", "acc-sgd-ie") for f in (0.1, 0.2))]):
        row = {"method": method, "fraction": fraction, "n_removed": round(N * fraction), "seeds": 5}
        for figure, value in {"accuracy": 0.8 + 0.02 * i, "loss": 0.5 - 0.02 * i, "gain": 0.02 * i}.items():
            if accuracy or figure != "accuracy":
                row.update({figure: value, f"{figure}_low": value - 0.015, f"{figure}_high": value + 0.015})
        rows.append({**row, "test": "held out"})
    return pa.Table.from_pylist(rows, schema=cleaning_table.SCHEMA)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    path = tmp_path_factory.mktemp("report") / "a & <b>run"
    pl.seed_everything(1)
    trainer(la.TrajectoryRecorder(path)).fit(make(hidden=4), datamodule=Described())
    run = la.Run(path)
    for method in ("loo", "acc-sgd-ie", "sgd-ie"):
        la.score(run, method, ray_address=None, check=0)
    cleaning_table.write(run, removal_curves())
    return run


@pytest.fixture(scope="module")
def page(run: la.Run) -> Path:
    return Path(report.write_report(run, over_time=2))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no browser on this machine")
    browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(started: Browser, page: Path) -> Iterator[Browser]:
    """The page, opened anew; it must neither complain nor load anything."""
    started.complaints.clear()
    started.requests.clear()
    started.open(page)
    yield started
    assert started.complaints == []
    assert [url for url in started.requests if not url.startswith(("file:", "data:"))] == []


ROWS = "[...document.querySelectorAll('#rows tbody tr[data-sample]')].map(row => Number(row.dataset.sample))"
FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))"


def by_sample(run: la.Run, method: str) -> dict[int, float]:
    table = scores.read(run.store, method)
    return {removal[0]: value for removal, value in table.by_removal().items()}


def choose(browser: Browser, selector: str, value: str) -> None:
    browser.see(
        f"(box => {{ box.value = {json.dumps(value)}; box.dispatchEvent(new Event('change')); }})"
        f"(document.querySelector({json.dumps(selector)}))"
    )


def whole_ranking(browser: Browser) -> list[int]:
    """The samples of the table, screen after screen."""
    found: dict[int, int] = {}
    here = "[...document.querySelectorAll('#rows tbody tr[data-sample]')].map(row => [row.ariaRowIndex, row.dataset.sample])"
    browser.see("document.querySelector('#sheet').scrollTop = 0")
    while True:
        browser.see(FRAMES)
        found.update((int(place) - 2, int(sample)) for place, sample in browser.see(here))
        if browser.see("(box => box.scrollTop + box.clientHeight >= box.scrollHeight - 1)(document.querySelector('#sheet'))"):
            assert sorted(found) == list(range(len(found)))
            assert browser.see("document.querySelector('#rows').getAttribute('aria-rowcount')") == str(len(found) + 1)
            return [found[place] for place in sorted(found)]
        browser.see("document.querySelector('#sheet').scrollBy(0, 300)")


def test_the_headline_stands_at_the_top(run: la.Run, page: Path) -> None:
    said = str(headline(run))
    assert f'<p class="said">{said[0].upper()}{said[1:]}.</p>' in page.read_text()


def test_headings_sort_and_all_rows_are_reached_by_scrolling(run: la.Run, browser: Browser) -> None:
    choose(browser, "#method", "1")  # acc-sgd-ie
    estimate, truth = by_sample(run, "acc-sgd-ie"), by_sample(run, "loo")
    ranked = sorted(estimate, key=lambda sample: estimate[sample])
    assert browser.see(ROWS) == ranked[: len(browser.see(ROWS))]
    assert len(browser.see(ROWS)) < N  # rows out of sight are not made
    assert whole_ranking(browser) == ranked
    sort = "document.querySelector('#rows th[data-key=\"{}\"]').getAttribute('aria-sort')"
    age = {i: -1 if i == 7 else 20 + i % 40 for i in range(N)}
    by_age = sorted(ranked, key=lambda i: (i == 7, age[i])), sorted(ranked, key=lambda i: (i == 7, -age[i]))
    by_truth = sorted(truth, key=lambda i: truth[i])
    orders = {"@score": (ranked, ranked[::-1]), "@truth": (by_truth, by_truth[::-1]), "age": by_age}
    for key, (up, down) in {**orders, "@id": (sorted(truth), sorted(truth)[::-1])}.items():
        assert browser.see(sort.format(key)) is None
        for word, order in (("ascending", up), ("descending", down)):
            browser.click(f"#rows th[data-key='{key}'] button")
            assert browser.see(sort.format(key)) == word
            assert whole_ranking(browser) == order
    choose(browser, "#method", "0")  # the truth itself has no such column
    assert browser.see("document.querySelector('#rows th[data-key=\"@truth\"]')") is None


def add_filter(browser: Browser, column: str) -> str:
    """Filter by a column; the box to fill in."""
    choose(browser, "#by", column)
    return f"#filters [data-column='{column}']"


def test_any_column_filters_and_words_are_found(run: la.Run, browser: Browser) -> None:
    truth = by_sample(run, "loo")
    ranked = sorted(truth, key=lambda sample: truth[sample])
    labels = Described().labels
    corrupted = add_filter(browser, "corrupted")
    choose(browser, corrupted, "=yes")
    assert whole_ranking(browser) == [i for i in ranked if i % 6 == 0]
    browser.click("#harmful")
    assert whole_ranking(browser) == [i for i in ranked if i % 6 == 0 and truth[i] < 0]
    choose(browser, corrupted, "")
    assert whole_ranking(browser) == [i for i in ranked if truth[i] < 0]
    browser.click("#harmful")
    choose(browser, "#filters [data-column=label]", "=" + NASTY_LABEL)
    assert whole_ranking(browser) == [i for i in ranked if labels[i] == NASTY_LABEL]
    choose(browser, "#filters [data-column=label]", "")
    choose(browser, add_filter(browser, "city"), "=" + CITIES[1])
    assert whole_ranking(browser) == [i for i in ranked if i % 3 == 1]
    browser.click("#filters [aria-label='remove the filter by city']")
    browser.type(add_filter(browser, "age"), "30")
    browser.type("#filters [aria-label='age to']", "35")
    assert whole_ranking(browser) == [i for i in ranked if i != 7 and 30 <= 20 + i % 40 <= 35]
    browser.click("#filters [aria-label='remove the filter by age']")
    assert whole_ranking(browser) == ranked
    for words, wanted in {
        "#17": [17],
        "&quot; [31,": [31],
        "oslo": [i for i in ranked if i % 3 == 1],
        "no such word": [],
    }.items():
        browser.type("#search", words)
        assert whole_ranking(browser) == wanted
        assert browser.see("document.querySelector('#nothing').hidden") is (wanted != [])
    assert browser.see("document.querySelector('#range').textContent") == "0 of 60 samples"


def test_what_a_user_does(run: la.Run, page: Path, browser: Browser, tmp_path: Path) -> None:
    truth, estimate = by_sample(run, "loo"), by_sample(run, "acc-sgd-ie")
    ranked = sorted(truth, key=lambda sample: truth[sample])
    for width in (400, 768, 1200, 1600):
        browser.open(page, width)
        choose(browser, add_filter(browser, "city"), "=" + CITIES[0])
        kept = [i for i in ranked if i % 3 == 0]
        browser.click(f"#rows tr[data-sample='{kept[0]}'] input")
        place = "document.querySelector('#sheet').scrollTop = 56 * 12"
        browser.see(place)
        browser.see(FRAMES)
        browser.click(f"#rows tr[data-sample='{kept[18]}'] input", shift=True)
        assert browser.see("document.querySelector('#count').textContent") == "19 selected"
        browser.click(f"#rows tr[data-sample='{kept[19]}'] input")
        assert browser.downloaded("#ids", tmp_path, "ids.txt") == "".join(f"{i}\n" for i in kept[:20])
        assert select(run, str(tmp_path / "ids.txt")) == [(i,) for i in kept[:20]]
        first, *lines = browser.downloaded("#csv", tmp_path, "samples.csv").splitlines()
        assert first.startswith("# loo, faithful: ")
        rows = list(csv.DictReader(lines))
        assert [int(row["sample"]) for row in rows] == kept
        assert all(float(row["score"]) == pytest.approx(truth[int(row["sample"])], rel=1e-5) for row in rows)
        assert all(row["city"] == CITIES[0] and row["source"] == "loo" for row in rows)
        # Two rankings: the other's ranks stand in the table, and the figure says what they have in common.
        choose(browser, "#other", "1")
        other = sorted(estimate, key=lambda sample: estimate[sample])
        shown = "document.querySelector('#rows tr[data-sample=\"{}\"] td:nth-child({})').textContent"
        column = browser.see("[...document.querySelectorAll('#rows th')].findIndex(th => th.dataset.key === '@rank-other')")
        assert int(browser.see(shown.format(kept[0], column + 1))) == 1 + other.index(kept[0])
        same = len(set(ranked[:10]) & set(other[:10]))
        assert f"The same are {same} of the 10 most harmful" in browser.see("document.querySelector('#compare p').textContent")
        assert browser.see("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


@pytest.mark.parametrize("way", ["", "navigator.clipboard.writeText = () => Promise.reject()"])
def test_ids_are_copied_also_where_the_page_may_not_write_to_the_clipboard_itself(
    run: la.Run, browser: Browser, way: str
) -> None:
    truth = by_sample(run, "loo")
    ranked = sorted(truth, key=lambda sample: truth[sample])
    for sample in ranked[:2]:
        browser.click(f"#rows tr[data-sample='{sample}'] input")
    assert browser.copied("#copy", way) == "".join(f"{sample}\n" for sample in ranked[:2])
    assert browser.see("document.querySelector('#count').textContent") == "2 ids copied"


def test_the_keyboard_steps_through_the_rows_and_selects(run: la.Run, browser: Browser) -> None:
    truth = by_sample(run, "loo")
    ranked = sorted(truth, key=lambda sample: truth[sample])
    at = "Number(document.activeElement.dataset.sample)"
    browser.see("document.querySelector('#rows tr[tabindex=\"0\"]').focus()")
    for key, place in (("ArrowDown", 1), ("End", N - 1), ("ArrowDown", N - 1), ("Home", 0), ("ArrowDown", 1)):
        browser.press(key)
        assert browser.see(at) == ranked[place]
        assert f"#{ranked[place]}" in browser.see("document.querySelector('#detail h3').textContent")
    browser.press(" ")
    for _ in range(3):
        browser.press("ArrowDown", shift=True)
    assert browser.see("document.querySelector('#count').textContent") == "4 selected"
    chosen = "[...document.querySelectorAll('#rows tr[aria-selected=true]')].map(row => Number(row.dataset.sample))"
    assert browser.see(chosen) == ranked[1:5]
    browser.click("#rows thead input")
    assert browser.see("document.querySelector('#count').textContent") == "60 selected"
    browser.click("#clear")
    assert browser.see("document.querySelector('#copy').disabled") is True


def test_the_detail_tells_all_that_is_known(run: la.Run, browser: Browser) -> None:
    browser.type("#search", "#12")
    browser.click("#rows tr[data-sample='12']")
    text = browser.see("document.querySelector('#detail').innerText")
    for part in (f"{NASTY} 12", "was class 7", "age\n32", f"city\n{CITIES[0]}", "acc-sgd-ie"):
        assert part in text
    assert browser.see("document.querySelectorAll('#detail i, #detail b, #detail script').length") == 0


def test_pointing_at_a_dot_and_the_arrow_keys_show_the_sample(run: la.Run, browser: Browser) -> None:
    estimate, truth = by_sample(run, "acc-sgd-ie"), by_sample(run, "loo")
    ordered = sorted(truth, key=lambda i: truth[i])
    worst = ordered[0]
    tip = "document.querySelector('#tip').hidden ? '' : document.querySelector('#tip').textContent"
    assert browser.see(tip) == ""
    browser.point(f".plots circle[data-sample='{worst}']")
    shown = browser.see(tip)
    assert NASTY in shown
    assert f"{Described().labels[worst]} · #{worst}" in shown
    assert ("was class 7" in shown) == (worst % 6 == 0)
    assert f"leave-one-out {truth[worst]:.3}"[:20] in shown
    assert f"acc-sgd-ie {estimate[worst]:.3}"[:17] in shown
    assert browser.see("document.querySelector('#tip img').naturalWidth") == 8
    assert browser.see("document.querySelectorAll('.dot.at').length") == 2  # in both plots
    browser.point("h1")
    assert browser.see(tip) == ""
    browser.see("document.querySelector('.plots svg').focus()")
    browser.press("Home")
    assert f"#{worst}" in browser.see(tip)
    browser.press("ArrowRight")
    assert f"#{ordered[1]}" in browser.see(tip)
    assert f"#{ordered[1]}" in browser.see("document.querySelector('#said').textContent")
    browser.press("Escape")
    assert browser.see(tip) == ""


@pytest.mark.parametrize("dark", [False, True])
def test_narrow_and_dark_are_readable(page: Path, browser: Browser, dark: bool) -> None:
    light = """const light = colour => {
      const parts = colour.match(/[\\d.]+/g).map(v => v / 255).map(v => v <= .04 ? v / 12.9 : ((v + .055) / 1.055) ** 2.4);
      return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
    }, of = selector => getComputedStyle(document.querySelector(selector));"""
    contrast = f"""(() => {{ {light}
      const paper = light(of("body").backgroundColor), inks = [light(of("svg text").fill)];
      for (const selector of ["body", "header p", ".flip", "nav a"]) inks.push(light(of(selector).color));
      return [paper, Math.min(...inks.map(ink => (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05)))];
    }})()"""
    boxes = "[...document.querySelectorAll('{}')].map(element => element.getBoundingClientRect())"
    for width in (1600, 1200, 768, 400):
        browser.open(page, width, dark)
        assert browser.see("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert browser.see(boxes.format("section > *, header > *") + ".filter(box => box.right > innerWidth).length") == 0
        assert browser.see(f"Math.min(...{boxes.format('svg text')}.map(box => Math.max(box.width, box.height)))") > 10
    paper, least = browser.see(contrast)
    assert paper < 0.05 if dark else paper > 0.9
    assert least > 4.5


def test_hostile_texts_stay_texts(page: Path, browser: Browser) -> None:
    assert browser.see("document.title") == "a & <b>run · training-sample influence"
    assert browser.see("document.querySelector('h1').textContent") == "a & <b>run"
    assert browser.see("document.querySelectorAll('script').length") == 2
    assert browser.see("document.querySelectorAll('h1 *, td.label b, option *, .text *, td i i, dd *').length") == 0
    assert browser.see("[...document.images].every(image => image.src.startsWith('data:image/'))") is True
    assert NASTY in browser.see("document.querySelector('.sample .text').textContent")
    assert NASTY_LABEL in browser.see("document.querySelector('#filters [data-column=label]').textContent")
    html = page.read_text()
    assert "alert(1)</script>" not in html
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert content is not None
    assert json.loads(content[1])["samples"]["0"]["text"] == f"{NASTY} 0"
    assert not re.search(r"https?://", html.replace("http://www.w3.org/2000/svg", ""))


def test_everything_has_a_name_to_be_read_out(browser: Browser) -> None:
    assert browser.see("[...document.querySelectorAll('svg[role=img]')].every(svg => svg.getAttribute('aria-label'))") is True
    assert (
        browser.see("[...document.querySelectorAll('#rows th')].every(th => th.querySelector('button, input') && th.scope)")
        is True
    )
    assert (
        browser.see("[...document.querySelectorAll('select, input')].every(box => box.labels.length === 1 || box.ariaLabel)")
        is True
    )
    assert browser.see("[...document.images].every(image => image.alt)") is True


def test_removal_curves_show_means_intervals_and_controls(browser: Browser) -> None:
    assert browser.see("document.querySelector('#cleaning').hidden") is False
    assert "mean on held out over 5 seeds" in browser.see("document.querySelector('#cleaning p').textContent")
    assert browser.see("[...document.querySelectorAll('#cleaning .legend button')].map(b => b.textContent)") == [
        "acc-sgd-ie",
        "random",
    ]
    assert browser.see("document.querySelectorAll('#cleaning .interval').length") == 4
    dashes = "[...document.querySelectorAll('#cleaning .curve')].map(c => c.getAttribute('stroke-dasharray') !== '')"
    assert browser.see(dashes) == [False, True]
    numbers = "[...document.querySelectorAll('#cleaning tbody tr')].map(row => row.textContent)"
    assert "acc-sgd-ie–86.0 % [84.5 %, 87.5 %]88.0 % [86.5 %, 89.5 %]" in browser.see(numbers)
    choose(browser, "#measure", "gain")
    assert "acc-sgd-ie–+6.0 [+4.5, +7.5]+8.0 [+6.5, +9.5]" in browser.see(numbers)
    browser.see("document.querySelector('#cleaning figure > svg').focus()")
    browser.press("End")
    assert "20 % removed" in browser.see("document.querySelector('#tip').textContent")
    assert "+8.0 [+6.5, +9.5]" in browser.see("document.querySelector('#tip').textContent")
    browser.click("#cleaning .legend button")
    assert browser.see("document.querySelectorAll('#cleaning .interval').length") == 2


def test_influence_over_training_stands_beside_the_query(run: la.Run, browser: Browser) -> None:
    assert browser.see("document.querySelector('#over-time').hidden") is False
    estimate, truth = by_sample(run, "sgd-ie"), by_sample(run, "loo")
    ranked = sorted(truth, key=lambda sample: truth[sample])
    followed = [*ranked[:2], *ranked[:-3:-1]]
    names = browser.see("[...document.querySelectorAll('#over-time .legend button')].map(key => key.textContent)")
    assert [name.split(" ")[0] for name in names] == [f"#{sample}" for sample in followed]
    lines = browser.see("data.over_time.lines")
    assert [line["sample"] for line in lines] == followed
    assert [line["gathered"][0] for line in lines] == [0] * 4
    assert [line["gathered"][-1] for line in lines] == pytest.approx([estimate[sample] for sample in followed], rel=1e-5)
    tip = "document.querySelector('#tip').textContent"
    browser.see("document.querySelector('#over-time svg').focus()")
    browser.press("End")
    replay = Replay(run)
    value = queries.find(run, "val").value(replay.objective, replay.placed(parameters_at(run, run.n_steps)))
    assert browser.see(tip) == f"after {run.n_steps} stepsval {float(value):#.3g}"
    browser.see("document.querySelectorAll('#over-time svg[tabindex]')[1].focus()")
    browser.press("End")
    assert all(f"#{sample} " in browser.see(tip) for sample in followed)
    browser.press("Home")
    assert "after 0 steps" in browser.see(tip)
    browser.click("#over-time .legend button")
    assert browser.see("document.querySelectorAll('#over-time .curve').length") == 1 + 3


def test_a_run_of_which_little_is_known_has_a_page(started: Browser, tmp_path: Path) -> None:
    run = record(tmp_path / "plain", make(loss="squared"))
    la.score(run, "sgd-ie", removals=range(5), ray_address=None, check=0)
    page = Path(report.write_report(run))
    shown = "[...document.querySelectorAll('section:not([hidden])')].map(section => section.id)"
    started.complaints.clear()
    started.open(page)
    assert started.see(shown) == ["samples", "ranking", "cost"]
    assert sorted(started.see(ROWS)) == [0, 1, 2, 3, 4]
    cleaning_table.write(run, removal_curves(accuracy=False))
    started.open(Path(report.write_report(run)))
    assert started.see("[...document.querySelector('#measure').options].map(option => option.value)") == ["gain", "loss"]
    assert started.complaints == []


def test_validation_added_is_a_level_beside_the_curves(started: Browser, tmp_path: Path) -> None:
    run = record(tmp_path / "plain", make(loss="squared"))
    la.score(run, "sgd-ie", removals=range(5), ray_address=None, check=0)
    rows = removal_curves(accuracy=False).to_pylist()
    added = {**rows[-1], "method": cleaning_table.ADDED, "fraction": 0.0, "n_removed": 0, "n_added": 37}
    cleaning_table.write(run, pa.Table.from_pylist([*rows, added], schema=cleaning_table.SCHEMA))
    started.complaints.clear()
    started.open(Path(report.write_report(run)))
    legend = "[...document.querySelectorAll('#cleaning .legend button')].map(b => b.textContent)"
    assert started.see(legend) == ["acc-sgd-ie", "random", "validation added"]
    assert started.see("document.querySelectorAll('#cleaning .interval').length") == 6  # at both ends of the level
    text = started.see("document.querySelector('#cleaning p').textContent")
    assert "nothing is dropped, and the 37 examples of val are trained on too" in text
    assert "wrong in the same way as the training's, they find much less." in text
    numbers = "[...document.querySelectorAll('#cleaning tbody tr')].map(row => row.textContent)"
    assert any(row.startswith("validation added+0.08") and row.endswith("[+0.0650, +0.0950]––") for row in started.see(numbers))
    assert started.complaints == []


def test_of_a_long_ranking_both_ends_are_embedded_and_the_page_says_so(
    run: la.Run, started: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "WHOLE", 20)
    monkeypatch.setattr(report, "ENDS", 5)
    monkeypatch.setattr(report, "DRAWN", 20)
    content = report.collect(run)
    truth = by_sample(run, "loo")
    ranked = sorted(truth, key=lambda sample: truth[sample])
    ranking = content["methods"][0]["ranking"]
    assert ranking["samples"] == ranked[:5] + ranked[-5:]
    drawn = [point[0] for point in content["methods"][1]["points"]]
    assert len(drawn) == len(set(drawn)) == 20
    assert set(content["methods"][1]["ranking"]["samples"]) < set(drawn)
    page = tmp_path / "page.html"
    page.write_text(report.render("long", [], content))
    started.complaints.clear()
    started.open(page)
    assert "the 5 most harmful and the 5 most helpful" in started.see("document.querySelector('#extent').textContent")
    assert "20 of 60 samples are drawn" in started.see("document.querySelector('figcaption').textContent")
    assert started.see(ROWS) == ranked[:5] + ranked[-5:]
    ranks = "[...document.querySelectorAll('#rows tr[data-sample] td:nth-child(2)')].map(cell => Number(cell.textContent))"
    assert started.see(ranks) == [*range(1, 6), *range(56, 61)]
    assert started.complaints == []


def test_large_pictures_are_made_smaller_and_broken_ones_left_out() -> None:
    small, large = png(np.zeros((8, 8))), png(np.random.default_rng(0).random((300, 200)))
    assert samples.thumbnail(small) == f"data:image/png;base64,{base64.b64encode(small).decode()}"
    shrunk = samples.thumbnail(large)
    assert shrunk is not None
    assert shrunk.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(shrunk.partition(",")[2]))).size == (64, 96)
    assert samples.thumbnail(b"no picture") is None


def test_a_ranking_is_written_as_csv(run: la.Run, tmp_path: Path) -> None:
    table, truth = scores.read(run.store, "acc-sgd-ie"), by_sample(run, "loo")
    exports.write_ranking_csv(run, table, tmp_path / "ranking.csv")
    with open(tmp_path / "ranking.csv", newline="") as file:
        assert next(file) == f"# acc-sgd-ie, {table.verdict}\n"
        rows = list(csv.DictReader(file))
    known = ["rank", "sample", "score", "source", "loo", "label", "true_label", "corrupted"]
    assert list(rows[0]) == [*known, "age", "city", "described_score"]
    for row in rows:
        i = int(row["sample"])
        assert row["age"] == ("" if i == 7 else str(20 + i % 40))
        assert row["city"].removeprefix("'") == CITIES[i % 3]
        assert row["city"].startswith("'") == (i % 3 == 2)  # no formula
        assert row["described_score"] == f"[{i}, {i + 1}]"
    assert [int(row["rank"]) for row in rows] == list(range(1, N + 1))
    found = {int(row["sample"]): (float(row["score"]), float(row["loo"])) for row in rows}
    assert found == {i: (score, truth[i]) for i, score in by_sample(run, "acc-sgd-ie").items()}
    assert {row["label"] for row in rows} == set(Described().labels)
    assert all((row["corrupted"] == "True") == (row["true_label"] == "class 7") for row in rows)
    groups = la.score(run, "sgd-ie", removals=[[1, 2], [3]], ray_address=None, save=False, check=0)
    exports.write_ranking_csv(run, groups, tmp_path / "groups.csv")
    with open(tmp_path / "groups.csv", newline="") as file:
        next(file)
        rows = list(csv.DictReader(file))
    assert {row["sample"] for row in rows} == {"1 2", "3"}
    assert [row["label"] == "" for row in rows] == [row["sample"] == "1 2" for row in rows]


def test_the_ids_to_drop_are_the_most_harmful_and_can_be_read_back(run: la.Run, tmp_path: Path) -> None:
    table, values = scores.read(run.store, "loo"), by_sample(run, "loo")
    harmful = sorted((i for i in values if values[i] < 0), key=lambda i: values[i])
    assert 6 < len(harmful) < N
    assert exports.ids_to_drop(table, fraction=0.1) == harmful[:6]
    assert exports.ids_to_drop(table, count=3) == harmful[:3]
    assert exports.ids_to_drop(table, fraction=1) == harmful
    assert exports.ids_to_drop(table, count=0) == []
    exports.write_ids(harmful[:6], tmp_path / "ids.txt")
    assert (tmp_path / "ids.txt").read_text() == "".join(f"{i}\n" for i in harmful[:6])
    assert select(run, str(tmp_path / "ids.txt")) == [(i,) for i in harmful[:6]]


def test_the_cleaned_dataset_is_the_training_set_without_the_dropped(run: la.Run) -> None:
    train, kept = Described().train, [i for i in range(N) if i not in (0, 7)]
    cleaned = exports.cleaned_dataset(run, [7, 0])
    described = ["image", "text", "label", "true_label", "corrupted", "age", "city", "score"]
    assert cleaned.column_names == ["sample", "0", "1", *described]
    assert cleaned["sample"][:] == kept
    np.testing.assert_array_equal(np.array(cleaned["0"][:]), train.tensors[0][kept].numpy())
    assert cleaned["1"][:] == train.tensors[1][kept].tolist()
    assert cleaned["text"][0] == f"{NASTY} 1"
    assert cleaned[5]["image"].size == (8, 8)
    own = datasets.Dataset.from_dict({"id": list(range(N))})
    assert exports.cleaned_dataset(run, [7, 0], own)["id"][:] == kept


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def per_sample_loss(self, batch: Any) -> torch.Tensor:
        return (self.layer(batch["x"])[..., 0].mean(1) - batch["sample"]) ** 2

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.per_sample_loss(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_sample_that_was_never_seen_is_null_and_a_taken_name_is_changed(tmp_path: Path) -> None:
    train = [{"x": torch.randn(2, 3), "sample": torch.tensor(float(i))} for i in range(4)]
    sampler = torch.utils.data.SubsetRandomSampler([0, 1, 3])

    loader: DataLoader[Any] = DataLoader(train, 3, sampler=sampler)  # type: ignore[arg-type]
    recorder = la.TrajectoryRecorder(tmp_path / "run")
    with pytest.warns(UserWarning, match="no validation data"):
        trainer(recorder, precision="32-true", max_epochs=1).fit(Plain(), loader)
    cleaned = exports.cleaned_dataset(la.Run(tmp_path / "run"), [0])
    assert cleaned.column_names == ["sample", "recorded_sample", "x"]
    assert cleaned["recorded_sample"][:] == [1.0, None, 3.0]
    assert cleaned["x"][1] is None
    np.testing.assert_array_equal(np.array(cleaned["x"][2], np.float32), train[3]["x"].numpy())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda run, table: exports.ids_to_drop(table), "fraction=None and count=None: give one"),
        (lambda run, table: exports.ids_to_drop(table, 0.1, 3), "fraction=0.1 and count=3: give one"),
        (lambda run, table: exports.ids_to_drop(table, fraction=1.5), "fraction=1.5 is no share"),
        (lambda run, table: exports.ids_to_drop(table, count=-1), "count=-1 samples cannot be dropped"),
        (lambda run, table: exports.write_ids([3, -1], "unused"), "-1 is no sample id"),
        (lambda run, table: exports.write_ids(["3"], "unused"), "'3' is no sample id"),
        (lambda run, table: exports.cleaned_dataset(run, [99]), "There is no sample 99: .* 0 to 59"),
        (lambda run, table: exports.cleaned_dataset(run, range(N)), "All 60 samples would be dropped"),
        (
            lambda run, table: exports.cleaned_dataset(run, [1], datasets.Dataset.from_dict({"id": [1, 2]})),
            "has 2 rows, but .* was trained on 60 samples",
        ),
        (
            lambda run, table: exports.write_ranking_csv(
                run, scores.Scores(table.table, {**table.conditions, "manifest_hash": "f" * 64}), "unused"
            ),
            "belong to the record ffffffffffff",
        ),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_sentence(run: la.Run, act: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        act(run, scores.read(run.store, "sgd-ie"))


def asked_in_many_ways(folder: Path) -> list[la.Run]:
    """Two runs; the first has three tables of one method, which differ in when the query is read and of how many runs."""
    runs = [record(folder / f"run-{i}", make(i, hidden=4), seed=i) for i in range(2)]
    for run, at in ((runs[0], "end"), (runs[0], "along"), (runs, "along")):
        la.score(run, "sgd-ie", ray_address=None, check=0, at=at)
    la.score(runs[0], "sgd-ie", removals=[[1, 2]], ray_address=None, check=0, at="along")
    return runs


def test_when_a_query_was_read_and_of_how_many_runs_is_told(tmp_path: Path) -> None:
    run, _ = asked_in_many_ways(tmp_path)
    found = report.collect(run)
    told = [(one["conditions"]["at"], one["conditions"]["runs"]) for one in found["methods"]]
    assert told == [("end", 1), ("along", 1), ("along", 2)]
    assert [one["conditions"]["at"] for one in found["groups"]] == ["along"]
    for name, first in (
        ("sgd-ie", "# sgd-ie, "),
        ("sgd-ie.along", "# sgd-ie along, "),
        ("sgd-ie.along.mean-of-2-runs", "# sgd-ie along, mean of 2 runs, "),
    ):
        exports.write_ranking_csv(run, scores.read(run.store, name), tmp_path / "ranking.csv")
        assert (tmp_path / "ranking.csv").read_text().startswith(first)
    labels = [dashboard._label(run, table.conditions) for table in stored_scores(run).values()]
    assert labels == ["sgd-ie (linear)", "sgd-ie (linear, along)", "sgd-ie (linear, along, mean of 2 runs)"]


def test_tables_of_one_method_have_names_of_their_own(started: Browser, tmp_path: Path) -> None:
    run, _ = asked_in_many_ways(tmp_path)
    table = removal_curves()
    names = pa.array(["sgd-ie along, 4 runs" if name == "acc-sgd-ie" else name for name in table["method"].to_pylist()])
    cleaning_table.write(run, table.set_column(0, "method", names))
    started.complaints.clear()
    started.open(Path(report.write_report(run)))
    assert started.see("[...document.querySelectorAll('#method option')].map(option => option.textContent)") == [
        "sgd-ie (linear readout)",
        "sgd-ie along (linear readout)",
        "sgd-ie along (linear readout), mean of 2 runs",
    ]
    assert "sgd-ie along" in started.see("document.querySelector('#groups').textContent")
    assert "Groups" in started.see("document.querySelector('nav').textContent")
    assert "sgd-ie along, 4 runs" in started.see("document.querySelector('#cleaning').textContent")
    assert started.see("getComputedStyle(document.documentElement).getPropertyValue('--sgd-ie') !== ''")
    assert "var(--sgd-ie," in started.see("document.querySelector('#cleaning').innerHTML")
    assert started.complaints == []
