"""Damages a run directory in thousands of ways and uses it: it must give the same answers, or say in a sentence why not.

    scripts/fuzz 5000              # so many mutations, and a table of what came of them
    scripts/fuzz --seed 1234       # one of them again, with the traceback

A run is recorded, scored, evaluated, cleaned and asked another query. A mutation changes one file (or swaps two), *plainly*,
as disks and hands do, or *sealed*: the content is made nonsense and every hash right again, as another program or someone of
ill will might. Then the run is opened and read in all ways. Each read gives the very answer it gave before, or refuses with
an ``InfluenceError`` of one sentence; after a sealed mutation the answer may be another, for the record says something else.
A bare traceback, a read that hangs or takes memory without end, and another answer from plain damage are faults.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mutations import KINDS, Files, mutate

import lightning_acc as la
from lightning_acc.judge import agreement, cleaning_table
from lightning_acc.record import manifest as manifests
from lightning_acc.record.lock import Lock
from lightning_acc.record.store import Store
from lightning_acc.show import over_time
from lightning_acc.show.report import collect, curves

SECONDS, MEMORY = 20, 3 * 2**30
"""What the reads after one mutation may take, beyond what the process has."""
METHODS = ("sgd-ie", "loo", "acc-low-rank")
Answers = dict[str, Any]


class Slow(BaseException):
    """The time is over; nothing catches it on the way."""


# ---- the run, and what is asked of it


def record(path: Path) -> None:
    """A small training of ours, with a frozen tensor and described samples."""
    import pytorch_lightning as pl

    from lightning_acc.studies.data import DigitsDataModule
    from lightning_acc.studies.models import Classifier

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    module = Classifier(64, 10, (3,), momentum=0.5)
    module.net[2].bias.requires_grad_(False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[la.TrajectoryRecorder(path)], **quiet)
    trainer.fit(module, datamodule=DigitsDataModule(n_train=24, n_val=16, batch_size=8))


def prepare(path: Path) -> Files:
    """All results of a recorded run; returns its files."""
    # The same in every run of this program, so that a seed is the same mutation.
    recorded = json.loads((path / "manifest.json").read_text())
    manifests.write(Store(path), {**recorded, "run_id": "fuzz", "created": "2026-01-01T00:00:00+00:00"})
    run = la.Run(path)
    run.add_query("more", list(_unpacked(run.query("val"))))
    for method in METHODS:
        la.score(run, method, ray_address=None, check=18 if method == "sgd-ie" else 0, progress=False)
    la.score_matrix(run, "sgd-ie", ray_address=None, check=0, progress=False)
    la.evaluate(run)
    over_time.follow(run, 2)
    la.clean(run, "sgd-ie", [0.2], seeds=2, test="more", controls=["random"], ray_address=None, progress=False)
    gone = {"run_id": "x", "pid": 2**22 + 1, "started": "1", "host": socket.gethostname(), "time": "now", "token": "y"}
    (path / "lock").write_text(json.dumps(gone))
    del run
    gc.collect()  # a module still in use would stand in for one that cannot be rebuilt
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def _unpacked(query: la.Query) -> Iterator[Any]:
    from lightning_acc.record.batches import unflatten

    for leaves, structure in query.batches:
        yield unflatten(structure, leaves)


def restore(path: Path, files: Files) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def reads(run: la.Run) -> dict[str, Callable[[], Any]]:
    """What is asked of a run, and in which order: what writes comes last.

    Of scores the estimates: what was retrained without to check a table goes, with a warning, with the table.
    """
    cleaning = {"seeds": 2, "test": "more", "controls": ["random"], "ray_address": None, "progress": False}
    return {
        "repr": lambda: repr(run).partition(": ")[2],
        "described": lambda: None if (info := run.sample_info()) is None else info.to_pydict(),
        "examples": lambda: None if (info := run.example_info("val")) is None else info.to_pydict(),
        "parameters": lambda: [run.parameters(t).tolist() for t in (0, run.n_steps)],
        "steps": lambda: [(s.sample_ids.tolist(), s.weights.tolist(), str(s.hyperparameters), s.sizes) for s in run.steps],
        "audit": lambda: str(run.audit()),
        "queries": lambda: [(name, run.query(name).fingerprint) for name in run.query_names()],
        "evaluation": lambda: agreement.read(run),
        "evaluate": lambda: str(la.evaluate(run, save=False).drop_columns(["seconds", "peak_memory_gb"]).to_pylist()),
        "cleaning": lambda: None if (table := cleaning_table.read(run)) is None else table.to_pylist(),
        "over time": lambda: str(curves.over_time(run)),
        "report": lambda: [(m["name"], str(m["ranking"])) for m in collect(run)["methods"]],
        "predictions": lambda: _predictions(run),
        "clean": lambda: str(la.clean(run, "sgd-ie", [0.2], **cleaning).to_pylist()),
        **{
            method: lambda method=method: la.score(
                run, method, ray_address=None, check=0, progress=False
            ).estimates.tolist()
            for method in METHODS
        },
        "more": lambda: la.score(
            run, "sgd-ie", query="more", ray_address=None, check=0, save=False, progress=False
        ).estimates.tolist(),
    }  # fmt: skip


def _predictions(run: la.Run) -> str:
    """What the page says of single predictions; a sentence on why it says less is a refusal."""
    found = collect(run)["predictions"]
    for asked in found["matrices"] if found else ():
        if asked["missing"]:
            raise la.RunError(asked["missing"])
    return str(found)


OF_KIND = {"scores": METHODS, "shards": METHODS, "figures": ("clean",), "added query": ("more",), "sidecar": ("more", "clean")}
DEAR = (*METHODS, "more", "clean")
"""Reads that take longest: after most mutations only some of them are made."""


def asked(kind: str, seed: int) -> tuple[str, ...]:
    """The reads that are made after a mutation of this kind of file."""
    dear = OF_KIND.get(kind) or random.Random(seed).sample(DEAR, 1)
    return tuple(dear)


def locked(path: Path) -> str:
    Lock(Store(path), "fuzz").release()
    return "taken"


class Refused(str):
    """The sentence a read was refused with."""


def answers(path: Path, dear: tuple[str, ...] = DEAR) -> Answers:
    """What the reads give, by name: an answer, a ``Refused``, or the ``Fault`` that they failed with."""
    found: Answers = {}

    def ask(name: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except la.InfluenceError as error:
            text = str(error)
            return Refused(text) if "\n" not in text else Fault(f"{len(text.splitlines())} lines: {text}")
        except Slow:
            return Fault(f"not done in {SECONDS} s\n{traceback.format_exc()}")
        except Exception:
            return Fault(traceback.format_exc())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = ask("open", lambda: la.Run(path))
        if isinstance(run, la.Run):
            for name, read in reads(run).items():
                if name in DEAR and name not in dear:
                    continue
                found[name] = ask(name, read)
        else:
            found["open"] = run
        found["lock"] = ask("lock", lambda: locked(path))
    return found


class Fault(str):
    """A traceback."""


def verdict(expected: Answers, found: Answers, sealed: bool) -> tuple[str, str]:
    """One word for a mutation, and where it is ``BAD`` why."""
    faults = [f"{name}: {answer}" for name, answer in found.items() if isinstance(answer, Fault)]
    if faults:
        return "BAD", "\n".join(faults)
    refused = [name for name, answer in found.items() if isinstance(answer, Refused)]
    changed = [name for name, answer in found.items() if name not in refused and repr(answer) != repr(expected[name])]
    # Queries and tables that are gone are no longer asked, or shown: that is an answer of its own.
    if changed and not sealed:
        return "BAD", "\n".join(
            f"{name}: {repr(found[name])[:400]} instead of {repr(expected[name])[:400]}" for name in changed
        )
    return ("different" if changed else "refused" if refused else "same"), ""


# ---- many of them


def explore(path: Path, files: Files, expected: Answers, seeds: list[int]) -> Iterator[tuple[int, str, str, str, str]]:
    """Seed, kind, mutation, word and why, of each; in a process of its own, which may die of one."""
    left = list(seeds)
    while left:
        child, receiver = _forked(lambda pipe: _work(path, files, expected, left, pipe))
        with receiver as pipe:
            while left:
                try:
                    one = pickle.load(pipe)
                except EOFError:
                    break
                yield left.pop(0), *one
        _, status = os.waitpid(child, 0)
        if left:
            restore(path, files)
            kind, how, _ = mutate(path, files, left[0])
            yield left.pop(0), kind, how, "BAD", f"the process died of it ({status})"


def _work(path: Path, files: Files, expected: Answers, seeds: list[int], pipe: Any) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _slow)
    for seed in seeds:
        pickle.dump(once(path, files, expected, seed), pipe)
        pipe.flush()


def _slow(*_: Any) -> None:
    raise Slow


def once(path: Path, files: Files, expected: Answers, seed: int) -> tuple[str, str, str, str]:
    restore(path, files)
    kind, how, sealed = mutate(path, files, seed)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = answers(path, asked(kind, seed))
    except Slow:
        found = {"time": Fault(f"not done in {SECONDS} s")}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return kind, how, *verdict(expected, found, sealed)


def table(counts: dict[str, Counter[str]]) -> str:
    words = ("same", "refused", "different", "BAD")
    lines = [f"{'file':12}" + "".join(f"{word:>11}" for word in ("tried", *words))]
    ordered = {kind: counts[kind] for kind in KINDS if kind in counts}
    for kind, came in {**ordered, "all": sum(counts.values(), Counter())}.items():
        lines.append(f"{kind:12}{came.total():11}" + "".join(f"{came[word]:11}" for word in words))
    return "\n".join(lines)


def count(path: Path, files: Files, expected: Answers, seeds: list[int], every: bool) -> dict[str, Counter[str]]:
    """How many mutations of each kind of file came to what; tells of those that are bad, or of ``every`` one."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for seed, kind, how, word, why in explore(path, files, expected, seeds):
        counts[kind][word] += 1
        if word == "BAD" or every:
            print(f"--seed {seed} ({how}): {word}\n{why}", flush=True)
    return counts


