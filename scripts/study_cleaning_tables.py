"""What scripts/study says of cleaning: does-it-clean.csv, the tables and the picture, from the cells of study_cleaning.py.

    python scripts/study_cleaning.py --tables

Cells that are not in the output directory are left out; where there are none, what stands in the CSV is shown anew. A sentence
that the figures do not bear out stops the writing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from study_cleaning import ADDED, RANKINGS, RUNS, cells
from study_figures import HERE, into_readme, plt

CSV = HERE / "does-it-clean.csv"
DATA = {"mnist": "MNIST", "adult": "Adult", "news": "20 Newsgroups"}
NOISE = {
    "uniform-10": "uniform 10 %",
    "uniform-20": "uniform 20 %",
    "class-20": "class-dependent 20 %",
    "feature-20": "features 20 %",
}
ORDER = [*RANKINGS, "random", ADDED]
UNTRIED = "not tried"
VAL_WRONG = "validation wrong too"
COLOURS = {"sgd-ie": "#d9730d", "acc-low-rank": "#0b6e99", "validation": "#5aa9a0", "oracle": "#3a8f4d", "random": "#9b9a97"}
COLOURS |= {"loss": "#b8a14a", "self-influence": "#c46a8f", "cleanlab": "#7a4ea3"}
SHOWN = (
    *("sgd-ie end", "sgd-ie along", "sgd-ie along of 4 runs", "acc-low-rank along"),
    *("loss", "self-influence", "cleanlab", "validation", "validation added", "oracle", "random"),
)
"""Rankings that the picture shows."""


def write(out: Path) -> None:
    found = [json.loads((out / f"{name}.json").read_text()) for name in cells() if (out / f"{name}.json").exists()]
    found = [one for one in found if not one["cell"].startswith("digits")]
    if found:
        known = frame(found)
        if CSV.exists():  # cells that were run elsewhere stay as they are
            before = pd.read_csv(CSV)
            known = pd.concat([known, before[~before["cell"].isin(known["cell"])]], ignore_index=True)
        order = {name: place for place, name in enumerate(cells())}
        known = known.sort_values("cell", key=lambda column: column.map(order), kind="stable")
        known.to_csv(CSV, index=False, float_format="%.5g")
    figures = pd.read_csv(CSV)
    picture(figures)
    lines = [*tables(figures), *sentences(figures)]
    into_readme("does-it-clean", lines)
    print("\n".join(lines))


def frame(found: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for each cell, ranking and share dropped."""
    rows = []
    for one in found:
        about = {key: one[key] for key in ("cell", "n", "n_val", "n_test", "steps", "parameters", "seeds", "rate", "accuracy")}
        for ranking, row in one["rankings"].items():
            for share, gain in (row["gains"] or {UNTRIED: {}}).items():
                ends = {
                    f"{what}{end}": value
                    for what, key in (("points", "accuracy"), ("loss_gain", "loss"))
                    for end, value in zip(("", "_low", "_high"), gain.get(key, [np.nan] * 3), strict=True)
                }
                found_by = {"ranking": ranking, "precision": row["precision"], "auc": row["auc"], "dropped": share}
                rows.append({**about, **found_by, **ends})
    return pd.DataFrame(rows)


def title(name: str) -> str:
    cell = cells()[name]
    return NOISE[cell.noise] + (f", {VAL_WRONG}" if cell.val_wrong else "")


def tables(figures: pd.DataFrame) -> list[str]:
    """For each data set and size, what is found and what is gained by dropping as many as are corrupted."""
    lines = []
    for size in ("1000", "all"):
        for data in DATA:
            names = [name for name in figures["cell"].unique() if (cells()[name].data, cells()[name].size) == (data, size)]
            if names:
                lines += [*table(figures[figures["cell"].isin(names)], names, data), ""]
    for name in ("mnist-1000-class-20", "mnist-1000-uniform-20"):
        if name in set(figures["cell"]):
            lines += [*by_share(figures[figures["cell"] == name], name), ""]
    return lines


