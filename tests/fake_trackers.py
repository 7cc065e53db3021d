"""Packages of trackers that write down what they are told, by the few calls that are made of them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class Told:
    """What a tracker was told.

    Args:
        begun: How each run was begun.
        settings: The hyper-parameters, all runs together.
        points: (step, numbers), in order.
        ended: How each run was ended.
        environment: The environment's variables while a run was begun.
    """

    begun: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    ended: list[Any] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin=f"{name}.py")
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def install_wandb(monkeypatch: pytest.MonkeyPatch) -> Told:
    """A Weights & Biases that is spoken to and never speaks to anybody."""
    told = Told()

    class Config(dict[str, Any]):
        def update(self, values: dict[str, Any], allow_val_change: bool) -> None:  # type: ignore[override]
            told.settings |= values

    class Run:
        def __init__(self, name: str) -> None:
            self.id = name

        def _label(self, code: str) -> None:
            pass

        def finish(self, exit_code: int) -> None:
            told.ended.append(exit_code)
            module.run = None

    def init(**given: Any) -> Run:
        told.begun.append(given)
        told.environment.update(os.environ)
        module.run = Run(given["id"] or "fresh")
        return module.run

    def log(numbers: dict[str, float]) -> None:
        told.points.append((int(numbers.pop("train/global_step")), numbers))

    module = _install(
        monkeypatch,
        "wandb",
        run=None,
        config=Config(),
        init=init,
        log=log,
        Settings=lambda **given: given,
        define_metric=lambda *names, **options: None,
    )
    for part in ("sdk", "sdk.lib"):
        _install(monkeypatch, f"wandb.{part}")
    _install(monkeypatch, "wandb.sdk.lib.config_util", ConfigError=RuntimeError)
    return told


def install_mlflow(monkeypatch: pytest.MonkeyPatch, known: dict[str, str] | None = None) -> Told:
    """An MLflow of which every run has the parameters in `known`."""
    told = Told()
    active: list[Any] = []

    def start_run(run_id: str | None, experiment_id: str, run_name: str) -> Any:
        told.begun.append({"run_id": run_id, "experiment_id": experiment_id, "run_name": run_name})
        told.environment.update(os.environ)
        info, data = SimpleNamespace(run_id=run_id or "fresh"), SimpleNamespace(params=known or {})
        active.append(SimpleNamespace(info=info, data=data))
        return active[-1]

    def end_run(status: str) -> None:
        told.ended.append(status)
        active.pop()

    _install(
        monkeypatch,
        "mlflow",
        __version__="3.17.2",
        utils=SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100),
        ),
        is_tracking_uri_set=lambda: "MLFLOW_TRACKING_URI" in os.environ,
        get_tracking_uri=lambda: os.environ["MLFLOW_TRACKING_URI"],
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name, place: f"{name} in {place}",
        active_run=lambda: active[-1] if active else None,
        start_run=start_run,
        end_run=end_run,
        log_params=lambda values, synchronous: told.settings.update(values),
        log_metrics=lambda metrics, step, synchronous: told.points.append((step, metrics)),
    )
    return told


def install_trackio(monkeypatch: pytest.MonkeyPatch, taken: tuple[str, ...] | None = None) -> Told:
    """A Trackio that has runs of these names; None: no project yet."""
    told = Told()

    class Api:
        def runs(self, project: str) -> list[Any]:
            if taken is None:
                raise ValueError(f"Project '{project}' does not exist")
            return [SimpleNamespace(name=name) for name in taken]

    def log(numbers: dict[str, float], step: int) -> None:
        assert numbers.pop("train/global_step") == step
        told.points.append((step, numbers))

    def init(project: str, **given: Any) -> Any:
        told.begun.append({"project": project, **given})
        told.settings |= given["config"]
        told.environment.update(os.environ)
        return SimpleNamespace(log=log)

    _install(monkeypatch, "trackio", Api=Api, init=init, finish=lambda: told.ended.append("finished"))
    return told
