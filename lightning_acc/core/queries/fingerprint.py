"""What a function is, in words that change when it does: its code, and the values it holds."""

from __future__ import annotations

import types
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lightning_acc.record.store import digest


def describe(value: Any, seen: set[int] | None = None) -> str:
    """The value in words: equal words mean equal values; what cannot be told so gets other words every time.

    Of a function these are its code and the code of those it calls, defaults, closure and the global values it names.
    """
    seen = set() if seen is None else seen

    def inner(part: Any) -> str:
        return describe(part, seen)

    if isinstance(value, (type(None), bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        values = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        return f"{value.dtype} {tuple(value.shape)} {inner(values.numpy())}"
    if isinstance(value, np.ndarray):
        return f"array{value.shape}{value.dtype}{digest(np.ascontiguousarray(value).tobytes())}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(inner, value))})"
    if isinstance(value, (set, frozenset)):
        return f"set({', '.join(sorted(map(inner, value)))})"
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{inner(key)}: {inner(entry)}' for key, entry in value.items())})"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, types.CodeType):
        return f"code {value.co_code.hex()} {value.co_names} {', '.join(map(inner, value.co_consts))}"
    if isinstance(value, types.MethodType):
        return f"method {inner(value.__func__)} of {inner(value.__self__)}"
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__ == "functools" and hasattr(value, "func"):
        return f"partial {inner(value.func)} {inner(value.args)} {inner(value.keywords)}"
    if hasattr(value, "__dict__") and id(value) not in seen:
        seen.add(id(value))
        return f"{type(value).__module__}.{type(value).__qualname__} {inner(vars(value))}"
    return f"{type(value).__qualname__} {uuid.uuid4().hex}"


def _function(function: types.FunctionType, seen: set[int]) -> str:
    code = function.__code__
    # What installed packages define is named by the versions among the conditions; only the user's own code is followed.
    if function.__module__.partition(".")[0] in ("torch", "numpy", "builtins", "lightning_acc"):
        return f"{function.__module__}.{function.__qualname__}"
    if id(function) in seen:
        return function.__qualname__
    seen.add(id(function))
    held = {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)}
    named = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    parts = (code, function.__defaults__, function.__kwdefaults__, held, named)
    return f"function {function.__qualname__} {' '.join(describe(part, seen) for part in parts)}"
