"""Where facts come from: devices and packages are acted, configurations are real ones."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sophia_galore.model.skeleton import build_skeleton
from sophia_galore.plan.detect import (
    detect_bitsandbytes,
    detect_device,
    largest_token,
    missing_trackers,
    model_facts,
    parameter_facts,
)
from sophia_galore.plan.facts import BitsandbytesFacts, DeviceFacts
from tiny import FAMILIES, tiny_config, tiny_tokenizer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_processor() -> None:
    assert detect_device(CPU) == DeviceFacts()
    assert detect_device(CPU).is_cpu


def test_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2080")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**30, 8 * 2**30))
    assert detect_device(GPU) == DeviceFacts("cuda:0", "RTX 2080", (7, 5), real_bf16=False, total_bytes=8 * 2**30)


class Library:
    """A native library as bitsandbytes wraps it."""

    def __init__(self, *, compiled_with_cuda: bool = True, error_msg: str = "") -> None:
        self.compiled_with_cuda = compiled_with_cuda
        if error_msg:
            self.error_msg = error_msg


def act_package(
    monkeypatch: pytest.MonkeyPatch, version: str | None, library: Library, quantise: Any = lambda matrix: None
) -> None:
    """Let there be a bitsandbytes, or none."""

    def find(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    package, cextension = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.cextension")
    package.functional = SimpleNamespace(int8_vectorwise_quant=quantise)  # type: ignore[attr-defined]
    cextension.lib = library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", cextension)
    monkeypatch.setattr(importlib.metadata, "version", find)


def fail(matrix: torch.Tensor) -> None:
    raise RuntimeError("no kernel image is available\nand more")


@pytest.mark.parametrize(
    ("version", "library", "quantise", "expected"),
    [
        (None, Library(), None, BitsandbytesFacts()),
        ("0.50.2", Library(), None, BitsandbytesFacts("0.50.2")),
        ("1.0", Library(), None, BitsandbytesFacts("1.0")),
        (
            "0.49.9",
            Library(),
            None,
            BitsandbytesFacts("0.49.9", "it is older than 0.50, the first version that is supported"),
        ),
        (
            "0.50.2",
            Library(error_msg="No compatible CUDA binary found\n."),
            None,
            BitsandbytesFacts("0.50.2", "No compatible CUDA binary found"),
        ),
        ("0.50.2", Library(), fail, BitsandbytesFacts("0.50.2", "no kernel image is available")),
    ],
    ids=["missing", "works", "newer", "old", "no library", "fails"],
)
def test_the_package(
    version: str | None, library: Library, quantise: Any, expected: BitsandbytesFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_package(monkeypatch, version, library, quantise or (lambda matrix: None))
    assert detect_bitsandbytes(CPU) == expected


def test_a_library_for_processors_does_not_do_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    act_package(monkeypatch, "0.50.2", Library(compiled_with_cuda=False))
    assert detect_bitsandbytes(CPU) == BitsandbytesFacts("0.50.2")
    assert detect_bitsandbytes(GPU) == BitsandbytesFacts("0.50.2", "the library that it loaded is for CPUs only")


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.50.2")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "bitsandbytes" in (detect_bitsandbytes(CPU).problem or "")


def test_the_package_that_is_here() -> None:
    pytest.importorskip("bitsandbytes")
    found = detect_bitsandbytes(CPU)
    assert found.version is not None and found.problem is None


def test_trackers_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "__init__.py").write_text("raise AssertionError('it is not imported')")
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)  # what wandb leaves behind is no package
    assert missing_trackers(("tensorboard", "wandb", "mlflow")) == ("wandb", "mlflow")
    assert missing_trackers(()) == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_configuration_says(family: str) -> None:
    found = model_facts(tiny_config(family), name="m")
    assert (found.model_type, found.positions) == (tiny_config(family).model_type, 128)
    assert (found.vocab_size, found.name, found.instead_of) == (320, "m", "")


def test_what_it_does_not_say_is_not_known() -> None:
    found = model_facts(SimpleNamespace(model_type="x"), instead_of="y")
    assert (found.positions, found.vocab_size, found.instead_of) == (None, None, "y")


def test_experts_and_what_chooses_them_are_found() -> None:
    """Each expert's matrices are parameters of their own, and no linear modules."""
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    params = parameter_facts(build_skeleton(config, CPU))
    experts = [param for param in params if param.is_expert]
    assert len(experts) == 2 * 2 * 3 and all(param.is_matrix and not param.is_linear for param in experts)
    assert experts[1].name == "model.layers.0.mlp.experts.gate_up_proj.1"
    assert experts[1].inner == "mlp.experts.gate_up_proj.1" and params[0].inner == params[0].name
    routers = [param for param in params if param.is_router]
    assert [param.name for param in routers] == [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]


def test_the_largest_token() -> None:
    tokenizer = tiny_tokenizer()
    assert largest_token(tokenizer) == len(tokenizer) - 1
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert largest_token(tokenizer) == tokenizer.convert_tokens_to_ids("<image>")
