"""The reference, made of the docstrings: a page for each public name, one for each part, and how the methods work.

    python scripts/reference.py FOLDER

It ends with status 1 where a public name has no docstring, an argument is not described, an array or a tensor has no shape,
or a name that is referred to does not exist.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning_acc as la

PARTS = {
    "how-it-works": "lightning_acc.methods",
    "contract": "lightning_acc.contract",
    "methods": "lightning_acc.methods.rules",
    "low-rank": "lightning_acc.methods.low_rank.tracked",
    "screened": "lightning_acc.methods.low_rank.screened",
    "defect": "lightning_acc.methods.low_rank.defect.scores",
    "verdict": "lightning_acc.scoring.trust.verdict",
    "exports": "lightning_acc.judge.exports",
    "headline": "lightning_acc.show.headline",
    "tracking": "lightning_acc.show.tracking",
}
"""Modules that have a page of their own, beside the names of the package."""
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Example)::?")
ROOT = Path(__file__).parent.parent
ITEMISED = ("Args", "Attributes", "Raises")
_ITEM = re.compile(r" {4}(\*{0,2}\w[\w, *]*): (.*)")
_CODE = re.compile(r"``([^`]+)``")
_ARRAY = re.compile(r"\b(Tensor|ndarray|State)\b")
_SHAPE = re.compile(r"\((?:\.\.\.|[\w+* -]+),(?: ?[\w.+* -]+,?)*\)")
"""``(n,)``, ``(n, p)``, ``(..., p)``, ``(n + 1, p)``."""
_NO_SHAPE = re.compile(r"\bscalar\b|\ba number\b|\bmappings?\b")
WIDTH = 100


class Entry(NamedTuple):
    """Something public: what it is called, the object, and the members it has a heading for."""

    name: str
    thing: Any
    members: tuple[Entry, ...] = ()

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.thing) or "" if _own_doc(self.thing) else ""

    @property
    def signature(self) -> inspect.Signature | None:
        called = self.thing.fget if isinstance(self.thing, property) else self.thing
        try:
            return inspect.signature(called) if callable(called) else None
        except (TypeError, ValueError):
            return None


def pages() -> dict[str, Entry]:
    """What there is a page about, by the name of its file."""
    found = {name: _entry(name, getattr(la, name)) for name in la.__all__}
    for file, path in PARTS.items():
        module = importlib.import_module(path)
        found[file] = Entry(path, module, tuple(_members_of_module(module)))
    return found


def _members_of_module(module: Any) -> Iterator[Entry]:
    """What a module exports; else what it defines, in its order."""
    given = getattr(module, "__all__", None)
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
    for name in own if given is None else given:
        thing = getattr(module, name)
        if not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield _entry(name, thing)


def _entry(name: str, thing: Any) -> Entry:
    if not inspect.isclass(thing) or issubclass(thing, Exception):
        return Entry(name, thing)
    # What a base class of another package declares, such as a hook of Lightning, is described there.
    others = {one for base in thing.__mro__ if not base.__module__.startswith("lightning_acc") for one in vars(base)}
    members = {}
    for base in reversed(thing.__mro__):
        if base.__module__.startswith("lightning_acc"):
            members.update({one: Entry(f"{name}.{one}", getattr(thing, one)) for one in vars(base) if one not in others})
    shown = [entry for one, entry in members.items() if not one.startswith("_") and _is_documented_kind(thing, one)]
    return Entry(name, thing, tuple(shown))


def _is_documented_kind(owner: type, name: str) -> bool:
    """Methods and properties; fields stand under Attributes of their class."""
    static = inspect.getattr_static(owner, name)
    return inspect.isfunction(static) or isinstance(static, (property, classmethod, staticmethod))


def _own_doc(thing: Any) -> bool:
    """Whether its docstring is its own, and not what dataclasses and protocols make up."""
    doc = getattr(thing, "__doc__", None)
    return bool(doc) and not (inspect.isclass(thing) and str(doc).startswith(f"{thing.__name__}("))


def sections(doc: str) -> dict[str, list[str]]:
    """The lines of a docstring by section; the text before and between them under the empty name."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in doc.splitlines():
        match = _SECTION.fullmatch(line)
        if match:
            current = match[1]
            found[current] = []
        elif line and not line.startswith(" "):
            current = ""
            found[current].append(line)
        else:
            found[current].append(line)
    return found


def items(lines: list[str]) -> dict[str, str]:
    """The items of a section, by name."""
    found: dict[str, str] = {}
    last = ""
    for line in lines:
        match = _ITEM.fullmatch(line)
        if match:
            last = match[1].lstrip("*")
            found[last] = match[2]
        elif last and line.strip():
            found[last] += f" {line.strip()}"
    return found


def faults(named: dict[str, Entry]) -> list[str]:
    """What is missing in the docstrings, a sentence each."""
    found: list[str] = []
    for page, top in named.items():
        for entry in (top, *top.members, *(one for member in top.members for one in member.members)):
            found += [f"{page}: {entry.name}: {fault}" for fault in _faults(entry)]
    return found


