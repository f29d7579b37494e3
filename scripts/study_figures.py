"""The studies' tables and figures, as they stand in scripts/study and in its README.

    lightning-acc study --config configs/study/paper.yaml
    lightning-acc study --config configs/study/low-rank.yaml
    lightning-acc run   --config configs/study/clean-mnist.yaml
    lightning-acc run   --config configs/study/clean-adult.yaml
    python scripts/study_figures.py

It writes paper.csv and low-rank.csv (every cell), the figures, and claims.md and low-rank.md: what was expected, and every
cell where it is not so. What has not been run is left as it is.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

plt.switch_backend("Agg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lightning_acc"})
HERE = Path(__file__).parent / "study"
COLOURS = {
    "acc-sgd-ie, exact": "#0b6e99",
    "acc-sgd-ie, linear": "#7cc0dc",
    "sgd-ie, linear": "#d9730d",
    "tracin, linear": "#9b9a97",
}
CLEANING = {"acc-sgd-ie": "#0b6e99", "sgd-ie": "#d9730d", "loo": "#1f1f1f", "cleanlab": "#7a4ea3", "loss": "#b8a14a"} | {
    "oracle": "#3a8f4d",
    "random": "#9b9a97",
}
NAMES = {"adult": "Adult", "newsgroups": "20 Newsgroups", "mnist": "MNIST 1 v 7"}
KEYS = ["data", "model", "corruption", "epochs", "batch_size", "seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="runs/study/paper/study.parquet")
    parser.add_argument("--cleaning", nargs="*", default=["runs/study/clean-mnist", "runs/study/clean-adult"])
    parser.add_argument("--low-rank", default="runs/study/low-rank/study.parquet")
    options = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    if Path(options.low_rank).exists():
        low_rank(pyarrow.parquet.read_table(options.low_rank))
    if not Path(options.study).exists():
        return
    table = pyarrow.parquet.read_table(options.study)
    frame = with_ways(table)
    write_csv(frame, table, "paper")
    frame = frame[frame["method"] != "loo"]
    error_against_epochs(frame)
    batch_size(frame)
    by_model(frame)
    claims = [*expectations(frame), "", *cost(table.to_pandas())]
    runs = [Path(path) for path in options.cleaning if (Path(path) / "cleaning.parquet").exists()]
    if runs:
        claims += ["", *cleaning(runs)]
    (HERE / "claims.md").write_text("# What was expected, and where it is not so\n\n" + "\n".join(claims) + "\n")
    into_readme("study", claims[: claims.index("")])
    if runs:
        into_readme("cleaning", cleaning(runs))
    print("\n".join(claims))


def into_readme(mark: str, lines: list[str]) -> None:
    """Replace what stands between two marks of the README beside the figures."""
    readme = HERE / "README.md"
    text, count = re.subn(
        rf"(<!-- {mark}: .* -->\n).*(<!-- end of {mark} -->)",
        lambda found: found[1] + "\n".join(lines).strip() + "\n" + found[2],
        readme.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1, f"{readme} has lost its marks of {mark}"
    readme.write_text(text)


def with_ways(table: pa.Table) -> pd.DataFrame:
    """The table, with the method and how it is read in a column ``way``."""
    frame = table.to_pandas()
    frame["way"] = frame["method"] + ", " + frame["readout"]
    return frame


def write_csv(frame: pd.DataFrame, table: pa.Table, grid: str) -> None:
    """Every cell, rounded to six digits, after a line that says where it comes from."""
    facts = {key.decode(): value.decode() for key, value in table.schema.metadata.items() if not key.startswith(b"pandas")}
    head = f"# lightning-acc study --config configs/study/{grid}.yaml; " + ", ".join(f"{k} {v}" for k, v in facts.items())
    body = frame.drop(columns="way").to_csv(index=False, float_format="%.6g")
    (HERE / f"{grid}.csv").write_text(head + "\n" + body)


def low_rank(table: pa.Table) -> None:
    """How close acc-low-rank comes to exact ACC-SGD-IE, and every cell where it is not as close as was expected."""
    frame = with_ways(table)
    write_csv(frame, table, "low-rank")
    wide = frame[frame["method"] != "loo"].pivot_table(index=KEYS, columns="way", values=["rmse_sd", "kendall"])
    ways = {"acc-low-rank": "acc-low-rank, exact", "acc": "acc-sgd-ie, exact", "sgd-ie": "sgd-ie, linear"}
    lines = [f"| data | model | steps | RMSE/sd: {' | '.join(ways)} | tau: {' | '.join(ways)} |"]
    lines.append("| --- " * 9 + "|")
    for (data, model, epochs, batch), part in wide.groupby(["data", "model", "epochs", "batch_size"]):
        cells = [f"{part['rmse_sd'][way].median():.2g}" for way in ways.values()]
        cells += [f"{part['kendall'][way].median():.3f}" for way in ways.values()]
        lines.append(f"| {NAMES.get(data, data)} | {model} | {epochs * 200 // batch} | {' | '.join(cells)} |")
    rmse = {short: wide["rmse_sd"][way] for short, way in ways.items()}
    ratio = rmse["acc-low-rank"] / rmse["acc"]
    claims = [f"Expected of every cell: RMSE at most 1.3 times that of exact acc-sgd-ie; {failed(ratio > 1.3)}"]
    claims += [f"- {name(cell)}: {ratio[cell]:.2f} times" for cell in ratio[ratio > 1.3].index]
    half = (rmse["acc"] <= 0.5 * rmse["sgd-ie"]) & (rmse["acc-low-rank"] > 0.5 * rmse["sgd-ie"])
    claims += ["", f"Expected where exact acc-sgd-ie halves sgd-ie's RMSE: so does acc-low-rank; {failed(half)}"]
    claims += [f"- {name(cell)}: {(rmse['acc-low-rank'] / rmse['sgd-ie'])[cell]:.2f} of it" for cell in half[half].index]
    work = frame.pivot_table(index=KEYS, columns="method", values="seconds")
    claims += ["", f"Cost in retrainings of loo, median over the cells: {(work['acc-low-rank'] / work['loo']).median():.2f}."]
    (HERE / "low-rank.md").write_text("\n".join(["# acc-low-rank beside exact ACC-SGD-IE", "", *lines, "", *claims]) + "\n")
    into_readme("low-rank", lines)
    print("\n".join([*lines, "", *claims]))


def panels(n: int) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, n, figsize=(3.2 * n, 2.9), sharey=True, squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def error_against_epochs(frame: pd.DataFrame) -> None:
    frame = frame[frame["batch_size"] == 100]
    figure, axes = panels(3)
    for axis, model in zip(axes, ("logistic", "gelu", "relu"), strict=True):
        for way, colour in COLOURS.items():
            part = frame[(frame["model"] == model) & (frame["way"] == way)].groupby("epochs")["rmse_sd"]
            middle = part.median()
            axis.plot(middle.index, middle, "o-", color=colour, label=way, lw=1.5, ms=4)
            axis.fill_between(middle.index, part.quantile(0.25), part.quantile(0.75), color=colour, alpha=0.15, lw=0)
        axis.set(title=model, xscale="log", yscale="log", xlabel="epochs", xticks=[2, 10, 38], xticklabels=["2", "10", "38"])
        axis.minorticks_off()
    axes[0].set_ylabel("RMSE / sd of the truth")
    axes[0].legend(fontsize=7, frameon=False)
    save(figure, "error-against-epochs")


def batch_size(frame: pd.DataFrame) -> None:
    frame = frame[frame["epochs"] == 10]
    figure, axes = panels(3)
    for axis, model in zip(axes, ("logistic", "gelu", "relu"), strict=True):
        for i, (way, colour) in enumerate(list(COLOURS.items())[:3]):
            for j, size in enumerate((100, 20)):
                values = frame[(frame["model"] == model) & (frame["way"] == way) & (frame["batch_size"] == size)]["rmse_sd"]
                axis.boxplot(
                    values,
                    positions=[4 * j + i],
                    widths=0.7,
                    patch_artist=True,
                    showfliers=False,
                    boxprops={"facecolor": colour, "lw": 0},
                    medianprops={"color": "black"},
                )
        axis.set(title=model, yscale="log", xticks=[1, 5], xticklabels=["batch 100\n20 steps", "batch 20\n100 steps"])
    axes[0].set_ylabel("RMSE / sd of the truth")
    save(figure, "batch-size")


def by_model(frame: pd.DataFrame) -> None:
    """Where ACC helps: its error beside SGD-IE's, a point a cell."""
    wide = frame.pivot_table(index=KEYS, columns="way", values="rmse_sd").reset_index()
    figure, axes = panels(3)
    for axis, model in zip(axes, ("logistic", "gelu", "relu"), strict=True):
        part = wide[wide["model"] == model]
        for name, colour in zip(NAMES, ("#0b6e99", "#3a8f4d", "#d9730d"), strict=True):
            points = part[part["data"] == name]
            axis.scatter(points["sgd-ie, linear"], points["acc-sgd-ie, exact"], s=9, color=colour, label=NAMES[name], alpha=0.7)
        limits = [1e-6, 10]
        axis.plot(limits, limits, color="#9b9a97", lw=0.8)
        axis.set(title=model, xscale="log", yscale="log", xlabel="RMSE of sgd-ie / sd")
    axes[0].set_ylabel("RMSE of acc-sgd-ie / sd")
    axes[0].legend(fontsize=7, frameon=False)
    save(figure, "where-acc-helps")


