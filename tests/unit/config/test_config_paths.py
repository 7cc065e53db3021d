"""`~` and variables in every path key, alike; and what stands in braces in the name of a run's folder."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest

from sophia_galore.config import RunConfig, dump_config, load_config
from sophia_galore.config.dump import flatten
from sophia_galore.config.paths import PATH_KEYS, escape_path, expand, expand_all, fill_placeholders, named_paths
from sophia_galore.errors import ArgumentError, CheckpointError, ConfigError
from sophia_galore.train.run_date import fill_date

# As written: as meant, with HOME=/h, DATA=/d and EMPTY empty.
EXPANDED = {
    "~/x": "/h/x",
    "~": "/h",
    "$DATA/x": "/d/x",
    "${DATA}x/y": "/dx/y",
    "a/$DATA/b": "a//d/b",
    "$IN_HOME/x": "/h/big/x",
    "a$$b": "a$b",
    "$$DATA": "$DATA",
    "$1/x": "$1/x",
    "a$": "a$",
    "./~x": "./~x",
    "a~b/~": "a~b/~",
    "Qwen/Qwen2-0.5B": "Qwen/Qwen2-0.5B",
    "r\u00fcn {optimizer} (1)": "r\u00fcn {optimizer} (1)",
    "C:\\data\\x": "C:\\data\\x",
}
REFUSED = {
    "$UNKNOWN/x": "'UNKNOWN'",
    "${UNKNOWN}": "'UNKNOWN'",
    "a/${}": "''",
    "$EMPTY/run": "is empty",
    "~nobody-of-that-name/x": "is no user",
}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/h", "DATA": "/d", "EMPTY": "", "IN_HOME": "~/big"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNKNOWN", raising=False)


@pytest.mark.parametrize("text", EXPANDED)
def test_what_is_expanded(text: str) -> None:
    assert expand(text) == EXPANDED[text]
    assert expand(escape_path(EXPANDED[text])) == EXPANDED[text]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_known_is_refused_by_name(text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        expand(text)
    assert REFUSED[text] in caught.value.cause and caught.value.remedy


@pytest.mark.parametrize("text", ["%DATA%\\x", "$DATA\\x"])
def test_windows_has_another_sign_for_variables(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand(text) == (text if text.startswith("%") else "/d\\x")
    monkeypatch.setattr(os, "name", "nt")
    assert expand(text) == "/d\\x"


@pytest.mark.parametrize("key", PATH_KEYS)
def test_every_path_key_is_expanded(key: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{eval_fraction: 0.0}}\n{key}: ~/x\n" if section != "data" else f"{key}: ~/x\n")
    assert flatten(load_config(path))[key] == "/h/x"
    config = load_config(path, [f"{key}=$DATA/$$x"])
    assert flatten(config)[key] == "/d/$x"
    # What is written down means the same, on whatever machine.
    path.write_text(dump_config(config))
    assert load_config(path) == config
    path.write_text(f"# a line\n{section}:\n  {name}: $UNKNOWN/x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"run.yaml:3: {key}: the environment variable 'UNKNOWN'" in caught.value.cause


def test_lists_and_sections_of_paths() -> None:
    """As `data.train` may hold them."""
    value = ["$DATA/a", {"path": "~/b", "weight": 2.0, "name": "$DATA"}]
    assert expand_all(value) == ["/d/a", {"path": "/h/b", "weight": 2.0, "name": "$DATA"}]
    assert named_paths(value) == [Path("$DATA/a"), Path("~/b")]
    assert named_paths(None) == []


def test_text_that_is_no_path_stays(tmp_path: Path) -> None:
    config = load_config(None, ['training.sample_questions=["What is $5 and ~?"]'])
    assert config.training.sample_questions == ("What is $5 and ~?",)


@pytest.mark.parametrize(
    ("template", "model", "expected"),
    [
        ("out/{optimizer}", "m", "out/galore"),
        ("out/{model}", "Qwen/Qwen2-0.5B", "out/Qwen2-0.5B"),
        ("out/{model}", "/models/mine/", "out/mine"),
        ("out/{model}", "C:\\models\\mine.gguf", "out/mine"),
        ("out/{model}", "a:b?c", "out/a-b-c"),
        ("out/{model}", "..", "out/model"),
        ("out/{{model}}", "m", "out/{model}"),
        ("out/{date}", "m", "out/{date}"),
        ("a}b{c", "m", "a}b{c"),
    ],
)
def test_what_stands_for_what(template: str, model: str, expected: str) -> None:
    config = RunConfig.model_validate({"model": {"name": model}, "training": {"output_dir": template}})
    assert config.run_folder == expected
    assert fill_placeholders(template, optimizer="galore", model=model) == expected


def dated_config(template: str) -> RunConfig:
    return RunConfig.model_validate({"model": {"name": "a/m"}, "training": {"output_dir": template}})


TEMPLATES = ["{date}", "{model}-{date}", "{date}/{optimizer}", "x+(1)/{date}/{date}"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_run_goes_on_in_the_folder_of_its_date(template: str, tmp_path: Path) -> None:
    config = dated_config(f"{tmp_path}/{template}")
    with pytest.raises(CheckpointError, match="No folder fits"):
        fill_date(config, resume=True)
    # The clock goes backwards between the two: the name counts.
    folders = []
    for when in (datetime(2026, 5, 2, 10, 0, 1), datetime(2026, 5, 2, 10, 0), datetime(2025, 12, 31)):
        folders.append(Path(fill_date(config, now=when).run_folder))
        folders[-1].mkdir(parents=True)
    assert len(set(folders)) == 3 and "2026-05-02_10-00-01" in str(folders[0])
    for other in ("2026-13-45_00-00-00", "2027-01-01", "notes", "m-2027-01-01_00-00-00-copy"):
        (tmp_path / other).mkdir()
    assert Path(fill_date(config, resume=True).run_folder) == folders[0]
    asked = fill_date(config, resume=True, resume_from=folders[2] / "checkpoint-3")
    assert Path(asked.run_folder) == folders[2]
    assert Path(fill_date(config, resume=True, resume_from=folders[1]).run_folder) == folders[1]
    # A checkpoint from elsewhere goes on in a new folder.
    now = datetime(2026, 6, 1)
    new = fill_date(config, resume=True, resume_from=tmp_path / "elsewhere" / "checkpoint-3", now=now)
    assert "2026-06-01" in new.run_folder
    assert fill_date(new, resume=True) == new  # put in once


def test_a_run_without_a_date_is_left_alone() -> None:
    assert fill_date(config := dated_config("out/{model}"), resume=True) is config
