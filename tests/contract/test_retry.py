"""A step for which memory runs out somewhere: the part is repeated with less at once, and the numbers are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract.running_out import TOLERANCE, RunsOut, gradients, rows_of, shrink_tiles, worst
from engines import CPU, everything_projected, load_parts, make_engine, take_step
from sophia_galore.data.portion import whole
from sophia_galore.engine.cross_entropy import default_chunk_bytes
from sophia_galore.engine.observe import Phase
from sophia_galore.engine.retry import ChunkSizes, split_rows
from sophia_galore.engine.stepper import Stepper
from sophia_galore.errors import OutOfMemory
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from tiny import ragged_batches, tiny_model

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch)


PLACES: list[tuple[Phase, int]] = [
    ("forward", 0),
    ("forward", 1),
    ("forward", 3),
    ("head", 0),
    ("backward", 0),
    ("backward", 1),
    ("backward", 2),
]


@pytest.mark.pairwise
@pytest.mark.parametrize("moment", ["before it", "at its first operation", "halfway", "at its last operation"])
@pytest.mark.parametrize("keep_layers", [0, 3])
@pytest.mark.parametrize("projected", [False, True], ids=["whole", "projected"])
@TIED
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_the_gradients_of_an_undisturbed_step(
    tmp_path: Path, family: str, tied: bool, projected: bool, keep_layers: int, moment: str
) -> None:
    """In whichever part memory runs out, and whenever in it; micro-batches are ragged and padded."""
    tiny_model(family, tied=tied).save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    projectors = everything_projected(parts[0]) if projected else {}
    count = RunsOut()
    plain = make_engine(*parts, keep_layers=keep_layers, observer=count)
    expected = gradients(plain, ragged_batches(), count, projectors)
    for phase, which in PLACES:
        number = next(number for *place, number in count.counts if place == [phase, which])
        operation = {
            "before it": -1,
            "at its first operation": 0,
            "halfway": number // 2,
            "at its last operation": number - 1,
        }[moment]
        memory, said = RunsOut(phase, which, operation), list[str]()
        engine = make_engine(*parts, keep_layers=keep_layers, on_oom="adapt", say=said.append, observer=memory)
        got = gradients(engine, ragged_batches(), memory, projectors)
        assert memory.ran_out == len(said) == 1
        assert worst(got, expected) <= TOLERANCE, (phase, which)


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
        assert engine.chunk_sizes == ChunkSizes(0, default_chunk_bytes(CPU), None if keep_layers else 1)
        assert worst(got, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("fast", "tied"),
    [
        pytest.param(None, True, id="AdamW-tied"),
        pytest.param(False, False, id="projected-untied"),
        pytest.param(True, True, id="fast path-tied"),
        pytest.param(None, False, id="AdamW-untied", marks=pytest.mark.thorough),
        pytest.param(False, True, id="projected-tied", marks=pytest.mark.thorough),
        pytest.param(True, False, id="fast path-untied", marks=pytest.mark.thorough),
    ],
)
def test_no_weight_moves_twice(tmp_path: Path, tied: bool, fast: bool | None) -> None:
    """Three real steps, disturbed in the second and the third: weights and moments of an undisturbed run."""
    tiny_model("llama", tied=tied).save_pretrained(tmp_path)
    ends: list[dict[str, Tensor]] = []
    begun: dict[str, Tensor] = {}
    for place in (None, *PLACES[3:]):
        architecture, store = load_parts(tmp_path)
        subspace = None if fast is None else SubspaceSpec(rank=6, gap=4, scale=0.5, kind="tracked", fast=fast)
        specs = [
            ParamSpec(name, tuple(shape), 1e-2, 0.0, Hyper(), subspace=subspace if len(shape) == 2 else None)
            for name, shape in architecture.parameter_shapes().items()
        ]
        begun = begun or {spec.name: store[spec.name].first.clone() for spec in specs}  # type: ignore[union-attr]
        optimizer = ParamOptimizer(specs, seed=0, device=CPU)
        memory = RunsOut(*place, operation=20, times=1) if place else RunsOut()
        engine = make_engine(architecture, store, keep_layers=1, on_oom="adapt", observer=memory)
        stepper = Stepper(engine, optimizer, store)
        for step in (1, 2, 3):
            memory.counts.clear()
            memory.operation = {1: -2, 2: 20, 3: 45}[step]  # not in the first, in which bases are made
            with memory:
                stepper.take(whole(ragged_batches(step)), step=step, factor=1.0)
        assert memory.ran_out == (2 if place else 0)
        ends.append({spec.name: store[spec.name].first.clone() for spec in specs})  # type: ignore[union-attr]
    for end in ends[1:]:
        for name, weight in end.items():
            # Adam divides gradients, which differ by roundings, by their size; worst seen 1.2e-6.
            assert float((weight - ends[0][name]).norm() / (ends[0][name] - begun[name]).norm()) <= 1e-5, name


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
    assert (
        engine.chunk_sizes.keep_layers == 3
        and not parts[0].model.training == engine._architecture.model.training is False
    )


def test_drawn_labels_and_a_head_that_is_decoded(tmp_path: Path) -> None:
    """The labels of a pass that is repeated are drawn anew from the same key."""
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path, torch.bfloat16)  # decoded for float32: the head by blocks

    def drawn_step(memory: RunsOut, *, sampled: bool) -> dict[str, Tensor]:
        got: dict[str, Tensor] = {}
        engine = make_engine(*parts, on_oom="adapt", observer=memory, keep_layers=1)
        with memory:
            take_step(
                engine,
                ragged_batches(),
                got.update,
                step=1,
                sampled=sampled,
            )
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