def expectations(frame: pd.DataFrame) -> list[str]:
    wide = frame.pivot_table(index=KEYS, columns="way", values=["rmse", "rmse_sd", "kendall"])
    ratio = wide["rmse"]["acc-sgd-ie, exact"] / wide["rmse"]["sgd-ie, linear"]
    tau = wide["kendall"]["acc-sgd-ie, exact"]
    lines = [
        "| model | cells | RMSE/sd: acc exact | acc linear | sgd-ie | tau: acc exact | acc linear | sgd-ie | acc better in |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in ("logistic", "gelu", "relu"):
        part = wide.xs(model, level="model")
        rmse = [f"{part['rmse_sd'][way].median():.3g}" for way in list(COLOURS)[:3]]
        kendall = [f"{part['kendall'][way].median():.3f}" for way in list(COLOURS)[:3]]
        better = (ratio.xs(model, level="model") < 1).mean()
        lines.append(f"| {model} | {len(part)} | {' | '.join(rmse + kendall)} | {100 * better:.0f} % |")
    logistic = ratio.index.get_level_values("model") == "logistic"
    lines += ["", f"Expected of every logistic cell: tau of acc-sgd-ie (exact) at least 0.98; {failed(tau[logistic] < 0.98)}"]
    lines += [f"- {name(cell)}: tau {tau[cell]:.3f}" for cell in tau[logistic][tau[logistic] < 0.98].index]
    bad = ratio[logistic][ratio[logistic] > 0.2]
    lines += ["", f"Expected of every logistic cell: RMSE at most a fifth of sgd-ie's; {failed(ratio[logistic] > 0.2)}"]
    lines += [f"- {name(cell)}: {ratio[cell]:.2f} of it" for cell in bad.index]
    worse = ratio[~logistic][ratio[~logistic] >= 1]
    lines += ["", f"Hoped of every network: RMSE below sgd-ie's; {failed(ratio[~logistic] >= 1)}"]
    lines += [f"- {name(cell)}: {ratio[cell]:.2f} of it" for cell in worse.index]
    return lines


def failed(wrong: pd.Series) -> str:
    return f"not so in {int(wrong.sum())} of {len(wrong)} cells" + (":" if wrong.any() else ".")


def name(cell: tuple[Any, ...]) -> str:
    data, model, corruption, epochs, batch, seed = cell
    return f"{data}, {model}, {corruption}, {epochs} epochs of batch {batch}, seed {seed}"


def cost(frame: pd.DataFrame) -> list[str]:
    frame = frame[frame["readout"] != "linear"].pivot_table(index=KEYS, columns="method", values="seconds")
    ratio = (frame["acc-sgd-ie"] / frame["loo"]).median()
    return [f"Cost of acc-sgd-ie in retrainings of loo, median over the cells: {ratio:.2f}."]


def cleaning(runs: list[Path]) -> list[str]:
    figure, axes = panels(len(runs))
    lines = []
    for axis, run in zip(axes, runs, strict=True):
        frame = pyarrow.parquet.read_table(run / "cleaning.parquet").to_pandas()
        axis.axhline(0, color="#9b9a97", lw=0.8)
        for i, (method, colour) in enumerate(CLEANING.items()):
            part = frame[frame["method"] == method]
            x = 100 * part["fraction"] + 0.25 * (i - 3)
            axis.errorbar(
                x,
                100 * part["gain"],
                100 * np.array([part["gain"] - part["gain_low"], part["gain_high"] - part["gain"]]),
                color=colour,
                label=method,
                lw=1.2,
                marker="o",
                ms=3,
                capsize=2,
            )
        axis.set(title=run.name.removeprefix("clean-"), xlabel="% of the samples dropped")
        title = {"mnist": "MNIST", "adult": "Adult"}[run.name.removeprefix("clean-")]
        fractions = sorted(set(frame["fraction"]) - {0.0})
        before = frame[frame["method"] == "none"]["accuracy"].iloc[0]
        lines += [f"| {title}: gain in points over {100 * before:.1f} % test accuracy (95 % interval); dropped |"]
        lines[-1] += " |".join(f" {100 * fraction:.0f} %" for fraction in fractions) + " |"
        lines.append("| --- |" + " --- |" * len(fractions))
        for method in CLEANING:
            rows = frame[frame["method"] == method].set_index("fraction")
            shown = [f"{100 * r.gain:+.2f} ({100 * r.gain_low:+.2f} to {100 * r.gain_high:+.2f})" for r in rows.itertuples()]
            lines.append(f"| `{method}` | {' | '.join(shown)} |")
        lines.append("")
    axes[0].set_ylabel("gain in test accuracy, points")
    axes[-1].legend(fontsize=7, frameon=False)
    save(figure, "cleaning")
    return lines


if __name__ == "__main__":
    main()
