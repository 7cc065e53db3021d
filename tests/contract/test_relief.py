"""A step for which memory runs out somewhere: the part is repeated with less at once, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines import CPU, load_parts, make_engine
from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine import cross_entropy
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.observe import Observer, Phase
from sophia_galore.engine.relief import AtOnce, split_rows
from sophia_galore.engine.stepper import Stepper
from sophia_galore.engine.tracker import StorageTracker
from sophia_galore.errors import OutOfMemory
from sophia_galore.model.anatomy import Anatomy
from sophia_galore.model.store import WeightStore
from sophia_galore.numerics.rules import Hyper
from sophia_galore.numerics.subspace import Projector, projection_side
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from tiny import VOCAB, ragged_batches, tiny_model

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
# Sums over the same tokens in smaller parts; over all tests here the worst seen is 2.0e-7.
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the head's tiles can be halved: the batches have 42 counted tokens."""
    monkeypatch.setattr(cross_entropy, "_MIN_TOKENS", 8)


class RunsOut(TorchDispatchMode, Observer):
    """Memory that runs out before one operation of one phase; counts the operations of every phase.

    Args:
        phase: Which phase.
        which: Which of those with this name.
        operation: Which operation in it; -1: as the phase is entered.
        times: In so many phases from this one on.
    """

    watches_tensors = False

    def __init__(self, phase: Phase | None = None, which: int = 0, operation: int = 0, times: int = 1) -> None:
        super().__init__()
        self.wanted, self.operation = [(phase, which + more) for more in range(times)], operation
        self.counts: list[tuple[Phase, int, int]] = []  # name, which of it, operations
        self.ran_out = 0

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:  # type: ignore[override]
        self.counts.append((name, sum(seen == name for seen, _, _ in self.counts), 0))
        if self.operation == -1 and self.counts[-1][:2] in self.wanted:
            self._run_out()
        yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counts:
            name, which, number = self.counts[-1]
            self.counts[-1] = (name, which, number + 1)
            if (name, which) in self.wanted and number == self.operation:
                self._run_out()
        return func(*args, **(kwargs or {}))

    def _run_out(self) -> None:
        self.ran_out += 1
        raise OutOfMemory("Out of memory in a test.")


def rows_of(num_rows: int, length: int = 12) -> list[MicroBatch]:
    """One micro-batch without padding."""
    tokens = torch.randint(3, VOCAB, (num_rows, length), generator=torch.Generator().manual_seed(5))
    labels = torch.full_like(tokens, -100)
    labels[:, 1:-1] = tokens[:, 2:]
    return [MicroBatch(tokens, None, labels, tokens.numel(), int((labels != -100).sum()))]


def everything_projected(anatomy: Anatomy) -> dict[str, Projector]:
    draw = torch.Generator().manual_seed(1)
    made: dict[str, Projector] = {}
    for name, shape in anatomy.parameter_shapes().items():
        if len(shape) == 2:
            side = projection_side(shape)
            length = shape[1] if side == "right" else shape[0]
            made[name] = Projector(torch.randn(length, 8, generator=draw) / length**0.5, side)
    return made


def gradients(
    engine: LayerwiseEngine,
    batches: list[MicroBatch],
    memory: TorchDispatchMode | None = None,
    projectors: dict[str, Projector] | None = None,
    step: int = 1,
) -> dict[str, Tensor]:
    """Everything that is handed on, each once."""
    got: dict[str, Tensor] = {}

    def apply(grads: dict[str, Tensor]) -> None:
        assert not got.keys() & grads.keys()
        got.update(grads)

    with memory or nullcontext():
        engine.step(batches, apply, step=step, projector=(projectors or {}).get)
    return got


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    # Biases of keys have gradients that cancel to roundings.
    return max(
        float((got[name] - grad).norm() / grad.norm()) for name, grad in expected.items() if "k_proj.bias" not in name
    )


PLACES: list[tuple[Phase, int]] = [
    ("forward", 0),
    ("forward", 1),
    ("forward", 3),
    ("head", 0),
    ("backward", 0),
    ("backward", 1),
    ("backward", 2),
]


