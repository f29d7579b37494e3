"""What a step puts into the plain attributes of a module is taken out again, so that all replays start from the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

CONTAINERS = (list, tuple, dict, set, deque)
MOST = 10_000
"""Longer containers hold data, which steps do not add to."""
RESISTS = "_rows_resist_vmap"
"""What is noted on the copy for later calls."""
OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes in which torch keeps parameters, buffers, submodules and hooks."""


class Attributes:
    """The plain attributes of a module, and of those of its submodules that are not torch's own."""

    def __init__(self, module: nn.Module) -> None:
        self._held = {
            name: part.__dict__ for name, part in module.named_modules() if not type(part).__module__.startswith("torch.")
        }

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is put into attributes in here, or into the lists and dicts among them, is taken out at the end.

        A list of losses that grows with every step would keep their graphs alive, and tensors that only vmap understands.
        """
        before = [(held, dict(held), _contents(_plain(held).values())) for held in self._held.values()]
        try:
            yield
        finally:
            for held, attributes, contents in before:
                for name in [name for name in held if name not in attributes and name != RESISTS]:
                    del held[name]
                for name, value in attributes.items():
                    if held.get(name) is not value:
                        held[name] = value
                for container, content in contents:
                    if container or content:
                        container.clear()
                        (container.extend if isinstance(container, (list, deque)) else container.update)(content)

    def values(self) -> dict[str, Any]:
        """All of them by name, as a user writes these; a container as the list of what it holds."""
        return {
            f"self.{part}.{name}" if part else f"self.{name}": _flat(value)
            for part, held in self._held.items()
            for name, value in _plain(held).items()
        }

    def changed(self, before: dict[str, Any]) -> list[str]:
        """The names of those that are not what ``values`` told before."""
        now = self.values()
        return sorted(name for name in {*before, *now} if not _same(before.get(name), now.get(name)))


def _plain(held: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in held.items() if name not in OF_EVERY_MODULE and name != RESISTS}


def _contents(values: Any) -> list[tuple[Any, Any]]:
    """The containers that may be added to, each with a copy, those inside of others first."""
    found = []
    for value in values:
        if isinstance(value, (list, dict, set, deque)) and len(value) <= MOST:
            found += [*_contents(value.values() if isinstance(value, dict) else value), (value, value.copy())]
    return found


def _flat(value: Any) -> Any:
    if isinstance(value, CONTAINERS) and len(value) <= MOST:
        return [_flat(part) for part in (value.values() if isinstance(value, dict) else value)]
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (not isinstance(a, Tensor) and isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b)