def count_on_all_cores(path: Path, files: Files, expected: Answers, seeds: list[int]) -> dict[str, Counter[str]]:
    """The same, shared out."""
    processes = len(os.sched_getaffinity(0))
    pipes = []
    for i in range(processes):
        own, share = path.with_name(f"run-{i}"), seeds[i::processes]
        _, receiver = _forked(lambda pipe: pickle.dump(dict(count(own, files, expected, share, every=False)), pipe))  # noqa: B023
        pipes.append(receiver)
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for receiver in pipes:
        with receiver as pipe:
            for kind, words in pickle.load(pipe).items():
                total[kind] += words
    return total


def _forked(work: Callable[[Any], Any]) -> tuple[int, Any]:
    """Do ``work`` in a process of its own; returns that and the end of a pipe that ``work`` is given the other end of."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child:
        os.close(sender)
        return child, os.fdopen(receiver, "rb")
    try:
        os.close(receiver)
        with os.fdopen(sender, "wb") as pipe:
            work(pipe)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def main(mutations: int, first: int, only: int | None) -> int:
    torch.set_num_threads(1)
    quick = "/dev/shm" if os.path.isdir("/dev/shm") else None  # writing waits for the disk
    with tempfile.TemporaryDirectory(dir=quick) as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(directory) / "run"
        record(path)
        files = prepare(path)
        restore(path, files)
        expected = answers(path)
        faults = {name: answer for name, answer in expected.items() if isinstance(answer, (Fault, Refused))}
        if faults:
            raise SystemExit(f"the run as it is: {faults}")
        started = time.perf_counter()
        if only is not None:
            counts = count(path, files, expected, [only], every=True)
        else:
            counts = count_on_all_cores(path, files, expected, list(range(first, first + mutations)))
        print(table(counts))
        print(f"{sum(map(Counter.total, counts.values()))} mutations in {time.perf_counter() - started:.0f} s")
    return min(1, sum(words["BAD"] for words in counts.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mutations", nargs="?", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="repeat this one")
    options = parser.parse_args()
    sys.exit(main(options.mutations, options.first, options.seed))
