"""Metrics: one JSON object a step in `metrics.jsonl`, and the same as TensorBoard events."""

import json
import math
import os
from pathlib import Path
from typing import Any


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, a line cut short by a kill excepted."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """Appends rows `{"step": s, name: value, …}`; a value that is not finite becomes null, which JSON can hold.

    A run that resumes at step `start` drops the lines past it: they are of steps that will run again.
    """

    def __init__(self, directory: Path, start: int, *, tensorboard: bool = True):
        path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start] if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)
        self._lines = path.open("a")
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._lines.write(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n")
            if self._events is not None:
                for name, value in row.items():
                    if name != "step":
                        self._events.add_scalar(name, value, row["step"])
        # On disk before the checkpoint of this step can be: a restored step has all its lines.
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        self._lines.close()
        if self._events is not None:
            self._events.close()