def table(part: pd.DataFrame, names: list[str], data: str) -> list[str]:
    first = part.iloc[0]
    tried = f"{part['seeds'].max()} seeds" + (", where tried" if part["seeds"].min() == 0 else "")
    gained = f"; points of test accuracy gained by dropping as many, over {tried}" if part["seeds"].max() else ""
    lines = [
        f"**{DATA[data]}, {first['n']} samples**, {first['n_val']} for validation, {first['n_test']} for testing, "
        f"{first['steps']} steps. Precision at the noise rate (AUC){gained}:",
        "",
        "| ranking | " + " | ".join(map(title, names)) + " |",
        "| --- " * (len(names) + 1) + "|",
    ]
    accuracies = [part[part["cell"] == name]["accuracy"].iloc[0] for name in names]
    before = ["" if np.isnan(accuracy) else f"{accuracy:.1f} %" for accuracy in accuracies]
    lines.append(f"| test accuracy, nothing dropped | {' | '.join(before)} |")
    for ranking in sorted(part["ranking"].unique(), key=ORDER.index):
        shown = []
        for name in names:
            share = f"{100 * cells()[name].rate:.0f} %"
            row = part[(part["cell"] == name) & (part["ranking"] == ranking) & part["dropped"].isin([share, "0 %", UNTRIED])]
            shown.append(in_words(row.iloc[0]) if len(row) else "")
        lines.append(f"| `{ranking}` | {' | '.join(shown)} |")
    return lines


def in_words(row: pd.Series) -> str:
    """A cell of the table; what drops nothing finds nothing."""
    found = "" if np.isnan(row["auc"]) else f"{row['precision']:.2f} ({row['auc']:.2f})"
    if np.isnan(row["points"]):
        return found
    return f"{found}{'; ' if found else ''}{row['points']:+.1f} ± {(row['points_high'] - row['points_low']) / 2:.1f}"


def by_share(part: pd.DataFrame, name: str) -> list[str]:
    shares = [share for share in part["dropped"].unique() if share != "0 %"]
    lines = [f"**MNIST, 1000 samples, {title(name)}**: points of test accuracy gained; test loss, by the share dropped:", ""]
    lines += ["| ranking | " + " | ".join(shares) + " |", "| --- " * (len(shares) + 1) + "|"]
    for ranking in [one for one in part["ranking"].unique() if one != "validation added"]:
        rows = [part[(part["ranking"] == ranking) & (part["dropped"] == share)].iloc[0] for share in shares]
        shown = [
            f"{r['points']:+.1f} ± {(r['points_high'] - r['points_low']) / 2:.1f}; "
            f"{r['loss_gain']:+.2f} ± {(r['loss_gain_high'] - r['loss_gain_low']) / 2:.2f}"
            for r in rows
        ]
        lines.append(f"| `{ranking}` | {' | '.join(shown)} |")
    return lines


