"""Which device and which precision; GPUs are acted, since the tests run without one."""

from __future__ import annotations

import pytest
import torch

from sophia_galore.config.schema import RunConfig
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.plan.detect import detect_device
from sophia_galore.plan.device import choose_device
from sophia_galore.plan.facts import Facts
from sophia_galore.plan.rules import RULES, compute_dtype
from sophia_galore.plan.verdicts import decide

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def act_gpus(monkeypatch: pytest.MonkeyPatch, count: int, *, real_bf16: bool = True, emulated: bool = True) -> None:
    """Let torch believe in so many GPUs; the second is the current one, if there are two."""

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return real_bf16 or (including_emulation and emulated)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: min(1, count - 1))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if real_bf16 else (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**30, 8 * 2**30))


def config_for(compute_dtype: str) -> RunConfig:
    return RunConfig.model_validate({"training": {"compute_dtype": compute_dtype}})


@pytest.mark.parametrize(
    ("name", "num_gpus", "chosen"),
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda:0"),
        ("auto", 2, "cuda:1"),
        ("cpu", 2, "cpu"),
        ("cpu:0", 0, "cpu"),
        ("cuda", 2, "cuda:1"),
        ("cuda:0", 2, "cuda:0"),
    ],
)
def test_the_device(name: str, num_gpus: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act_gpus(monkeypatch, num_gpus)
    assert choose_device(name) == torch.device(chosen)


@pytest.mark.parametrize(
    ("name", "num_gpus", "cause", "remedy"),
    [
        ("cuda", 0, "PyTorch finds no GPU", "training.device=cpu"),
        ("cuda:0", 0, "PyTorch finds no GPU", "CUDA build"),
        ("cuda:2", 2, "only 2 GPUs", "cuda:0 to cuda:1"),
        ("mps", 0, "training.device=mps is not supported", "cpu, cuda"),
        ("meta", 0, "training.device=meta is not supported", "cpu, cuda"),
        ("gpu", 1, "training.device=gpu is not a device", "cpu, cuda"),
        ("cuda:x", 1, "training.device=cuda:x is not a device", "cpu, cuda"),
        ("", 0, "is not a device", "cpu, cuda"),
    ],
)
def test_a_device_that_is_not_there(
    name: str, num_gpus: int, cause: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_gpus(monkeypatch, num_gpus)
    with pytest.raises(EnvironmentProblem) as caught:
        choose_device(name)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("asked", "device", "real_bf16", "chosen"),
    [
        ("auto", CPU, False, torch.float32),
        ("fp32", CPU, False, torch.float32),
        ("bf16", CPU, False, torch.bfloat16),
        ("fp16", CPU, False, torch.float16),
        ("auto", GPU, True, torch.bfloat16),
        ("auto", GPU, False, torch.float16),
        ("bf16", GPU, True, torch.bfloat16),
        ("fp16", GPU, True, torch.float16),
        ("fp32", GPU, False, torch.float32),
    ],
)
def test_the_precision(
    asked: str, device: torch.device, real_bf16: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_gpus(monkeypatch, 1, real_bf16=real_bf16)
    facts = Facts(config_for(asked), device=detect_device(device))
    assert all(verdict.verdict != "refuse" for verdict in decide(RULES, facts))
    assert compute_dtype(facts) == chosen


def test_emulated_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    act_gpus(monkeypatch, 1, real_bf16=False)
    with pytest.raises(EnvironmentProblem, match=r"Some GPU has no bfloat16 arithmetic \(compute cap") as caught:
        decide(RULES, Facts(config_for("bf16"), device=detect_device(GPU)))
    assert "training.compute_dtype=auto" in caught.value.remedy
