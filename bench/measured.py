"""What is measured of a run, whoever carries it out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

_LONGEST_REASON = 160
# What makes a terminal write bold or in colours.
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Measured:
    """Steps of a run, and what it took.

    Args:
        steps: Tokens (padding left out) and seconds of each optimizer step.
        peak_process_bytes: Largest resident size of the process until the last step was done, so that writing the model
            does not count.
        peak_tracked_bytes: Most bytes of live tensors at once, by the storage tracker; None: it was not there.
    """

    steps: list[tuple[int, float]]
    peak_process_bytes: int
    peak_tracked_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def weights_sha256(folder: Path) -> str:
    """A digest of every tensor in a model folder: names, dtypes, shapes and bytes.

    Args:
        folder: Holds model.safetensors, or weights in a format of their own beside it, or those of an adapter.

    Returns:
        64 hex digits.

    Raises:
        FileNotFoundError: There are no weights.
    """
    import torch
    from safetensors import safe_open

    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("adapter_model*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds neither model*.safetensors nor adapter_model*.safetensors.")
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        # By name alone: how many files the weights are in must not matter.
        held = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        for name in sorted(held):
            tensor = held[name].get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, if it is there."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def reason(error: BaseException) -> str:
    """The first sentence of what an error says, short enough for a table."""
    lines = (_ESCAPES.sub("", line).strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), "")
    sentence = re.split(r"(?<=[.!?])\s", first)[0]
    said = f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
    return said if len(said) <= _LONGEST_REASON else said[: _LONGEST_REASON - 3] + "..."


def provenance() -> dict[str, Any]:
    """Return date, machine, versions and commit, for the file of a measurement."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit,
    }
