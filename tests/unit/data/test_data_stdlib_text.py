from __future__ import annotations

from pathlib import Path

import pytest

from sophia_galore.data import stdlib_text
from sophia_galore.data.stdlib_text import prepare_corpus
from sophia_galore.errors import DataError, EnvironmentProblem


def test_the_same_bytes_again_and_no_packages_of_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "corpus.txt"
    first, again = prepare_corpus(path), prepare_corpus(path)
    assert first == again and first.num_bytes == path.stat().st_size > 5e6 and first.num_files > 300
    text = path.read_text(encoding="utf-8")
    assert "\n# json/decoder.py\n" in text and "def JSONArray" in text
    assert "site-packages/" not in "".join(
        line for line in text.splitlines() if line.startswith("# ") and ".py" in line
    )


def test_another_text_stays(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("my own words")
    with pytest.raises(DataError, match="another text"):
        prepare_corpus(path)
    assert path.read_text() == "my own words"


def test_a_python_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(EnvironmentProblem, match="without the source"):
        prepare_corpus(tmp_path / "corpus.txt")
