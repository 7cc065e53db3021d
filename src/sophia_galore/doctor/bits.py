"""What a run left behind, to the bit: its losses, every tensor of its model and its last checkpoint, its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sophia_galore.records import files
from sophia_galore.records.run import Answers
from sophia_galore.train.checkpoint import checkpoints

_NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")


@dataclass(frozen=True)
class Bits:
    """What a run left behind; of two runs that should be the same, nothing may differ.

    Args:
        numbers: Losses and norms, by line of `metrics.jsonl`.
        tensors: A digest of each tensor, by its place and name.
        answers: The answers before and after training.
    """

    numbers: tuple[dict[str, Any], ...]
    tensors: dict[str, str]
    answers: dict[str, Any]

    @classmethod
    def of(cls, run: Path) -> Bits:
        """Read the folder of a finished run."""
        lines = (json.loads(line) for line in (run / files.METRICS).read_text(encoding="utf-8").splitlines())
        newest = checkpoints(run)[-1]
        found = {f"final model: {name}": digest(tensor) for name, tensor in tensors_in(run)}
        found |= {f"{newest.name}: {name}": digest(tensor) for name, tensor in tensors_in(newest)}
        return cls(
            tuple({key: line[key] for key in _NUMBERS if key in line} for line in lines),
            found,
            Answers.read(run / files.ANSWERS).to_json(),
        )

    def difference(self, other: Bits) -> str:
        """Return the first thing that differs in another run, as a clause; empty: nothing does."""
        for own, theirs in zip(self.numbers, other.numbers, strict=False):
            if own != theirs:
                key = next(key for key in _NUMBERS if own.get(key) != theirs.get(key))
                return f"{key} after step {own.get('step')} is {own.get(key)} in one and {theirs.get(key)} in the other"
        if len(self.numbers) != len(other.numbers):
            return f"one has {len(self.numbers)} lines of metrics, the other {len(other.numbers)}"
        differing = sorted(
            name for name in self.tensors | other.tensors if self.tensors.get(name) != other.tensors.get(name)
        )
        if differing:
            return f"{len(differing)} of {len(self.tensors)} tensors differ, the first is {differing[0]}"
        return "" if self.answers == other.answers else "the answers differ"


def tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder with their names, however many files they are in."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        kind = path.name.partition(".")[0].partition("-")[0]  # model or optimizer, whatever the format or the shard
        for name, tensor in load_file(path).items():
            yield f"{kind}/{name}", tensor


def digest(tensor: Tensor) -> str:
    """Return a digest of dtype, shape and bytes."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content).hexdigest()
