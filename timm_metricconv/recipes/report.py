"""How results leave a recipe: JSON and CSV for programs, Markdown and a table for people, written whole or not."""

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from rich.console import Console
from rich.table import Table

from .config import ConfigError

# a pipe has no width of its own, and 80 columns cut tables
console = Console() if sys.stdout.isatty() else Console(width=120)
Record = Dict[str, Any]


def write_atomic(path: Union[str, Path], content: Union[str, bytes]) -> None:
    """Writes a file beside its place and moves it there: nobody sees half of it, a full disk keeps the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure, path: Union[str, Path]) -> None:
    """Saves a matplotlib figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    write_atomic(path, buffer.getvalue())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def csv_text(records: Sequence[Record]) -> str:
    """Records as CSV: a list is one cell of numbers separated by spaces; of a dictionary each number has a column."""
    nested = {key for record in records for key, value in record.items() if isinstance(value, dict)}
    rows: List[Record] = [{} for _ in records]
    for row, record in zip(rows, records, strict=True):
        for key, value in record.items():
            if key in nested:  # what lies deeper is left to the JSON file
                row.update({f"{key}.{k}": v for k, v in (value or {}).items() if not isinstance(v, dict)})
            else:
                row[key] = " ".join(map(str, value)) if isinstance(value, list) else value
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def update_csv(path: Union[str, Path], rows: Sequence[Record], key: Sequence[str], order: Optional[str] = None) -> None:
    """Writes rows into a CSV file of the same columns, in place of those that agree in `key`; highest `order` first.

    Raises:
        ConfigError: The file has other columns.
    """
    path, columns = Path(path), list(rows[0])
    old: List[Record] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            old = list(reader)
        if reader.fieldnames != columns:
            raise ConfigError(f"csv: {path} has the columns {reader.fieldnames}, expected {columns}.")
    merged = {tuple(str(row[column]) for column in key): row for row in [*old, *rows]}
    ordered = sorted(merged.values(), key=lambda row: -float(row[order])) if order else merged.values()
    write_atomic(path, csv_text(list(ordered)))


def markdown(records: Sequence[Record]) -> str:
    """Records as a Markdown table."""
    columns = list(records[0]) if records else []
    rows = [columns, ["---"] * len(columns), *([_text(record.get(c)) for c in columns] for record in records)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_summary(
    folder: Union[str, Path], records: List[Record], title: str, rows: Optional[Sequence[Record]] = None
) -> None:
    """Writes `summary.json`, `summary.csv` and `summary.md` into `folder`; `rows` are the Markdown's, if others."""
    folder = Path(folder)
    write_atomic(folder / "summary.json", json.dumps(records, indent=2) + "\n")
    write_atomic(folder / "summary.csv", csv_text(records))
    write_atomic(folder / "summary.md", f"# {title}\n\n{markdown(rows or records)}")


def print_table(records: Sequence[Record], title: str) -> None:
    """Records as a table on the terminal."""
    table = Table(title=title)
    for column, value in (records[0] if records else {}).items():
        table.add_column(column, justify="right" if isinstance(value, (int, float)) else "left")
    for record in records:
        table.add_row(*map(_text, record.values()))
    console.print(table)
