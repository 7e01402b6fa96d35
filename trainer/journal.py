"""What a seed writes while it trains: three logs and TensorBoard, cut back exactly on resume (runs.py draws them)."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import write_text
from .diagnostics import separation_matrix

WALL_CLOCK = "time/"  # prefix of the fields that differ between runs of the same seed
SECONDS = WALL_CLOCK + "seconds"  # since the seed began, time between a kill and the resume left out


class Journal:
    """Appends rows to the logs of one seed folder; `close` it."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the logs of `folder`, keeping only rows up to `step` (those after it will be made again)."""
        from torch.utils.tensorboard import SummaryWriter  # imports for seconds, and only training needs it

        folder.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        self._files = {}
        self.last: Mapping[str, object] = {}  # the newest row of metrics.jsonl
        for name in ("metrics", "evaluation", "embeddings"):
            path = folder / f"{name}.jsonl"
            rows = _cut(path, step)
            if rows and name == "metrics":  # the clock goes on from the last row kept
                self.last = rows[-1]
                self._started -= _number(self.last.get(SECONDS))
            self._files[name] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, name: str, step: int, values: Mapping[str, Any], phase: str = "") -> None:
        """Append a row to `name` ("metrics" or "evaluation"); a number that is not finite becomes null.

        Lists of numbers are kept in the row and not drawn.
        """
        row: dict[str, object] = {"step": step}
        if phase:
            row["phase"] = phase
        row |= {key: _finite_or_none(value) for key, value in values.items()}
        row[SECONDS] = round(time.monotonic() - self._started, 3)
        self._append(name, row)
        self.last = row if name == "metrics" else self.last
        for key, value in values.items():
            if isinstance(value, list):
                continue
            tag = key if name == "metrics" else f"evaluation/{key}"
            self._board.add_scalar(tag, value, step)

    def write_embeddings(self, step: int, tasks: Sequence[int], embeddings: Tensor) -> None:
        """Append one embedding (K, L) per task to embeddings.jsonl, and their separation matrix to TensorBoard."""
        rounded = [[round(value, 6) for value in row] for row in embeddings.tolist()]
        self._append("embeddings", {"step": step, "tasks": list(tasks), "embeddings": rounded})
        self._board.add_image("embedding/separation", separation_matrix(embeddings) / 4, step, dataformats="HW")

    def _append(self, name: str, row: Mapping[str, object]) -> None:
        self._files[name].write(json.dumps(row, allow_nan=False) + "\n")
        self._files[name].flush()

    def sync(self) -> None:
        """Bring all rows to the disk; to be called before the checkpoint that will vouch for them."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the logs."""
        for file in self._files.values():
            file.close()
        self._board.close()


def read_rows(path: Path) -> list[dict[str, object]]:
    """Return the whole rows of a log, oldest first; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def _cut(path: Path, step: int) -> list[dict[str, object]]:
    """Keep the rows up to `step`, and return them."""
    kept = [row for row in read_rows(path) if _number(row.get("step", math.inf)) <= step]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def _finite_or_none(value: Any) -> Any:
    """A number, or lists of them, with None for what is not finite: JSON has no name for those."""
    if isinstance(value, list):
        return [_finite_or_none(one) for one in value]
    return value if math.isfinite(value) else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
