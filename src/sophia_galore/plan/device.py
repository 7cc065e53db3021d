"""Chooses the device. `rules.py` chooses the precision."""

from __future__ import annotations

import os

import torch

from sophia_galore.errors import EnvironmentProblem


def choose_device(name: str, option: str = "training.device=") -> torch.device:
    """Return the device that the user asked for or, for "auto", a GPU if there is one.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        option: The option's text before the name, for messages.

    Returns:
        The device, with its index if it is a GPU.

    Raises:
        EnvironmentProblem: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EnvironmentProblem(f"{option}{name} is not a device.", "Use cpu, cuda, cuda:N, or auto.") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise EnvironmentProblem(f"{option}{name} is not supported.", "Use cpu, cuda, cuda:N, or auto.")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"{option}{name}, but PyTorch finds no GPU.",
            f"Install a CUDA build of PyTorch and the GPU's driver, or use {option}cpu.",
        )
    index = device.index
    if index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise EnvironmentProblem(
            f"{option}{name} is one GPU, but several processes on this machine would use it.",
            f"Use {option}cuda: each process then takes a GPU of its own.",
        )
    if index is None:
        # Of several processes on a machine, each has a GPU of its own.
        index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    if index >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"{option}{name}, but there are only {torch.cuda.device_count()} GPUs.",
            f"Use cuda:0 to cuda:{torch.cuda.device_count() - 1}.",
        )
    # Queries without a device, such as for bfloat16 support, refer to the current GPU.
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
