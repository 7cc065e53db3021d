"""Model cards: of a run, of its checkpoints, of what is made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sophia_galore.model.card import Card, write_card
from sophia_galore.model.origin import WRITTEN_HERE, Origin, read_origin
from sophia_galore.model.source_files import read_source_files
from unit.cli.tiny_run import World, command, sha256

BASE_CARD = "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE\nbase_model: someone/older\n---\n# Base\n"


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run from a model whose card and manifest say what it is, with a checkpoint of step 2."""
    from sophia_galore.weights.manifest import write_manifest
    from tiny import write_tiny_model

    model = write_tiny_model(tmp_path_factory.mktemp("based") / "base")
    (model / "README.md").write_text(BASE_CARD)
    write_manifest(model, name="someone/tiny", source="hf", revision="", has_code=False)
    words = [f"model.name={model}", "training.max_steps=3", "checkpoint.save_every_steps=2"]
    ended = world.train("carded", *words)
    assert ended.code == 0, ended.err
    return world.folder / "carded"


def keys(card: Path) -> dict[str, Any]:
    """What a card says to the hub."""
    _, front, _ = card.read_text().split("---\n", 2)
    read = yaml.safe_load(front)
    assert isinstance(read, dict)
    return read


def test_the_card_of_a_run(run: Path, world: World) -> None:
    assert keys(run / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "someone/tiny",
        "license": "other",
        "license_name": "tiny-1",
        "license_link": "LICENSE",
        "tags": ["sophia-galore"],
    }
    text, plan = (run / "README.md").read_text(), json.loads((run / "plan.json").read_text())
    assert f"| data fingerprint | `{plan['data_fingerprint']}` |" in text
    counts = f"{plan['num_train_examples']} examples to train on, {plan['num_eval_examples']} examples held out"
    assert f"| data | data.json, {counts} |" in text
    losses = [line["eval_loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "eval_loss" in line]
    assert f"| eval loss before training | {losses[0]:.4f} |" in text
    assert f"| eval loss after step 3 | {losses[-1]:.4f} |" in text
    assert str(world.folder) not in text and str(Path.home()) not in text.replace(" ", "")


def test_cards_of_what_is_made_from_it(run: Path, tmp_path: Path) -> None:
    for source, steps in ((run, "| steps | 3 |"), (run / "checkpoint-2", "| steps | 2 of 3 |")):
        target = tmp_path / source.name
        assert command("export", str(source), "--to", "fp16", "--output", str(target)).code == 0
        assert keys(target / "README.md") == keys(run / "README.md")
        text = (target / "README.md").read_text()
        assert steps in text and "The weights are in fp16." in text and f"# {source.name}" in text


def test_a_resumed_run_exports_the_same_after_its_model_is_gone(run: Path, world: World, tmp_path: Path) -> None:
    from shutil import copytree

    gone = Path(json.loads((run / "plan.json").read_text())["model_folder"])
    copytree(gone, tmp_path / "model")
    words = [f"model.name={tmp_path / 'model'}", "training.max_steps=3", "checkpoint.save_every_steps=2"]
    assert world.train("carded-2", *words).code == 0
    again = world.folder / "carded-2"
    before = {path.name: sha256(path) for path in again.iterdir() if path.name in read_source_files(again).files}
    card = keys(again / "README.md")
    for path in (tmp_path / "model").iterdir():
        path.write_bytes(b"")
    (again / "model.safetensors").unlink()
    ended = world.train("carded-2", *words, "--resume")
    assert ended.code == 0, ended.err
    assert {name: sha256(again / name) for name in before} == before
    assert keys(again / "README.md") == card


@pytest.mark.parametrize("ours", [True, False])
def test_only_cards_of_ours_are_written_over(ours: bool, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"# Mine\n<!-- {WRITTEN_HERE} -->\n" if ours else "# Mine\n")
    write_card(tmp_path, Card("new", "", Origin(), ["Said."]))
    assert ("# new" in (tmp_path / "README.md").read_text()) is ours


ORIGINS = {
    "no card": (None, Origin()),
    "no keys": ("# A model\n", Origin()),
    "broken keys": ("---\nlicense: [\n---\n", Origin()),
    "keys that are no table": ("---\n- a\n---\n", Origin()),
    "a licence": ("---\nlicense: mit\n---\n", Origin(license="mit")),
    "several licences": ("---\nlicense: [mit, apache-2.0]\n---\n", Origin(license="mit, apache-2.0")),
    "windows": ("\ufeff---\r\nlicense: mit\r\nbase_model: a/b\r\n---\r\n", Origin(license="mit", base_model="a/b")),
    "a base that is a path": ("---\nbase_model: /home/me/model\n---\n", Origin()),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_what_a_folder_says_of_its_origin(case: str, tmp_path: Path) -> None:
    text, expected = ORIGINS[case]
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode())
    assert read_origin(tmp_path) == expected
