"""Figures of sampled molecules as tables of text."""

from workshop.molecules.hierarchy import COUNTED
from workshop.molecules.judging import SAMPLE_CLASSES, Figure, share
from workshop.tables import plain_table

WORDS = {
    "valid": "RDKit reads it",
    "bracket": "parentheses do not match",
    "ring": "a ring digit is odd",
    "valence": "valence or aromatic ring refused",
    "other": "anything else",
    "unique": "different / valid",
    "novel": "not in training / different",
    "diversity": "1 - mean Tanimoto",
    "fcd": "distance from training",
}


def cell(figure: Figure, percent: bool) -> tuple[str, str]:
    """A value and its interval as text; dashes where there is none."""
    if figure["value"] is None:
        return "-", "-"
    value, low, high = (
        f"{100 * part:.1f}%" if percent else f"{part:.3f}" for part in (figure["value"], *figure["interval"])
    )
    return value, f"{low} to {high}"


def classes_table(counts: dict) -> str:
    """A row a class of samples, and one of different molecules: count, share and 95% interval."""
    total = counts["count"]
    rows = [("figure", f"of {total} samples", "count", "share", "95% interval")]
    for name in (*SAMPLE_CLASSES, "unique"):
        found = share(counts[name], counts["valid"] if name == "unique" else total)
        rows.append((name, WORDS[name], str(counts[name]), *cell(found, percent=True)))
    return plain_table(rows, text_columns=2)


def figures_table(figures: dict, count: int) -> str:
    """A row a figure, its value and 95% interval; below the table what was not measured, and why."""
    rows, missing = [("figure", f"of {count} samples", "value", "95% interval")], []
    for name, figure in figures.items():
        if isinstance(figure, str):
            missing.append(f"{name}: {figure}")
        else:
            rows.append((name, WORDS[name], *cell(figure, percent=name not in ("diversity", "fcd"))))
    return "\n".join([plain_table(rows, text_columns=2), *missing])


def passes_table(rows: list[dict]) -> str:
    """A row a pass and head: the share of each class, and the interval of the valid one."""
    table = [("head", "passes", *SAMPLE_CLASSES, "95% interval of valid")]
    for row in rows:
        found = {kind: cell(share(row[kind], row["count"]), percent=True) for kind in SAMPLE_CLASSES}
        table.append((row["head"], str(row["passes"]), *(value for value, _ in found.values()), found["valid"][1]))
    return plain_table(table)


def hierarchy_table(figures: dict[str, dict]) -> str:
    """A row a bin: how much of the training molecules and of the samples is in it, and how many of these are valid."""
    parts = []
    for name, found in figures.items():
        rows = [(COUNTED[name], "of training", "of samples", "samples", "valid", "95% interval")]
        for label, figure in found.items():
            shares = [cell(figure[part], percent=True)[0] for part in ("training", "of_samples")]
            rows.append((label, *shares, str(figure["samples"]), *cell(figure["valid"], percent=True)))
        parts.append(plain_table(rows))
    return "\n\n".join(parts)
