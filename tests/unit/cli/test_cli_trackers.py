"""TensorBoard beside a whole run: it has every record, and the run has the same bits as without."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sophia_galore.train import integrations
from sophia_galore.train.integrations import RunStart, TrackedRun
from unit.cli.tiny_run import Ended, World, command, json_lines, sha256

# They are no numbers of the training: clocks, and what the process takes.
CHANGING = ("tokens_per_second", "process_bytes")
# The schedule does not look at the end of the run, so the end may move.
SHORT = ["training.lr_scheduler_type=constant", "training.max_steps=4"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: the points of each curve."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def hyperparameters(folder: Path) -> dict[str, Any]:
    """What TensorBoard shows beside them."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    shown: dict[str, Any] = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    return shown


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same, from the records, as TensorBoard holds numbers: in float32."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in json_lines(folder / "metrics.jsonl"):
        for key, value in record.items():
            if key != "step" and value is not None:
                tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                curves.setdefault(tag, []).append((record["step"], float(np.float32(value))))
    return curves


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The records without what differs between any two runs."""
    return [
        {key: value for key, value in record.items() if key not in CHANGING}
        for record in json_lines(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def plain(world: World) -> Path:
    """A run without trackers."""
    assert world.train("untracked", *SHORT).code == 0
    return world.folder / "untracked"


@pytest.fixture(scope="module")
def tracked(world: World) -> Path:
    """The same run with one, which saved a checkpoint in the middle."""
    pytest.importorskip("tensorboard")
    saving = ["checkpoint.save_every_steps=2", "checkpoint.keep_last=9"]
    ended = world.train("tracked", "report_to=tensorboard", *SHORT, *saving)
    assert ended.code == 0, ended.err
    return world.folder / "tracked"


def test_it_has_every_record(tracked: Path) -> None:
    shown = scalars(tracked)
    assert shown == recorded(tracked)
    assert {"train/loss", "eval/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(
        shown
    )
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]


def test_it_shows_what_was_asked_and_what_was_planned(tracked: Path) -> None:
    shown = hyperparameters(tracked)
    assert (shown["training.max_steps"], shown["optimizer.galore.rank"]) == (4, 8)
    assert (shown["plan.num_steps"], shown["plan.device"]) == (4, "cpu")


def test_the_run_has_the_same_bits_as_without(plain: Path, tracked: Path) -> None:
    assert sha256(tracked / "model.safetensors") == sha256(plain / "model.safetensors")
    assert numbers(tracked) == numbers(plain)


def test_a_run_that_goes_on_takes_steps_that_are_gone_out_of_the_curves(world: World, tracked: Path) -> None:
    folder = world.folder / "going on"
    shutil.copytree(tracked, folder)
    more = ["training.max_steps=5", f"--resume={folder / 'checkpoint-2'}"]
    ended = world.train("going on", "report_to=tensorboard", *SHORT, *more)
    assert ended.code == 0, ended.err
    assert [step for step, _ in scalars(folder)["train/loss"]] == [1, 2, 3, 4, 5]
    assert scalars(folder) == recorded(folder)


def test_a_run_that_goes_on_elsewhere_has_whole_curves_there(world: World, tracked: Path) -> None:
    ended = world.train("elsewhere", "report_to=tensorboard", *SHORT, f"--resume={tracked / 'checkpoint-2'}")
    assert ended.code == 0, ended.err
    assert [step for step, _ in scalars(world.folder / "elsewhere")["train/loss"]] == [1, 2, 3, 4]
    assert scalars(world.folder / "elsewhere") == recorded(world.folder / "elsewhere")


def test_a_run_that_is_moved_aside_takes_its_curves_along(world: World) -> None:
    pytest.importorskip("tensorboard")
    for steps in (2, 1):
        ended = world.train("aside", "report_to=[tensorboard]", f"training.max_steps={steps}")
        assert ended.code == 0, ended.err
    for name, steps in (("aside.previous-1", [1, 2]), ("aside", [1])):
        assert [step for step, _ in scalars(world.folder / name)["train/loss"]] == steps


def test_a_place_that_can_not_be_written_to_costs_the_curves_alone(
    world: World, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    folder = world.folder / "taken"

    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard, "SummaryWriter", full)
    ended = world.train("taken", "report_to=tensorboard", *SHORT)
    assert ended.code == 0, ended.err
    assert ended.out.count("tensorboard can't be told more: ") == 1
    assert sha256(folder / "model.safetensors") == sha256(plain / "model.safetensors")
    assert numbers(folder) == numbers(plain)


def test_a_tracker_that_fails_during_the_run_costs_no_bit(
    world: World, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    failed: dict[str, bool] = {}

    def tell(step: int, numbers: Mapping[str, float]) -> None:
        told.append(step)
        if step == 2:
            raise OSError("No space left on device")

    def begin(run: RunStart) -> TrackedRun:
        assert (run.folder / "plan.json").exists(), "it begins in the folder of this run"
        return TrackedRun(tell, lambda how: failed.update(mlflow=how))

    monkeypatch.setitem(integrations.BEGIN, "mlflow", begin)
    well = TrackedRun(lambda step, numbers: None, lambda how: failed.update(wandb=how))
    monkeypatch.setitem(integrations.BEGIN, "wandb", lambda run: well)
    monkeypatch.setattr("sophia_galore.train.prepare.missing_trackers", lambda names: ())
    ended = world.train("failing", "report_to=[mlflow, wandb]", *SHORT)
    assert ended.code == 0, ended.err
    assert ended.out.count("mlflow can't be told more: No space left on device.") == 1
    assert told == [0, 1, 2]
    assert failed == {"mlflow": True, "wandb": False}
    assert sha256(world.folder / "failing" / "model.safetensors") == sha256(plain / "model.safetensors")


@pytest.mark.parametrize("told_to", ["train", "check"])
def test_a_missing_package_is_refused_before_anything_is_looked_for(
    told_to: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    monkeypatch.setattr("sophia_galore.train.prepare.resolve_model", None)
    words = ["report_to=trackio", "model.name=somebody/elses", f"training.output_dir={world.folder / 'never'}"]
    ended: Ended = command(told_to, "--config", str(world.config), *words)
    assert ended.code == 2
    assert "training.report_to asks for what is not installed: trackio." in ended.err
    assert 'pip install "sophia-galore[trackio]"' in ended.err
    assert not (world.folder / "never").exists()