def _faults(entry: Entry) -> Iterator[str]:
    if not entry.doc:
        # Of an abstract method the docstring holds for what implements it.
        yield from () if _inherited_doc(entry) else ("it has no docstring",)
        return
    told = sections(entry.doc)
    arguments = {**items(told.get("Attributes", [])), **items(told.get("Args", []))}
    signature = entry.signature
    for name, parameter in signature.parameters.items() if signature is not None and not inspect.isclass(entry.thing) else ():
        kind, text = str(parameter.annotation), arguments.get(name, entry.doc)
        if name not in arguments and "Args" in told and name not in ("self", "cls"):
            yield f"the argument {name} is not described"
        elif _ARRAY.search(kind) and not (_SHAPE.search(text) or _NO_SHAPE.search(text)):
            yield f"the argument {name} is an array without a shape"
    given = "" if signature is None or inspect.isclass(entry.thing) else str(signature.return_annotation)
    text = "\n".join([*told[""], *told.get("Returns", [])])
    if _ARRAY.search(given) and not (_SHAPE.search(text) or _NO_SHAPE.search(text)):
        yield "it returns an array without a shape"
    for reference in _CODE.findall(entry.doc):
        is_dead = re.fullmatch(r"lightning_acc(\.\w+)+", reference) and not _exists(reference)
        if is_dead or (re.fullmatch(r"(scripts|configs|tests)/[\w./-]+", reference) and not (ROOT / reference).exists()):
            yield f"{reference} does not exist"


def _inherited_doc(entry: Entry) -> bool:
    return bool(inspect.getdoc(entry.thing)) and not inspect.isclass(entry.thing)


def _exists(path: str) -> bool:
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part, None)
        return thing is not None
    return False


def as_markdown(file: str, top: Entry, link: Callable[[str, str], str]) -> str:
    """A page."""
    lines = [f"# {top.name}", ""]
    lines += _described(file, top, link)
    for entry in top.members:
        lines += [f"## {entry.name}", "", *_described(file, entry, link)]
        for member in entry.members:
            lines += [f"### {member.name}", "", *_described(file, member, link)]
    return "\n".join(lines).rstrip() + "\n"


def _described(file: str, entry: Entry, link: Callable[[str, str], str]) -> list[str]:
    lines: list[str] = []
    if entry.signature is not None and not isinstance(entry.thing, property) and not _is_protocol(entry.thing):
        lines += ["```python", _in_lines(entry.name, entry.signature), "```", ""]
    for section, content in sections(inspect.getdoc(entry.thing) or "").items():
        if section == "Example":
            lines += ["```python", inspect.cleandoc("\n".join(content)), "```", ""]
            continue
        if section:
            lines += [f"**{section}**", ""]
        if section in ITEMISED and items(content):
            lines += [f"* `{name}`: {link(text, file)}" for name, text in items(content).items()]
        else:
            own = content if not section else inspect.cleandoc("\n".join(content)).splitlines()
            lines += [link(line, file) for line in own]
        lines.append("")
    return lines


def _is_protocol(thing: Any) -> bool:
    return inspect.isclass(thing) and getattr(thing, "_is_protocol", False)


def _in_lines(name: str, signature: inspect.Signature) -> str:
    """A call as it is declared, in one line where it fits; annotations are texts in these modules."""
    words: list[str] = []
    starred = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{stars}{parameter.name}{kind}{default}")
    end = "" if signature.return_annotation in (signature.empty, None, "None") else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(words)}){end}"
    inner = ",\n    ".join(words)
    return line if len(line) <= WIDTH else f"{name}(\n    {inner},\n){end}"


def linker(named: dict[str, Entry]) -> Callable[[str, str], str]:
    """Makes links of what is in double backquotes and has a page, or a heading on one."""
    places: dict[str, tuple[str, str]] = {}
    for page, top in named.items():
        places.setdefault(top.name, (page, ""))
        for entry in (*top.members, *(one for member in top.members for one in member.members)):
            places.setdefault(entry.name, (page, anchor(entry.name)))

    def of(text: str, file: str) -> str:
        def instead(match: re.Match[str]) -> str:
            called = match[1].removeprefix("la.").partition("(")[0]
            page, heading = places.get(called, ("", ""))
            return f"[`{match[1]}`]({page}.md{heading})" if page and page != file else f"`{match[1]}`"

        return _CODE.sub(instead, text)

    return of


def anchor(heading: str) -> str:
    """Where a heading lies on its page, as GitHub has it."""
    return "#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def write(folder: Path) -> list[str]:
    """Write the pages; returns what is missing in the docstrings."""
    named = pages()
    link = linker(named)
    folder.mkdir(parents=True, exist_ok=True)
    for file, top in named.items():
        (folder / f"{file}.md").write_text(as_markdown(file, top, link), encoding="utf-8")
    index = ["# lightning_acc", "", link(inspect.getdoc(la) or "", "index"), "", "## Pages", ""]
    for file, top in named.items():
        first = (inspect.getdoc(top.thing) or "").partition("\n\n")[0].replace("\n", " ")
        index.append(f"* [{top.name}]({file}.md): {link(first, 'index')}")
    (folder / "index.md").write_text("\n".join(index) + "\n", encoding="utf-8")
    return faults(named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pages are written")
    missing = write(parser.parse_args().folder)
    if missing:
        sys.exit("\n".join(missing))


if __name__ == "__main__":
    main()
