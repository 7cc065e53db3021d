"""Runs with frozen weights, and runs with noise on embeddings: what changes, what does not, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitsandbytes_here import NEEDS_BITSANDBYTES
from sophia_galore.config import load_config
from sophia_galore.errors import CheckpointError
from sophia_galore.train.callback import Callback
from sophia_galore.train.run import train
from unit.cli.tiny_run import World, command, json_lines, make_world, sha256

QUICK = ["training.max_steps=3", "training.probe_step=false", "memory.track_steps=0", "checkpoint.save_every_steps=2"]
LAST = 'training.trainable=["model.layers.2.*"]'


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


# Settings -> what begins the names of the weights that change; in a tied model the head is the embedding.
CASES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "the last layer": ([LAST], ("model.layers.2.",)),
    "a tied head": (['training.trainable=["lm_head.weight"]'], ("model.embed_tokens.",)),
    "unfrozen_parameters, sophia": (
        ['unfrozen_parameters=["*.1.mlp*"]', "optimizer.type=sophia"],
        ("model.layers.1.mlp.",),
    ),
    "clipped by the model, 8-bit state": (
        [LAST, "max_grad_norm=0.01", "optimizer.state_bits=8"],
        ("model.layers.2.",),
    ),
    "nothing but norms": (['training.trainable=["model.norm.weight"]', "optimizer.type=adamw"], ("model.norm.",)),
}


@pytest.mark.parametrize(("words", "changes"), CASES.values(), ids=CASES)
def test_frozen_weights_keep_their_bits(
    words: list[str], changes: tuple[str, ...], world: World, tmp_path: Path
) -> None:
    before = load_file(world.model / "model.safetensors")
    ended = world.train(str(tmp_path / "run"), *QUICK, *words)
    assert ended.code == 0, ended.err
    after = load_file(tmp_path / "run" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if name.startswith(changes)}
    assert changed == trained
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    share = sum(before[name].numel() for name in trained) / sum(weight.numel() for weight in before.values())
    assert plan["trained_fraction"] == pytest.approx(share)
    assert "of the parameters are trained" in ended.out and "100% of the parameters" not in ended.out
    assert "frozen: not in training.trainable" in {route["why"].split(";")[0] for route in plan["routes"]}
    state = load_file(tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in state} <= trained


def test_codes_of_frozen_weights_in_eight_bits_do_not_change(world: World, tmp_path: Path) -> None:
    ended = world.train(str(tmp_path / "run"), *QUICK, LAST, "load_in_8bit=true")
    assert ended.code == 0, ended.err
    assert command("export", str(world.model), "--to", "int8", "--output", str(tmp_path / "as it was")).code == 0
    files = [next(folder.glob("*int8*")) for folder in (tmp_path / "as it was", tmp_path / "run" / "checkpoint-2")]
    before, after = map(load_file, files)
    frozen = [name for name in before if not name.startswith("model.layers.2.")]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@NEEDS_BITSANDBYTES
def test_beside_layers_that_bitsandbytes_holds(world: World, tmp_path: Path) -> None:
    bnb = ["load_in_8bit=true", "quantization.backend=bitsandbytes"]
    ended = world.train(str(tmp_path / "run"), *QUICK, *bnb, 'training.trainable=["*layernorm*", "model.layers.2*"]')
    assert ended.code == 0, ended.err
    routes = json.loads((tmp_path / "run" / "plan.json").read_text())["routes"]
    assert {route["name"].rsplit(".", 2)[-2] for route in routes if route["trained"]} == {
        "input_layernorm",
        "post_attention_layernorm",
    }
    refused = world.train(str(tmp_path / "other"), *bnb, 'training.trainable=["*mlp*"]')
    assert refused.code == 2 and "'*mlp*' matches only weights that bitsandbytes holds" in refused.err


REFUSED = {
    'training.trainable=["model.layer.2*"]': "Did you mean model.layers.2.*?",
    'training.trainable=["*", "nothing*"]': "'nothing*' matches no weight",
    "training.trainable=[]": "no weight would be trained",
    "training.trainable=model.layers.2": "takes a list",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_would_do_nothing_is_refused(words: str, world: World, tmp_path: Path) -> None:
    ended = world.train(str(tmp_path / "run"), words)
    assert (ended.code, ended.out.count("Loading")) == (2, 0)
    assert REFUSED[words] in ended.err


NOISE = "neftune_noise_alpha=5"
BITS = {"noise": [NOISE], "frozen": [LAST], "both": [NOISE, LAST, "optimizer.galore.rule=sophia"]}


@pytest.mark.parametrize("words", BITS.values(), ids=BITS)
def test_a_resumed_run_comes_to_the_same_bits(words: list[str], world: World, tmp_path: Path) -> None:
    """Stopped after its second step: a run of three that goes on from its checkpoint."""

    def carry_out(folder: Path, **more: bool) -> str:
        config = load_config(world.config, [*QUICK, "memory.predict=false", f"training.output_dir={folder}", *words])
        train(config, Callback(), **more)
        return sha256(folder / "model.safetensors")

    whole = carry_out(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert carry_out(tmp_path / "run", resume=True) == whole
    assert json_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 3


CHANGED = {
    (NOISE, "training.neftune_alpha=6"): "training.neftune_alpha",
    (LAST, 'training.trainable=["model.layers.1.*"]'): "changed: training.trainable",
}


@pytest.mark.parametrize(("then", "now"), CHANGED)
def test_what_would_change_numbers_is_no_way_to_go_on(then: str, now: str, world: World, tmp_path: Path) -> None:
    settings = [*QUICK, "memory.predict=false", f"training.output_dir={tmp_path / 'run'}"]
    train(load_config(world.config, [*settings, then]), Callback())
    with pytest.raises(CheckpointError) as caught:
        train(load_config(world.config, [*settings, now]), Callback(), resume=True)
    assert CHANGED[then, now] in caught.value.cause


def test_other_words_for_the_same_weights_may_go_on(world: World, tmp_path: Path) -> None:
    settings = [*QUICK, "memory.predict=false", f"training.output_dir={tmp_path / 'run'}"]
    train(load_config(world.config, [*settings, LAST, "training.neftune_alpha=0"]), Callback())
    same = 'training.trainable=["*layers.2.mlp*", "*layers.2.self*", "*layers.2.*norm*"]'
    assert train(load_config(world.config, [*settings, same]), Callback(), resume=True).finished


def test_noise_is_in_training_only(world: World, tmp_path: Path) -> None:
    """The first evaluation is that of a run without, the first step's loss is not."""
    runs = []
    for name, words in {"noisy": ["training.neftune_alpha=20"], "plain": ["training.neftune_alpha=0"]}.items():
        assert world.train(str(tmp_path / name), "training.max_steps=1", *words).code == 0
        runs.append(json_lines(tmp_path / name / "metrics.jsonl"))
    (noisy_before, noisy_step, _), (plain_before, plain_step, _) = runs
    assert noisy_before["eval_loss"] == plain_before["eval_loss"]
    assert noisy_step["loss"] != plain_step["loss"]
