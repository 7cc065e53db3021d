"""Weights in int8 train in every family that is supported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sophia_galore.config import load_config
from sophia_galore.records.files import METRICS
from sophia_galore.train.callback import Callback
from sophia_galore.train.run import train
from tiny import FAMILIES, more_families, write_tiny_data, write_tiny_model

NUM_STEPS = 16
# Texts of a few words, which tiny models learn by heart. Smallest share of all families: 0.989.
SHARE = 0.95


@pytest.mark.parametrize(
    "family", [*(pytest.param(family, marks=pytest.mark.thorough) for family in FAMILIES), *more_families()]
)
def test_the_loss_falls_as_with_fp32(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", family)
    write_tiny_data(tmp_path / "data.json")
    fp32, int8 = (
        fall_of(tmp_path, store, words)
        for store, words in (("fp32", []), ("int8", ["quantization.enabled=true", "quantization.block_size=32"]))
    )
    assert fp32 > 0
    assert int8 > SHARE * fp32


def fall_of(folder: Path, store: str, words: list[str]) -> float:
    """By how much the loss falls from the first to the last step, in nats."""
    settings = [
        f"model.name={folder / 'model'}",
        f"data.train={folder / 'data.json'}",
        f"training.output_dir={folder / store}",
        f"training.max_steps={NUM_STEPS}",
        "training.max_length=40",
        "training.learning_rate=0.02",
        "training.sample_questions=[]",
        "training.probe_step=false",
        "data.eval_fraction=0.2",
        "optimizer.galore.rank=8",
        "memory.predict=false",
        "memory.track_steps=0",
    ]
    train(load_config(None, [*settings, *words]), Callback())
    lines = map(json.loads, (folder / store / METRICS).read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == NUM_STEPS
    return losses[0] - losses[-1]