def picture(figures: pd.DataFrame) -> None:
    """Precision and gain by ranking, class-dependent and uniform noise beside one another."""
    names = [f"mnist-1000-{noise}{end}" for noise in ("class-20", "uniform-20") for end in ("", "-val-wrong")]
    names = [name for name in names if name in set(figures["cell"])]
    if not names:
        return
    drawn = figures[figures["cell"].isin(names) & figures["dropped"].isin(["20 %", "0 %"])]
    # The same rows in all panels, which share their labels: those that were run in each.
    everywhere = [ranking for ranking in SHOWN if drawn[drawn["ranking"] == ranking]["cell"].nunique() == len(names)][::-1]
    figure, axes = plt.subplots(2, len(names), figsize=(2.2 * len(names) + 1.4, 5.2), sharey=True, squeeze=False)
    for column, name in enumerate(names):
        part = drawn[drawn["cell"] == name].set_index("ranking").loc[everywhere]
        colours = [colour_of(ranking) for ranking in part.index]
        places = np.arange(len(part))
        top, bottom = axes[:, column]
        top.barh(places, part["precision"].fillna(0), color=colours)
        top.set(title=title(name).replace(", ", ",\n"), xlim=(0, 1), xlabel="share of corrupted in the first 20 %")
        reach = np.array([part["points"] - part["points_low"], part["points_high"] - part["points"]])
        bottom.barh(places, part["points"], color=colours, xerr=reach, error_kw={"lw": 0.8})
        bottom.axvline(0, color="#1f1f1f", lw=0.6)
        bottom.set(xlabel="points gained, 20 % dropped", yticks=places, yticklabels=part.index)
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=7)
            axis.xaxis.label.set_size(7)
            axis.title.set_size(8)
    figure.tight_layout()
    figure.savefig(HERE / "cleaning.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def colour_of(ranking: str) -> str:
    return next(colour for name, colour in COLOURS.items() if ranking.startswith(name))


ALONG = f"sgd-ie along of {RUNS} runs"
CHEAP = ("loss", "self-influence", "cleanlab")
"""Rankings that need no validation examples."""


class Figures:
    """Looked up by cell and ranking, where as many are dropped as are corrupted."""

    def __init__(self, figures: pd.DataFrame) -> None:
        rates = figures["cell"].map(lambda name: f"{100 * cells()[name].rate:.0f} %")
        self._rows = figures[(figures["dropped"] == rates) | figures["dropped"].isin(["0 %", UNTRIED])].set_index(
            ["cell", "ranking"]
        )

    def has(self, *names: str) -> bool:
        return set(names) <= set(self._rows.index.get_level_values(0))

    def knows(self, cell: str, ranking: str) -> bool:
        return (cell, ranking) in self._rows.index

    def precision(self, cell: str, ranking: str) -> float:
        return float(self._rows.loc[(cell, ranking), "precision"])

    def points(self, cell: str, ranking: str) -> float:
        return float(self._rows.loc[(cell, ranking), "points"])

    def reach(self, cell: str, ranking: str) -> float:
        """Half the interval of the points."""
        row = self._rows.loc[(cell, ranking)]
        return float(row["points_high"] - row["points_low"]) / 2


def sentences(table: pd.DataFrame) -> list[str]:
    """Who wins where, and what to use for what: each sentence with what must be so for it to stand here."""
    f = Figures(table)
    lines = []

    def say(text: str, *facts: bool) -> None:
        assert all(facts), f"The figures do not bear out ({facts}): {text}"
        lines.append(f"* {text}")

    def best(cell: str, rankings: tuple[str, ...], what: str = "precision") -> str:
        return max(rankings, key=lambda ranking: getattr(f, what)(cell, ranking))

    cell, wrong = "mnist-1000-class-20", "mnist-1000-class-20-val-wrong"
    if f.has(cell):
        cheap, paid = best(cell, CHEAP), best(cell, CHEAP, "points")
        say(
            f"**Systematic wrong labels, a clean validation set: influence finds them.** On MNIST `{ALONG}` has "
            f"a precision of {f.precision(cell, ALONG):.2f} and gains {f.points(cell, ALONG):.1f} points, the oracle "
            f"{f.points(cell, 'oracle'):.1f}; of what needs no validation examples `{cheap}` finds most, "
            f"{f.precision(cell, cheap):.2f}, and gains {f.points(cell, paid):.1f}. The network learns such labels as it "
            f"learns a class: the loss of the trained model does not show them ({f.precision(cell, 'loss'):.2f}).",
            f.precision(cell, ALONG) > 1.5 * f.precision(cell, cheap),
            f.points(cell, ALONG) > 2 * f.points(cell, paid),
            cheap == paid,
            abs(f.points(cell, ALONG) - f.points(cell, "oracle")) < f.reach(cell, "oracle"),
        )
        say(
            f"**The knowledge is the validation set's.** A model trained on these {int(table['n_val'].iloc[0])} examples alone "
            f"distrusts the right samples just as well ({f.precision(cell, 'validation'):.2f}, "
            f"{f.points(cell, 'validation'):+.1f} points), for less; adding them to the training, nothing dropped, gains "
            f"{f.points(cell, 'validation added'):.1f}.",
            f.precision(cell, "validation") >= f.precision(cell, ALONG),
            abs(f.points(cell, "validation") - f.points(cell, ALONG)) < f.reach(cell, "validation"),
            f.points(cell, "validation added") < f.points(cell, ALONG),
        )
        say(
            f"**Read along the run, not at its end**: {f.precision(cell, 'sgd-ie end'):.2f} there against "
            f"{f.precision(cell, 'sgd-ie along'):.2f}. A mean over {RUNS} runs helps at the end "
            f"({f.precision(cell, f'sgd-ie end of {RUNS} runs'):.2f}); along the run it adds little here "
            f"({f.precision(cell, ALONG):.2f}).",
            f.precision(cell, "sgd-ie along") - f.precision(cell, "sgd-ie end") > 0.1,
            f.precision(cell, f"sgd-ie end of {RUNS} runs") - f.precision(cell, "sgd-ie end") > 0.03,
            0 <= f.precision(cell, ALONG) - f.precision(cell, "sgd-ie along") < 0.03,
        )
    if f.has(cell, wrong):
        found = best(wrong, CHEAP)
        say(
            f"**Where the validation labels are wrong in the same way, influence finds little**: on MNIST "
            f"{f.precision(wrong, ALONG):.2f} ({f.points(wrong, ALONG):+.1f} points), the validation model "
            f"{f.precision(wrong, 'validation'):.2f} ({f.points(wrong, 'validation'):+.1f}); `{found}`, which does not use "
            f"them, {f.precision(wrong, found):.2f} ({f.points(wrong, found):+.1f}) as before.",
            f.precision(wrong, ALONG) < f.precision(wrong, found),
            f.precision(wrong, "validation") < f.precision(wrong, found),
            f.points(wrong, ALONG) < f.points(wrong, found),
        )
    same, lost = "mnist-1000-uniform-20", "mnist-1000-uniform-20-val-wrong"
    if f.has(same):
        say(
            f"**Uniform noise: the loss finds it as well, at no cost** ({f.precision(same, 'loss'):.2f}; `{ALONG}` "
            f"{f.precision(same, ALONG):.2f}, `validation` {f.precision(same, 'validation'):.2f}), though dropping by "
            f"influence gains more ({f.points(same, ALONG):+.1f} against {f.points(same, 'loss'):+.1f} points).",
            abs(f.precision(same, "loss") - f.precision(same, ALONG)) < 0.05,
            f.points(same, ALONG) - f.reach(same, ALONG) > f.points(same, "loss") + f.reach(same, "loss"),
        )
    if f.has(same, lost):
        say(
            f"With a fifth of the validation labels wrong at random too, influence loses what it gained "
            f"({f.precision(lost, ALONG):.2f}, {f.points(lost, ALONG):+.1f} points); the loss "
            f"({f.points(lost, 'loss'):+.1f}) and the validation model ({f.precision(lost, 'validation'):.2f}, "
            f"{f.points(lost, 'validation'):+.1f}) do not.",
            f.points(lost, ALONG) + f.reach(lost, ALONG) < 0 < f.points(lost, "loss") - f.reach(lost, "loss"),
            f.points(lost, "validation") - f.reach(lost, "validation") > 0,
        )
    census, news = "adult-1000-class-20", "news-1000-class-20"

    def told(cell: str) -> str:
        shown = ("sgd-ie end", ALONG, "validation", "cleanlab", "loss")
        parts = [f"`{name}` {f.precision(cell, name):.2f} ({f.points(cell, name):+.1f} points)" for name in shown]
        return f"{', '.join(parts)}, the oracle {f.points(cell, 'oracle'):+.1f}"

    if f.has(census):
        say(
            f"On Adult, class-dependent, influence is ahead of all, read at the end as well as along the run: {told(census)}.",
            best(census, (ALONG, "sgd-ie end", "validation", *CHEAP)) == "sgd-ie end",
            f.precision(census, ALONG) > f.precision(census, "validation"),
            abs(f.points(census, ALONG) - f.points(census, "sgd-ie end")) < f.reach(census, ALONG),
        )
    both = "adult-1000-class-20-val-wrong"
    if f.has(both):
        say(
            f"With wrong validation labels on Adult it finds less than the loss ({f.precision(both, ALONG):.2f} against "
            f"{f.precision(both, 'loss'):.2f}), and yet dropping what it finds gains {f.points(both, ALONG):+.1f} points "
            f"(loss {f.points(both, 'loss'):+.1f}, validation {f.points(both, 'validation'):+.1f}).",
            f.precision(both, ALONG) < f.precision(both, "loss"),
            f.points(both, ALONG) > f.points(both, "validation") > f.points(both, "loss"),
        )
    if f.has(news):
        say(
            f"On 20 Newsgroups, class-dependent, influence does no better than cleanlab, and the validation model far better: "
            f"{told(news)}.",
            abs(f.precision(news, ALONG) - f.precision(news, "cleanlab")) < 0.05,
            f.precision(news, "validation") > f.precision(news, ALONG) + 0.2,
            f.points(news, "validation") > f.points(news, ALONG) + f.reach(news, ALONG),
        )
    all_census, all_news, once = "adult-all-class-20", "news-all-class-20", "sgd-ie along"
    if f.has(all_census):
        say(
            "All of Adult, class-dependent: along the run as good as a model trained on validation, and as the oracle, but "
            f"not at the end: {told(all_census)}; `{once}` of one run {f.precision(all_census, once):.2f} "
            f"({f.points(all_census, once):+.1f} points).",
            abs(f.precision(all_census, ALONG) - f.precision(all_census, "validation")) < 0.03,
            f.precision(all_census, once) > f.precision(all_census, "sgd-ie end") + 0.3,
            abs(f.points(all_census, ALONG) - f.points(all_census, "oracle")) < f.reach(all_census, ALONG),
        )
    if f.has(all_news):
        say(
            f"All of 20 Newsgroups, class-dependent, in {steps(table, all_news)} steps: what was true of 1000 posts holds: "
            f"{told(all_news)}.",
            abs(f.precision(all_news, ALONG) - f.precision(all_news, "cleanlab")) < 0.05,
            f.precision(all_news, "validation") > f.precision(all_news, ALONG) + 0.2,
        )
    full, dense = "mnist-all-uniform-10", "sgd-ie along:200"
    if f.has(full) and f.knows(full, dense):
        say(
            f"**All of MNIST, one label in ten wrong at random: the loss** ({f.precision(full, 'loss'):.2f}). Influence comes "
            f"from {f.precision(full, 'sgd-ie end'):.2f} at the end to {f.precision(full, 'sgd-ie along'):.2f} along the run "
            f"and {f.precision(full, ALONG):.2f} over {RUNS} runs, at every 20th of {steps(table, full)} steps; read at 200 it "
            f"finds {f.precision(full, dense):.2f}, and over {RUNS} runs {f.precision(full, f'{dense} of {RUNS} runs'):.2f}."
            + (
                ""
                if np.isnan(f.points(full, "oracle"))
                else f" Dropping them gains the oracle {f.points(full, 'oracle'):+.1f} points."
            ),
            f.precision(full, "loss") > f.precision(full, dense) > f.precision(full, "sgd-ie along"),
            f.precision(full, "sgd-ie along") > f.precision(full, "sgd-ie end") + 0.1,
        )
    noisy, fitted = "mnist-1000-feature-20", "news-1000-uniform-20"
    if f.has(noisy):
        say(
            f"**Noisy features** are hardly found by any: `validation` {f.precision(noisy, 'validation'):.2f}, `{ALONG}` "
            f"{f.precision(noisy, ALONG):.2f}, `cleanlab` {f.precision(noisy, 'cleanlab'):.2f}, `loss` "
            f"{f.precision(noisy, 'loss'):.2f}, of 0.20 by chance.",
            best(noisy, (ALONG, "sgd-ie end", "validation", "loss", "cleanlab")) == "validation",
            f.precision(noisy, "validation") < 0.5,
        )
    if f.has(cell, same, wrong):
        say(
            "**What to use.** Labels wrong at random: the loss, which costs nothing, unless the model has fitted the wrong "
            "labels, as on 20 Newsgroups; then cleanlab. Systematically wrong ones: a validation set whose labels were "
            "checked, and a model trained on it, or `sgd-ie` read along the run, which also says what each sample did. No such "
            "set: what does not trust the validation labels, such as cleanlab. In any case train anew and test on labels that "
            "were checked.",
            not f.has(fitted) or f.precision(fitted, "cleanlab") > f.precision(fitted, "loss") + 0.1,
            f.precision(same, "loss") > f.precision(same, "cleanlab"),
            f.precision(cell, "cleanlab") > f.precision(cell, "loss"),
        )
    return lines


def steps(table: pd.DataFrame, cell: str) -> int:
    return int(table[table["cell"] == cell]["steps"].iloc[0])


if __name__ == "__main__":
    write(Path("runs/study-cleaning"))
