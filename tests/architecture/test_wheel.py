"""What is installed is enough: the wheel, built and put into a folder of its own, works outside of the clone.

`make wheel-test` does the same with an empty environment, into which pip puts all that the wheel asks for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sophia_galore
from tiny import write_tiny_data, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
# So small that a run takes a second.
SMALL = [
    *("training.max_steps=2", "training.warmup_steps=0", "training.max_length=64", "optimizer.galore.rank=8"),
    *("training.output_dir=run", "memory.predict=false"),
]


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a program, which has to succeed."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel")
    run(*pip, "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder, ROOT, cwd=folder)
    return next(folder.glob("*.whl"))


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("METADATA"))
        asked = Parser().parsestr(archive.read(metadata).decode())
    packed = {name for name in names if ".dist-info/" not in name}
    source = ROOT / "src"
    assert packed == {
        str(path.relative_to(source))
        for path in (source / "sophia_galore").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "sophia_galore/py.typed" in packed
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert asked["Version"] == sophia_galore.__version__
    needs = [need for need in asked.get_all("Requires-Dist") or [] if "extra ==" not in need]
    assert [re.match(r"[\w.-]+", need)[0] for need in needs] == ["numpy", "safetensors", "torch"]  # type: ignore[index]


@pytest.mark.thorough
def test_outside_of_the_clone(wheel: Path, tmp_path: Path) -> None:
    place, folder = tmp_path / "installed", tmp_path / "elsewhere"
    folder.mkdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    run(*pip, "--no-deps", "--no-index", "--target", place, wheel, cwd=folder)
    write_tiny_model(folder / "model")
    write_tiny_data(folder / "data.json")
    command = next(
        (place / name) for name in ("bin/sophia-galore", "Scripts/sophia-galore.exe") if (place / name).exists()
    )
    path = {"PYTHONPATH": str(place)}
    where = run(sys.executable, "-c", "import sophia_galore; print(sophia_galore.__file__)", cwd=folder, **path)
    assert Path(where.strip()).is_relative_to(place)
    asked = ("--model", "model", "--data", "data.json", "--memory", "2GiB", "--output", "run.yaml")
    run(command, "init", *asked, cwd=folder, **path)
    said = run(command, "train", "--config", "run.yaml", *SMALL, cwd=folder, **path)
    assert "Model, records and reports: run" in said
    assert {"model.safetensors", "config.json", "tokenizer.json", "loss.png"} <= set(os.listdir(folder / "run"))
    answer = run(
        *(sys.executable, "-m", "sophia_galore", "generate", "run", "what follows one", "--max-new-tokens", "3"),
        cwd=folder,
        **path,
    )
    assert answer  # of random weights; these may say nothing but new lines
    # Nothing was looked for in a clone, nor left beside what was asked for.
    assert {path.name for path in folder.iterdir()} <= {"model", "data.json", "run", "run.yaml", ".run.lock"}
