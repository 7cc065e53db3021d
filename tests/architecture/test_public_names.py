"""Frozen surfaces: public names and commands. A change here is a change for users; say it in the CHANGELOG."""

from __future__ import annotations

import subprocess
import sys

import typer

import sophia_galore
from documents import ROOT
from sophia_galore.cli.main import app

ANSWERING = [
    *("--compare-base", "--device", "--format", "--max-new-tokens", "--seed", "--system", "--temperature", "--top-p"),
    "model",
]


def test_public_names() -> None:
    names = ["Apollo", "GaLore", "Sophia", "__version__", "attach", "shard_placement", "watch"]
    assert sorted(sophia_galore.__all__) == names
    for name in sophia_galore.__all__:
        assert hasattr(sophia_galore, name)


def test_commands_and_their_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    surface = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in commands.items()
    }
    assert surface == {
        "init": ["--data", "--force", "--memory", "--model", "--output", "-d", "-m"],
        "train": ["--config", "--optimizer", "--resume", "-c", "-o", "overrides"],
        "check": ["--config", "--json", "--optimizer", "--parameters", "-c", "-o", "overrides"],
        "plan": [
            *("--allow-shorter", "--config", "--device", "--fit", "--host-memory", "--json", "--matrix", "--memory"),
            *("--model", "--optimizer", "--output", "--picture", "--processes", "-c", "-m", "-o", "overrides"),
        ],
        "doctor": ["--device", "--folder", "--json", "--output"],
        "compare": ["--output", "--seeds", "words"],
        "report": ["--output", "runs"],
        "prepare-data": ["--corpus", "--output"],
        "download": ["--cache-dir", "--list", "--prefer", "--source", "--trust-remote-code", "name"],
        "export": ["--block-size", "--converter", "--output", "--to", "--type", "source"],
        "push": ["--private", "folder", "hub_id"],
        "generate": [*ANSWERING, "prompt"],
        "chat": ANSWERING,
    }


def test_importing_the_package_is_light() -> None:
    """No side effects at import: neither torch nor transformers is loaded by the package itself."""
    code = (
        "import sys, sophia_galore, sophia_galore.errors; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {sophia_galore.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
