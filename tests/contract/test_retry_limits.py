"""What a repetition after running out of memory takes, says and remembers, and what is not repeated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.running_out import TOLERANCE, RunsOut, gradients, rows_of, shrink_tiles, worst
from engines import CPU, load_parts, make_engine, take_step
from sophia_galore.engine.cross_entropy import default_chunk_bytes
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.observe import Phase
from sophia_galore.engine.retry import ChunkSizes
from sophia_galore.errors import OutOfMemory
from sophia_galore.memory.tracker import StorageTracker
from sophia_galore.numerics.subspace import Projector
from sophia_galore.weights.store import WeightStore
from tiny import VOCAB, tiny_model


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch)


class Watched(RunsOut):
    """And what is alive as each phase begins, and most of it within."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.tracker, self.begun, self.peaks = StorageTracker(CPU), list[int](), list[int]()

    def given(self, store: WeightStore) -> Watched:
        """With all weights counted from the beginning."""
        for weight in store.tensors().values():
            self.tracker.tag(weight, "weights")
        return self

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:  # type: ignore[override]
        self.tracker.reset_peak()
        self.begun.append(self.tracker.allocated_bytes)
        self.peaks.append(0)
        try:
            with super().phase(name):
                yield
        finally:
            self.peaks[-1] = self.tracker.peak_bytes

    def __enter__(self) -> Watched:
        super().__enter__()
        self.tracker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.tracker.__exit__(*error)
        super().__exit__(*error)


@pytest.mark.parametrize("keep_layers", [0, 2])
@pytest.mark.parametrize("place", [("forward", 1), ("forward", 3), ("head", 0), ("backward", 0), ("backward", 2)])
def test_a_repetition_takes_less_memory(tmp_path: Path, place: tuple[Phase, int], keep_layers: int) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    parts, batches = load_parts(tmp_path), rows_of(16, 32)
    plain = Watched().given(parts[1])
    gradients(make_engine(*parts, keep_layers=keep_layers, observer=plain), batches, plain)
    at = next(at for at, (*counted, _) in enumerate(plain.counts) if counted == list(place))
    # Near its end, when the failed try has made almost all that it ever will.
    memory = Watched(*place, plain.counts[at][2] - 4).given(parts[1])
    engine = make_engine(*parts, keep_layers=keep_layers, on_oom="adapt", observer=memory)
    gradients(engine, batches, memory)
    assert memory.counts[at][0] == memory.counts[at + 1][0] == place[0]
    assert memory.peaks[at + 1] < 0.9 * plain.peaks[at]
    # Nothing of the failed try is alive; but a second micro-batch has positions of its own: 32 numbers of 8 bytes, and
    # angles, cosines and sines, of which 32 x 16 float32 are 2048 bytes.
    assert memory.begun[at + 1] <= memory.begun[at] + 32 * 8 + 4 * 2048


class Limited(StorageTracker):
    """Memory of so many bytes; nothing else is counted."""

    def __init__(self, limit: int | None) -> None:
        super().__init__(CPU)
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.limit is not None and self.allocated_bytes > self.limit:
            del out
            raise torch.OutOfMemoryError("CPU out of memory in a test")
        return out


