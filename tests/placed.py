"""Tiny runs whose layers, embedding and head live elsewhere than on the device, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sophia_galore.config import RunConfig, load_config
from sophia_galore.records import files
from sophia_galore.train.callback import Callback
from sophia_galore.train.run import train
from tiny import write_tiny_data, write_tiny_model

# Four layers, so that some can stream through two buffers while others stay.
NUM_LAYERS = 4
FAMILIES: dict[str, tuple[str, bool]] = {
    "llama": ("llama", True),
    "llama, untied": ("llama", False),
    "qwen2": ("qwen2", False),
    "gemma3": ("gemma3", True),
    "qwen3_moe": ("qwen3_moe", False),
    "gemma4_text": ("gemma4_text", True),
}
# 22 records, 4 held out: 18 examples in steps of 2 x 2, the last one of an epoch smaller.
SETTINGS = (
    "data.eval_fraction=0.2",
    "training.max_steps=6",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.max_length=40",
    "training.learning_rate=0.01",
    "training.sample_max_new_tokens=6",
    "optimizer.galore.rank=8",
    "optimizer.galore.update_proj_gap=2",
    "optimizer.apollo.rank=8",
    "optimizer.apollo.update_proj_gap=2",
    "optimizer.sophia.curvature_every=2",
    "checkpoint.save_every_steps=3",
)
# The forecast takes longer than such a run; the probe step and the tracking of tensors half of it.
QUICK = ("memory.predict=false", "memory.track_steps=0", "training.probe_step=false")


@dataclass(frozen=True)
class PlacedRuns:
    """A folder with models, data and runs."""

    folder: Path

    def config(self, output: Path, family: str, *words: str) -> RunConfig:
        """The configuration of a run into a folder."""
        return load_config(None, self.words(output, family, *words))

    def words(self, output: Path, family: str, *words: str) -> list[str]:
        """The same as words of the command line."""
        model = self.folder / family
        if not model.exists():
            kind, tied = FAMILIES[family]
            types = {"layer_types": ["sliding_attention", "full_attention"] * 2}
            layers = types if kind in ("gemma3", "gemma4_text") else {}
            write_tiny_model(model, kind, tied=tied, num_hidden_layers=NUM_LAYERS, **layers)
        data = self.folder / "data.json"
        if not data.exists():
            write_tiny_data(data)
        return [f"model.name={model}", f"data.train={data}", f"training.output_dir={output}", *SETTINGS, *words]

    def train(self, output: Path, family: str, *words: str, resume: bool = False) -> Left:
        """A whole run, or the rest of one; returns what it left behind."""
        train(self.config(output, family, *words), Callback(), resume=resume)
        return Left.in_folder(output)


@dataclass(frozen=True)
class Left:
    """What a run left behind, as far as the placement must not change it.

    Args:
        numbers: Losses and norms by step, from `metrics.jsonl`.
        tensors: Digests of all tensors: of the final model, and of weights and state in each checkpoint.
        answers: Sample questions with their answers.
    """

    numbers: list[dict[str, Any]]
    tensors: dict[str, str]
    answers: Any

    @classmethod
    def in_folder(cls, run: Path) -> Left:
        """Read a run's folder."""
        lines = [json.loads(line) for line in (run / files.METRICS).read_text().splitlines()]
        kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
        answers = run / files.ANSWERS
        return cls(
            [{key: line[key] for key in kept if key in line} for line in lines],
            {
                f"{folder.name}/{name}": digest
                for folder in (run, *sorted(run.glob("checkpoint-*")))
                for name, digest in digests(folder.glob("*.safetensors")).items()
            },
            json.loads(answers.read_text()) if answers.exists() else None,
        ).with_run_named("run", run.name)

    def with_run_named(self, name: str, before: str) -> Left:
        """The same, with another name for the run's own folder."""
        tensors = {
            f"{name}/{key.removeprefix(f'{before}/')}" if key.startswith(f"{before}/") else key: digest
            for key, digest in self.tensors.items()
        }
        return Left(self.numbers, tensors, self.answers)


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """Digests of the tensors of safetensors files by name; no name may be in two files."""
    found: dict[str, str] = {}
    for path in paths:
        for name, tensor in load_file(path).items():
            place = f"{path.name.partition('-')[0].removesuffix('.safetensors')}: {name}"
            assert place not in found, f"{place} is in {path.name} and in another file"
            kind = f"{tensor.dtype} {tuple(tensor.shape)} "
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[place] = hashlib.sha256(kind.encode() + content).hexdigest()
    return found


def assert_same(found: Left, expected: Left) -> None:
    """Everything is equal to the bit; the message names the first thing that is not."""
    assert found.numbers == expected.numbers
    assert found.tensors.keys() == expected.tensors.keys()
    other = [name for name in found.tensors if found.tensors[name] != expected.tensors[name]]
    assert not other, f"{len(other)} tensors differ, first {other[0]}"
    assert found.answers == expected.answers
