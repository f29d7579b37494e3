"""What must not be shown or stored: secrets by their names, by their looks, and in URLs. One filter for all that leaves.

A name is taken apart into words (``hfToken``, ``hf_token`` and ``x-hf-token`` alike) and judged by these. Numbers, booleans
and what is empty are never secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

HIDDEN = "***"

_SECRET_ENDINGS = (
    *("password", "passwords", "passwd", "passphrase", "passcode", "passkey", "pwd", "secret", "secrets"),
    *("credential", "credentials", "creds", "authorization", "bearer", "cookie", "cookies", "csrf", "xsrf", "jwt", "dsn"),
    *("webhook", "connstr", "connectionstring"),
)
"""A name with a word that ends so is secret, wherever in it."""
_SECRET_PAIRS = {("connection", "string"), ("connection", "str"), ("conn", "string"), ("conn", "str"), ("storage", "options")}
_OWNERS = {
    *("access", "account", "admin", "api", "app", "auth", "client", "consumer", "decryption", "deploy", "encryption", "gpg"),
    *("hmac", "hub", "license", "licence", "login", "mail", "master", "oauth", "personal", "pgp", "private", "refresh"),
    *("root", "rsa", "sas", "secret", "security", "service", "shared", "signing", "smtp", "ssh", "ssl", "storage", "tls"),
    *("anthropic", "aws", "azure", "comet", "database", "db", "gcp", "gcs", "gh", "git", "github", "gitlab", "google", "hf"),
    *("huggingface", "kaggle", "mlflow", "neptune", "openai", "s3", "slack", "stripe", "telegram", "vault", "wandb"),
}
"""A key, tokens or a pass of one of these is secret; a key of anything else (``sort_key``) is a word like any other."""
_OF_TEXT = {
    *("pad", "padding", "eos", "bos", "sos", "unk", "unknown", "mask", "sep", "separator", "cls", "class", "special"),
    *("start", "begin", "end", "stop", "eot", "eod", "image", "img", "audio", "video", "vision", "patch", "text", "word"),
    *("sub", "subword", "char", "sentence", "document", "entity", "speaker", "lang", "language", "task", "domain", "time"),
    *("next", "prev", "previous", "first", "last", "new", "old", "source", "target", "label", "placeholder", "extra"),
    *("additional", "register", "memory", "empty", "blank", "null", "oov", "prompt", "query", "summary", "global", "pool"),
    *("pooling", "decoder", "encoder", "prefix", "suffix", "newline", "system", "assistant", "dist", "distillation"),
    *("max", "min", "n", "num", "per", "by", "cross", "single", "multi", "input", "output", "think"),
}
"""A token of one of these is one of a vocabulary; of anything else, or by itself, it opens a door."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_TAILS = ("keys", "key", "tokens", "token", "pass")
_OF_VOCABULARY = re.compile(r"<.*>|\[.*\]|\{.*\}", re.S)
_HEXADECIMAL = re.compile(r"[0-9a-fA-F]{32,}")

_USER = re.compile(
    r"(?<=://)(?<!abfs://)(?<!abfss://)"  # there the container stands before the @
    # Some passwords have a slash. Ports have none behind them, but a path, in which an @ may stand near the end. All is
    # bounded, as texts of run directories may be made to take forever.
    r"(?:[^/\s]{0,500}@|[^/\s:@]{0,500}:(?!\d{1,5}/[^\s@]{0,500}(?:@[^\s/@]{0,500})?(?:[\s'\"]|$))"
    r"[^\s@]{0,500}@(?:[^/\s]{0,500}@)?)"
)
_QUERY = re.compile(r"""(?<=://)([^\s?'"]{0,2000})\?[^\s'"]*""")
_LOOKS = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), HIDDEN),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\bsk-(?:[a-z0-9]{1,20}-){0,4}\w{16,}[\w-]*"), HIDDEN),
    (re.compile(r"\b(?:gh[opusr]_|github_pat_|glpat-)[\w-]{16,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), HIDDEN),
    (re.compile(r"\bxox[a-z]-[\w-]{8,}"), HIDDEN),
    (re.compile(r"\bAIza[\w-]{30,}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), HIDDEN),
    (re.compile(r"(?<=hooks\.slack\.com/services/)[\w/]+"), HIDDEN),
    (re.compile(r"""\b((?:authorization|cookie)["']?\s*[:=]\s*["']?)[^\r\n'"]+""", re.I), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Bearer\s+)[\w.~+/=-]+"), rf"\1{HIDDEN}"),
)
"""What is secret by its looks, under any name, and what takes its place."""
_ASSIGNED = re.compile(r"""(?<![\w.-])([\w.-]+)(["']?\s*=\s*["']?|["']\s*:\s*["']?)([^\s;&'",}]+)""")
"""``name=value`` and ``"name": "value"`` within a text, such as a connection string or an argument."""


def without_credentials(value: Any) -> Any:
    """``value`` (text, bytes, numbers, in lists and mappings) with ``***`` in place of secrets, and URLs without theirs."""
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, bytes):
        text = value.decode("latin-1")
        return value if _clean(text) == text else HIDDEN.encode()
    if isinstance(value, Mapping):
        return {without_credentials(key): _under(str(key), entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [without_credentials(entry) for entry in value]
    return value


def is_secret(name: str) -> bool:
    """Whether a text of this name is secret, going by the words of the name."""
    words = _words(name)
    if any(word.endswith(_SECRET_ENDINGS) for word in words):
        return True
    if any(pair in _SECRET_PAIRS or (pair[0] in _OWNERS and pair[1] in _TAILS) for pair in pairwise(words)):
        return True
    if words[-1:] == ["token"]:
        return not _OF_TEXT.intersection(words)
    return words[-1:] == ["auth"] or words == ["pass"]


def _words(name: str) -> list[str]:
    """The words of a name, in lower case and without numbers; ``apikey`` is two."""
    words = []
    for word in _WORD.findall(name):
        word = word.lower()
        tail = next((tail for tail in _TAILS if word.endswith(tail) and word[: -len(tail)] in _OWNERS), "")
        words += [word[: -len(tail)], tail] if tail else [word]
    return words


def _under(name: str, value: Any) -> Any:
    """``value`` as it may be shown under ``name``."""
    words = _words(name)
    if isinstance(value, Mapping) and words == ["token"]:
        return without_credentials(value)  # a group of hyper-parameters
    if isinstance(value, Mapping) and words[-1:] in (["options"], ["credentials"]) and is_secret(name):
        return HIDDEN
    if is_secret(name):
        return _hidden(value)
    if {"key", "keys", "wandb"}.intersection(words):
        return _without_hexadecimal(without_credentials(value))
    return without_credentials(value)


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        return HIDDEN if value and not _OF_VOCABULARY.fullmatch(value) else value
    if isinstance(value, bytes):
        return HIDDEN.encode() if value else value
    if isinstance(value, Mapping):
        return {without_credentials(key): _hidden(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_hidden(entry) for entry in value]
    return value


def _without_hexadecimal(value: Any) -> Any:
    """W&B's keys look like any hash: only their names tell."""
    if isinstance(value, list):
        return [_without_hexadecimal(entry) for entry in value]
    return HIDDEN if isinstance(value, str) and _HEXADECIMAL.fullmatch(value) else value


def _clean(text: str) -> str:
    if "://" in text:
        text = _QUERY.sub(r"\1", _USER.sub("", text))
    for look, instead in _LOOKS:
        text = look.sub(instead, text)
    return _ASSIGNED.sub(lambda match: f"{match[1]}{match[2]}{HIDDEN}" if is_secret(match[1]) else match[0], text)
