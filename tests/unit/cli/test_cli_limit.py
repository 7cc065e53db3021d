"""A run under `memory.limit`: it fits and says so, or it stops, says where memory went, and leaves things in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.train import output as run_output
from tiny import write_tiny_data, write_tiny_model
from unit.cli.tiny_run import SETTINGS, Ended, World, json_lines, sha256

STEPS = "training.max_steps=3"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Wider than other tiny models: its 2.5 MiB of weights are more than the least limit that is taken."""
    made = World(tmp_path_factory.mktemp("world"), quick=False)
    write_tiny_model(made.model, intermediate_size=1024)
    write_tiny_data(made.data)
    made.config.write_text(SETTINGS.format(model=made.model, data=made.data, output=made.folder / "run"))
    return made


@pytest.fixture(scope="module")
def free(world: World) -> Path:
    """A run without a limit, all of it measured."""
    assert world.train("free", STEPS, "memory.track_steps=3").code == 0
    return world.folder / "free"


def report(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "memory_report.json").read_text())
    return loaded


def assert_stopped(ended: Ended, *words: str) -> None:
    assert ended.code == 1, ended.out + ended.err
    assert ended.err.startswith("Error: ") and "Traceback" not in ended.err
    assert len(ended.err.strip().splitlines()) == 2, "cause and remedy"
    for said in words:
        assert said in ended.err, ended.err
    assert _get_current_dispatch_mode() is None, "nothing keeps watching"


# ---- it fits


def test_a_limit_of_the_measured_peak_is_enough_and_changes_no_bit(world: World, free: Path, tmp_path: Path) -> None:
    peak_bytes = report(free)["peak_allocated_bytes"]
    ended = world.train(
        str(tmp_path), STEPS, f"memory.limit={peak_bytes}", "memory.track_steps=0", "checkpoint.save_every_steps=2"
    )
    assert ended.code == 0, ended.err
    assert "(memory.limit: 6 MiB)" in ended.out
    found = report(tmp_path)
    assert found["limit_bytes"] == found["peak_allocated_bytes"] == peak_bytes
    assert found["measured_by"] == "storage tracker (the whole run)"
    assert all(0 < step["allocated_bytes"] <= peak_bytes for step in found["steps"]) and len(found["steps"]) == 3
    assert report(free)["limit_bytes"] is None
    assert sha256(tmp_path / "model.safetensors") == sha256(free / "model.safetensors")


@pytest.mark.parametrize("words", [["quantization.load_in_8bit=true"], ["optimizer.state_bits=8", "model.store=bf16"]])
def test_what_needs_less_runs_where_the_rest_does_not(
    words: list[str], world: World, free: Path, tmp_path: Path
) -> None:
    limit_bytes = int(0.9 * report(free)["peak_allocated_bytes"])
    ended = world.train(str(tmp_path), STEPS, *words, f"memory.limit={limit_bytes}")
    assert ended.code == 0, ended.err
    assert report(tmp_path)["peak_allocated_bytes"] <= limit_bytes


def test_a_resumed_run_may_have_another_limit_and_needs_no_more(world: World, free: Path, tmp_path: Path) -> None:
    peak_bytes = report(free)["peak_allocated_bytes"]
    words = [STEPS, "checkpoint.save_every_steps=2"]
    assert world.train(str(tmp_path / "run"), *words).code == 0
    from_two = f"--resume={tmp_path / 'run' / 'checkpoint-2'}"
    ended = world.train(str(tmp_path / "again"), *words, f"memory.limit={peak_bytes}", from_two)
    assert ended.code == 0, ended.err
    assert report(tmp_path / "again")["peak_allocated_bytes"] <= peak_bytes
    assert sha256(tmp_path / "again" / "model.safetensors") == sha256(free / "model.safetensors")


# ---- it does not fit


def test_the_probe_step_finds_out(world: World, free: Path, tmp_path: Path) -> None:
    limit_bytes = int(0.9 * report(free)["peak_allocated_bytes"])
    ended = world.train(str(tmp_path / "run"), STEPS, f"memory.limit={limit_bytes}")
    assert_stopped(
        ended,
        "The probe step (2 x 40 tokens in 2 micro-batches",
        "needs more memory than there is, in backward: 320 KiB more (",
        "do not fit into memory.limit (6 MiB), 5 MiB are taken.",
        "activations grew most, from ",
        "Largest: activations (80 x 1024, float32, 320 KiB); ",
        "Raise memory.limit, or lower training.max_length or training.batch_size",
    )
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_weights_alone_are_too_many(world: World, tmp_path: Path) -> None:
    ended = world.train(str(tmp_path / "run"), "memory.limit=1MiB")
    assert_stopped(
        ended,
        "Out of memory, while loading: ",
        "do not fit into memory.limit (1 MiB)",
        "weights grew most, from 0 bytes to ",
        "Largest: weights (",
    )
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_the_state_does_not_fit_beside_the_weights(world: World, free: Path, tmp_path: Path) -> None:
    weight_bytes = json.loads((free / "plan.json").read_text())["bytes"]["weights"]
    ended = world.train(str(tmp_path / "run"), "--optimizer", "adamw", f"memory.limit={weight_bytes + 2**20}")
    assert_stopped(ended, "Out of memory, while loading: ", "memory.limit (3 MiB)")


