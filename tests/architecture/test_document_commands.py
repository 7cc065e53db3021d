"""The documents' commands: each exists, with its options, files and keys; a block that can't be run says why."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest
import typer

from documents import DOCUMENTS, MARKS, READMES, ROOT, TYPED, blocks, named_files, prose, read, shell_lines
from sophia_galore.cli.arguments import STARTER
from sophia_galore.cli.main import app
from sophia_galore.config.aliases import ALIASES
from sophia_galore.config.keys import keys

# What users were promised, letter for letter.
PROMISED = [
    "python train.py --prepare-data",
    "python train.py --optimizer galore",
    "python train.py --optimizer adamw",
    "python train.py --resume",
    "python train.py --config configs/galore_config.fullrun.yaml",
    "python train.py --config configs/galore_compare_galore.yaml",
    "python train.py --config configs/galore_compare_adamw.yaml",
    "python train.py --config configs/galore_config.yaml --optimizer galore",
    "python train.py --config configs/galore_config.yaml --resume",
    "python download_model.py",
    "python download_model_modelscope.py",
]

# The scripts are doors to a command.
SCRIPTS = {"train.py": "train", "download_model.py": "download", "download_model_modelscope.py": "download"}
MODULES = {"venv", "pip", "pytest"}
OVERRIDE = re.compile(r"([\w.]+)=")
EXTRA = re.compile(r"""["'](?:\.|sophia-galore)\[(\w+)\]["']""")


def test_the_first_code_is_the_two_commands() -> None:
    assert blocks("README.md")[0].text == "make train\nmake test\n"
    targets = re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE)
    made = {line.split()[1] for name in DOCUMENTS for line in shell_lines(name) if line.startswith("make ")}
    assert made <= set(targets)


@pytest.mark.parametrize("command", PROMISED)
def test_promised_commands_are_in_the_readme(command: str) -> None:
    assert len(PROMISED) == 11
    assert command in shell_lines("README.md")


COMMANDS = list(dict.fromkeys(line for name in (*TYPED, "CONTRIBUTING.md") for line in shell_lines(name)))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line: str) -> None:
    program, *words = shlex.split(line)
    program = program.removeprefix(".venv/bin/")
    if program == "sophia-galore":
        check_arguments(words[0], words[1:])
    elif program in ("python", "python3"):
        check_python(words)
    elif program == "torchrun":
        start = words.index("-m")
        assert words[start + 1] == "sophia_galore"
        check_arguments(words[start + 2], words[start + 3 :])
    else:
        assert program in ("make", "pip"), f"{program} is none of our commands"


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert words[1] in MODULES
        for word in words[2:]:
            if "/" in word or word.endswith(".txt"):
                assert (ROOT / word).exists(), word
    elif words[0] == "-c":
        compile(words[1], "document", "exec")
    else:
        assert (ROOT / words[0]).is_file(), words[0]
        if words[0] in SCRIPTS:
            command = "prepare-data" if "--prepare-data" in words else SCRIPTS[words[0]]
            check_arguments(command, [word for word in words[1:] if word != "--prepare-data"])


def check_arguments(command: str, words: list[str]) -> None:
    """The command has these options, the configuration is there, and the overrides name keys."""
    known = {*keys(), *ALIASES}
    root = typer.main.get_command(app)
    if command.startswith("-"):
        assert command in options(root)
        return
    commands = root.commands  # type: ignore[attr-defined]
    assert command in commands
    for index, word in enumerate(words):
        if word.startswith("-"):
            assert word in options(commands[command]), f"{command} has no {word}"
        if word == "--config":
            assert (ROOT / words[index + 1]).is_file() or words[index + 1] in {*named_files(), str(STARTER)}, words[
                index + 1
            ]
        if override := OVERRIDE.match(word):
            assert override[1] in known, override[1]


def options(command: object) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_that_are_not_run_say_why(name: str) -> None:
    marks = {(block.language, block.mark) for block in blocks(name) if block.mark}
    assert marks <= {("bash", mark) for mark in MARKS}
    # A fence that the pattern does not know would leave an odd number of them, or code in the prose.
    assert "```" not in prose(name)


@pytest.mark.parametrize("name", TYPED)
def test_a_mark_is_no_way_round_the_tests(name: str) -> None:
    for block in blocks(name, "bash"):
        for line in block.lines:
            if block.mark == "install":
                assert line.startswith((".venv/bin/", "python3 -m venv", "pip install ", "make ")), line
            elif block.mark == "long":
                assert line.startswith("python bench/") or "--matrix" in line, line


def test_extras_exist() -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    named = {found for name in (*TYPED, *READMES) for found in EXTRA.findall(read(name))}
    assert len(named) >= 2
    assert named <= set(extras)
