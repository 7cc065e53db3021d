"""What files are read and written with: beside the weights in memory, some blocks of rows of one of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engines import CPU
from resident import MIB, peak_beside
from sophia_galore.model.export import convert_model, write_model
from sophia_galore.model.skeleton import build_skeleton, load_model_config
from sophia_galore.model.source_files import read_source_files
from sophia_galore.model.tied_head import head_differs
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.train.best_checkpoint import load_weights
from sophia_galore.train.checkpoint import find_checkpoint, save_checkpoint
from sophia_galore.train.to_gguf import _refuse_overflow
from sophia_galore.weights.files import load_store
from sophia_galore.weights.folder import HEAD
from sophia_galore.weights.int8 import Int8Format
from sophia_galore.weights.plain import DTYPES
from sophia_galore.weights.store import WeightStore
from tiny import write_tiny_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads and resets Linux's peak")

# 16 blocks of rows; 256 MiB in float32. All other weights together have less than one block.
EMBEDDING = "model.embed_tokens.weight"
ROWS, COLUMNS = 65_536, 1_024
# A block is 16 MiB in float32. Worst seen 48 MiB: a block that is read, one that is made, and the one before it, which
# lives until the next is there. So 60, below the embedding in the narrowest format, 65.
LIMIT_BYTES = 60 * MIB
FORM = Int8Format(128)
SHARD_BYTES = 10 * MIB
FORMATS = ("fp32", "bf16", "int8")


def pairs(others: tuple[str, ...], *kept: tuple[str, str]) -> pytest.MarkDecorator:
    """Every format with every other one; all but `kept` are thorough."""
    found = [(form, other) for form in FORMATS for other in others]
    return pytest.mark.parametrize(
        ("form", "other"), [pytest.param(*pair, marks=[] if pair in kept else pytest.mark.thorough) for pair in found]
    )


def form_of(name: str) -> torch.dtype | Int8Format:
    return FORM if name == "int8" else DTYPES[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`large` and `small`, in each format in a folder of its own, the large ones in several files."""
    place = tmp_path_factory.mktemp("models")
    for size, more in (("large", {"vocab_size": ROWS, "hidden_size": COLUMNS}), ("small", {})):
        source = write_tiny_model(place / size / "source", num_hidden_layers=1, **more)
        for form in FORMATS:
            (place / size / form).mkdir()
            convert_model(source, place / size / form, form_of(form), shard_bytes=SHARD_BYTES)
        (source / "model.safetensors").unlink()
    yield place


def opened(folder: Path, form: str) -> WeightStore:
    shapes = build_skeleton(load_model_config(folder), CPU).parameter_shapes()
    packed = [name for name, shape in shapes.items() if form == "int8" and len(shape) == 2]
    dtype = torch.float32 if packed else DTYPES[form]
    return load_store(folder, shapes, tied_head=HEAD, dtype=dtype, device=CPU, int8=packed, form=FORM)


def bytes_of(store: WeightStore) -> int:
    return sum(weight.num_bytes for _, weight in store.items())


@pairs((*FORMATS, "fp16"), ("fp32", "fp32"), ("bf16", "int8"), ("int8", "int8"), ("int8", "fp16"))
def test_a_conversion(form: str, other: str, models: Path, tmp_path: Path) -> None:
    def prepare(size: str) -> Callable[[], int]:
        def convert() -> int:
            (tmp_path / size).mkdir()
            convert_model(models / size / form, tmp_path / size, form_of(other), shard_bytes=SHARD_BYTES)
            return 0

        return convert

    assert peak_beside(prepare, tmp_path) < LIMIT_BYTES


@pairs(FORMATS, ("fp32", "bf16"), ("bf16", "int8"), ("int8", "int8"))
def test_loading(form: str, other: str, models: Path, tmp_path: Path) -> None:
    kept: list[WeightStore] = []

    def prepare(size: str) -> Callable[[], int]:
        def load() -> int:
            kept.append(opened(models / size / form, other))
            return bytes_of(kept[-1])

        return load

    assert peak_beside(prepare, tmp_path) < LIMIT_BYTES


@pairs(("fp32", "bf16", "fp16"), ("bf16", "fp32"), ("int8", "fp16"))
def test_exporting_a_model_in_memory(form: str, other: str, models: Path, tmp_path: Path) -> None:
    def prepare(size: str) -> Callable[[], int]:
        store, source = opened(models / size / form, form), read_source_files(models / size / form)

        def export() -> int:
            (tmp_path / size).mkdir()
            write_model(tmp_path / size, store=store, dtype=DTYPES[other], source=source, shard_bytes=SHARD_BYTES)
            return 0

        return export

    assert peak_beside(prepare, tmp_path) < LIMIT_BYTES


def make_optimizer(store: WeightStore) -> ParamOptimizer:
    """With a state whose moments are as large as the embedding in float32."""
    spec = ParamSpec(EMBEDDING, tuple(store[EMBEDDING].shape), 1e-2, 0.0, Hyper())
    return ParamOptimizer([spec], seed=0, device=CPU)


@pytest.mark.parametrize("held", ["bf16", pytest.param("int8", marks=pytest.mark.thorough)])
def test_a_checkpoint_is_saved_and_loaded(held: str, models: Path, tmp_path: Path) -> None:
    def saving(size: str) -> Callable[[], int]:
        store, source = opened(models / size / held, held), read_source_files(models / size / held)
        optimizer = make_optimizer(store)
        for tensor in optimizer.states.named().values():
            tensor.fill_(1)

        def save() -> int:
            save_checkpoint(
                tmp_path / size,
                1,
                optimizer_state=optimizer.states.stream(),
                write_model=lambda folder: write_model(
                    folder, store=store, dtype=None, source=source, shard_bytes=SHARD_BYTES
                ),
                documents={"plan.json": {}, "run_config.json": {}},
                keep_last=1,
                shard_bytes=SHARD_BYTES,
            )
            return 0

        return save

    def loading(size: str) -> Callable[[], int]:
        store = opened(models / size / held, held)
        optimizer = make_optimizer(store)
        for tensor in optimizer.states.named().values():
            tensor.fill_(0)

        def load() -> int:
            found = find_checkpoint(tmp_path / size, None)
            optimizer.states.load(found.optimizer_state())
            load_weights(found, store, optimizer)
            assert all(tensor.amin() == tensor.amax() == 1 for tensor in optimizer.states.named().values())
            return 0

        return load

    for prepare in (saving, loading):
        assert peak_beside(prepare, tmp_path) < LIMIT_BYTES


def test_looking_through_a_model(models: Path, tmp_path: Path) -> None:
    def prepare(size: str) -> Callable[[], int]:
        def look() -> int:
            folder = models / size / "fp32"
            assert not head_differs(folder)
            _refuse_overflow(folder)
            return 0

        return look

    assert peak_beside(prepare, tmp_path) < LIMIT_BYTES
