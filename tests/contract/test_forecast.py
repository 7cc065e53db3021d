"""What is predicted before a run is what it takes, phase by phase."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.config import load_config
from sophia_galore.memory.forecast import Forecast
from sophia_galore.train import run as running
from sophia_galore.train.callback import Callback
from sophia_galore.train.prepare import Prepared
from tiny import write_tiny_data, write_tiny_model

# Of the peak and of each phase of a step; it is what is promised to users. Most peaks here are exact to 0.03 %. The
# worst is 0.8 % too low, where a step's micro-batches need masks that the longest examples do not; of a single phase
# it is 1.2 % too high, where what is looked at once is of another shape than in these two steps.
TOLERANCE = 0.03
# The same of more micro-batches than are run; the worst seen are 0.6 % of the peak and 1.1 % of a phase.
EXTRAPOLATED = 0.03

FAMILIES = {"llama": True, "qwen2": False, "gemma3": True}  # tied or not
FORMATS: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["model.store=bf16", "training.compute_dtype=bf16"],
    "int8": ["quantization.enabled=true"],
}
OPTIMIZERS: dict[str, list[str]] = {
    "galore": [],
    "adamw": ["optimizer.type=adamw"],
    "apollo": ["optimizer.type=apollo", "optimizer.apollo.rank=8"],
}
SHARING = "gemma3n_text"
SIZES = ((24, 2), (64, 3), (64, 2), (24, 3))  # longest example, micro-batches


@dataclass(frozen=True)
class World:
    """Models of every family, and data: ragged ones, and some that are all cut to one length."""

    folder: Path

    def train(self, output: Path, family: str, *words: str, data: str = "ragged") -> tuple[Forecast, dict[str, Any]]:
        """A run of two steps; returns what was expected of it, and its memory report."""
        seen: list[Prepared] = []
        with pytest.MonkeyPatch.context() as patched:
            prepare = running.prepare
            patched.setattr(running, "prepare", lambda *given: seen.append(prepare(*given)) or seen[-1])
            config = load_config(
                None,
                [
                    f"model.name={self.folder / family}",
                    f"data.train={self.folder / data}.json",
                    f"training.output_dir={output}",
                    "data.eval_fraction=0.2",
                    "training.max_steps=2",
                    "training.batch_size=2",
                    "training.max_length=64",
                    "optimizer.galore.rank=8",
                    "optimizer.galore.update_proj_gap=3",
                    *words,
                ],
            )
            running.train(config, Callback())
        (prepared,) = seen
        assert prepared.estimate is not None
        return prepared.estimate.forecast, json.loads((output / "memory_report.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    for family, tied in FAMILIES.items():
        write_tiny_model(folder / family, family, tied=tied)
    write_tiny_data(folder / "ragged.json", num_records=40)
    long = [{"text": f"{number} " + "what follows the sum of one and two? " * 8} for number in range(40)]
    (folder / "full.json").write_text(json.dumps(long))
    return World(folder)


def deal() -> list[tuple[str, str, str, int, int, str]]:
    """Two hands of an orthogonal array of family, format and optimizer; sizes and data in turn."""
    cases = []
    for index in range(18):
        row, column = divmod(index % 9, 3)
        words = (list(FAMILIES)[column], list(FORMATS)[row], list(OPTIMIZERS)[(row + column + index // 9) % 3])
        length, together = SIZES[index % 4]
        cases.append((*words, length, together, ("ragged", "full")[(index // 2 + index // 9) % 2]))
    return cases


def deviations(forecast: Forecast, report: dict[str, Any]) -> dict[str, float]:
    """Predicted over measured less 1, of each phase and of the peak."""
    found = {
        phase: forecast.phases[phase] / report["phases"][phase] - 1  # type: ignore[index]
        for phase in ("forward", "head", "backward", "step")
    }
    return {**found, "peak": forecast.peak_bytes / report["peak_allocated_bytes"] - 1}


def assert_near(forecast: Forecast, report: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    found = deviations(forecast, report)
    assert all(abs(value) <= tolerance for value in found.values()), found
    assert report["predicted_peak_bytes"] == forecast.peak_bytes
    assert report["predicted_ratio"] == round(1 + found["peak"], 4)
    assert sum(forecast.categories.values()) == forecast.peak_bytes


# The second hand is thorough. What a prediction is made from is held against the engine to the byte by
# `test_forecast_twin.py`, for every optimizer.
FIRST_HAND = 9
DEALT = [
    pytest.param(*case, marks=[pytest.mark.thorough] if index >= FIRST_HAND else [])
    for index, case in enumerate(deal())
]


@pytest.mark.parametrize(("family", "form", "optimizer", "length", "together", "data"), DEALT)
def test_a_run_takes_what_was_predicted(
    family: str, form: str, optimizer: str, length: int, together: int, data: str, world: World, tmp_path: Path
) -> None:
    words = [f"training.max_length={length}", f"training.gradient_accumulation_steps={together}"]
    assert_near(*world.train(tmp_path, family, *words, *FORMATS[form], *OPTIMIZERS[optimizer], data=data))


SPECIAL: dict[str, list[str]] = {
    "padded": ["training.batch_size=4", "training.max_length=40"],
    "sophia": ["optimizer.type=sophia", "optimizer.sophia.curvature_every=2"],
    "galore, sophia": ["optimizer.galore.rule=sophia", "optimizer.sophia.curvature_every=2"],
    "clipped by the model": ["training.max_grad_norm=0.5", "training.clip_by=model"],
    "full gradients apart": ["engine.full_gradients=matrix"],
    "full gradients apart, clipped": ["engine.full_gradients=matrix", "training.max_grad_norm=0.5"],
    "fp16": ["training.compute_dtype=fp16"],
    "noise": ["training.neftune_alpha=5"],
    "the last layer": ['training.trainable=["model.layers.2.*"]'],
    "a layer in the middle, graphs kept": ['training.trainable=["model.layers.1.*"]', "engine.keep_layers=3"],
    "norms and the head": ['training.trainable=["*norm*", "lm_head*"]', "quantization.enabled=true"],
    "packed": ["data.packing=true"],
    "grouped": ["data.group_by_length=true", "training.batch_size=4"],
    "sums in two blocks": ["distributed.sum_blocks=2"],
    "sums in two blocks, full gradients apart": ["distributed.sum_blocks=2", "engine.full_gradients=matrix"],
}


# These have their bytes in `test_forecast_twin.py` as well.
TWIN = ("sophia", "galore, sophia", "clipped by the model", "fp16", "packed")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=name, marks=[pytest.mark.thorough] if name in TWIN else [])
        for name, words in SPECIAL.items()
    ],
)
def test_so_it_is_with_what_is_seldom_asked_for(words: list[str], world: World, tmp_path: Path) -> None:
    forecast, report = world.train(tmp_path, "llama", "training.gradient_accumulation_steps=2", *words)
    assert_near(forecast, report)


@pytest.mark.parametrize(("words", "kept"), [("engine.keep_layers=1", 1), ("gradient_checkpointing=false", 3)])
def test_so_it_is_with_kept_graphs(words: str, kept: int, world: World, tmp_path: Path) -> None:
    forecast, report = world.train(tmp_path, "llama", "training.gradient_accumulation_steps=2", words)
    assert_near(forecast, report)
    assert forecast.keep_layers == kept


@pytest.mark.parametrize("kept", [0, 1, pytest.param(3, marks=pytest.mark.thorough), 4])
def test_so_it_is_where_layers_depend_on_one_another(kept: int, world: World, tmp_path: Path) -> None:
    """Of four layers, the last two use keys and values of the first two; each gets four hidden states of a token."""
    if not (world.folder / SHARING).exists():
        write_tiny_model(world.folder / SHARING, SHARING)
    words = ["training.gradient_accumulation_steps=2", f"engine.keep_layers={kept}"]
    forecast, report = world.train(tmp_path, SHARING, *words)
    assert_near(forecast, report)
    assert forecast.keep_layers == kept


@pytest.mark.parametrize(("data", "blocks"), [("ragged", 1), ("full", 1), ("full", 4)])
def test_more_micro_batches_than_are_run_are_computed(data: str, blocks: int, world: World, tmp_path: Path) -> None:
    words = ["training.batch_size=1", "training.gradient_accumulation_steps=13", "training.max_length=48"]
    words += [f"distributed.sum_blocks={blocks}"]
    assert_near(*world.train(tmp_path, "llama", *words, data=data), EXTRAPOLATED)
