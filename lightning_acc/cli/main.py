"""``lightning-acc``: words to verbs."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import shlex
import sys
import textwrap
from typing import Any

from lightning_acc import arguments
from lightning_acc.cli.verbs import LISTS, SEVERAL, VERBS
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import ImportRefused, InfluenceError

_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
DESCRIPTION = (
    "Which training samples made your PyTorch Lightning model better or worse? With --trust PACKAGE a run may import its "
    "module from that package; without it only from what is imported already. Each verb has --help."
)
WIDTH = 100


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
    if args[0] not in SEVERAL:
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


def _overview() -> str:
    """The verbs, each with the first sentence of its help. No parser is made for it: one imports all that its verb needs."""
    indent = 2 + max(map(len, VERBS)) + 2
    lines = ["usage: lightning-acc [--trust PACKAGE] VERB ...", "", textwrap.fill(DESCRIPTION, WIDTH), ""]
    for name, verb in VERBS.items():
        said = (inspect.getdoc(verb) or "").partition("\n\n")[0].replace("\n", " ")
        lines.append(textwrap.fill(said, WIDTH, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent))
    return "\n".join(lines)


def _obey(args: list[str]) -> None:
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help", "--version"):
        print(f"lightning-acc {importlib.metadata.version('lightning-acc')}" if verb == "--version" else _overview())
        sys.exit(0)
    if verb not in VERBS:
        said = f"There is no verb {verb}{arguments.meant(verb, VERBS) or '.'} See lightning-acc --help."
        raise arguments.NotUnderstood(None, said)
    if verb in ("fit", "run"):
        from lightning_acc.studies import fit as training

        getattr(training, verb)(args[1:])
    else:
        from jsonargparse import ArgumentParser, auto_cli

        class DashedParser(arguments.InOneSentence, ArgumentParser):
            def format_help(self, *formatter: Any) -> str:
                text = super().format_help(*formatter).replace("[ITEM,...]", "RUN [RUN ...]")
                return _OPTION.sub(lambda option: option[0].replace("_", "-"), text)

        # Options are written with dashes, as users of other commands expect; underscores do as well.
        listed = _runs_together(_lists_in_brackets(args))[1:]
        dashed = [_OPTION.sub(_underscored, arg, count=1) if arg.startswith("--") else arg for arg in listed]
        auto_cli(VERBS[verb], args=dashed, parser_class=DashedParser, prog=f"lightning-acc {verb}")


def _line(error: ImportRefused, args: list[str]) -> str:
    """The same command once more, with what the module of its run needs."""
    where, trusted = "", []
    if error.missing:
        here = any(map(os.path.exists, (error.missing, f"{error.missing}.py")))
        more = ":$PYTHONPATH" if os.environ.get("PYTHONPATH") else ""
        where = f"PYTHONPATH={'.' if here else f'FOLDER_OF_{error.missing}'}{more} "
    if error.untrusted:
        trusted = ["--trust", error.untrusted]
    return where + shlex.join(["lightning-acc", *args, *trusted])


def main(args: list[str] | None = None) -> None:
    """Entry point: one line on stderr and exit status 1 for what cannot be done, 2 for words that are not understood, 130
    after Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args)
    try:
        _obey(_trusting(args))
    except arguments.NotUnderstood as error:
        print(f"lightning-acc: {without_credentials(str(error))}", file=sys.stderr)
        sys.exit(2)
    except InfluenceError as error:
        again = f" If you trust it, type: {_line(error, args)}" if isinstance(error, ImportRefused) else ""
        print(f"lightning-acc: {without_credentials(str(error) + again)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("lightning-acc: interrupted; what was finished before is kept", file=sys.stderr)
        sys.exit(130)
