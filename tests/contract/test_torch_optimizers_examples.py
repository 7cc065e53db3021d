"""Each example runs as it stands, without a network, and the loss goes down.

One is run by a new interpreter, as a reader does; the others by copies of this process, which have imported everything.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from forked import run_forked

ROOT = Path(__file__).resolve().parents[2]
# Not among them: what they train, and what makes a new model, which a page of the documents does.
EXAMPLES = sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - {"small", "new_model"})
WORDS = ("--steps", "8", "--device", "cpu")


def in_a_copy(name: str, folder: Path, log: Path) -> tuple[int, str]:
    """An example in a forked process: its exit code, and what it said."""

    def child() -> int:
        torch.set_num_threads(1)
        os.chdir(folder)
        os.environ["HF_HUB_OFFLINE"] = "1"
        script = ROOT / "examples" / f"{name}.py"
        sys.argv, sys.path[:0] = [str(script), *WORDS], [str(script.parent)]
        runpy.run_path(str(script), run_name="__main__")
        return 0

    code = run_forked(child, log)
    return code, log.read_text(encoding="utf-8")


def in_a_new_interpreter(name: str, folder: Path) -> tuple[int, str]:
    """An example as a reader runs it: its exit code, and what it said."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *WORDS],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    if name == "plain_loop":
        code, said = in_a_new_interpreter(name, folder)
    else:
        code, said = in_a_copy(name, folder, tmp_path / "said.log")
    assert code == 0, said
    # A progress bar may stand before it in the line.
    before, after = (float(loss) for loss in re.findall(r"\bloss (?:before|after): ([\d.]+)$", said, re.MULTILINE))
    assert after < before - 0.2
    assert not list(folder.iterdir())


def test_the_sharded_loop_under_torchrun(tmp_path: Path) -> None:
    """Two processes, as a reader starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "examples" / "fsdp2_loop.py"), *WORDS],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (
        float(loss) for loss in re.findall(r"^loss (?:before|after): ([\d.]+)$", done.stdout, re.MULTILINE)
    )
    assert after < before - 0.2


def test_there_are_seven() -> None:
    assert [
        *("accelerate_fsdp2", "fsdp2_loop", "hf_trainer", "plain_loop"),
        *("sophia_trainer", "trl_sft", "update_in_backward"),
    ] == EXAMPLES
