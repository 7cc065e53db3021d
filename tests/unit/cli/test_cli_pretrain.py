"""Pre-training: random weights and a corpus of plain text, from a folder that holds no weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unit.cli.tiny_run import Ended, World, command, json_lines, sha256

Run = Callable[..., Ended]
WORDS = ("model.init=random", "training.max_length=32", "training.max_steps=4", "training.warmup_steps=0")


@pytest.fixture(scope="module")
def plan(world: World) -> Path:
    """A folder with config.json and a tokenizer, and no weights."""
    folder = world.folder / "plan of a model"
    shutil.copytree(world.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def corpus(world: World) -> Path:
    draw = random.Random(0)
    words = ["river", "stone", "light", "under", "seven", "green"]
    path = world.folder / "corpus.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(200)))
    return path


@pytest.fixture(scope="module")
def pretrain(world: World, plan: Path, corpus: Path) -> Run:
    def run(output: str, *words: str) -> Ended:
        cache = f"model.cache_dir={world.folder / 'cache'}"
        return world.train(output, f"model.name={plan}", f"data.train={corpus}", cache, *WORDS, *words)

    return run


def test_a_model_is_trained_from_nothing(pretrain: Run, world: World) -> None:
    ended = pretrain("pretrained", "training.learning_rate=0.01", "checkpoint.save_every_steps=2")
    assert ended.code == 0, ended.err
    said = json.loads((world.folder / "pretrained" / "plan.json").read_text())
    assert said["model_source"] == "random weights"
    lines = json_lines(world.folder / "pretrained" / "metrics.jsonl")
    evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
    # Of as many tokens as the vocabulary has, a new model finds each about as likely as any other.
    vocabulary = json.loads((world.model / "config.json").read_text())["vocab_size"]
    assert evals[0] == pytest.approx(torch.tensor(float(vocabulary)).log().item(), abs=0.3)
    assert evals[-1] < evals[0] - 0.3
    answered = command("generate", str(world.folder / "pretrained"), "river", "--max-new-tokens", "3")
    assert answered.code == 0, answered.err


def test_it_resumes_to_the_same_bits(pretrain: Run, world: World) -> None:
    whole, half = ("whole", "half")
    every = ("checkpoint.save_every_steps=2", "training.learning_rate=0.01")
    assert pretrain(whole, *every).code == 0
    assert pretrain(half, *every).code == 0
    shutil.rmtree(world.folder / half / "checkpoint-4")
    shutil.rmtree(world.folder / "cache" / "tokens")
    assert pretrain(half, *every, "--resume").code == 0
    assert sha256(world.folder / half / "model.safetensors") == sha256(world.folder / whole / "model.safetensors")


def test_weights_are_a_function_of_the_seed_and_made_once(pretrain: Run, world: World) -> None:
    cache = world.folder / "cache"
    for seed, name in ((5, "a"), (5, "b"), (6, "c")):
        assert pretrain(name, f"training.seed={seed}", "training.max_steps=1").code == 0
    made = {json.loads((f / "sophia_galore_model.json").read_text())["revision"]: f for f in cache.glob("random-*")}
    assert {"5", "6"} <= made.keys()
    five, six = (load_file(made[seed] / "model.safetensors") for seed in ("5", "6"))
    assert five.keys() == six.keys() and not any(
        torch.equal(five[name], six[name]) for name in five if five[name].dim() == 2
    )
    assert sha256(world.folder / "a" / "model.safetensors") == sha256(world.folder / "b" / "model.safetensors")
    assert sha256(world.folder / "a" / "model.safetensors") != sha256(world.folder / "c" / "model.safetensors")


def test_without_it_weights_are_missed(world: World, plan: Path) -> None:
    ended = world.train("none", f"model.name={plan}")
    assert ended.code == 2 and "holds no *.safetensors file" in ended.err
    assert "model.init" in ended.err


def test_a_folder_without_a_plan_of_a_model(world: World, tmp_path: Path) -> None:
    ended = world.train("none", f"model.name={tmp_path}", "model.init=random")
    assert ended.code == 2 and "config.json" in ended.err and "Traceback" not in ended.err
