"""Folders as runs leave them, with numbers of a test's own choosing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

MIB = 2**20
ROUTE = {"name": "layer.weight", "rule": "galore", "trained": True}


def write_run(
    folder: Path,
    *,
    losses: Sequence[float] = (3.0, 2.9, 2.8, 2.7),
    evals: Mapping[int, float] | None = None,
    waited: Mapping[int, int] | None = None,
    exported: tuple[int, float] | None = None,
    seed: int = 42,
    tokens: int = 100,
    tokens_per_second: float | Sequence[float] = 50.0,
    waiting_shares: Sequence[float | None] = (),
    config: Mapping[str, Mapping[str, Any]] | None = None,
    plan: Mapping[str, Any] | None = None,
    peak_bytes: int = 900 * MIB,
    finished: bool = True,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """A run of two steps an epoch.

    Args:
        folder: Where; it is made.
        losses: Of the steps.
        evals: Evaluation losses by step.
        waited: Evaluations without an improvement, by step, where they are counted.
        exported: Step and eval loss of the final model, where it was chosen by that.
        seed: `training.seed`.
        tokens: Of each step.
        tokens_per_second: Of each step, or of all.
        waiting_shares: Of the first steps, how much of their time the computation waited for weights; None: unknown.
        config: Sections of the configuration that differ from a bare one.
        plan: Entries of the plan that differ.
        peak_bytes: Peak of live tensors.
        finished: Whether there are a final model and a memory report.
        environment: Entries that differ.
    """
    folder.mkdir(parents=True)
    asked: dict[str, dict[str, Any]] = {
        "training": {"seed": seed, "output_dir": str(folder)},
        "optimizer": {"type": "galore"},
    }
    for section, values in (config or {}).items():
        asked.setdefault(section, {}).update(values)
    planned = {
        "model_name": "m",
        "device": "cpu",
        "compute_dtype": "float32",
        "optimizer": "galore",
        "num_train_examples": 8,
        "num_eval_examples": 2,
        "data_fingerprint": "f" * 64,
        "num_shared": 0,
        "repetition_loss": 5.0,
        "repetition_share": 0.1,
        "steps_per_epoch": 2,
        "num_steps": 4,
        "num_parameters": 1000,
        "trained_fraction": 1.0,
        "bytes": {"weights": 400 * MIB, "optimizer state": 200 * MIB, "projections": 50 * MIB},
        "verdicts": [],
        "routes": [ROUTE],
        **(plan or {}),
    }
    speeds = [tokens_per_second] * len(losses) if isinstance(tokens_per_second, float) else tokens_per_second
    lines: list[dict[str, Any]] = [
        {"step": step, "epoch": step / 2, "loss": loss, "tokens": tokens, "tokens_per_second": speed}
        | {"allocated_bytes": peak_bytes - step, "reserved_bytes": peak_bytes}
        for step, (loss, speed) in enumerate(zip(losses, speeds, strict=True), start=1)
    ]
    for line, share in zip(lines, waiting_shares, strict=False):
        line |= {} if share is None else {"waiting_share": share}
    measured = {0: 3.1, 2: 2.6, 4: 2.4} if evals is None else evals
    lines += [{"step": step, "epoch": step / 2, "eval_loss": loss} for step, loss in measured.items()]
    for line in lines:
        if "eval_loss" in line and line["step"] in (waited or {}):
            line["evaluations_without_improvement"] = (waited or {})[line["step"]]
    lines.sort(key=lambda line: line["step"])
    if exported is not None:
        lines.append({"step": len(losses), "epoch": len(losses) / 2})
        lines[-1] |= dict(zip(("exported_step", "exported_eval_loss"), exported, strict=True))
    (folder / "run_config.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    _write(folder / "plan.json", planned)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    _write(
        folder / "environment.json",
        {
            "machine": {"system": "Linux", "processor": "a processor", "num_cores": 2, "num_threads": 2}
            | {"memory_bytes": 8 * 2**30, "gpu": None},
            "versions": {"sophia-galore": "9.9.9", "python": "3.11"},
            "command": f"sophia-galore train --config {folder.name}.yaml",
            "started": "2026-01-02T03:04:05+00:00",
            **(environment or {}),
        },
    )
    if finished:
        (folder / "model.safetensors").write_bytes(b"weights")
        _write(
            folder / "memory_report.json",
            {
                "device": "cpu",
                "measured_by": "storage tracker",
                "peak_allocated_bytes": peak_bytes,
                "peak_reserved_bytes": peak_bytes + MIB,
                "peak_process_bytes": 2 * peak_bytes,
                "phases": {"forward": peak_bytes},
                "categories": {"weights": peak_bytes // 2, "activations": peak_bytes - peak_bytes // 2},
                "steps": [],
            },
        )
    return folder


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")