def test_a_reserve_is_taken_from_the_limit(world: World, free: Path, tmp_path: Path) -> None:
    peak_bytes = report(free)["peak_allocated_bytes"]
    words = [STEPS, "memory.reserve=1MiB"]
    ended = world.train(str(tmp_path / "run"), *words, f"memory.limit={peak_bytes}")
    assert_stopped(ended, "The probe step", "memory.limit (6 MiB) less memory.reserve (1 MiB)")
    ended = world.train(str(tmp_path / "run"), *words, f"memory.limit={peak_bytes + 2**20}")
    assert ended.code == 0, ended.err


def at_step(number: int, monkeypatch: pytest.MonkeyPatch, method: str, happen: Callable[[], object]) -> None:
    """Let something happen in the engine's call of that number, counted from 1, in its first phase."""
    original, calls = getattr(LayerwiseEngine, method), []

    def changed(engine: Any, *given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            with engine._observer.phase("eval" if method == "evaluate" else "forward"):
                happen()
        return original(engine, *given, **more)

    monkeypatch.setattr(LayerwiseEngine, method, changed)


@pytest.mark.parametrize("save_every_steps", [0, 1])
def test_a_step_that_needs_more_ends_the_run_in_order(
    save_every_steps: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(3, monkeypatch, "forward", lambda: torch.ones(2**24))
    words = [STEPS, "memory.limit=32MiB", f"checkpoint.save_every_steps={save_every_steps}"]
    ended = world.train(str(tmp_path), *words)
    way = f"The last checkpoint is {tmp_path / 'checkpoint-1'}." if save_every_steps else "There is no checkpoint yet."
    assert_stopped(
        ended,
        "Out of memory, in forward: 64 MiB more (16777216, float32) do not fit into memory.limit (32 MiB)",
        "Largest: model.layers.0.mlp.gate_proj.weight (1024 x 64, float32, 256 KiB); ",
        way,
    )
    assert [entry["step"] for entry in json_lines(tmp_path / "metrics.jsonl") if "loss" in entry] == [1]
    assert [entry["step"] for entry in report(tmp_path)["steps"]] == [1]
    assert report(tmp_path)["peak_allocated_bytes"] < 2**25
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 1
    assert not (tmp_path / "model.safetensors").exists()


def test_an_evaluation_that_needs_more_does_too(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(1, monkeypatch, "evaluate", lambda: torch.ones(2**24))
    ended = world.train(str(tmp_path), STEPS, "memory.limit=32MiB")
    assert_stopped(ended, "Out of memory, in evaluation: 64 MiB more", "There is no checkpoint yet.")
    assert (tmp_path / "memory_report.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_a_machine_without_memory_is_explained_in_the_same_way(
    error: Exception, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise error

    at_step(2, monkeypatch, "forward", fails)
    ended = world.train(str(tmp_path), STEPS)
    assert_stopped(
        ended,
        "Out of memory, in forward: ",
        str(error).splitlines()[0] if str(error) else "MemoryError",
        "Largest: model.layers.0.mlp.gate_proj.weight (1024 x 64",
        "Lower training.max_length",
        "There is no checkpoint yet.",
    )
    assert "memory.limit" not in ended.err


def test_other_errors_are_left_alone(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **more: Any) -> None:
        raise ValueError("surprise")

    monkeypatch.setattr(run_output, "write_model", fails)
    ended = world.train(str(tmp_path), STEPS, "memory.limit=32MiB")
    assert ended.code == 1 and "ValueError: surprise" in ended.err and "Largest" not in ended.err


# ---- what is no limit


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("4", "memory.limit is 4 bytes\nWrite a unit, such as 4GiB."),
        ("0", "memory.limit is 0 bytes\n"),
        ("-4GiB", 'memory.limit is no size: "-4GiB"\n'),
        ("4 apples", 'memory.limit is no size: "4 apples"\n'),
        (".nan", "memory.limit is no size: NaN\n"),
    ],
)
def test_a_bad_size_is_named_with_its_place(value: str, said: str, world: World, tmp_path: Path) -> None:
    path = tmp_path / "limit.yaml"
    path.write_text(f"{world.config.read_text()}memory:\n  limit: {value}\n")
    line = len(path.read_text().splitlines())
    ended = world.train(str(tmp_path / "run"), "--config", str(path))
    assert ended.code == 2 and f"limit.yaml:{line}: {said}" in ended.err, ended.err
    assert not (tmp_path / "run").exists()
