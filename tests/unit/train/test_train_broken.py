"""A run whose last step broke the model says so, and writes no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sophia_galore.config import load_config
from sophia_galore.engine.stepper import Stepper
from sophia_galore.errors import NonFiniteError
from sophia_galore.train.listener import Listener
from sophia_galore.train.run import train
from unit.cli.tiny_run import make_world


class Ears(Listener):
    """Hears how runs end."""

    def __init__(self) -> None:
        self.failed: list[bool] = []

    def closed(self, *, failed: bool) -> None:
        self.failed.append(failed)


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_model_that_is_not_finite_is_not_written(
    evaluates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)
    take = Stepper.take

    def breaking(self: Stepper, *given: Any, step: int, factor: float) -> Any:
        found = take(self, *given, step=step, factor=factor)
        if step == 2:
            self._store["model.norm.weight"].first[0] = float("nan")
        return found

    monkeypatch.setattr(Stepper, "take", breaking)
    words = [
        "training.max_steps=2",
        "memory.track_steps=0",
        "memory.predict=false",
        f"training.output_dir={tmp_path / 'out'}",
    ]
    if not evaluates:
        words += ["data.eval_fraction=0"]
    message = "evaluation loss is nan" if evaluates else r"model\.norm\.weight holds values that are not finite"
    with pytest.raises(NonFiniteError, match=message):
        train(load_config(world.config, words), ears := Ears())
    assert ears.failed == [True]
    assert not (tmp_path / "out" / "model.safetensors").exists()
