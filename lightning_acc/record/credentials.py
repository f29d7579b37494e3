"""What must not be shown or stored: credentials in URLs, and values whose names say that they are secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_USER = re.compile(
    r"(?<=://)(?<!abfs://)(?<!abfss://)"  # there the container stands before the @
    r"(?:[^/\s]*@|[^/\s:@]*:(?!\d+/)[^\s@]*@(?:[^/\s]*@)?)"  # some passwords have a slash; ports have not
)
_QUERY = re.compile(r"""(?<=://)([^\s?'"]*)\?[^\s'"]*""")
_SECRET = re.compile(
    r"(.*_)?(password|passwd|secret|api_?key|access_key|credentials?|(auth|access|api|bearer)_token)|token", re.I
)
_SECRET_MAPPING = re.compile(r"(.*_)?(storage_options|credentials)", re.I)


def without_credentials(value: Any) -> Any:
    """``value``, plain JSON or text, without ``user:password@`` and query strings in its URLs and without named secrets."""
    if isinstance(value, str):
        return _QUERY.sub(r"\1", _USER.sub("", value)) if "://" in value else value
    if isinstance(value, Mapping):
        return {key: "***" if _is_secret(str(key), entry) else without_credentials(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_credentials(entry) for entry in value]
    return value


def _is_secret(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(_SECRET_MAPPING.fullmatch(key))
    return isinstance(value, str) and bool(_SECRET.fullmatch(key))
