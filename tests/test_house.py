"""The house: which room may import which, read from the imports themselves, those within functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lightning_acc"
GROUND = {"errors", "arguments", "credentials", "extras", "progress", "contract"}
"""What every room may use; it uses nothing."""
BELOW = {
    "record": set(),
    "core": {"record"},
    "recorder": {"record", "core"},
    "methods": {"record", "core"},
    "planning": {"record", "core", "methods"},
    "scoring": {"record", "core", "methods", "planning"},
    "judge": {"record", "core", "methods", "planning", "scoring"},
    "run": {"record", "core", "methods", "planning", "scoring", "judge"},
    "show": {"record", "core", "methods", "planning", "scoring", "judge"},
    "studies": {"record", "core", "methods", "planning", "scoring", "judge", "show", "run", "recorder"},
    "cli": {"record", "core", "methods", "planning", "scoring", "judge", "show", "run", "studies", "recorder"},
}
"""The rooms each room may import."""
LARGEST_FILE, MOST_FILES = 310, 12


def files(room: str) -> list[Path]:
    single = ROOT / f"{room}.py"
    return [single] if single.exists() else sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The rooms a file imports, wherever in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("lightning_acc.")}
    return rooms


def test_every_file_has_its_room() -> None:
    there = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert there == {"__init__", *GROUND, *BELOW}


@pytest.mark.parametrize("room", [*sorted(GROUND), *BELOW])
def test_no_arrow_leads_up(room: str) -> None:
    allowed = {room, "errors", *(GROUND if room in BELOW else ()), *BELOW.get(room, ())}
    arrows = {str(path.relative_to(ROOT)): sorted(imported(path) - allowed) for path in files(room)}
    assert {path: rooms for path, rooms in arrows.items() if rooms} == {}


def test_the_order_has_no_circle() -> None:
    placed: set[str] = set()
    for room, below in BELOW.items():
        assert below <= placed, room
        placed.add(room)


def test_no_room_is_crowded_and_no_file_is_long() -> None:
    folders = {path.parent for path in ROOT.rglob("*.py")}
    crowded = {str(folder): len(list(folder.glob("*.py"))) for folder in folders if folder != ROOT}
    assert {folder: count for folder, count in crowded.items() if count > MOST_FILES} == {}
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > LARGEST_FILE} == {}


def test_nothing_branches_on_the_name_of_a_method() -> None:
    from lightning_acc.methods.registry import METHODS

    for room in BELOW:
        for path in files(room):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Compare):
                    words = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                    assert not words & set(METHODS) - {"loo"}, f"{path}:{node.lineno}"
