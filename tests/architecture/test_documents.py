"""The documents promise commands, files and keys: each of them must exist, and the translation must keep step."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import typer

import sophia_galore
from sophia_galore.cli.main import app
from sophia_galore.config import RunConfig, load_config
from sophia_galore.config.aliases import ALIASES
from sophia_galore.config.dump import config_reference
from sophia_galore.config.keys import known_keys, sections
from sophia_galore.model.anatomy import SUPPORTED
from sophia_galore.plan.routes import DEFAULT_LEARNING_RATES, make_routes

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = (*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "docs/config.md")

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
FILE_ENDINGS = {"gguf", "json", "jsonl", "md", "png", "py", "safetensors", "toml", "txt", "yaml"}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#+) ", re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"([a-z_]\w*(?:\.[a-z_]\w*)+)(?=$|[:= ])")
LINK = re.compile(r"\]\(([^)]+)\)")
OVERRIDE = re.compile(r"([\w.]+)=")
FAMILY_ROW = re.compile(r"^\| `(\w+)` \|.*?\| ([\d.e-]+)\b[^|]*\| ([\d.]+) MB \| ([\d.]+) MB \|", re.MULTILINE)
EXAMPLE = re.compile(r"`(\w+\.py)`")


@dataclass(frozen=True)
class Block:
    """One fenced code block: its language and its text."""

    language: str
    text: str


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str | None = None) -> list[Block]:
    found = [Block(*match) for match in FENCE.findall(read(name))]
    return [block for block in found if language in (None, block.language)]


def prose(name: str) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", read(name))


def shell_lines(name: str) -> list[str]:
    return [line for block in blocks(name, "bash") for line in block.text.splitlines() if line]


def named_files() -> set[str]:
    """Files that the README tells its reader to write: a YAML block says its name in the first line."""
    return {block.text.splitlines()[0].removeprefix("# ") for block in blocks("README.md", "yaml")}


def test_the_translation_has_the_same_headings() -> None:
    english, chinese = (HEADING.findall(prose(name)) for name in READMES)
    assert english == chinese
    assert len(english) > 10  # the pattern still finds them


def test_the_translation_has_the_same_code() -> None:
    english, chinese = (blocks(name) for name in READMES)
    assert english == chinese


def test_the_first_code_is_the_two_commands() -> None:
    assert blocks("README.md")[0].text == "make train\nmake test\n"
    targets = re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE)
    made = {line.split()[1] for name in DOCUMENTS for line in shell_lines(name) if line.startswith("make ")}
    assert made <= set(targets)


@pytest.mark.parametrize("command", PROMISED)
def test_promised_commands_are_in_the_readme(command: str) -> None:
    assert len(PROMISED) == 11
    assert command in shell_lines("README.md")


COMMANDS = [line for name in ("README.md", "CONTRIBUTING.md") for line in shell_lines(name)]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line: str) -> None:
    program, *words = shlex.split(line)
    program = program.removeprefix(".venv/bin/")
    if program == "sophia-galore":
        check_arguments(words[0], words[1:])
    elif program in ("python", "python3"):
        check_python(words)
    else:
        assert program in ("make", "."), f"{program} is none of our commands"


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
    known = set(known_keys()) | set(ALIASES)
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
            assert (ROOT / words[index + 1]).is_file() or words[index + 1] in named_files(), words[index + 1]
        if override := OVERRIDE.match(word):
            assert override[1] in known, override[1]


def options(command: object) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}  # type: ignore[attr-defined]


@pytest.mark.parametrize("block", blocks("README.md", "yaml"), ids=lambda block: block.text.splitlines()[0])
def test_configurations_load(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "readme.yaml"
    path.write_text(block.text, encoding="utf-8")
    load_config(path)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_keys_in_backticks_exist(name: str) -> None:
    known = {*known_keys(), *sections()}
    # A span over a line's end would turn what is inside and outside upside down for the pattern.
    assert [line for line in prose(name).splitlines() if line.count("`") % 2] == []
    spans = [found[1] for span in CODE_SPAN.findall(prose(name)) if (found := DOTTED.match(span))]
    for word in spans:
        if word.rpartition(".")[2] not in FILE_ENDINGS and not word.startswith("torch."):
            assert word in known or word == "key.path", f"{name} speaks of {word}"


def test_the_reference_of_keys_is_current() -> None:
    heading, _, table = read("docs/config.md").partition("\n\n")
    assert re.fullmatch(r"# .+", heading)
    assert table == config_reference()  # CONTRIBUTING.md has the command that writes it anew
    assert "(docs/config.md)" in read("README.md")


@pytest.mark.parametrize("name", READMES)
def test_tables_and_numbers_are_those_of_the_code(name: str) -> None:
    text = prose(name)
    for model_type in SUPPORTED:
        assert f"| {model_type} |" in text
    rates = {row[0]: row[1] for row in FAMILY_ROW.findall(text)}
    assert rates == {
        kind: f"{rate:.1e}".replace("e-0", "e-").replace(".0e", "e") for kind, rate in DEFAULT_LEARNING_RATES.items()
    }


@pytest.fixture(scope="module")
def qwen2_shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter of Qwen2-0.5B, without a weight of it."""
    spec = importlib.util.spec_from_file_location("shapes", ROOT / "bench" / "shapes.py")
    assert spec is not None and spec.loader is not None
    shapes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**shapes.QWEN2_05B))
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


@pytest.mark.parametrize("name", READMES)
def test_bytes_of_state_are_those_of_the_plan(name: str, qwen2_shapes: dict[str, tuple[int, ...]]) -> None:
    def megabytes(kind: str, bits: int) -> str:
        config = RunConfig.model_validate({"optimizer": {"type": kind, "state_bits": bits}})
        routes = make_routes(config, qwen2_shapes, "model.embed_tokens.weight")
        size = sum(route.state_bytes + route.projection_bytes for route in routes) / 1e6
        return f"{size:.0f}" if size >= 10 else f"{size:.1f}"

    found = {row[0]: (row[2], row[3]) for row in FAMILY_ROW.findall(prose(name))}
    assert found == {kind: (megabytes(kind, 32), megabytes(kind, 8)) for kind in DEFAULT_LEARNING_RATES}


def test_python_in_the_readme_imports_what_there_is() -> None:
    for block in blocks("README.md", "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module == "sophia_galore":
                assert {alias.name for alias in node.names} <= set(sophia_galore.__all__)


@pytest.mark.parametrize("name", READMES)
def test_every_example_is_named(name: str) -> None:
    (line,) = [part for part in prose(name).split("\n\n") if "`examples`" in part]
    assert set(EXAMPLE.findall(line)) == {path.name for path in (ROOT / "examples").glob("*.py")} - {"small.py"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in LINK.findall(prose(name)):
        if not target.startswith("https://"):
            assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_is_left_to_do(name: str) -> None:
    assert re.findall(r"TODO[-\w]*|@@\w+@@", read(name)) == []
