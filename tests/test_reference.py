"""The reference is whole: everything public is described, arrays have shapes, and no link of it or of the documents is dead."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from test_scripts import SCRIPTS, load
from torch import Tensor

import lightning_acc as la

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
ROOT = SCRIPTS.parent
reference = load("reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "pages"
    assert reference.write(path) == []
    return path


def headings(page: Path) -> set[str]:
    fenceless = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {reference.anchor(line.lstrip("#").strip()) for line in fenceless.splitlines() if line.startswith("#")}


def dead_links(page: Path) -> list[str]:
    dead = []
    for match in LINK.finditer(page.read_text()):
        target, _, heading = (match[1] or match[2]).partition("#")
        if target.startswith(("http://", "https://")):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (heading and path.suffix == ".md" and f"#{heading}" not in headings(path)):
            dead.append(f"{page.name}: {match[0]}")
    return dead


def test_every_public_name_has_a_page_that_the_index_leads_to(folder: Path) -> None:
    index = (folder / "index.md").read_text()
    for name in la.__all__:
        assert f"]({name}.md)" in index
        text = (folder / f"{name}.md").read_text()
        assert text.startswith(f"# {name}\n")
        first = (getattr(la, name).__doc__ or "").strip().partition("\n")[0]
        assert first.replace("``", "`")[:40].partition("`")[0] in text
    assert "## Run.audit\n" in (folder / "Run.md").read_text()
    assert "method: str = 'acc-sgd-ie'" in (folder / "score.md").read_text()
    assert "[`Query`](Query.md)" in (folder / "score.md").read_text()


def test_how_it_works_has_the_line_of_each_method(folder: Path) -> None:
    text = (folder / "how-it-works.md").read_text()
    for line in (
        "F_t(s_t + D_t, w^R)",
        "U_t(s_t + D_t,  G_t(theta_t, w^R) + H_t(w^R) D_t)",
        "lambda_t = (dF_t/ds)^T lambda_{t+1}",
        "w_i <g_i + H_i D^i_t, gamma_t>",
    ):
        assert line in text


def test_no_link_of_the_reference_is_dead(folder: Path) -> None:
    pages = sorted(folder.glob("*.md"))
    assert sum(len(LINK.findall(page.read_text())) for page in pages) > 50
    assert [link for page in pages for link in dead_links(page)] == []


def test_no_link_of_the_documents_is_dead() -> None:
    documents = [ROOT / "README.md", *SCRIPTS.rglob("*.md"), *(ROOT / "tests").rglob("*.md")]
    assert len(documents) >= 5
    assert [link for page in documents for link in dead_links(page)] == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](nothing.md) ![d](no.png) [e](https://example.org)\n```\n# Two\n```\n")
    assert dead_links(page) == ["page.md: [b](#two)", "page.md: [c](nothing.md)", "page.md: ![d](no.png)"]


def undescribed(a: int) -> None: ...


def half_described(a: int, b: int) -> None:
    """Something.

    Args:
        a: one.
    """


def shapeless(a: Tensor, b: Tensor) -> np.ndarray:
    """Something that it returns.

    Args:
        a: numbers, (n,).
        b: numbers.
    """
    return np.zeros(0)


def referring() -> None:
    """See ``lightning_acc.scoring.score``, ``lightning_acc.nowhere``, ``scripts/study`` and ``scripts/nothing.md``."""


def described(a: Tensor) -> Tensor:
    """The squares (n, p) of ``a`` (n, p)."""
    return a**2


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (undescribed, ["it has no docstring"]),
        (half_described, ["the argument b is not described"]),
        (shapeless, ["the argument b is an array without a shape", "it returns an array without a shape"]),
        (referring, ["lightning_acc.nowhere does not exist", "scripts/nothing.md does not exist"]),
        (described, []),
    ],
)
def test_what_is_missing_is_told(function: object, found: list[str]) -> None:
    entry = reference.Entry("it", function)
    assert reference.faults({"page": entry}) == [f"page: it: {fault}" for fault in found]
