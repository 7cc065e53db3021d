"""A run with quantization.backend: bitsandbytes: resumed to the byte, and an ordinary model at its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bitsandbytes_here import NEEDS_BITSANDBYTES
from sophia_galore.config import load_config
from sophia_galore.records.files import INT8_FILE
from sophia_galore.train.callback import Callback
from sophia_galore.train.result import RunResult
from sophia_galore.train.run import train
from unit.cli.tiny_run import World, make_world

pytestmark = NEEDS_BITSANDBYTES


def run(world: World, folder: Path, resume_from: Path | None = None) -> RunResult:
    words = [
        "optimizer.type=adamw",
        "quantization.enabled=true",
        "quantization.backend=bitsandbytes",
        "training.max_steps=4",
        "checkpoint.save_every_steps=2",
        f"training.output_dir={folder}",
    ]
    return train(load_config(world.config, words), Callback(), resume=resume_from is not None, resume_from=resume_from)


def test_a_run_and_its_resumption_end_in_the_same_bytes(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    straight, other = tmp_path / "straight", tmp_path / "other"
    losses = run(world, straight).evaluations
    shutil.copytree(straight, other)
    (other / "model.safetensors").unlink()
    assert (other / "checkpoint-2" / INT8_FILE).is_file()
    assert run(world, other, other / "checkpoint-2").evaluations == losses
    assert losses[-1].loss < losses[0].loss
    assert (other / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(straight).dtype == torch.bfloat16
    routes = json.loads((straight / "plan.json").read_text())["routes"]
    frozen = [route["name"] for route in routes if route["format"] == "bnb8"]
    assert len(frozen) == 21 and all(".layers." in name for name in frozen)
