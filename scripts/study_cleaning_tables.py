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
from study_cleaning import cells
from study_figures import HERE, into_readme, plt

CSV = HERE / "does-it-clean.csv"
DATA = {"mnist": "MNIST", "adult": "Adult", "news": "20 Newsgroups"}
NOISE = {
    "uniform-10": "uniform 10 %",
    "uniform-20": "uniform 20 %",
    "class-20": "class-dependent 20 %",
    "feature-20": "features 20 %",
}
VAL_WRONG = "validation wrong too"
COLOURS = {"sgd-ie": "#d9730d", "acc-low-rank": "#0b6e99", "validation": "#5aa9a0", "oracle": "#3a8f4d", "random": "#9b9a97"}
COLOURS |= {"loss": "#b8a14a", "self-influence": "#c46a8f", "cleanlab": "#7a4ea3"}
SHOWN = (
    *("sgd-ie end", "sgd-ie along", "sgd-ie along of 4 runs", "acc-low-rank along of 4 runs"),
    *("loss", "self-influence", "cleanlab", "validation", "validation added", "oracle", "random"),
)
"""Rankings that the picture shows."""


def write(out: Path) -> None:
    found = [json.loads((out / f"{name}.json").read_text()) for name in cells() if (out / f"{name}.json").exists()]
    found = [one for one in found if not one["cell"].startswith("digits")]
    if found:
        frame(found).to_csv(CSV, index=False, float_format="%.5g")
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
            for share, gain in row["gains"].items():
                ends = {
                    f"{what}{end}": value
                    for what, key in (("points", "accuracy"), ("loss_gain", "loss"))
                    for end, value in zip(("", "_low", "_high"), gain[key], strict=True)
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
    lines = [
        f"**{DATA[data]}, {first['n']} samples**, {first['n_val']} for validation, {first['n_test']} for testing, "
        f"{first['steps']} steps. Precision at the noise rate (AUC); points of test accuracy gained by dropping as many, over "
        f"{first['seeds']} seeds:",
        "",
        "| ranking | " + " | ".join(map(title, names)) + " |",
        "| --- " * (len(names) + 1) + "|",
    ]
    before = [f"{part[part['cell'] == name]['accuracy'].iloc[0]:.1f} %" for name in names]
    lines.append(f"| test accuracy, nothing dropped | {' | '.join(before)} |")
    for ranking in part["ranking"].unique():
        shown = []
        for name in names:
            share = f"{100 * cells()[name].rate:.0f} %"
            row = part[(part["cell"] == name) & (part["ranking"] == ranking) & part["dropped"].isin([share, "0 %"])]
            shown.append(in_words(row.iloc[0]) if len(row) else "")
        lines.append(f"| `{ranking}` | {' | '.join(shown)} |")
    return lines


def in_words(row: pd.Series) -> str:
    """A cell of the table; what drops nothing finds nothing."""
    found = "" if np.isnan(row["auc"]) else f"{row['precision']:.2f} ({row['auc']:.2f}); "
    return f"{found}{row['points']:+.1f} ± {(row['points_high'] - row['points_low']) / 2:.1f}"


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
    figure, axes = plt.subplots(2, len(names), figsize=(2.7 * len(names) + 1.2, 5.2), sharey=True, sharex="row", squeeze=False)
    for column, name in enumerate(names):
        part = figures[(figures["cell"] == name) & figures["dropped"].isin(["20 %", "0 %"])].set_index("ranking")
        rankings = [ranking for ranking in SHOWN if ranking in part.index]
        part = part.loc[rankings[::-1]]
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


def sentences(figures: pd.DataFrame) -> list[str]:
    return []


if __name__ == "__main__":
    write(Path("runs/study-cleaning"))
