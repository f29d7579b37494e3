"""``lightning-acc``: words to verbs."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from lightning_acc.cli.verbs import LISTS, SEVERAL, VERBS
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import InfluenceError

_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
DESCRIPTION = (
    "Which training samples made your PyTorch Lightning model better or worse? With --trust PACKAGE a run may import its "
    "module from that package; without it only from what is imported already."
)


def _underscored(option: re.Match[str]) -> str:
    return "--" + option[0][2:].replace("-", "_")


def _trusting(args: list[str]) -> list[str]:
    """The arguments without ``--trust PACKAGE[,PACKAGE]``, which holds for every verb, and is put into effect here."""
    out: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--trust" or word.startswith("--trust="):
            from lightning_acc.core.rebuild import allow

            named = word.partition("=")[2] or (rest.pop(0) if rest else "")
            allow(name for name in named.split(",") if name)
        else:
            out.append(word)
    return out


def _lists_in_brackets(args: list[str]) -> list[str]:
    """``--fractions 0.05 0.1`` as ``--fractions [0.05, 0.1]``, which is how the parser takes lists."""
    out: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word.split("=")[0] not in LISTS.get(args[0], ()):
            out.append(word)
            continue
        option, given, value = word.partition("=")
        values = [value] if given else []
        while not given and rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        whole = len(values) == 1 and values[0].startswith("[")
        out += [option, values[0] if whole else f"[{', '.join(values)}]"]
    return out


def _runs_together(args: list[str]) -> list[str]:
    """The run directories of a verb that takes several as one list, which is how the parser takes them."""
    if not args or args[0] not in SEVERAL:
        return args
    runs: list[str] = []
    options: list[str] = []
    rest = args[1:]
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            runs.append(word)
            continue
        options.append(word)
        if word.startswith("--") and "=" not in word and word != "--help" and rest:  # all others have a value
            options.append(rest.pop(0))
    return [args[0], *([json.dumps(runs)] if runs else []), *options]


def main(args: list[str] | None = None) -> None:
    """Entry point: one line on stderr and exit status 1 for what cannot be done, 130 after Ctrl-C."""
    args = _trusting(list(sys.argv[1:] if args is None else args))
    try:
        if args and args[0] in ("fit", "run"):
            from lightning_acc.studies import fit as training

            getattr(training, args[0])(args[1:])
        else:
            from jsonargparse import ArgumentParser, auto_cli

            class DashedParser(ArgumentParser):
                def format_help(self, *formatter: Any) -> str:
                    text = super().format_help(*formatter).replace("[ITEM,...]", "RUN [RUN ...]")
                    return _OPTION.sub(lambda option: option[0].replace("_", "-"), text)

            # Options are written with dashes, as users of other commands expect; underscores do as well.
            listed = _runs_together(_lists_in_brackets(args))
            dashed = [_OPTION.sub(_underscored, arg, count=1) if arg.startswith("--") else arg for arg in listed]
            auto_cli(VERBS, args=dashed, parser_class=DashedParser, prog="lightning-acc", description=DESCRIPTION)
    except InfluenceError as error:
        print(f"lightning-acc: {without_credentials(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("lightning-acc: interrupted; what was finished before is kept", file=sys.stderr)
        sys.exit(130)
