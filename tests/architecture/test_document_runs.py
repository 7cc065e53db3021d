"""What the documents tell their reader to type is typed, line by line, in a folder where everything is there and tiny.

Each document stands by itself: its lines run in their order, and what one leaves the next ones find. Its Python runs
too, and a YAML block that names its file is written to that file.
"""

from __future__ import annotations

import io
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest

from document_folder import make_folder, mesh_of_one, python_names, write_data, write_small
from documents import ROOT, TYPED, Block, blocks, file_name
from forked import forked_command
from sophia_galore.cli import compare
from sophia_galore.experiment.children import carry_out
from unit.cli.tiny_run import Ended, command

WITH_CODE = [name for name in TYPED if any(not block.mark for block in blocks(name) if block.language != "text")]


@pytest.mark.parametrize(
    "name",
    # The other pages are followed by continuous integration.
    [pytest.param(name, marks=[] if name == "README.md" else [pytest.mark.thorough]) for name in WITH_CODE],
)
def test_a_document_can_be_followed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if sys.platform == "linux":
        monkeypatch.setattr(compare, "carry_out", partial(carry_out, begin=forked_command))
    names = None
    with ExitStack() as until_the_end:
        for block in blocks(name):
            if block.language == "bash" and not block.mark:
                for line in block.lines:
                    follow(line, folder, monkeypatch)
            elif block.language == "python":
                names = python_names() if names is None else names
                if "mesh" in block.text and "mesh" not in names:
                    names["mesh"] = until_the_end.enter_context(mesh_of_one())
                exec(compile(block.text, name, "exec"), names)
            elif file := file_name(block):
                write_small(block.text, folder / file)


def follow(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line, which has to succeed."""
    program, *words = shlex.split(line)
    if {"prepare-data", "--prepare-data"} & set(words):
        for name in ("sample_data.json", "corpus.txt"):
            (folder / "data" / name).unlink()  # tiny, and not what that command would replace
    if program == "make":
        # Continuous integration does it; here it is gone through without being done.
        done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        ended = Ended(done.returncode, done.stdout, done.stderr)
    elif program == "python":
        ended = run_script(words, monkeypatch)
    else:
        assert program == "sophia-galore", f"nobody knows how to run {line}"
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n/exit\n"))
        ended = command(*words)
    assert ended.code == 0, f"{line}\n{ended.out[-2000:]}\n{ended.err[-2000:]}"
    write_data(folder)  # `prepare-data` has made 2000 examples, or a long text


def run_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Ended:
    """`python SCRIPT ...`, without a new process."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(Path(words[0]).parent.resolve()))
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


def test_make_is_here() -> None:
    assert shutil.which("make")


def test_each_kind_of_block_is_found() -> None:
    found: list[Block] = [block for name in WITH_CODE for block in blocks(name)]
    assert {block.language for block in found} >= {"bash", "python", "yaml"}
    assert sum(not block.mark for block in found if block.language == "bash") > 15
