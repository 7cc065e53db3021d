"""What is known of bitsandbytes, with and without it; nothing imports it that does not need it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bitsandbytes_here import NEEDS_BITSANDBYTES
from engines import load_frozen_parts
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.model import frozen
from sophia_galore.model.frozen import bitsandbytes_facts
from tiny import write_tiny_model


def test_missing_it_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    facts = bitsandbytes_facts("cpu")
    assert (facts.installed, facts.version) == (False, "") and "not installed" in str(facts.problem)
    with pytest.raises(EnvironmentProblem) as caught:
        load_frozen_parts(write_tiny_model(tmp_path))
    assert "quantization.backend: bitsandbytes can't be used here" in caught.value.cause
    assert 'pip install "sophia-galore[bitsandbytes]"' in caught.value.remedy


def pretend(monkeypatch: pytest.MonkeyPatch, version: str, compiled_with_cuda: bool) -> None:
    """An installed bitsandbytes as it would present itself."""
    package, extension = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.cextension")
    package.__version__ = version  # type: ignore[attr-defined]
    extension.lib = SimpleNamespace(compiled_with_cuda=compiled_with_cuda)  # type: ignore[attr-defined]
    known = {"bitsandbytes": package, "bitsandbytes.cextension": extension}
    monkeypatch.setattr(frozen.importlib, "import_module", known.__getitem__)
    monkeypatch.setattr(frozen.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("version", "compiled", "device", "problem"),
    [
        ("0.50.2", True, "cuda", None),
        ("0.51.0.dev1", False, "cpu", None),
        ("1.0", False, "cpu", None),
        ("0.50.2", False, "cuda", "no native library"),
        ("0.49.1", True, "cuda", "0.49.1 is too old, 0.50 is needed"),
    ],
)
def test_version_and_library(
    version: str, compiled: bool, device: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, version, compiled)
    facts = bitsandbytes_facts(device)
    assert facts.installed and facts.version == version
    assert facts.problem is None if problem is None else problem in str(facts.problem)


def test_a_broken_installation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr(frozen.importlib, "import_module", broken)
    monkeypatch.setattr(frozen.importlib.util, "find_spec", lambda name: object())
    facts = bitsandbytes_facts("cpu")
    assert facts.installed and not facts.version
    assert str(facts.problem).endswith("libcudart.so.13: cannot open shared object file")


@NEEDS_BITSANDBYTES
def test_it_works_on_a_cpu() -> None:
    facts = bitsandbytes_facts("cpu")
    assert facts.installed and facts.problem is None
    assert facts.version == importlib.import_module("bitsandbytes").__version__


def test_nothing_imports_it_unasked() -> None:
    code = "import sys, sophia_galore.train.run, sophia_galore.cli.main; print('bitsandbytes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
