"""What may change between a run and its continuation: nothing that changes a number."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.config import load_config
from sophia_galore.errors import CheckpointError
from sophia_galore.plan.facts import BitsandbytesFacts
from sophia_galore.train import prepare as preparing
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import Checkpoint, find_checkpoint
from sophia_galore.train.prepare import prepare
from sophia_galore.train.resume import refuse_difference
from sophia_galore.train.run import train
from tiny import write_tiny_data
from unit.cli.tiny_run import World, make_world, sha256

FIRST = ["checkpoint.save_every_steps=2", "memory.track_steps=0", "memory.predict=false", "training.max_steps=3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def carry_out(world: World, output: str, *words: str, resume: bool = False) -> str:
    """A run of three steps that saves after the second; returns the final model's digest."""
    folder = world.folder / output
    config = load_config(world.config, [*FIRST, f"training.output_dir={folder}", *words])
    assert train(config, Callback(), resume=resume).finished
    return sha256(folder / "model.safetensors")


@pytest.fixture(scope="module")
def saved(world: World) -> dict[str, Checkpoint]:
    """A checkpoint at step 2 by the run's schedule."""
    schedules = ("cosine", "constant")
    for name in schedules:
        carry_out(world, name, f"training.lr_scheduler_type={name}")
    return {name: find_checkpoint(world.folder / name, None) for name in schedules}


def compare(world: World, checkpoint: Checkpoint, schedule: str, *words: str) -> None:
    """What a resumed run does before it loads a weight."""
    config = load_config(world.config, [*FIRST, f"training.lr_scheduler_type={schedule}", *words])
    refuse_difference(checkpoint, config, prepare(config, Callback(), checkpoint).plan)


REFUSED: list[tuple[list[str], str]] = [
    (["training.seed=7"], "training.seed: 42 then, 7 now"),
    (["training.batch_size=4"], "training.batch_size: 2 then, 4 now"),
    (["training.gradient_accumulation_steps=4"], "training.gradient_accumulation_steps"),
    (["training.lr_scheduler_type=linear"], "training.lr_scheduler_type: cosine then, linear now"),
    (["training.warmup_steps=1"], "training.warmup_steps"),
    (["training.weight_decay=0.1"], "training.weight_decay"),
    (["training.max_grad_norm=1"], "training.max_grad_norm"),
    (["training.max_length=63"], "training.max_length"),
    (["training.learning_rate=0.02"], "learning_rate: 0.01 then, 0.02 now"),
    (["training.max_steps=4"], "num_steps: 3 then, 4 now"),
    (["training.max_steps=0"], "num_steps: 3 then, 10 now"),
    (["training.compute_dtype=bf16"], "compute_dtype: float32 then, bfloat16 now"),
    (["optimizer.betas=[0.9,0.99]"], "routing of parameters"),
    (["optimizer.eps=1e-6"], "routing of parameters"),
    (["optimizer.type=adamw"], "optimizer: galore then, adamw now"),
    (["optimizer.galore.rank=4"], "routing of parameters"),
    (["optimizer.galore.update_proj_gap=4"], "routing of parameters"),
    (["optimizer.galore.stagger=false"], "routing of parameters"),
    (["optimizer.galore.subspace=svd"], "routing of parameters"),
    (["optimizer.galore.rule=muon"], "routing of parameters"),
    (["optimizer.galore.rule=sophia"], "curvature_every: 0 then, 10 now"),
    (["optimizer.galore.residual=fira"], "routing of parameters"),
    (["optimizer.galore.moment_transport=false"], "routing of parameters"),
    (["optimizer.galore.projection_bits=4"], "routing of parameters"),
    (["optimizer.galore.adaptive_gap=true"], "routing of parameters"),
    (["optimizer.galore.fast_path=never"], "routing of parameters"),
    (["optimizer.state_bits=8"], "routing of parameters"),
    (["memory.logits_chunk_mib=1"], "memory.logits_chunk_mib"),
    (["optimizer.galore.scale=0.5"], "dense_learning_rate"),
    (["optimizer.galore.dense_learning_rate=0.1"], "dense_learning_rate"),
    (["model.name=some/other"], "model.name"),
    (["model.store=bf16"], "model.store: fp32 then, bf16 now"),
    (["data.eval_fraction=0.1"], "num_train_examples"),
    (["data.max_train_examples=17"], "num_train_examples"),
    (["data.packing=true"], "arrangement of the examples (data.packing, data.group_by_length): shuffled then, packed"),
    (["data.group_by_length=true"], "arrangement of the examples (data.packing, data.group_by_length): shuffled"),
]


