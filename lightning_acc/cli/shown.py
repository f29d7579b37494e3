"""What a command prints of a table of scores."""

from __future__ import annotations

from lightning_acc.methods.low_rank.choice import RETRAINED
from lightning_acc.progress import duration
from lightning_acc.scoring.scores import Scores


def shown(scores: Scores, top: int) -> str:
    """The table in words: what it is and how far it holds, what it cost, and the ``top`` most harmful removals."""
    c = scores.conditions
    lines = []
    if c["reused"]:
        lines.append(f"{c['reused']} of {c['n']} removals were stored before, {c['n'] - c['reused']} are new")
    if c.get("banked"):
        lines.append(f"{c['banked']} were retrained without before, for another question: nothing was trained for them")
    lines.append(
        f"{scores}\n{duration(c['seconds'])} of work in {duration(c['wall_seconds'])}, peak {c['peak_memory_gb']:.2f} GB"
    )
    if c.get("form") == RETRAINED:
        lines.append(f"each was retrained without, as the {c['trainings']} trainings that {c['method']} may cost pay for it")
    table = scores.table
    names = scores.names  # once: it is made of the whole table
    sizes = [f" ({len(removal)} samples)" if removal in names and len(removal) > 1 else "" for removal in scores.removals]
    labels = [label + size for label, size in zip(scores.labels, sizes, strict=True)]
    rows = zip(*(table[name].to_pylist() for name in ("rank", "score", "source", "estimate")), labels, strict=True)
    lines.append("most harmful first:" if len(scores) else "no removals")
    for place, value, source, estimate, label in sorted(rows)[:top]:
        true = "" if source == "estimate" or c["method"] == source else f"  (by retraining; estimated {estimate:+.3e})"
        lines.append(f"{place:6d}  {value:+.3e}  {label}{true}")
    return "\n".join(lines)
