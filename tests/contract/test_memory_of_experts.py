"""Experts that hubs keep apart are converted one at a time: a layer of them does not fit into what may be taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from other_models import other_config
from resident import MIB, peak_beside
from sophia_galore.model.export import convert_model, write_model
from sophia_galore.model.folder_layout import find_layout
from sophia_galore.model.skeleton import build_skeleton, load_model_config
from sophia_galore.model.source_files import read_source_files
from sophia_galore.weights.files import load_store
from sophia_galore.weights.int8 import Int8Format
from sophia_galore.weights.store import WeightStore

CPU = torch.device("cpu")
# In float32, the 48 experts of the only layer have 144 MiB; one has 3 MiB. Worst seen 10 MiB, so 20.
LIMIT_BYTES = 20 * MIB
LARGE = {"num_experts": 48, "hidden_size": 256, "moe_intermediate_size": 1024}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`large` and `small`, as the hub would give them."""
    place = tmp_path_factory.mktemp("models")
    for size, more in (("large", LARGE), ("small", {})):
        config = other_config("qwen3_moe", num_hidden_layers=1, **more)
        AutoModelForCausalLM.from_config(config).save_pretrained(place / size)
    yield place


def opened(folder: Path) -> WeightStore:
    architecture = build_skeleton(load_model_config(folder), CPU)
    layout = find_layout(folder, architecture)
    shapes = architecture.parameter_shapes()
    return load_store(folder, shapes, tied_head=None, dtype=torch.float32, device=CPU, layout=layout.reading)


def test_loading(models: Path, tmp_path: Path) -> None:
    kept: list[WeightStore] = []

    def prepare(size: str) -> Callable[[], int]:
        def load() -> int:
            kept.append(opened(models / size))
            return sum(weight.num_bytes for _, weight in kept[-1].items())

        return load

    assert peak_beside(prepare, tmp_path) < LIMIT_BYTES


def test_exporting_a_model_in_memory(models: Path, tmp_path: Path) -> None:
    def prepare(size: str) -> Callable[[], int]:
        folder = models / size
        store, source = opened(folder), read_source_files(folder)
        layout = find_layout(folder, build_skeleton(load_model_config(folder), CPU))

        def export() -> int:
            (tmp_path / size).mkdir()
            write_model(tmp_path / size, store=store, dtype=None, source=source, layout=layout, beside=folder)
            return 0

        return export

    assert peak_beside(prepare, tmp_path) < LIMIT_BYTES


@pytest.mark.parametrize("target", [torch.bfloat16, pytest.param(Int8Format(), marks=pytest.mark.thorough)])
def test_a_conversion(target: torch.dtype | Int8Format, models: Path, tmp_path: Path) -> None:
    def prepare(size: str) -> Callable[[], int]:
        def convert() -> int:
            (tmp_path / size).mkdir()
            convert_model(models / size, tmp_path / size, target)
            return 0

        return convert

    assert peak_beside(prepare, tmp_path) < LIMIT_BYTES
