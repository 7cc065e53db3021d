"""Kept graphs in a run: the same bits, and memory that is seen."""

from __future__ import annotations

import json

import pytest

from unit.cli.tiny_run import World, json_lines, make_world, sha256


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("more", [[], ["quantization.load_in_8bit=true", "optimizer.galore.rule=sophia"]])
def test_a_run_with_kept_graphs_has_the_bits_of_one_without(world: World, more: list[str]) -> None:
    words = ["training.max_steps=3", "memory.track_steps=3", *more]
    ends = []
    for output, said in {
        "none": "engine.keep_layers=0",
        "some": "engine.keep_layers=2",
        "all": "gradient_checkpointing=false",
    }.items():
        ended = world.train(f"{output}-{len(more)}", said, *words)
        assert ended.code == 0, ended.err
        folder = world.folder / f"{output}-{len(more)}"
        losses = [entry.get("loss", entry.get("eval_loss")) for entry in json_lines(folder / "metrics.jsonl")]
        phases = json.loads((folder / "memory_report.json").read_text())["phases"]
        ends.append(((sha256(folder / "model.safetensors"), losses), phases["forward"]))
    assert ends[0][0] == ends[1][0] == ends[2][0]
    assert ends[0][1] < ends[1][1] < ends[2][1]
