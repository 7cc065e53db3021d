"""What is in the repository belongs there: nothing of one machine, and nothing that `.gitignore` names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked(*options: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def test_no_links() -> None:
    assert [line for line in tracked("--stage") if line.startswith("120000")] == []


def test_nothing_that_is_ignored() -> None:
    assert tracked("--cached", "--ignored", "--exclude-standard") == []
