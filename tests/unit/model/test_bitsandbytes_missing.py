"""bitsandbytes is imported where it is used, and missed kindly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engines import load_frozen_parts
from sophia_galore.errors import EnvironmentProblem
from tiny import write_tiny_model


def test_missing_it_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(EnvironmentProblem) as caught:
        load_frozen_parts(write_tiny_model(tmp_path))
    assert "quantization.backend: bitsandbytes can't be used here" in caught.value.cause
    assert 'pip install "sophia-galore[bitsandbytes]"' in caught.value.remedy


def test_nothing_imports_it_unasked() -> None:
    code = "import sys, sophia_galore.train.run, sophia_galore.cli.main; print('bitsandbytes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