@pytest.mark.parametrize(("words", "named"), REFUSED, ids=[words[0] for words, _ in REFUSED])
def test_what_changes_numbers_is_refused_by_name(
    words: list[str], named: str, world: World, saved: dict[str, Checkpoint]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        compare(world, saved["cosine"], "cosine", *words)
    assert named in caught.value.cause, caught.value.cause
    assert str(saved["cosine"].folder) in caught.value.cause
    key = words[0].partition("=")[0]
    assert key in caught.value.cause, caught.value.cause
    assert "run_config.yaml" in caught.value.remedy


ROUTES: list[tuple[list[str], str]] = [
    (["optimizer.galore.rank=4"], "model.embed_tokens.weight, rank: 8 then, 4 now"),
    (["optimizer.galore.update_proj_gap=4"], "model.embed_tokens.weight, subspace.gap: 3 then, 4 now"),
    (["optimizer.betas=[0.9,0.99]"], "model.embed_tokens.weight, hyper.beta2: 0.999 then, 0.99 now"),
    (["optimizer.state_bits=8"], "model.embed_tokens.weight, state_bits: 32 then, 8 now"),
    (["optimizer.galore.residual=fira"], "model.embed_tokens.weight, subspace.residual: none then, fira now"),
]


@pytest.mark.parametrize(("words", "named"), ROUTES, ids=[words[0] for words, _ in ROUTES])
def test_the_first_parameter_and_field_that_differ_are_named(
    words: list[str], named: str, world: World, saved: dict[str, Checkpoint]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        compare(world, saved["cosine"], "cosine", *words)
    assert named in caught.value.cause, caught.value.cause
    assert "export" not in caught.value.remedy, "the format of the weights is the same"


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (["model.store=bf16"], "bf16"),
        (["quantization.load_in_8bit=true"], "int8 --block-size 128"),
        (["quantization.load_in_8bit=true", "quantization.backend=bitsandbytes"], "fp32"),
    ],
)
def test_another_format_of_the_weights_comes_with_the_way_there(
    words: list[str], form: str, world: World, saved: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "detect_bitsandbytes", lambda device: BitsandbytesFacts("0.50.2"))
    with pytest.raises(CheckpointError) as caught:
        compare(world, saved["cosine"], "cosine", *words)
    folder = saved["cosine"].folder
    assert f"sophia-galore export {folder} --to {form} --output FOLDER" in caught.value.remedy
    assert ("model.name=FOLDER" if "bitsandbytes" in words[-1] else "--resume=FOLDER") in caught.value.remedy


def test_other_words_for_the_same_route_are_no_difference(world: World, saved: dict[str, Checkpoint]) -> None:
    """Reasons may be worded anew, and versions before them wrote no verdicts."""
    old = {key: value for key, value in saved["cosine"].plan.items() if key not in ("verdicts", "trained_fraction")}
    old["routes"] = [{**route, "why": "for other reasons"} for route in old["routes"]]
    for route in old["routes"]:
        del route["because"]
    compare(world, replace(saved["cosine"], plan=old), "cosine")


def test_a_plan_of_version_02_says_less_and_is_no_difference(world: World, saved: dict[str, Checkpoint]) -> None:
    """It had no eight-bit weights: neither their bytes nor when updates are folded in."""
    old = {key: value for key, value in saved["cosine"].plan.items() if key not in ("verdicts", "trained_fraction")}
    new = ("weight_bytes", "because")
    old["routes"] = [{key: value for key, value in route.items() if key not in new} for route in old["routes"]]
    for route in old["routes"]:
        if route["subspace"]:
            route["subspace"] = {key: value for key, value in route["subspace"].items() if key != "folds_late"}
    compare(world, replace(saved["cosine"], plan=old), "cosine")


def test_a_plan_of_version_05_knew_no_packing_and_is_no_difference(world: World, saved: dict[str, Checkpoint]) -> None:
    new = ("arrangement", "num_rows", "fill", "fill_shuffled")
    old = replace(saved["cosine"], plan={key: value for key, value in saved["cosine"].plan.items() if key not in new})
    compare(world, old, "cosine")
    with pytest.raises(CheckpointError, match="shuffled then, packed now"):
        compare(world, old, "cosine", "data.packing=true")


def test_what_eight_bits_would_be_like_is_of_no_effect_without_them(world: World, saved: dict[str, Checkpoint]) -> None:
    """Checkpoints of versions that had no eight-bit weights can be resumed."""
    before = {key: value for key, value in saved["cosine"].config.items() if not key.startswith("quantization.")}
    assert before.keys() != saved["cosine"].config.keys()
    compare(world, replace(saved["cosine"], config=before), "cosine", "quantization.block_size=64")


