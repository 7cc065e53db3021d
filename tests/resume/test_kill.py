"""A run that is killed and resumed in a new process ends with the same bits as one that was not."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from forked import run_forked
from other_models import write_other_model
from resume.crash_run import BESIDE, MOMENTS, crash_run
from tiny import write_tiny_data, write_tiny_model

# 22 records, one held out: 21 examples; steps of 2 x 2: 6 an epoch, the last of one example; 13 steps
# are two epochs and one. With a gap of 4 and 21 matrices some basis is refreshed at every step.
SETTINGS = [
    "training.max_steps=13",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.max_length=48",
    "training.learning_rate=0.01",
    "training.warmup_steps=2",
    "training.weight_decay=0.1",
    "optimizer.galore.rank=8",
    "optimizer.galore.update_proj_gap=4",
    "checkpoint.save_every_steps=2",
    "training.probe_step=false",
    "memory.track_steps=0",
    "memory.predict=false",
]
# What each kind adds: between them every rule's and every format's state goes to disk and comes back, and examples come
# in every arrangement.
KINDS: dict[str, list[str]] = {
    "galore": ["training.max_grad_norm=0.5", "training.probe_step=true", "memory.track_steps=1"],
    "galore, narrow": ["model.store=bf16", "optimizer.state_bits=8", "optimizer.galore.projection_bits=4"],
    "galore, fira": [
        "model.store=bf16",
        "optimizer.state_bits=16",
        "optimizer.galore.residual=fira",
        "optimizer.galore.adaptive_gap=true",
        "training.max_grad_norm=0.5",
    ],
    "galore, sophia": ["optimizer.galore.rule=sophia", "optimizer.sophia.curvature_every=3"],
    "galore, published": [
        "optimizer.galore.subspace=svd",
        "optimizer.galore.moment_transport=false",
        "optimizer.galore.rule=adafactor",
    ],
    "int8": ["quantization.load_in_8bit=true", "quantization.block_size=32", "optimizer.state_bits=8"],
    "int8, folded late": [
        "quantization.load_in_8bit=true",
        "quantization.fold=refresh",
        "optimizer.galore.projection_bits=4",
        "model.store=bf16",
    ],
    "bitsandbytes": ["quantization.load_in_8bit=true", "quantization.backend=bitsandbytes"],
    "apollo": ["optimizer.type=apollo", "optimizer.apollo.rank=8", "optimizer.apollo.update_proj_gap=4"],
    "scale": ["optimizer.type=scale", "optimizer.state_bits=8", "data.group_by_length=true"],
    "adamw": ["optimizer.type=adamw", "training.max_grad_norm=0.5"],
    "adamw, bf16": ["optimizer.type=adamw", "model.store=bf16", "optimizer.state_bits=8", "data.packing=true"],
    "a mixture of experts": ["model.name={world}/mixture", "quantization.load_in_8bit=true"],
    "layers with a state": ["model.name={world}/hybrid", "data.packing=true"],
    "the language half": ["model.name={world}/seeing", "model.store=bf16"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model", attention_dropout=0.1)
    write_other_model(folder / "mixture", "qwen3_moe")
    write_other_model(folder / "seeing", "gemma3")
    write_tiny_model(folder / "hybrid", "lfm2")
    write_tiny_data(folder / "data.json")
    (folder / "config.yaml").write_text(
        f"model: {{name: {folder / 'model'}}}\ndata: {{train: {folder / 'data.json'}}}\n"
    )
    return folder


# This run is killed and resumed in new interpreters; all others are copies of this process, which takes a third of the
# time.
NEW_INTERPRETERS = "killed-adamw-after the rename"


def run(world: Path, output: str, kind: str, *more: str, moment: str = "never", count: int = 0) -> int:
    """One process; returns its exit code, negative if it died by a signal."""
    own = [word.format(world=world) for word in KINDS[kind]]
    arguments = ["train", "--config", str(world / "config.yaml"), *SETTINGS, *own, *more]
    arguments.append(f"training.output_dir={world / output}")
    log = world / f"{output}.log"
    if output == NEW_INTERPRETERS:
        script = Path(__file__).with_name("crash_run.py")
        with log.open("a") as file:
            words = [sys.executable, str(script), moment, str(count), *arguments]
            code = subprocess.run(words, stdout=file, stderr=file).returncode
    else:
        code = run_forked(lambda: crash_run(moment, count, arguments), log)
    assert code in (0, -signal.SIGKILL), log.read_text()
    return code


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(world: Path) -> Callable[[str], str]:
    """The digest of a whole run of a kind."""

    @cache
    def digest(kind: str) -> str:
        assert run(world, f"whole-{kind}", kind) == 0
        return sha256(world / f"whole-{kind}" / "model.safetensors")

    return digest


# Moments inside the run and how often they are passed before death. A step passes 29 weights: 160 is in the
# last, incomplete window of the first epoch, 365 in the last step. A checkpoint has about 12 files: 30 is in the third.
DEATHS = [
    ("galore", "at a refresh", 60),
    ("galore", "before the rename", 3),
    ("galore, narrow", "at a weight", 160),
    ("galore, narrow", "while saving", 30),
    ("galore, fira", "at a refresh", 70),
    ("galore, fira", "after a step", 9),
    ("galore, sophia", "at a curvature", 100),
    ("galore, published", "at a weight", 290),
    ("int8", "at a weight", 160),
    ("int8, folded late", "at a weight", 290),
    ("int8, folded late", "before the rename", 3),
    ("bitsandbytes", "after a step", 9),
    ("apollo", "after a step", 9),
    ("scale", "at a weight", 160),
    ("adamw", "after a step", 7),
    ("adamw", "after the rename", 5),
    ("adamw, bf16", "at a weight", 365),
    ("a mixture of experts", "at a weight", 290),
    ("layers with a state", "at a refresh", 60),
    ("the language half", "while saving", 30),
    ("int8", "beside: while saving", 30),
    ("galore, fira", "beside: before the rename", 3),
    ("adamw, bf16", "beside: after the rename", 5),
    ("galore", "beside: at a weight", 290),
]


# In the default run each kind dies once, and each moment is somebody's last.
AGAIN = (
    ("galore", "at a refresh", 60),
    ("galore, narrow", "at a weight", 160),
    ("int8, folded late", "at a weight", 290),
    ("adamw", "after a step", 7),
)


def test_each_kind_dies_at_least_once_and_at_each_moment_something_does() -> None:
    once = [death for death in DEATHS if death not in AGAIN]
    assert {kind for kind, _, _ in once} == set(KINDS)
    assert {moment.removeprefix(BESIDE) for _, moment, _ in once} == set(MOMENTS)
    assert set(AGAIN) <= set(DEATHS) and ("adamw", "after the rename", 5) in once


@pytest.mark.parametrize(
    ("kind", "moment", "count"),
    [
        pytest.param(*death, id="-".join(map(str, death)), marks=[pytest.mark.thorough] if death in AGAIN else [])
        for death in DEATHS
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    world: Path, uninterrupted: Callable[[str], str], kind: str, moment: str, count: int
) -> None:
    output = f"killed-{kind}-{moment}"
    assert run(world, output, kind, moment=moment, count=count) == -signal.SIGKILL
    assert not (world / output / "model.safetensors").exists()
    assert run(world, output, kind, "--resume") == 0
    assert sha256(world / output / "model.safetensors") == uninterrupted(kind)
    lines = [json.loads(line) for line in (world / output / "metrics.jsonl").read_text().splitlines()]
    whole = (world / f"whole-{kind}" / "metrics.jsonl").read_text().splitlines()
    numbers = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss")
    expected = [{key: line.get(key) for key in numbers} for line in map(json.loads, whole)]
    assert [{key: line.get(key) for key in numbers} for line in lines] == expected


def test_killed_twice(world: Path, uninterrupted: Callable[[str], str]) -> None:
    kind = "galore, narrow"
    assert run(world, "twice", kind, moment="after a step", count=4) == -signal.SIGKILL
    assert run(world, "twice", kind, "--resume", moment="at a refresh", count=9) == -signal.SIGKILL
    assert run(world, "twice", kind, "--resume") == 0
    assert sha256(world / "twice" / "model.safetensors") == uninterrupted(kind)


def test_same_config_same_bits(world: Path, uninterrupted: Callable[[str], str]) -> None:
    kind = "galore, narrow"
    assert run(world, "again", kind) == 0
    assert sha256(world / "again" / "model.safetensors") == uninterrupted(kind)


@pytest.mark.thorough
def test_another_seed_other_bits(world: Path, uninterrupted: Callable[[str], str]) -> None:
    kind = "galore, narrow"
    assert run(world, "seed", kind, "training.seed=7") == 0
    assert sha256(world / "seed" / "model.safetensors") != uninterrupted(kind)
