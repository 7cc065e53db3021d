"""What the driver says of NVIDIA cards, which does not need PyTorch and makes no CUDA context."""

from __future__ import annotations

import shutil
import subprocess

import torch

_ASK = ("--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits")
_WAIT_S = 10.0


def used_bytes() -> dict[str, int]:
    """Return what is taken of each card's memory, by the card's id; {} without a card or its driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    try:
        done = subprocess.run([program, *_ASK], capture_output=True, text=True, timeout=_WAIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[str, int] = {}
    for line in done.stdout.splitlines():
        name, _, mebibytes = line.partition(",")
        if mebibytes.strip().isdigit():
            found[name.strip()] = int(mebibytes) * 2**20
    return found


def id_of(device: torch.device) -> str:
    """Return a card's id, as the driver writes it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
