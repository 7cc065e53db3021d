"""Runs in eight bits through the command line: everything is trained, and goes on in other formats."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitsandbytes_here import NEEDS_BITSANDBYTES
from engines import open_store
from sophia_galore.records.files import INT8_FILE
from sophia_galore.weights.int8 import Int8Format, quantise
from sophia_galore.weights.saved import read_weights
from unit.cli.tiny_run import World, command, json_lines, sha256

INT8 = ["quantization.enabled=true", "quantization.load_in_8bit=true", "quantization.block_size=32"]
LATE = [*INT8, "quantization.fold=refresh", "optimizer.galore.rank=8", "optimizer.galore.update_proj_gap=3"]
STEPS = ["training.max_steps=6", "training.learning_rate=0.01", "checkpoint.save_every_steps=3"]
CPU = torch.device("cpu")


FORMATS = {"int8": INT8, "late": LATE, "fp32": []}


@pytest.fixture(scope="module")
def trained(world: World) -> Callable[[str], Path]:
    """A finished run by its format, with checkpoints of steps 3 and 6. Tests read it and write beside it."""

    @cache
    def of(name: str) -> Path:
        ended = world.train(f"from-{name}", *FORMATS[name], *STEPS)
        assert ended.code == 0, ended.err
        assert name == "fp32" or ("int8" in ended.out and "100% of the parameters are trained" in ended.out)
        return world.folder / f"from-{name}"

    return of


@pytest.fixture(scope="module")
def run(trained: Callable[[str], Path]) -> Path:
    """A run in eight bits."""
    return trained("int8")


@pytest.mark.parametrize("name", ["int8", "late"], ids=["each step", "folded late"])
def test_every_tensor_moves_and_no_code_is_frozen(name: str, trained: Callable[[str], Path], world: World) -> None:
    """After six steps at a high rate each tensor has changed, and there is no block all of whose codes are the old."""
    begun = {name: weight for _, name, weight in read_weights(world.folder / "model")}
    store = open_store(trained(name) / "checkpoint-6", CPU)
    packed: dict[str, Any] = {key: weight.settled for key, weight in store.items() if weight.is_packed}
    assert packed.keys() == {name for name, weight in begun.items() if len(weight.shape) == 2}
    for name, weight in packed.items():
        before = quantise(begun[name].values(torch.float32), Int8Format(32))
        same = (weight.codes == before.codes).float()
        assert float(same.mean()) <= 0.7, name  # worst seen 0.51
        blocks = same[:, : same.shape[1] // 32 * 32].unflatten(1, (-1, 32)).mean(2)
        # Of the embedding, rows of tokens that do not occur are moved by the head's gradient alone, a little.
        assert float((blocks == 1).float().mean()) <= (0.05 if "embed" in name else 0), name
    for name, weight in store.items():
        assert not torch.equal(weight.values(torch.float32), begun[name].values(torch.float32)), name


def test_the_final_model_is_ordinary_and_bf16(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.dtype == torch.bfloat16
    last = open_store(run / "checkpoint-6", CPU)
    written = load_file(run / "model.safetensors")
    for name, weight in last.items():
        assert torch.equal(written[name], weight.values(torch.bfloat16)), name
    assert not (run / INT8_FILE).exists()


def test_the_losses_are_near_those_of_fp32(trained: Callable[[str], Path]) -> None:
    """A tiny model, six steps: the formats differ by less than the steps do."""
    losses = [
        [line["eval_loss"] for line in json_lines(folder / "metrics.jsonl") if "eval_loss" in line]
        for folder in (trained("int8"), trained("fp32"))
    ]
    moved = abs(losses[1][0] - losses[1][-1])
    assert all(abs(one - other) <= 0.1 * moved for one, other in zip(*losses, strict=True))  # worst seen 2 %


@pytest.mark.parametrize("name", ["int8", "late"])
def test_resumed_in_the_middle_it_ends_with_the_same_bits(
    name: str, trained: Callable[[str], Path], world: World
) -> None:
    whole = trained(name)
    ended = world.train(f"again-{name}", f"--resume={whole / 'checkpoint-3'}", *FORMATS[name], *STEPS)
    assert ended.code == 0, ended.err
    assert sha256(world.folder / f"again-{name}" / "model.safetensors") == sha256(whole / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "form"),
    [([], "fp32"), (["model.store=bf16"], "bf16"), ([*INT8[:2], "quantization.block_size=16"], "")],
    ids=["to fp32", "to bf16", "to other blocks"],
)
def test_another_format_is_refused_with_the_way_to_convert(
    words: list[str], form: str, run: Path, world: World
) -> None:
    ended = world.train("refused", f"--resume={run / 'checkpoint-3'}", *words, *STEPS)
    assert ended.code == 2 and "going on would change numbers" in ended.err
    if form:
        assert f"sophia-galore export {run / 'checkpoint-3'} --to {form}" in ended.err
    assert not (world.folder / "refused").exists()


@pytest.mark.parametrize("source", ["int8", "late", "fp32"])
@pytest.mark.parametrize("to", ["int8", "bf16", "fp32"])
def test_a_converted_checkpoint_goes_on(
    source: str, to: str, trained: Callable[[str], Path], world: World, tmp_path: Path
) -> None:
    """By the words that the command itself prints."""
    words, checkpoint = FORMATS[source], trained(source) / "checkpoint-3"
    ended = command("export", str(checkpoint), "--to", to, "--output", str(tmp_path / "out"))
    assert ended.code == 0, ended.err
    told = shlex.split(ended.out.strip().splitlines()[-1].partition(" and: ")[2])
    gone_on = world.train(f"on-{source}-{to}", *words, *STEPS, *told)
    assert gone_on.code == 0, gone_on.err
    assert [
        line["step"] for line in json_lines(world.folder / f"on-{source}-{to}" / "metrics.jsonl") if "loss" in line
    ] == [
        4,
        5,
        6,
    ]
    state = load_file(tmp_path / "out" / "optimizer.safetensors")
    kept = {key: value for key, value in load_file(checkpoint / "optimizer.safetensors").items() if key in state}
    assert all(torch.equal(kept[key], value) for key, value in state.items())


def test_the_advice_of_a_refusal_can_be_followed_to_the_letter(
    trained: Callable[[str], Path], world: World, tmp_path: Path
) -> None:
    """With the words that were refused, and other ones for the same thing."""
    checkpoint = trained("fp32") / "checkpoint-3"
    asked = ["quantization.load_in_8bit=true", "quantization.block_size=16"]
    refused = world.train("goes-on", f"--resume={checkpoint}", *asked, *STEPS)
    assert refused.code == 2
    told = refused.err.partition("To go on in the other format: sophia-galore ")[2].partition(", then")[0]
    assert command(*told.replace("FOLDER", str(tmp_path / "out")).split()).code == 0
    for words in (asked, ["quantization.enabled=true", asked[1]]):
        ended = world.train("goes-on", f"--resume={tmp_path / 'out'}", *words, *STEPS)
        assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    "words",
    [["quantization.rounding=nearest"], ["quantization.skip=[model.embed_tokens.*]"], LATE[3:]],
    ids=["nearest", "skip", "late"],
)
def test_no_advice_where_there_is_no_way(words: list[str], run: Path, world: World) -> None:
    ended = world.train("refused", f"--resume={run / 'checkpoint-3'}", *INT8, *words, *STEPS)
    assert ended.code == 2 and "export" not in ended.err


def test_a_model_is_converted_and_answers(run: Path, tmp_path: Path) -> None:
    for source, to in ((run, "int8"), (tmp_path / "int8", "fp16")):
        ended = command("export", str(source), "--to", to, "--output", str(tmp_path / to))
        assert ended.code == 0, ended.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fp16").dtype == torch.float16
    assert command("generate", str(tmp_path / "int8"), "what", "--max-new-tokens", "3").code == 0


def test_export_refuses_to_write_over_something(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    ended = command("export", str(run), "--to", "bf16", "--output", str(tmp_path / "full"))
    assert ended.code == 2 and "exists already" in ended.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_export_says_what_does_not_fit(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = {
        "exists already": ["--to", "bf16", "--output", "."],
        "too long": ["--to", "bf16", "--output", "x" * 300],
        "block-size": ["--to", "int8", "--output", "y", "--block-size", "1000000000"],
    }
    for words, arguments in cases.items():
        ended = command("export", str(run), *arguments)
        assert ended.code == 2 and words in ended.err, ended.err
    assert not list(tmp_path.iterdir())


def test_export_refuses_what_the_format_can_not_hold(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "large", ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = load_file(run / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e30
    save_file(tensors, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    ended = command("export", str(tmp_path / "large"), "--to", "fp16", "--output", str(tmp_path / "out"))
    assert ended.code == 2 and "model.norm.weight" in ended.err and "not finite" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


@pytest.mark.parametrize("skip", ["['']", "['', nothing]", "[model.embed_tokens.*, nothing]"])
def test_a_pattern_that_keeps_nothing_out_is_refused(skip: str, world: World) -> None:
    ended = world.train("refused", *INT8, f"quantization.skip={skip}")
    assert ended.code == 2 and "matches no weight" in ended.err


def test_patterns_keep_weights_out(world: World) -> None:
    ended = world.train("skips", *INT8, "quantization.skip=[model.embed_tokens.*]", "training.max_steps=1")
    assert ended.code == 0, ended.err
    plan = json.loads((world.folder / "skips" / "plan.json").read_text(encoding="utf-8"))
    formats = {route["name"]: route["format"] for route in plan["routes"]}
    assert formats["model.embed_tokens.weight"] == "fp32"
    assert formats["model.layers.0.mlp.up_proj.weight"] == "int8"


@NEEDS_BITSANDBYTES
def test_with_bitsandbytes_the_share_is_said(world: World) -> None:
    words = [*INT8[:2], "quantization.backend=bitsandbytes", *STEPS]
    ended = world.train("frozen", *words)
    assert ended.code == 0, ended.err
    plan = json.loads((world.folder / "frozen" / "plan.json").read_text(encoding="utf-8"))
    share = plan["num_trained_parameters"] / plan["num_parameters"]
    # Rounded down to a tenth.
    assert 0 < share < 1 and f"{math.floor(1000 * share) / 10:g}% of the parameters are trained" in ended.out
    assert AutoModelForCausalLM.from_pretrained(world.folder / "frozen").dtype == torch.bfloat16
