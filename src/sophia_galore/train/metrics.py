"""What happened, a line at a time: `metrics.jsonl`, and `trainer_state.json` made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_STATE_KEYS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "eval_loss",
    "exported_step",
    "exported_eval_loss",
)


class MetricsLog:
    """Appends records to `metrics.jsonl`; a line is on its way to disk before the next step begins.

    Args:
        path: The file.
        up_to_step: When resuming, the step of the checkpoint: later lines will be written again and are
            dropped. None: a new file.
    """

    def __init__(self, path: Path, up_to_step: int | None) -> None:
        self.records: list[dict[str, Any]] = []
        if up_to_step is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # a line cut by the end of the process: the last one
                if record["step"] <= up_to_step:
                    self.records.append(record)
        # Written beside and renamed: a kill in between leaves the old file.
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        beside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Append one record, which has at least a `step`."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def trainer_state(self, *, step: int, epoch: float, num_steps: int, epochs: float) -> dict[str, Any]:
        """The records in the layout of Hugging Face's `trainer_state.json`, which other tools plot."""
        return {
            "global_step": step,
            "epoch": epoch,
            "max_steps": num_steps,
            "num_train_epochs": epochs,
            "log_history": [{key: record[key] for key in _STATE_KEYS if key in record} for record in self.records],
        }
