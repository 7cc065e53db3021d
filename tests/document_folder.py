"""A folder in which what the documents tell their reader to type can be typed: everything is there, and tiny.

The names are those of the documents: their configurations, their data, their models. What would take long is made
short, and no network is needed, since the models are in the cache already.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh

from documents import ROOT
from sophia_galore.model.aliases import ALIASES
from tiny import VOCAB, tiny_model, write_tiny_data, write_tiny_model

# Beside what the configurations say: a subspace that fits into a tiny model, and steps that take milliseconds.
_SMALL: dict[str, dict[str, Any]] = {
    "training": {"max_length": 64, "gradient_accumulation_steps": 2},
    "optimizer": {"galore": {"rank": 8, "update_proj_gap": 5}},
    "memory": {"predict": False},
}
_ANSWERS = {"sample_max_new_tokens": 4}
# The step of the last checkpoint that the documents speak of, and two more.
_MOST_STEPS = 22
_NUM_RECORDS = 12


def make_folder(folder: Path) -> Path:
    """Prepare everything.

    Args:
        folder: An empty folder.

    Returns:
        `folder`.
    """
    for script in ("train.py", "download_model.py", "download_model_modelscope.py", "_door.py"):
        shutil.copy(ROOT / script, folder / script)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        write_small(path.read_text(encoding="utf-8"), folder / "configs" / path.name)
    write_data(folder)
    _write_models(folder / "models_cache")
    return folder


def write_small(text: str, path: Path) -> None:
    """Write a configuration of the documents in small.

    Args:
        text: It, as YAML.
        path: Where to.
    """
    config = yaml.safe_load(text)
    for section, changes in _SMALL.items():
        config[section] = _merged(config.get(section, {}), changes)
    training = config["training"]
    if "sample_questions" in training:
        training |= _ANSWERS
    if "max_steps" in training:
        training["max_steps"] = min(training["max_steps"], _MOST_STEPS)
        training["warmup_steps"] = min(training.get("warmup_steps", 0), _MOST_STEPS // 2)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def write_data(folder: Path) -> None:
    """Write the data that the documents train on; a command that makes the real ones replaces them."""
    (folder / "data").mkdir(exist_ok=True)
    path = write_tiny_data(folder / "data" / "sample_data.json", _NUM_RECORDS)
    records = json.loads(path.read_text(encoding="utf-8"))
    (folder / "data" / "corpus.txt").write_text(
        "\n".join(record["output"] for record in records) * 20, encoding="utf-8"
    )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "my_data.jsonl").write_text(lines, encoding="utf-8")


def python_names() -> dict[str, Any]:
    """What the documents' Python takes for granted: a model, and something to train it on."""
    from transformers import TrainingArguments

    tokens = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return {
        "model": tiny_model(),
        "batches": [{"input_ids": tokens, "labels": tokens}] * 2,
        "examples": rows,
        "arguments": TrainingArguments(
            "outputs/trainer", max_steps=2, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True
        ),
    }


@contextmanager
def mesh_of_one() -> Iterator[Any]:
    """What a document about sharded models takes for granted: processes, of which this is the only one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def _merged(given: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(given)
    for key, value in changes.items():
        merged[key] = _merged(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def _write_models(cache: Path) -> None:
    """A tiny model in the place of every model that has a short name."""
    # As many positions as the longest examples that are asked for, and no more layers than there are kinds of work.
    one = write_tiny_model(cache / ".tiny", max_position_embeddings=8192, num_hidden_layers=2)
    for alias in ALIASES:
        (cache / alias.hf.replace("/", "--")).symlink_to(one, target_is_directory=True)