def test_a_limit_is_kept_to_and_remembered(tmp_path: Path) -> None:
    """By memory that is really counted: kept graphs go first, then rows, and the next step begins with what is left."""
    tiny_model("llama", tied=False, intermediate_size=256).save_pretrained(tmp_path)
    parts = load_parts(tmp_path)

    def peak(engine: LayerwiseEngine) -> int:
        tracker = Limited(None)
        gradients(engine, rows_of(8), tracker)
        return tracker.peak_bytes

    largest = peak(make_engine(*parts, keep_layers=3))
    lean = make_engine(*parts)
    lean._retry.sizes = ChunkSizes(0, 1, 1)
    least = peak(lean)
    expected = gradients(make_engine(*parts), rows_of(8))
    fewer: list[ChunkSizes] = []
    for share in (0.7, 0.4, 0.1):
        said: list[str] = []
        engine = make_engine(*parts, keep_layers=3, on_oom="adapt", say=said.append)
        limit = Limited(least + int(share * (largest - least)))
        assert worst(gradients(engine, rows_of(8), limit), expected) <= TOLERANCE
        assert said and len(set(said)) == len(said)
        fewer.append(engine.chunk_sizes)
        said.clear()
        assert worst(gradients(engine, rows_of(8), Limited(limit.limit), step=2), expected) <= TOLERANCE
        assert not said
    assert [at_once.keep_layers for at_once in fewer] == sorted((a.keep_layers for a in fewer), reverse=True)
    assert fewer[-1].keep_layers == 0 and fewer[-1].max_rows is not None
    engine = make_engine(*parts, keep_layers=3, on_oom="adapt")
    with pytest.raises(torch.OutOfMemoryError, match="CPU out of memory in a test"):
        gradients(engine, rows_of(8), Limited(least // 2))
    assert engine.chunk_sizes.keep_layers == 0 and engine.chunk_sizes.logits_bytes == 4 * VOCAB * 8


def test_each_change_is_said_in_a_sentence(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    stored = load_parts(tmp_path), load_parts(tmp_path, torch.bfloat16)

    def said(place: Phase, which: int, times: int, keep_layers: int = 0, *, decodes: bool = False) -> list[str]:
        memory, sentences, parts = RunsOut(place, which, 5, times), list[str](), stored[decodes]
        engine = make_engine(*parts, keep_layers=keep_layers, on_oom="adapt", say=sentences.append, observer=memory)
        gradients(engine, rows_of(4), memory, step=3)
        return sentences

    same = "the effective batch stays the same"
    where = "Memory ran out in backward of layer 2 at step 3: from here on"
    assert said("backward", 0, 2) == [
        f"{where} micro-batches have 2 rows instead of 4; {same}.",
        f"{where} micro-batches have 1 row instead of 2; {same}.",
    ]
    assert said("backward", 0, 3, keep_layers=3) == [
        f"{where} the graphs of 1 layer are kept instead of 3.",
        f"{where} no graphs are kept.",
        f"{where} micro-batches have 2 rows instead of 4; {same}.",
    ]
    where = "Memory ran out in the head at step 3: from here on the head takes"
    assert said("head", 0, 2) == [
        f"{where} 20 tokens at once instead of 40.",
        f"{where} 10 tokens at once instead of 20.",
    ]
    assert said("head", 0, 2, decodes=True) == [
        f"{where.removesuffix('takes')}computes its logits twice instead of keeping them.",
        f"{where} 19 tokens at once instead of 39.",
    ]
    assert said("forward", 1, 1) == [
        f"Memory ran out in forward of layer 0 at step 3: from here on micro-batches have 2 rows instead of 4; {same}."
    ]


@pytest.mark.parametrize(("phase", "which"), [("forward", 1), ("head", 0), ("backward", 1)])
def test_an_error_goes_on_up_where_nothing_is_left(tmp_path: Path, phase: Phase, which: int) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    memory = RunsOut(phase, which, 5, times=99)
    engine = make_engine(*load_parts(tmp_path), keep_layers=2, on_oom="adapt", observer=memory)
    with pytest.raises(OutOfMemory, match="Out of memory in a test"):
        gradients(engine, rows_of(4), memory)
    # A layer whose forward comes before those that are kept, the head after all of them, a layer between them.
    assert engine.chunk_sizes.keep_layers == {"forward": 2, "head": 0, "backward": 1}[phase]


def test_nothing_is_repeated_unless_asked(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    memory = RunsOut("backward", 0, 5)
    engine = make_engine(*load_parts(tmp_path), keep_layers=2, observer=memory)
    with pytest.raises(OutOfMemory):
        gradients(engine, rows_of(4), memory)
    assert engine.chunk_sizes == ChunkSizes(2, default_chunk_bytes(CPU))


def test_other_errors_are_no_reason_to_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    engine = make_engine(*load_parts(tmp_path), on_oom="adapt")

    def fail(*args: Any, **more: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(engine._layers, "backward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        gradients(engine, rows_of(4))


def test_while_a_weight_moves_nothing_is_repeated(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    engine = make_engine(*load_parts(tmp_path), on_oom="adapt")
    asked: list[int] = []

    def apply(grads: dict[str, Tensor]) -> None:
        asked.append(len(grads))
        if len(asked) == 2:
            raise OutOfMemory("Out of memory in the optimizer.")

    with pytest.raises(OutOfMemory, match="in the optimizer"):
        take_step(engine, rows_of(4), apply, step=1)
    assert len(asked) == 2 and engine.chunk_sizes == ChunkSizes(0, default_chunk_bytes(CPU))


def test_while_a_basis_is_chosen_nothing_is_repeated(tmp_path: Path) -> None:
    """A chooser may have changed the optimizer's state."""
    tiny_model("llama", tied=False).save_pretrained(tmp_path)
    engine = make_engine(*load_parts(tmp_path), keep_layers=2, on_oom="adapt")

    def choose(grad: object) -> Projector:
        raise OutOfMemory("Out of memory in the chooser.")

    with pytest.raises(OutOfMemory, match="in the chooser"):
        take_step(
            engine,
            rows_of(4),
            lambda grads: None,
            step=1,
            wants=lambda name: choose if name == "lm_head.weight" else None,
        )
    assert engine.chunk_sizes == ChunkSizes(2, default_chunk_bytes(CPU))
