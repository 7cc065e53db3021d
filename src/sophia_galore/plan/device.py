"""Where the arithmetic runs, and in which precision."""

from __future__ import annotations

import torch

from sophia_galore.config import RunConfig
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.plan.ask import ask_device
from sophia_galore.plan.facts import Facts
from sophia_galore.plan.rules import RULES, compute_dtype
from sophia_galore.plan.verdicts import decide


def choose_device(name: str) -> torch.device:
    """The device that the user asked for, or the best there is.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".

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
        raise EnvironmentProblem(f"training.device={name} is no device.", "Use cpu, cuda, cuda:N, or auto.") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise EnvironmentProblem(f"training.device={name} is not supported.", "Use cpu, cuda, cuda:N, or auto.")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"training.device={name}, but PyTorch finds no GPU.",
            "Install a CUDA build of PyTorch and the GPU's driver, or use training.device=cpu.",
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"training.device={name}, but there are only {torch.cuda.device_count()} GPUs.",
            f"Use cuda:0 to cuda:{torch.cuda.device_count() - 1}.",
        )
    # Questions about "the" GPU, such as which arithmetic it has, are answered for the current one.
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The precision that the user asked for, or the one that the device is good at.

    float32 on CPU; bfloat16 on GPUs that have it in hardware (PyTorch emulates it on older ones);
    float16, with scaled gradients, on the others.

    Args:
        config: What was asked.
        device: Where the arithmetic runs.

    Returns:
        The dtype.

    Raises:
        EnvironmentProblem: bf16 was asked of a GPU that only emulates it.
    """
    facts = Facts(config, device=ask_device(device))
    decide(RULES, facts)
    return compute_dtype(facts)
