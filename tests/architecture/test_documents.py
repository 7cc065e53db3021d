"""The documents promise commands, files and keys: each of them must exist, and the translation must keep step."""

from __future__ import annotations

import ast
import importlib.util
import re
from itertools import chain
from pathlib import Path

import pytest
import torch
import transformers

import sophia_galore
from documents import DOCUMENTS, PAGES, READMES, ROOT, TYPED, Block, blocks, prose, read
from sophia_galore.config import RunConfig, load_config
from sophia_galore.config.dump import config_reference
from sophia_galore.config.keys import keys, sections
from sophia_galore.model.architecture import SUPPORTED
from sophia_galore.optim.recipes import DEFAULT_LEARNING_RATES
from sophia_galore.plan.routes import make_routes

FILE_ENDINGS = {"csv", "gguf", "html", "json", "jsonl", "md", "png", "py", "safetensors", "toml", "txt", "yaml"}

HEADING = re.compile(r"^(#+) ", re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"([a-z_]\w*(?:\.[a-z_]\w*)+)(?=$|[:= ])")
LINK = re.compile(r"\]\(([^)]+)\)")
FAMILY_ROW = re.compile(r"^\| `(\w+)` \|.*?\| ([\d.e-]+)\b[^|]*\| ([\d.]+) MB \| ([\d.]+) MB \|", re.MULTILINE)
EXAMPLE = re.compile(r"`(\w+\.py)`")


def test_the_translation_has_the_same_headings() -> None:
    english, chinese = (HEADING.findall(prose(name)) for name in READMES)
    assert english == chinese
    assert len(english) > 10  # the pattern still finds them


def test_the_translation_has_the_same_code() -> None:
    english, chinese = (blocks(name) for name in READMES)
    assert english == chinese


YAML = [block for name in TYPED for block in blocks(name, "yaml")]


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.lines[0])
def test_configurations_load(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "readme.yaml"
    path.write_text(block.text, encoding="utf-8")
    load_config(path)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_keys_in_backticks_exist(name: str) -> None:
    known = {*keys(), *sections()}
    # A span over a line's end would turn what is inside and outside upside down for the pattern.
    assert [line for line in prose(name).splitlines() if line.count("`") % 2] == []
    spans = [found[1] for span in CODE_SPAN.findall(prose(name)) if (found := DOTTED.match(span))]
    for word in spans:
        # Files, names of torch and of a model's weights are no keys.
        if word.rpartition(".")[2] in {*FILE_ENDINGS, "weight", "jinja", "model"} or word.startswith("torch."):
            continue
        assert word in known or word == "key.path", f"{name} speaks of {word}"


def test_the_reference_of_keys_is_current() -> None:
    heading, _, table = read("docs/config.md").partition("\n\n")
    assert re.fullmatch(r"# .+", heading)
    assert table == config_reference()  # CONTRIBUTING.md has the command that writes it anew
    assert "(docs/config.md)" in read("README.md")


@pytest.mark.parametrize("name", READMES)
def test_tables_and_numbers_are_those_of_the_code(name: str) -> None:
    text = prose(name)
    table = text.partition("| `model_type` |\n")[2].partition("\n\n")[0]
    listed = [row.split("|")[2].strip().split(", ") for row in table.splitlines()[1:]]
    assert sorted(chain.from_iterable(listed)) == sorted(SUPPORTED)
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


def test_python_in_the_documents_imports_what_there_is() -> None:
    python = [block for name in TYPED for block in blocks(name, "python")]
    assert len(python) > 5  # they are found
    for block in python:
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
            file, _, anchor = target.partition("#")
            path = ((ROOT / name).parent / file) if file else ROOT / name
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """What a Markdown page can be linked at, as its readers make it of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_is_left_to_do(name: str) -> None:
    assert re.findall(r"TODO[-\w]*|@@\w+@@", read(name)) == []


def test_every_page_is_in_the_index() -> None:
    assert {f"docs/{target}" for target in LINK.findall(prose("docs/README.md"))} == set(PAGES) - {"docs/README.md"}


def test_the_table_of_cards_is_the_same_in_both_languages() -> None:
    english, chinese = (read(name).partition("<!-- plan --matrix -->")[2] for name in READMES)
    end = "<!-- /plan --matrix -->"
    assert english.partition(end)[:2] == chinese.partition(end)[:2]
    assert end in english
