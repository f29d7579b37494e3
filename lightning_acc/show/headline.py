"""``headline``: what is known of a run in one sentence, the same on the terminal, on the page and in W&B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_acc.core.queries.moments import END
from lightning_acc.judge import cleaning_table
from lightning_acc.judge.agreement import stored_scores
from lightning_acc.methods import registry
from lightning_acc.record.record import Record
from lightning_acc.scoring.scores import Scores

BLIND = ("random", "loss", "self-influence", "cleanlab")
"""Controls that know nothing but the training data: what gains no more than they do was not worth the influence."""
NAMED = 3
"""Of the most harmful samples, where nothing was cleaned yet."""


@dataclass(frozen=True)
class Headline:
    """What to do with a run, and how sure that is.

    Attributes:
        text: ``drop 60 of 600: +2.3 points (0.4 to 4.3); ranking faithful, Spearman 0.99``; points of test accuracy, with their
            95 % interval, or the change of the test loss of a module without an accuracy.
        scores: name of the table of scores that ranks the samples; None where it is stored no longer.
        n_dropped: how many of its most harmful samples that is about; 0 where nothing was cleaned.
    """

    text: str
    scores: str | None
    n_dropped: int = 0

    def __str__(self) -> str:
        return self.text


def headline(run: Record, tables: dict[str, Scores] | None = None) -> Headline | None:
    """The headline of a run, from what is stored with it; None where it has no scores.

    Of several rankings and shares that were dropped it is about the one whose gain is surest: of the highest lower end.

    Args:
        run: the recorded run.
        tables: its stored scores, where they are read already.

    Raises:
        RunError: something stored with it is damaged.
    """
    tables = stored_scores(run) if tables is None else tables
    cleaned = cleaning_table.read(run)
    rows = [] if cleaned is None else cleaned.to_pylist()
    tried = [row for row in rows if cleaning_table.method_of(row["method"]) in registry.METHODS]
    if not tried:
        return _ranked(tables)
    best = max(tried, key=lambda row: (row["gain_low"], -row["n_removed"]))
    name = fullest({name: table for name, table in tables.items() if _label(table) == best["method"]})
    return Headline(
        f"{_gained(run, best, rows, len(tried))}; ranking {'not stored' if name is None else _trusted(tables[name])}",
        name,
        best["n_removed"],
    )


def fullest(tables: dict[str, Scores]) -> str | None:
    """The name of the ranking of most samples, and of those of as many of the truest; None of no tables."""

    def order(name: str) -> tuple[int, int, bool]:
        c = tables[name].conditions
        return -sum(len(removal) == 1 for removal in tables[name].removals), registry.place(c["method"]), c["at"] != END

    return min(tables, key=order, default=None)


def _ranked(tables: dict[str, Scores]) -> Headline | None:
    name = fullest(tables)
    if name is None:
        return None
    table = tables[name]
    single = [removal[0] for removal in table.removals if len(removal) == 1]
    what = f"{len(single)} samples" if single else f"{len(table)} groups"
    scores = table.by_removal()
    harmful = [removal for removal in table.most_harmful(NAMED) if scores[removal] < 0]
    named = ", ".join(f"#{removal[0]}" for removal in harmful if len(removal) == 1)
    most = f"; most harmful {named}" if named else ""
    return Headline(f"{what} ranked by {_label(table)}: {_trusted(table)}{most}; not cleaned yet", name)


def _gained(run: Record, row: dict[str, Any], rows: list[dict[str, Any]], tried: int) -> str:
    """What dropping gains, and whether more was tried, or a control gains as much."""
    gain, low, high = row["gain"], row["gain_low"], row["gain_high"]
    if row["accuracy"] is None:
        said = f"loss {-gain:+.2g} ({-high:+.2g} to {-low:+.2g})"
    else:
        said = f"{100 * gain:+.1f} points ({100 * low:.1f} to {100 * high:.1f})"
    text = f"drop {row['n_removed']} of {run.n_samples}: {said}"
    text = text if low > 0 else f"no sure gain: {text}"
    text += f", the surest of {tried} tried" if tried > 1 else ""
    equal = [one for one in rows if one["method"] in BLIND and one["fraction"] == row["fraction"] and one["gain"] >= gain]
    return text + (f", {max(equal, key=lambda one: one['gain'])['method']} gains as much" if equal else "")


def _trusted(table: Scores) -> str:
    if registry.is_truth(table.conditions["method"]):
        return "by retraining"
    verdict = table.verdict
    return verdict.word if verdict.spearman is None else f"{verdict.word}, Spearman {verdict.spearman:.2f}"


def _label(table: Scores) -> str:
    c = table.conditions
    return cleaning_table.label(c["method"], c["at"], int(c.get("runs", 1)))
