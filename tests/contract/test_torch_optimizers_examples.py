"""Each example runs as it stands, without a network, and the loss goes down."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "small")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", "--steps", "8", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = (float(loss) for loss in re.findall(r"^loss \w+: ([\d.]+)$", done.stdout, re.MULTILINE))
    assert after < before - 0.2
    assert not list(tmp_path.iterdir())


def test_there_are_five() -> None:
    assert EXAMPLES == ["hf_trainer", "plain_loop", "sophia_trainer", "trl_sft", "update_in_backward"]
