"""A mixture of experts and the language part of a model that sees, through the command line, with a break."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from other_models import differing, other_model, tensors_in, write_other_model
from sophia_galore.records.metrics import read_metrics
from unit.cli.tiny_run import World, command

WORDS = ("training.max_steps=2", "model.store=fp32", "checkpoint.save_every_steps=1", "training.epochs=1")


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3"])
def test_it_is_trained_and_resumed_and_written_as_the_source_is(name: str, world: World, tmp_path: Path) -> None:
    source = write_other_model(tmp_path / "source", name)
    words = (*WORDS, f"model.name={source}")
    whole, parts = (world.folder / f"{name}-{each}" for each in ("whole", "parts"))
    # With the probe step, in which some experts get no token.
    assert (ended := world.train(whole.name, *words, "training.probe_step=true")).code == 0, ended.err
    resumed = world.train(parts.name, *words, f"--resume={whole / 'checkpoint-1'}")
    assert resumed.code == 0, resumed.err
    assert not differing(whole, parts)
    before, after = tensors_in(source), tensors_in(whole)
    assert {key: tensor.shape for key, tensor in before.items()} == {key: tensor.shape for key, tensor in after.items()}
    changed = {key for key in before if not torch.equal(before[key].float(), after[key].float())}
    assert changed
    assert not [key for key in changed if "vision" in key or "projector" in key]
    kind = type(other_model(name))
    again = kind.from_pretrained(whole)
    assert isinstance(again, transformers.PreTrainedModel)
    checkpoint = command("export", str(whole / "checkpoint-2"), "--to", "fp32", "--output", str(tmp_path / "exported"))
    assert checkpoint.code == 0, checkpoint.err
    assert not differing(whole, tmp_path / "exported")
    experts = [line.tokens_per_expert for line in read_metrics(whole).train]
    assert all(bool(each) == (name == "qwen3_moe") for each in experts)
