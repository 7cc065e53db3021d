"""Where weights and states live changes no bit, and what is predicted of it is what is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.test_forecast import TOLERANCE
from placed import FAMILIES, QUICK, Left, PlacedRuns, assert_same
from sophia_galore.config.dump import changed
from sophia_galore.engine import cross_entropy, logits
from sophia_galore.numerics import row_blocks
from sophia_galore.records.files import MEMORY_REPORT, PLAN
from sophia_galore.train.callback import Callback
from sophia_galore.train.prepare import prepare
from sophia_galore.train.run import train

STORES: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["model.store=bf16", "training.compute_dtype=bf16"],
    "int8": ["quantization.enabled=true", "quantization.block_size=32"],
    "int8, folded late": ["quantization.enabled=true", "quantization.fold=refresh"],
}
OPTIMIZERS: dict[str, list[str]] = {
    "galore, svd": ["optimizer.galore.subspace=svd"],
    "galore, tracked": [],
    "galore, adaptive gap": ["optimizer.galore.subspace=svd", "optimizer.galore.adaptive_gap=true"],
    "adamw": ["optimizer.type=adamw", "optimizer.state_bits=8"],
    "sophia": ["optimizer.type=sophia"],
    "apollo": ["optimizer.type=apollo"],
}
REST: dict[str, list[str]] = {
    "nothing": [],
    "clipped by the model": ["training.clip_by=model", "training.max_grad_norm=0.5"],
    "clipped by the layer": ["training.clip_by=layer", "training.max_grad_norm=0.5"],
    "by matrix": ["engine.full_gradients=matrix", "optimizer.galore.fast_path=never"],
    "frozen": ['training.trainable=["model.layers.1.*", "model.layers.3.*", "model.norm.*"]'],
    "graphs kept": ["engine.keep_layers=1"],
    "answers": ['training.sample_questions=["what is the sum?"]'],
}
PLACEMENTS: dict[str, list[str]] = {
    "host": ["memory.placement=host"],
    "disk": ["memory.placement=disk"],
    "the last layer stays": ["memory.placement=host", "memory.resident_layers=1"],
    "disk, nothing ahead": ["memory.placement=disk", "memory.prefetch=false"],
    "host, nothing ahead": ["memory.placement=host", "memory.prefetch=false"],
    "inputs in host memory": ["memory.placement=device", "memory.activations=host"],
    "all on disk": ["memory.placement=disk", "memory.activations=disk"],
}
Setting = tuple[str, str, str, str]
# Store, optimizer, family, and the rest. Updates are kept apart (folded late) only in GaLore's subspace, and only its
# gradients are small enough to be held for a norm over the model.
SETTINGS: tuple[Setting, ...] = (
    ("fp32", "galore, svd", "llama", "clipped by the model"),
    ("fp32", "galore, tracked", "llama, untied", "graphs kept"),
    ("fp32", "galore, adaptive gap", "qwen2", "by matrix"),
    ("fp32", "adamw", "gemma3", "clipped by the layer"),
    ("fp32", "sophia", "llama, untied", "answers"),
    ("fp32", "apollo", "qwen2", "frozen"),
    ("bf16", "galore, svd", "gemma3", "by matrix"),
    ("bf16", "galore, tracked", "llama", "clipped by the model"),
    ("bf16", "galore, adaptive gap", "qwen2", "graphs kept"),
    ("bf16", "adamw", "gemma3", "nothing"),
    ("bf16", "sophia", "llama", "clipped by the layer"),
    ("bf16", "apollo", "llama, untied", "answers"),
    ("int8", "galore, svd", "gemma3", "frozen"),
    ("int8", "galore, tracked", "llama", "by matrix"),
    ("int8", "galore, adaptive gap", "llama, untied", "clipped by the model"),
    ("int8", "adamw", "qwen2", "graphs kept"),
    ("int8", "sophia", "llama", "nothing"),
    ("int8", "apollo", "llama, untied", "clipped by the layer"),
    ("int8, folded late", "galore, svd", "qwen2", "answers"),
    ("int8, folded late", "galore, tracked", "gemma3", "clipped by the model"),
    ("int8, folded late", "galore, adaptive gap", "llama, untied", "frozen"),
    ("fp32", "galore, tracked", "qwen3_moe", "nothing"),
    ("int8", "galore, tracked", "qwen3_moe", "clipped by the layer"),
    ("fp32", "adamw", "gemma4_text", "graphs kept"),
)
# In the default run each word above is there once; all settings with all placements are thorough.
SOON: tuple[tuple[int, str], ...] = (
    (0, "disk"),
    (4, "host"),
    (7, "inputs in host memory"),
    (8, "the last layer stays"),
    (9, "disk, nothing ahead"),
    (13, "all on disk"),
    (14, "host, nothing ahead"),
    (17, "host"),
    (20, "disk"),
    (22, "disk"),
    (23, "host"),
)
CASES = [
    pytest.param(
        number, placement, id=f"{', '.join(setting)}: {placement}", marks=[] if soon else [pytest.mark.by_hand]
    )
    for number, setting in enumerate(SETTINGS)
    for placement in PLACEMENTS
    for soon in [(number, placement) in SOON]
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> PlacedRuns:
    return PlacedRuns(tmp_path_factory.mktemp("runs"))


def words_of(number: int) -> list[str]:
    store, optimizer, _, rest = SETTINGS[number]
    return [*STORES[store], *OPTIMIZERS[optimizer], *REST[rest]]


@pytest.fixture(scope="module")
def on_the_device(runs: PlacedRuns) -> Callable[[int], Left]:
    @cache
    def left(number: int) -> Left:
        words = [*QUICK, *words_of(number), "memory.placement=device"]
        return runs.train(runs.folder / f"device-{number}", SETTINGS[number][2], *words)

    return left


def test_the_default_run_has_every_word() -> None:
    soon = [SETTINGS[number] for number, _ in SOON]
    for place, words in enumerate((STORES, OPTIMIZERS, FAMILIES, REST)):
        assert {setting[place] for setting in SETTINGS} == set(words)
        assert {setting[place] for setting in soon} >= set(words) - {"galore, svd"}
    assert {placement for _, placement in SOON} == set(PLACEMENTS)


@pytest.mark.parametrize(("number", "placement"), CASES)
def test_no_bit_depends_on_where_things_live(
    number: int, placement: str, runs: PlacedRuns, on_the_device: Callable[[int], Left], tmp_path: Path
) -> None:
    words = [*QUICK, *words_of(number), *PLACEMENTS[placement]]
    assert_same(runs.train(tmp_path / "run", SETTINGS[number][2], *words), on_the_device(number))


@pytest.mark.parametrize(
    ("number", "placement"),
    [
        (14, "disk"),
        pytest.param(3, "host", marks=pytest.mark.by_hand),
        pytest.param(7, "disk", marks=pytest.mark.by_hand),
        pytest.param(4, "host, nothing ahead", marks=pytest.mark.by_hand),
        pytest.param(18, "host", marks=pytest.mark.by_hand),
        pytest.param(11, "disk", marks=pytest.mark.by_hand),
    ],
)
def test_nor_when_embedding_and_head_come_in_several_blocks(
    number: int, placement: str, runs: PlacedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 320 rows: in slices of 64 for logits, of 128 for all else, and no head as a whole."""
    monkeypatch.setattr(cross_entropy, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(logits, "_MOST_WHOLE_BYTES", 0)
    monkeypatch.setattr(row_blocks, "_BLOCK_ELEMENTS", 128 * 64)
    left = [
        runs.train(tmp_path / where / "run", SETTINGS[number][2], *QUICK, *words_of(number), *words)
        for where, words in (("there", ["memory.placement=device"]), ("elsewhere", PLACEMENTS[placement]))
    ]
    assert_same(left[1], left[0])


@pytest.mark.parametrize(
    ("number", "placement", "call"),
    [
        # Four layers, two micro-batches: 8 calls in the first evaluation, then 8 in each forward and in each backward.
        (0, "disk", 36),
        pytest.param(0, "host", 28, marks=pytest.mark.by_hand),
        pytest.param(13, "disk", 36, marks=pytest.mark.by_hand),
    ],
)
def test_nor_when_memory_runs_out_in_between(
    number: int, placement: str, call: int, runs: PlacedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that fails is given back and borrowed again, for smaller micro-batches."""
    attention = torch.nn.functional.scaled_dot_product_attention
    calls = 0

    def failing(*given: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return attention(*given, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", failing)
    left = []
    for where, words in (("there", ["memory.placement=device"]), ("elsewhere", PLACEMENTS[placement])):
        output, calls = tmp_path / where / "run", 0
        asked = [*QUICK, *words_of(number), "memory.on_oom=adapt", *words]
        left.append(runs.train(output, SETTINGS[number][2], *asked))
        assert calls > call and json.loads((output / MEMORY_REPORT).read_text())["adaptations"]
    assert_same(left[1], left[0])


def test_more_layers_than_there_are_can_stay(runs: PlacedRuns, tmp_path: Path) -> None:
    words = [*QUICK, "memory.placement=host", "memory.resident_layers=5"]
    streamed = prepare(runs.config(tmp_path / "run", "llama, untied", *words), Callback()).streamed
    assert {unit.name for unit in streamed.units} == set(streamed.parts.ends)


# Settings whose weights or states are larger than the buffers; two thirds of what streams finds room in host memory.
LIMITED = (2, 4, 11, 15)


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=[pytest.mark.by_hand] if number != LIMITED[0] else []) for number in LIMITED],
    ids=lambda number: ", ".join(SETTINGS[number]),
)
def test_a_limit_of_what_is_expected_is_enough(
    number: int, runs: PlacedRuns, on_the_device: Callable[[int], Left], tmp_path: Path
) -> None:
    """What is chosen for a limit is what was asked for to find it; an allocation beyond it would end the run."""
    family, output = SETTINGS[number][2], tmp_path / "run"
    asked = [*words_of(number), "memory.placement=host", "memory.resident_layers=1"]
    estimate = prepare(runs.config(output, family, *asked), Callback()).estimate
    assert estimate is not None
    limit, host_limit = estimate.forecast.peak_bytes, estimate.streamed.bytes_in("host") * 2 // 3
    # Both are smaller here than a user may write.
    given = {"memory.limit": limit, "memory.host_limit": host_limit}
    train(changed(runs.config(output, family, *words_of(number)), given), Callback())
    assert_same(Left.in_folder(output), on_the_device(number))
    report = json.loads((output / MEMORY_REPORT).read_text())
    assert abs(report["predicted_ratio"] - 1) <= TOLERANCE
    assert report["peak_allocated_bytes"] <= limit
    placements = json.loads((output / PLAN).read_text())["placements"]
    assert set(placements.values()) == {"host", "disk"}
    assert len(placements) <= len(estimate.streamed.placements)


@pytest.mark.parametrize(
    ("number", "placement"),
    [
        (0, "the last layer stays"),
        pytest.param(17, "disk", marks=pytest.mark.by_hand),
        pytest.param(2, "host", marks=pytest.mark.by_hand),
        pytest.param(13, "disk, nothing ahead", marks=pytest.mark.by_hand),
        pytest.param(9, "disk", marks=pytest.mark.by_hand),
        pytest.param(16, "host", marks=pytest.mark.by_hand),
        pytest.param(20, "host", marks=pytest.mark.by_hand),
    ],
)
def test_what_is_expected_is_taken(number: int, placement: str, runs: PlacedRuns, tmp_path: Path) -> None:
    words = [*words_of(number), *PLACEMENTS[placement], "checkpoint.save_every_steps=0"]
    runs.train(tmp_path / "run", SETTINGS[number][2], *words)
    report = json.loads((tmp_path / "run" / MEMORY_REPORT).read_text())
    assert abs(report["predicted_ratio"] - 1) <= TOLERANCE, report["predicted_ratio"]