@pytest.mark.parametrize("keep_layers", [0, 3])
@pytest.mark.parametrize("projected", [False, True], ids=["whole", "projected"])
@TIED
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_the_gradients_of_an_undisturbed_step(
    tmp_path: Path, family: str, tied: bool, projected: bool, keep_layers: int
) -> None:
    """Wherever it ran out: as a part began, in its midst, or at its end; micro-batches are ragged and padded."""
    tiny_model(family, tied=tied).save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    projectors = everything_projected(parts[0]) if projected else {}
    count = RunsOut()
    plain = make_engine(*parts, keep_layers=keep_layers, observer=count)
    expected = gradients(plain, ragged_batches(), count, projectors)
    for phase, which in PLACES:
        number = next(number for *place, number in count.counts if place == [phase, which])
        for operation in (-1, 0, number // 2, number - 1):
            memory, said = RunsOut(phase, which, operation), list[str]()
            engine = make_engine(*parts, keep_layers=keep_layers, on_oom="adapt", say=said.append, observer=memory)
            got = gradients(engine, ragged_batches(), memory, projectors)
            assert memory.ran_out == len(said) == 1
            assert worst(got, expected) <= TOLERANCE, (phase, which, operation)


# One rounding is 2^-12 (fp16) or 2^-9 (bf16) relative, and a sum that is split is rounded twice: the worst seen are
# 3.3e-4 and 3.0e-3.
@pytest.mark.parametrize(("compute_dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_differs_by_roundings(tmp_path: Path, compute_dtype: torch.dtype, tolerance: float) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    expected = gradients(make_engine(*parts, compute_dtype=compute_dtype), rows_of(16, 32))
    for phase, which in PLACES[1:]:
        memory = RunsOut(phase, which, 40)
        engine = make_engine(*parts, compute_dtype=compute_dtype, keep_layers=1, on_oom="adapt", observer=memory)
        got = gradients(engine, rows_of(16, 32), memory)
        assert memory.ran_out == 1 and worst(got, expected) <= tolerance, (phase, which)


@pytest.mark.parametrize("keep_layers", [0, 3])
def test_it_may_run_out_more_than_once(tmp_path: Path, keep_layers: int) -> None:
    """In the backward of each layer, and of one layer several times."""
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    expected = gradients(make_engine(*parts), rows_of(4) + ragged_batches())
    for operation in (0, 40):
        memory, said = RunsOut("backward", 0, operation, times=2), list[str]()
        engine = make_engine(*parts, keep_layers=keep_layers, on_oom="adapt", say=said.append, observer=memory)
        got = gradients(engine, rows_of(4) + ragged_batches(), memory)
        assert memory.ran_out == len(said) == 2
        assert engine.at_once == (AtOnce(0, 0, None) if keep_layers else AtOnce(0, 0, 1))
        assert worst(got, expected) <= TOLERANCE


@pytest.mark.parametrize("fast", [None, False, True], ids=["AdamW", "projected", "fast path"])
@TIED
def test_no_weight_moves_twice(tmp_path: Path, tied: bool, fast: bool | None) -> None:
    """Three real steps, disturbed in the second and the third: weights and moments of an undisturbed run."""
    tiny_model("llama", tied=tied).save_pretrained(tmp_path)
    ends: list[dict[str, Tensor]] = []
    begun: dict[str, Tensor] = {}
    for place in (None, *PLACES[3:]):
        anatomy, store = load_parts(tmp_path)
        subspace = None if fast is None else SubspaceSpec(rank=6, gap=4, scale=0.5, kind="tracked", fast=fast)
        specs = [
            ParamSpec(name, tuple(shape), 1e-2, 0.0, Hyper(), subspace=subspace if len(shape) == 2 else None)
            for name, shape in anatomy.parameter_shapes().items()
        ]
        begun = begun or {spec.name: store[spec.name].clone() for spec in specs}  # type: ignore[union-attr]
        optimizer = ParamOptimizer(specs, seed=0, device=CPU)
        memory = RunsOut(*place, operation=20, times=1) if place else RunsOut()
        engine = make_engine(anatomy, store, keep_layers=1, on_oom="adapt", observer=memory)
        stepper = Stepper(engine, optimizer, store)
        for step in (1, 2, 3):
            memory.counts.clear()
            memory.operation = {1: -2, 2: 20, 3: 45}[step]  # not in the first, in which bases are made
            with memory:
                stepper.take(ragged_batches(step), step=step, factor=1.0)
        assert memory.ran_out == (2 if place else 0)
        ends.append({spec.name: store[spec.name].clone() for spec in specs})  # type: ignore[union-attr]
    for end in ends[1:]:
        for name, weight in end.items():
            # Adam divides gradients, which differ by roundings, by their size; worst seen 1.2e-6.
            assert float((weight - ends[0][name]).norm() / (ends[0][name] - begun[name]).norm()) <= 1e-5, name


class Watched(RunsOut):
    """And what is alive as each phase begins, and most of it within."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.tracker, self.begun, self.peaks = StorageTracker(CPU), list[int](), list[int]()

    def given(self, store: WeightStore) -> Watched:
        """With all weights counted from the beginning."""
        for _, weight in store.items():
            assert isinstance(weight, Tensor)
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
    lean._relief.at_once = AtOnce(0, 1, 1)
    least = peak(lean)
    expected = gradients(make_engine(*parts), rows_of(8))
    fewer: list[AtOnce] = []
    for share in (0.7, 0.4, 0.1):
        said: list[str] = []
        engine = make_engine(*parts, keep_layers=3, on_oom="adapt", say=said.append)
        limit = Limited(least + int(share * (largest - least)))
        assert worst(gradients(engine, rows_of(8), limit), expected) <= TOLERANCE
        assert said and len(set(said)) == len(said)
        fewer.append(engine.at_once)
        said.clear()
        assert worst(gradients(engine, rows_of(8), Limited(limit.limit), step=2), expected) <= TOLERANCE
        assert not said
    assert [at_once.keep_layers for at_once in fewer] == sorted((a.keep_layers for a in fewer), reverse=True)
    assert fewer[-1].keep_layers == 0 and fewer[-1].most_rows is not None
    engine = make_engine(*parts, keep_layers=3, on_oom="adapt")
    with pytest.raises(torch.OutOfMemoryError, match="CPU out of memory in a test"):
        gradients(engine, rows_of(8), Limited(least // 2))
    assert engine.at_once.keep_layers == 0 and engine.at_once.chunk_bytes == 4 * VOCAB * 8


def test_each_change_is_said_in_a_sentence(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)

    def said(place: Phase, which: int, times: int, keep_layers: int = 0) -> list[str]:
        memory, sentences = RunsOut(place, which, 5, times), list[str]()
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
    assert engine.at_once.keep_layers == {"forward": 2, "head": 0, "backward": 1}[phase]


def test_nothing_is_repeated_unless_asked(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    memory = RunsOut("backward", 0, 5)
    engine = make_engine(*load_parts(tmp_path), keep_layers=2, observer=memory)
    with pytest.raises(OutOfMemory):
        gradients(engine, rows_of(4), memory)
    assert engine.at_once == AtOnce(2, 0)


def test_other_errors_are_no_reason_to_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    engine = make_engine(*load_parts(tmp_path), on_oom="adapt")

    def fail(*args: Any) -> None:
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
        engine.step(rows_of(4), apply, step=1)
    assert len(asked) == 2 and engine.at_once == AtOnce(0, 0)


def test_while_a_basis_is_chosen_nothing_is_repeated(tmp_path: Path) -> None:
    """A chooser may have changed the optimizer's state."""
    tiny_model("llama", tied=False).save_pretrained(tmp_path)
    engine = make_engine(*load_parts(tmp_path), keep_layers=2, on_oom="adapt")

    def choose(grad: object) -> Projector:
        raise OutOfMemory("Out of memory in the chooser.")

    with pytest.raises(OutOfMemory, match="in the chooser"):
        engine.step(
            rows_of(4),
            lambda grads: None,
            step=1,
            chooser=lambda name: choose if name == "lm_head.weight" else None,
        )
    assert engine.at_once == AtOnce(2, 0)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_with_dropout_forward_begins_anew(tmp_path: Path, which: int) -> None:
    """Smaller micro-batches draw other numbers, in all layers: those of a step that had them from the beginning."""
    tiny_model("llama", attention_dropout=0.3).save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    expected = gradients(make_engine(*parts), split_rows(rows_of(4)[0], 2))
    memory = RunsOut("forward", which, 5)
    got = gradients(make_engine(*parts, on_oom="adapt", observer=memory), rows_of(4), memory)
    assert memory.ran_out == 1 and all(torch.equal(got[name], grad) for name, grad in expected.items())


def test_with_dropout_backward_gives_up_graphs_but_no_rows(tmp_path: Path) -> None:
    """In forward, dropout drew for the micro-batches as they were; a gradient by other numbers would be wrong."""
    tiny_model("llama", attention_dropout=0.3).save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    expected = gradients(make_engine(*parts), rows_of(4))
    memory = RunsOut("backward", 1, 5)
    engine = make_engine(*parts, keep_layers=2, on_oom="adapt", observer=memory)
    got = gradients(engine, rows_of(4), memory)
    assert memory.ran_out == 1 and all(torch.equal(got[name], grad) for name, grad in expected.items())
    memory = RunsOut("backward", 1, 5)
    with pytest.raises(OutOfMemory):
        gradients(make_engine(*parts, on_oom="adapt", observer=memory), rows_of(4), memory)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_evaluation_is_relieved_too(tmp_path: Path, share: float) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    count = RunsOut()
    with count:
        expected = make_engine(*parts, observer=count).evaluate(ragged_batches())
    memory, said = RunsOut("eval", 0, int(share * count.counts[0][2])), list[str]()
    engine = make_engine(*parts, keep_layers=3, on_oom="adapt", say=said.append, observer=memory)
    with memory:
        total, num_counted = engine.evaluate(ragged_batches())
    assert memory.ran_out == len(said) == 1 and said[0].startswith("Memory ran out in ")
    assert num_counted == expected[1]
    assert total == pytest.approx(expected[0], rel=1e-6)  # float32 sums of some 50 tokens
    assert engine.at_once.keep_layers == 3 and not parts[0].model.training == engine._anatomy.model.training is False


def test_drawn_labels_and_a_head_that_is_decoded(tmp_path: Path) -> None:
    """The labels of a pass that is repeated are drawn anew from the same key."""
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path, torch.bfloat16)  # decoded for float32: the head by blocks

    def drawn_step(memory: RunsOut, *, sampled: bool) -> dict[str, Tensor]:
        got: dict[str, Tensor] = {}
        engine = make_engine(*parts, on_oom="adapt", observer=memory, keep_layers=1)
        with memory:
            engine.step(ragged_batches(), got.update, step=1, sampled_labels=sampled)
        return got

    expected = {sampled: drawn_step(RunsOut(), sampled=sampled) for sampled in (False, True)}
    for place in PLACES[1:]:
        sampled = place[0] != "head"  # in tiles of another size other labels may be drawn
        memory = RunsOut(*place, operation=9)
        assert worst(drawn_step(memory, sampled=sampled), expected[sampled]) <= TOLERANCE, place
        assert memory.ran_out == 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "most", "expected"), [(5, 3, [3, 2]), (7, 2, [2, 2, 2, 1]), (4, 9, [4]), (3, 1, [1] * 3)]
)
def test_rows_are_split_and_nothing_is_lost(num_rows: int, most: int, expected: list[int], padded: bool) -> None:
    (batch,) = rows_of(num_rows)
    if padded:
        mask = torch.ones_like(batch.input_ids)
        mask[0, 7:] = 0
        batch = replace(batch, attention_mask=mask, num_tokens=int(mask.sum()))
    parts = split_rows(batch, most)
    assert [len(part.input_ids) for part in parts] == expected
    for field in ("input_ids", "labels", *(["attention_mask"] if padded else [])):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))
    for field in ("num_tokens", "num_counted"):
        assert sum(getattr(part, field) for part in parts) == getattr(batch, field)
    assert all((part.attention_mask is not None) == padded for part in parts)
