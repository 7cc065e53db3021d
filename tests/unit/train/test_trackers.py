"""Trackers are told what `metrics.jsonl` is told, under Trainer's names, and a run does not depend on them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_trackers import Told, install_mlflow, install_trackio, install_wandb
from sophia_galore.config import RunConfig
from sophia_galore.config.dump import changed, flatten
from sophia_galore.train import trackers as module
from sophia_galore.train.callback import Callback, Callbacks
from sophia_galore.train.integrations import TrackedRun
from sophia_galore.train.trackers import Trackers

TRAIN = {
    "step": 1,
    "epoch": 0.2,
    "loss": 5.5,
    "learning_rate": 0.01,
    "grad_norm": 3.25,
    "tokens": 123,
    "tokens_per_second": 700.5,
    "allocated_bytes": None,  # not measured at this step
    "process_bytes": 2**30,
}
EVAL = {"step": 0, "epoch": 0.0, "eval_loss": 6.0}
# What Trainer's users know; MLflow's callback leaves the names as they are.
NAMED = [
    (0, {"train/epoch": 0.0, "eval/loss": 6.0}),
    (
        1,
        {
            "train/epoch": 0.2,
            "train/loss": 5.5,
            "train/learning_rate": 0.01,
            "train/grad_norm": 3.25,
            "train/tokens": 123,
            "train/tokens_per_second": 700.5,
            "train/process_bytes": 2**30,
        },
    ),
]
PLAIN = [
    (step, {name.removeprefix("train/").replace("eval/", "eval_"): value for name, value in numbers.items()})
    for step, numbers in NAMED
]
INSTALL: dict[str, Callable[[pytest.MonkeyPatch], Told]] = {
    "wandb": install_wandb,
    "mlflow": install_mlflow,
    "trackio": install_trackio,
}
POINTS = {"wandb": NAMED, "mlflow": PLAIN, "trackio": NAMED}
ENDED = {"wandb": [0, 1], "mlflow": ["FINISHED", "FAILED"], "trackio": ["finished", "finished"]}
# Variables by which they would be given the model, or make a Space.
DANGEROUS = {
    "wandb": {"WANDB_LOG_MODEL": "end", "WANDB_WATCH": "all"},
    "mlflow": {"HF_MLFLOW_LOG_ARTIFACTS": "1"},
    "trackio": {"TRACKIO_SPACE_ID": "somebody/space"},
}
# How each is asked to go on with a run that it calls so.
GOES_ON = {
    "wandb": {"id": "fresh", "resume": "allow"},
    "mlflow": {"run_id": "fresh"},
    "trackio": {"name": "run", "resume": "allow"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of the machine that the tests run on."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "DISABLE_MLFLOW", "HF_MLFLOW", "TENSORBOARD_")):
            monkeypatch.delenv(name)


def asked(*names: str) -> RunConfig:
    return changed(RunConfig(), {"training.report_to": names})


def told_of_a_run(names: tuple[str, ...], folder: Path, *, failed: bool = False, after_step: int = 0) -> list[str]:
    """A run with an evaluation and a step, as trackers are told of it; returns what was said."""
    said: list[str] = []
    trackers = Trackers(asked(*names), said.append)
    trackers.opened(folder, after_step=after_step, records=[EVAL] if after_step else [])
    if not after_step:
        trackers.recorded(EVAL)
    trackers.recorded(TRAIN | {"step": after_step + 1})
    trackers.closed(failed=failed)
    return said


@pytest.mark.parametrize("name", INSTALL)
def test_every_record_arrives_under_the_names_of_trainer(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = INSTALL[name](monkeypatch)
    assert told_of_a_run((name,), folder) == []
    assert told.points == POINTS[name]
    settings = json.loads(json.dumps(flatten(asked(name))))
    assert told.settings == settings  # nothing of a model, none of Trainer's own arguments
    told_of_a_run((name,), folder, failed=True)
    assert told.ended == ENDED[name]


@pytest.mark.parametrize("name", INSTALL)
def test_nothing_of_the_model_can_be_asked_for(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in DANGEROUS[name].items():
        monkeypatch.setenv(variable, value)
    before = dict(os.environ)
    told = INSTALL[name](monkeypatch)
    # The stand-ins have no artifacts and nothing that watches a model: to be asked for them would end them.
    assert told_of_a_run((name,), folder) == []
    assert told.points == POINTS[name]
    if name == "trackio":
        assert "TRACKIO_SPACE_ID" not in told.environment
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", INSTALL)
def test_a_run_that_goes_on_is_the_same_run_there(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = INSTALL[name](monkeypatch)
    told_of_a_run((name,), folder)
    assert json.loads((folder / "trackers.json").read_text()) == {name: "run" if name == "trackio" else "fresh"}
    told.points.clear()
    told_of_a_run((name,), folder, after_step=1)
    assert GOES_ON[name].items() <= told.begun[1].items()
    assert [step for step, _ in told.points] == [2]
    # A run that begins anew in a folder where another one was is another one.
    told_of_a_run((name,), folder)
    assert not GOES_ON[name].items() <= told.begun[2].items()


@pytest.mark.parametrize("name", INSTALL)
def test_a_tracker_that_comes_later_is_told_what_was(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = INSTALL[name](monkeypatch)
    (folder / "trackers.json").write_text('{"another": "kept"}')
    told_of_a_run((name,), folder, after_step=1)
    assert [step for step, _ in told.points] == [0, 2]
    assert json.loads((folder / "trackers.json").read_text()).keys() == {"another", name}


def test_wandb_keeps_what_is_printed_to_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = install_wandb(monkeypatch)
    told_of_a_run(("wandb",), folder)
    assert told.begun[0] == {
        "project": "sophia-galore",
        "name": "run",
        "id": None,
        "resume": None,
        "dir": str(folder),
        "settings": {"console": "off"},
    }
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    told_of_a_run(("wandb",), folder)
    assert (told.begun[1]["project"], told.begun[1]["dir"], told.begun[1]["settings"]) == ("mine", "/elsewhere", None)


def test_mlflow_is_a_database_in_the_folder_unless_something_else_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = install_mlflow(monkeypatch)
    told_of_a_run(("mlflow",), folder)
    assert told.environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{folder}/mlflow/mlflow.db"
    assert "MLFLOW_TRACKING_URI" not in os.environ, "the next run in this process has a folder of its own"
    assert told.begun[0]["experiment_id"] == f"sophia-galore in {(folder / 'mlflow').as_uri()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    told_of_a_run(("mlflow",), folder)
    assert told.environment["MLFLOW_TRACKING_URI"] == os.environ["MLFLOW_TRACKING_URI"] == "http://there"
    assert told.begun[1]["experiment_id"] == "mine in None"


def test_mlflow_is_not_told_other_values_for_what_a_run_was_begun_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = install_mlflow(monkeypatch, known={"training.max_steps": "5", "training.report_to": "[]"})
    assert told_of_a_run(("mlflow",), folder) == []
    assert not {"training.max_steps", "training.report_to"} & told.settings.keys()
    assert "training.seed" in told.settings


@pytest.mark.parametrize(("taken", "name"), [(None, "run"), (("other",), "run"), (("run", "run-2"), "run-3")])
def test_a_run_of_trackio_has_a_name_of_its_own(
    taken: tuple[str, ...] | None, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = install_trackio(monkeypatch, taken)
    told_of_a_run(("trackio",), folder)
    assert (told.begun[0]["name"], told.begun[0]["resume"]) == (name, "never")
    assert json.loads((folder / "trackers.json").read_text()) == {"trackio": name}


class _Failing:
    """A tracker that fails at one call, counted from its beginning."""

    def __init__(self, at: str) -> None:
        self.at, self.calls = at, list[str]()

    def begin(self, *_: Any) -> TrackedRun:
        self._call("begin")
        return TrackedRun(
            lambda step, numbers: self._call(f"step {step}"), lambda failed: self._call("end"), "its name"
        )

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if what == self.at:
            raise ConnectionError("the server is away.\nTraceback: ...")


FAILURES = {
    "begin": ["begin"],
    "step 0": ["begin", "step 0", "end"],
    "step 1": ["begin", "step 0", "step 1", "end"],
    "end": ["begin", "step 0", "step 1", "end", "end"],
}


@pytest.mark.parametrize("at", FAILURES)
def test_a_tracker_that_fails_is_left_out_and_the_others_are_not(
    at: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, told = _Failing(at), install_wandb(monkeypatch)
    monkeypatch.setitem(module.BEGIN, "mlflow", failing.begin)
    said = told_of_a_run(("mlflow", "wandb"), folder)
    assert said == [
        "mlflow can't be told more: the server is away. The run goes on without, and metrics.jsonl has every record."
    ]
    assert failing.calls == FAILURES[at], "it is ended, so that nothing of it reaches the next run, and told no more"
    assert told.points == NAMED and told.ended == [0]


def test_names_that_can_not_be_kept_are_no_reason_to_lose_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_wandb(monkeypatch)
    (folder / "trackers.json").mkdir()
    said = told_of_a_run(("wandb",), folder)
    assert len(said) == 1 and "Is a directory" in said[0]


def test_several_callbacks_are_all_called() -> None:
    called: list[tuple[int, str, dict[str, Any]]] = []

    def each(number: int) -> Callback:
        class Each(Callback):
            pass

        for name in methods:

            def call(self: Callback, *given: Any, _name: str = name, **named: Any) -> None:
                bound = inspect.signature(getattr(Callback, _name)).bind(self, *given, **named)
                called.append((number, _name, dict(list(bound.arguments.items())[1:])))

            setattr(Each, name, call)
        return Each()

    methods = [name for name in vars(Callback) if not name.startswith("_")]
    both = Callbacks(each(1), each(2))
    for name in methods:
        parameters = list(inspect.signature(getattr(Callback, name)).parameters.values())[1:]
        given = {parameter.name: object() for parameter in parameters}
        plain = [given[each.name] for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        named = {each.name: given[each.name] for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
        called.clear()
        getattr(both, name)(*plain, **named)
        assert called == [(1, name, given), (2, name, given)], name
