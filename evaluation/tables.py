"""Tables as files: the same rows as CSV, for machines, and Markdown, for readers."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], caption: str) -> list[Path]:
    """Write rows that share their keys to `path` with .csv and with .md (under `caption`); return both files."""
    names = list(rows[0])
    assert all(list(row) == names for row in rows), "rows of a table share their keys"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    files = [path.with_suffix(".csv"), path.with_suffix(".md")]
    write_text(files[0], text.getvalue())
    write_text(files[1], f"{caption}\n\n{markdown(rows)}")
    return files


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows that share their keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