ALLOWED: list[list[str]] = [
    [],
    ["training.output_dir=elsewhere"],
    ["checkpoint.save_every_steps=1"],
    ["checkpoint.save_every_minutes=3"],
    ["checkpoint.keep_last=7"],
    ["engine.keep_layers=2"],
    ["training.gradient_checkpointing=false"],
    ["training.logging_steps=5"],
    ["training.eval_every_steps=1"],
    ['training.sample_questions=["what"]'],
    ["training.sample_max_new_tokens=3"],
    ["memory.track_steps=2"],
    ["export.dtype=bf16"],
    ["model.cache_dir=elsewhere"],
    ["data.format=alpaca"],
    ["training.device=cpu"],
    ["training.compute_dtype=fp32"],
    ["training.epochs=9"],  # max_steps decides
]


@pytest.mark.parametrize("words", ALLOWED, ids=[(words or ["nothing"])[0] for words in ALLOWED])
def test_what_changes_no_number_is_allowed(words: list[str], world: World, saved: dict[str, Checkpoint]) -> None:
    compare(world, saved["cosine"], "cosine", *words)


@pytest.mark.parametrize("words", [["training.max_steps=4"], ["training.max_steps=0"], ["training.max_steps=2"]])
def test_a_schedule_without_an_end_lets_the_end_be_moved(
    words: list[str], world: World, saved: dict[str, Checkpoint]
) -> None:
    compare(world, saved["constant"], "constant", *words)


def test_an_end_before_the_checkpoint_is_refused(world: World, saved: dict[str, Checkpoint]) -> None:
    with pytest.raises(CheckpointError, match="is at step 2, the run would end at 1") as caught:
        compare(world, saved["constant"], "constant", "training.max_steps=1")
    assert "training.max_steps" in caught.value.remedy


def test_other_content_under_the_same_name_is_refused(
    world: World, saved: dict[str, Checkpoint], tmp_path: Path
) -> None:
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    shutil.copy(world.data, same)
    records = json.loads(world.data.read_text())
    records[0]["output"] += "!"
    other.write_text(json.dumps(records))
    compare(world, saved["cosine"], "cosine", f"data.train={same}")
    with pytest.raises(CheckpointError, match="content of the training or evaluation data"):
        compare(world, saved["cosine"], "cosine", f"data.train={other}")
    write_tiny_data(other, num_records=30)
    with pytest.raises(CheckpointError, match="num_train_examples"):
        compare(world, saved["cosine"], "cosine", f"data.train={other}")


def test_several_differences_are_counted(world: World, saved: dict[str, Checkpoint]) -> None:
    words = ["training.seed=7", "optimizer.eps=1e-6"]
    with pytest.raises(CheckpointError, match=r"training.seed: 42 then, 7 now \(and \d more\)"):
        compare(world, saved["cosine"], "cosine", *words)


def test_a_key_that_the_checkpoint_does_not_know_is_a_difference(world: World, saved: dict[str, Checkpoint]) -> None:
    known: dict[str, Any] = dict(saved["cosine"].config)
    del known["training.seed"]
    with pytest.raises(CheckpointError, match=r"training\.seed: None then"):
        compare(world, replace(saved["cosine"], config=known), "cosine")


@pytest.mark.usefixtures("saved")
def test_a_finished_run_can_be_made_longer(world: World) -> None:
    words = ["training.lr_scheduler_type=constant", "training.max_steps=5"]
    longer = carry_out(world, "constant", *words, resume=True)
    assert longer == carry_out(world, "five at once", *words)


def test_a_run_goes_on_in_another_place_without_its_model(
    world: World, saved: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """A checkpoint has all that is needed, but the data."""
    folder = Path(shutil.copytree(saved["cosine"].folder.parent, world.folder / "moved"))
    expected = sha256(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    world.model.rename(tmp_path / "model")
    try:
        assert carry_out(world, "moved", "training.lr_scheduler_type=cosine", resume=True) == expected
    finally:
        (tmp_path / "model").rename(world.model)


def test_a_checkpoint_of_version_0_1_says_what_it_is(world: World, saved: dict[str, Checkpoint]) -> None:
    old = {key: value for key, value in saved["cosine"].plan.items() if key not in ("clip_by", "curvature_every")}
    with pytest.raises(CheckpointError, match=r"made by version 0\.1") as caught:
        compare(world, replace(saved["cosine"], plan=old), "cosine")
    assert f"model.name={saved['cosine'].folder}" in caught.value.remedy


def test_hidden_changes_of_the_subspace_are_seen(world: World) -> None:
    """Without staggering no offset gives the gap away; with a rate of its own no dense rate gives the scale away."""
    words = ["optimizer.galore.stagger=false", "optimizer.galore.dense_learning_rate=0.001"]
    carry_out(world, "plain", *words)
    (world.folder / "plain" / "model.safetensors").unlink()
    for change in ("optimizer.galore.update_proj_gap=9", "optimizer.galore.scale=0.5"):
        with pytest.raises(CheckpointError, match=change.partition("=")[0]):
            carry_out(world, "plain", *words, change, resume=True)
