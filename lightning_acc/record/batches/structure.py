"""The structure of a batch: plain JSON, each part of which is a dict with one key, the *kind*, and its content.

* ``leaf``: the tensor of that name, with a row a sample; ``shared``: one that belongs to no sample; ``single``: one number, a
  0-d tensor, said of the whole batch and kept with each of its samples.
* ``texts``: a list with a text for each sample; ``objects``: a list with something else for each, kept as JSON; ``fact``: a
  number, a text or a truth value, said of the whole batch; ``constant``: one that never changes, most often None.
* ``list``, ``tuple``, ``dict`` and ``mapping`` (a dict whose entries are attributes too) of further parts; ``named``: a named
  tuple, and ``dataclass``, of which the content tells the ``class`` and the ``fields``.
* ``graphs``: a batch of graphs (``graphs``), of which the content tells the ``class`` of a graph and the ``fields``, among them
  ``joined``: a ragged leaf, and the dimension along which it is joined.
* ``numpy``: the tensor inside as an array; ``tuple-of``: the list inside as a tuple.
"""

from __future__ import annotations

from typing import Any

from lightning_acc.record.batches.leaves import FACT, JSON, LENGTH, ROWS, SHARED, SINGLE, TEXT

Structure = dict[str, Any]

TENSORS = {"leaf": "", "single": SINGLE, "shared": SHARED}
"""Kinds that are one tensor, and how the names of their leaves end."""
WORDS = {"texts": TEXT, "objects": JSON, "fact": FACT}
"""Kinds that are kept as ragged leaves, and how the names of these end."""
WRAPPED = {"numpy": tuple(TENSORS), "tuple-of": ("texts", "objects")}
"""Kinds that say in which form what is inside is given back, and what may be inside."""
OF_A_CLASS = ("named", "dataclass", "graphs")
PLAIN = (bool, int, float, str)


def kind_of(structure: Structure) -> tuple[str, Any]:
    """The kind of a part and its content."""
    ((kind, content),) = structure.items()
    return kind, content


def parts_of(kind: str, content: Any) -> dict[str, Structure] | None:
    """The parts of a part by their names; None where it has none."""
    if kind in OF_A_CLASS:
        return dict(content["fields"])
    if kind in ("dict", "mapping"):
        return dict(content)
    if kind in ("list", "tuple"):
        return {str(i): part for i, part in enumerate(content)}
    return None


def leaf_names(structure: Any) -> list[str]:
    """The names of the leaves of a structure.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(structure, dict) or len(structure) != 1:
        raise ValueError("no structure of a batch")
    kind, content = kind_of(structure)
    if kind in TENSORS or kind in WORDS:
        end = TENSORS[kind] if kind in TENSORS else WORDS[kind]
        if isinstance(content, str) and content.endswith(end):
            return [content, content + LENGTH] if kind in WORDS else [content]
    elif kind in WRAPPED:
        if isinstance(content, dict) and len(content) == 1 and kind_of(content)[0] in WRAPPED[kind]:
            return leaf_names(content)
    elif kind == "joined":
        if isinstance(content, list) and len(content) == 2 and type(content[1]) is int and content[1] >= 0:
            name = content[0]
            if isinstance(name, str) and name.endswith(ROWS):
                return [name, name + LENGTH]
    elif kind == "constant":
        if content is None or isinstance(content, PLAIN):
            return []
    elif (kind in ("dict", "mapping") and isinstance(content, dict)) or (
        kind in ("tuple", "list") and isinstance(content, list)
    ):
        return [name for part in (parts_of(kind, content) or {}).values() for name in leaf_names(part)]
    elif kind in OF_A_CLASS and isinstance(content, dict) and content.keys() == {"class", "fields"}:
        fields = content["fields"]
        if isinstance(content["class"], str) and isinstance(fields, dict) and all(map(str.isidentifier, fields)):
            return [name for part in fields.values() for name in leaf_names(part)]
    raise ValueError("no structure of a batch")


IN_WORDS = {
    "leaf": "tensor with a row a sample",
    "shared": "tensor without a row a sample",
    "single": "single number in a tensor",
    "texts": "list of a text a sample",
    "objects": "list of an entry a sample",
    "fact": "number or text of the batch",
    "constant": "None",
    "joined": "tensor of the nodes or edges of graphs",
}


def first_difference(before: Structure, now: Structure, name: str = "") -> str:
    """In words, where two structures that are not equal begin to differ."""
    (kind, old), (other, new) = kind_of(before), kind_of(now)
    place = f"{name!r}" if name else "it"
    if kind != other:
        return f"{place} is a {IN_WORDS.get(other, other)} and not a {IN_WORDS.get(kind, kind)}"
    parts = parts_of(kind, old), parts_of(kind, new)
    if parts[0] is None or parts[1] is None:
        return f"{place} is {new!r} and not {old!r}"
    if sorted(parts[0]) != sorted(parts[1]):
        return f"{place} holds {', '.join(sorted(parts[1]))} and not {', '.join(sorted(parts[0]))}"
    differing = next((key for key in parts[0] if parts[0][key] != parts[1][key]), None)
    if differing is None:
        return f"{place} is another class"
    return first_difference(parts[0][differing], parts[1][differing], f"{name}/{differing}" if name else differing)
