"""The names of the files that runs, comparisons and reports write.

A run's folder:

    run_config.yaml, plan.json, environment.json     what was asked, what was decided, with which machine and versions
    metrics.jsonl, trainer_state.json                what happened
    memory_report.json, answers.json, ...            further records
    model.safetensors and its companions             the final model; written.json lists them
    checkpoint-STEP/                                 a model, optimizer.safetensors, records and manifest.json

Above 5 GB, model.safetensors is in several files with an index, and optimizer.safetensors in several files.

The output of a comparison has its runs in `runs/`, and a report beside it.
"""

from __future__ import annotations

import re
from pathlib import Path

METRICS = "metrics.jsonl"
PLAN = "plan.json"
CONFIG = "run_config.yaml"
ENVIRONMENT = "environment.json"
TRAINER_STATE = "trainer_state.json"
MEMORY_REPORT = "memory_report.json"
ANSWERS = "answers.json"
BAD_RECORDS = "bad_records.jsonl"
TRACKERS = "trackers.json"
"""What each tracker calls the run."""


def index_name(file: str) -> str:
    """Return the name of the index of weights that are in several files.

    Args:
        file: Name of the file that they would have as a single one.
    """
    return f"{file}.index.json"


MODEL = "model.safetensors"
MODEL_INDEX = index_name(MODEL)
"""Lists the files of a model that is in several files."""
MODEL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Names of the files with a final model's weights: a single file, or several and their index."""
INT8_FILE = "model.int8.safetensors"
"""The weights if some of them are in eight bits: other programs find no weights, instead of wrong ones."""
INT8_INDEX = index_name(INT8_FILE)
WRITTEN = "written.json"
"""Lists the files of the final model: each tokenizer has other ones."""

MANIFEST = "manifest.json"
"""The last file of a checkpoint to be written; a folder without it is not a checkpoint."""
FLAT_CONFIG = "run_config.json"
"""In a checkpoint: the configuration by dotted key."""
OPTIMIZER_STATE = "optimizer.safetensors"

LOSS_PICTURE = "loss.png"
MEMORY_PICTURE = "memory.png"
EXPERTS_PICTURE = "experts.png"

REPORT_JSON, REPORT_MD, REPORT_HTML = "report.json", "report.md", "report.html"
LOSSES_PICTURE = "losses.png"
CATEGORIES_PICTURE = "memory-by-category.png"
REPORT_FILES = (REPORT_HTML, REPORT_MD, REPORT_JSON, LOSSES_PICTURE, CATEGORIES_PICTURE)

RUNS = "runs"
"""Where the runs of a comparison are, in its folder."""

TRACKER_FOLDERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Where trackers keep what they keep on this machine, in a run's folder."""

RUN_FILES = frozenset(
    {
        METRICS,
        "metrics.tmp",
        PLAN,
        CONFIG,
        ENVIRONMENT,
        TRAINER_STATE,
        MEMORY_REPORT,
        ANSWERS,
        BAD_RECORDS,
        TRACKERS,
        WRITTEN,
        LOSS_PICTURE,
        MEMORY_PICTURE,
        *REPORT_FILES,  # the report of a single run is in its folder
        *TRACKER_FOLDERS,
    }
)
"""What a run writes into its folder beside its model and its checkpoints. A new run may move these away."""


def weights_entry(folder: Path) -> Path | None:
    """Return the file by which a model's weights are found: the only one, or the index of several; None: no weights.

    An index beside a single file is left over from shards; transformers ignores it too.
    """
    names = (MODEL, INT8_FILE, MODEL_INDEX, INT8_INDEX)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def holds_final_model(run_folder: Path) -> bool:
    """Return whether a run's final model is there, in one file or in several.

    The file that is asked for is moved into the folder after all others.
    """
    return any((run_folder / name).is_file() for name in (MODEL, MODEL_INDEX))


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run_folder / f"checkpoint-{step}"
