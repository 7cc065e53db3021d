"""Files that can't be read: each is one error with the place and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from sophia_galore.config import RunConfig, load_config
from sophia_galore.errors import ConfigError

BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["run.yaml:1", "empty"]),
    "only comments": (b"# nothing\n", ["run.yaml:1", "empty"]),
    "list": (b"- a\n- b\n", ["run.yaml:1", "top level"]),
    "scalar": (b"\n\nhello\n", ["run.yaml:3", "top level"]),
    "null": (b"null\n", ["run.yaml:1", "top level"]),
    "tab": (b"training:\n\tseed: 1\n", ["run.yaml:2", "a tab", "spaces"]),
    "colon": (b"model:\n  name: a: b\n", ["run.yaml:2", "colon", "quotes"]),
    "indentation": (b"training:\n  seed: 1\n epochs: 2\n", ["run.yaml:3", "indentation"]),
    "text after a brace": (b"training:\n  output_dir: {date}-x\n", ["run.yaml:2", "begins with { or [ needs quotes"]),
    "no colon": (b"training:\n  seed: 1\n  epochs\n", ["run.yaml:4", "colon after its key"]),
    "open bracket": (b"optimizer:\n  betas: [0.9, 0.99\n", ["run.yaml:3", "never closed"]),
    "open quote": (b"model:\n  name: 'abc\n", ["run.yaml", "never closed"]),
    "two documents": (b"training:\n  seed: 1\n---\nmodel:\n", ["run.yaml:3", "second document"]),
    "anchor": (b"training:\n  seed: *nope\n", ["run.yaml:2", "begins with *"]),
    "control character": (b"training:\n  output_dir: a\x01\n", ["run.yaml:2", "control character"]),
    "latin-1": (b"training:\n  seed: 1\n  output_dir: caf\xe9\n", ["run.yaml:3", "UTF-8"]),
    "tag": (b"training:\n  seed: !!python/object:os.system 1\n", ["run.yaml:2", "tags"]),
    "wrong tag": (b"training:\n  seed: !!int abc\n", ["run.yaml:2", "training.seed", "can't be read"]),
    "contains itself": (b"training:\n  seed: &a [*a]\n", ["run.yaml:2", "contains itself"]),
    "duplicate key": (b"training:\n  seed: 1\n  epochs: 1\n  seed: 2\n", ["run.yaml:4", "training.seed", "run.yaml:2"]),
    "duplicate section": (
        b"training:\n  seed: 1\ntraining:\n  epochs: 1\n",
        ["run.yaml:3", "'training'", "run.yaml:1"],
    ),
    "key is a list": (b"[a]: 1\n", ["run.yaml:1", "key must be a word"]),
    "key is empty": (b"'': 1\n", ["run.yaml:1", "key must be a word"]),
    "section is a value": (b"model: gpt2\n", ["run.yaml:1", "model is a section", "name"]),
    "section is a list": (b"optimizer:\n  galore: [1]\n", ["run.yaml:2", "optimizer.galore is a section", "rank"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    content, expected = BAD_FILES[name]
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for words in expected:
        assert words in str(caught.value)
    assert caught.value.remedy
    assert "yaml.org" not in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model:\n")
    with pytest.raises(ConfigError, match=r"rnu\.yaml does not exist") as caught:
        load_config(tmp_path / "rnu.yaml")
    assert "run.yaml" in caught.value.remedy


def test_a_missing_folder_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "no" / "run.yaml")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder"):
        load_config(tmp_path)


def test_an_empty_section_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbftraining:\n  # seed: 3\nmodel:\n")
    assert load_config(path) == RunConfig()


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None) == RunConfig()
