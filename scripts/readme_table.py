"""Write the agreement of the demo's run into the README, between its two marks."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def table(rows: list[dict[str, object]]) -> str:
    """The rows of ``evaluation.json`` as Markdown."""
    lines = [
        "| estimate (600 removals) | RMSE / sd of the truth | Kendall | Spearman | Jaccard 10 % | seconds of work |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = "".join(f" {row[key]:.3g} |" for key in ("rmse_sd", "kendall", "spearman", "jaccard_10", "seconds"))
        lines.append(f"| `{row['method']}`, {row['readout']} readout |{figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    rows = json.loads((ROOT / "runs/digits/evaluation.json").read_text())["rows"]
    text, count = re.subn(
        r"(<!-- digits: .* -->\n).*(<!-- end of digits -->)",
        lambda found: f"{found[1]}{table(rows)}\n{found[2]}",
        readme.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1, "README.md has lost its marks"
    readme.write_text(text)
