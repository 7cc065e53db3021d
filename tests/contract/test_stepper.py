"""The layer-wise step with limits, products and curvature, against autograd over the whole model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from inspect import GEN_CLOSED, getgeneratorstate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import CPU, load_parts, make_engine, take_step
from sophia_galore.data.batches import MicroBatch
from sophia_galore.data.portion import whole
from sophia_galore.engine.observe import Observer, Phase
from sophia_galore.engine.probe import take_probe
from sophia_galore.engine.step_results import FinishedGradients, ForwardPass
from sophia_galore.engine.stepper import ClipBy, Stepper
from sophia_galore.errors import NonFiniteError
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.subspace import Gradient, ProjectedGradient, Projector, tensor_of
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.request import Wants
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from sophia_galore.weights.store import Borrowed, WeightStore
from tiny import autograd_loss, ragged_batches, tiny_model

SUBSPACE = SubspaceSpec(rank=6, gap=3, scale=0.5, kind="tracked", transport=True)


def specs_for(shapes: Mapping[str, Iterable[int]], subspace: SubspaceSpec, rule: str = "adamw") -> list[ParamSpec]:
    """Matrices in a subspace, refreshed at different steps; the rest dense."""
    specs = []
    for index, (name, shape) in enumerate(shapes.items()):
        size = tuple(shape)
        where = replace(subspace, offset=index % subspace.gap) if len(size) == 2 else None
        specs.append(ParamSpec(name, size, 1e-2, 0.01, Hyper(rho=10.0), rule=rule, subspace=where))
    return specs


class Parts:
    """A tiny model, ready to step."""

    def __init__(
        self,
        folder: Path,
        *,
        subspace: SubspaceSpec = SUBSPACE,
        rule: str = "adamw",
        clip_by: ClipBy = "nothing",
        max_grad_norm: float = 0.0,
        curvature_every: int = 0,
        tied: bool = True,
        observer: Observer | None = None,
        **shapes: int,
    ) -> None:
        self.model = tiny_model("qwen2", tied=tied, **shapes).train()
        self.model.save_pretrained(folder)
        self.architecture, self.store = load_parts(folder)
        self.specs = specs_for(self.architecture.parameter_shapes(), subspace, rule)
        self.optimizer = ParamOptimizer(self.specs, seed=0, device=CPU)
        engine = make_engine(self.architecture, self.store, observer=observer)
        self.stepper = Stepper(
            engine,
            self.optimizer,
            self.store,
            clip_by=clip_by,
            curvature_every=curvature_every,
            max_grad_norm=max_grad_norm,
        )

    def go(self, num_steps: int) -> list[float]:
        return [
            self.stepper.take(whole(ragged_batches(step)), step=step, factor=1.0)[1] for step in range(1, num_steps + 1)
        ]

    def weights(self) -> dict[str, Tensor]:
        return {spec.name: self.store[spec.name].first.clone() for spec in self.specs}


def worst_error(one: Mapping[str, Tensor], other: Mapping[str, Tensor], begun: Mapping[str, Tensor]) -> float:
    """Largest distance of two ends, relative to the way that was gone."""
    assert one.keys() == other.keys()
    # Biases of keys have gradients that cancel to roundings, by whose size Adam divides.
    return max(
        float((one[name] - other[name]).norm() / (other[name] - begun[name]).norm())
        for name in one
        if not name.endswith("k_proj.bias")
    )


def autograd_run(
    model: Any, specs: list[ParamSpec], num_steps: int, max_grad_norm: float = 0.0
) -> tuple[list[float], dict[str, Tensor]]:
    """The same steps with ordinary backward and torch's clipping. Returns norms before clipping, and weights."""
    optimizer, norms = ParamOptimizer(specs, seed=0, device=CPU), []
    parameters = dict(model.named_parameters())
    for step in range(1, num_steps + 1):
        model.zero_grad()
        autograd_loss(model, ragged_batches(step))
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm or float("inf"))))
        for name, parameter in parameters.items():
            optimizer.step_param(name, parameter.data, parameter.grad, step=step, factor=1.0)
    return norms, {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["svd", "tracked", "random"])
def test_clipping_by_the_model_equals_torch(tmp_path: Path, kind: Any, tied: bool) -> None:
    parts = Parts(tmp_path, subspace=replace(SUBSPACE, kind=kind), clip_by="model", max_grad_norm=0.5, tied=tied)
    begun = parts.weights()
    norms = parts.go(5)
    expected_norms, expected = autograd_run(parts.model, parts.specs, 5, max_grad_norm=0.5)
    assert min(norms) > 0.6  # so clipping had something to do
    assert norms == pytest.approx(expected_norms, rel=1e-5)  # worst seen 1.3e-7
    # Five steps of two ways to the same gradients, which Adam divides by their size; worst seen 8.9e-6.
    assert worst_error(parts.weights(), expected, begun) <= 5e-5


@pytest.mark.parametrize("clip_by", ["nothing", "model", "layer"])
def test_the_norm_is_the_true_one_before_clipping(tmp_path: Path, clip_by: ClipBy) -> None:
    parts = Parts(tmp_path, clip_by=clip_by, max_grad_norm=0.0 if clip_by == "nothing" else 0.2)
    (norm,) = parts.go(1)
    (expected,), _ = autograd_run(parts.model, parts.specs, 1)
    assert norm == pytest.approx(expected, rel=1e-5)  # float32 sums in another order; worst seen 1.3e-7


def test_clipping_by_the_layer_limits_each_one(tmp_path: Path) -> None:
    """Every layer's step is that of its own gradient, scaled to the limit if it is longer."""
    parts = Parts(tmp_path, clip_by="layer", max_grad_norm=0.2)
    seen: dict[str, Tensor] = {}
    take_step(parts.stepper._engine, ragged_batches(1), lambda grads: seen.update(grads), step=1)
    optimizer, weights = ParamOptimizer(parts.specs, seed=0, device=CPU), parts.weights()
    groups: dict[str, list[str]] = {}
    for name in seen:
        layer = next((layer for layer in parts.architecture.layer_names if name.startswith(f"{layer}.")), name)
        groups.setdefault(layer, []).append(name)
    for names in groups.values():
        norm = float(torch.stack([seen[name].norm() for name in names]).norm())
        for name in names:
            grad = seen[name] * min(1.0, 0.2 / norm)
            optimizer.step_param(name, weights[name], grad, step=1, factor=1.0)
    begun = parts.weights()
    parts.go(1)
    # The same gradients, scaled the same way: roundings.
    assert worst_error(parts.weights(), weights, begun) <= 1e-4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["svd", "tracked", "randomized", "random"])
def test_products_make_the_same_run(tmp_path: Path, kind: Any, tied: bool) -> None:
    """Fast or not: the same weights but for roundings, and a norm that is an estimate."""
    runs = {}
    for fast in (False, True):
        parts = Parts(tmp_path, subspace=replace(SUBSPACE, kind=kind, gap=4, fast=fast), tied=tied)
        begun = parts.weights()
        runs[fast] = parts.go(6), parts.weights()
    # G (P Z) and (d^T x) P sum in two orders; worst seen 1.3e-6 after six steps.
    assert worst_error(runs[True][1], runs[False][1], begun) <= 1e-5
    deviations = [quick / exact - 1 for quick, exact in zip(runs[True][0], runs[False][0], strict=True)]
    # The first step refreshes every basis: the layers' by full gradients; for an svd the others' too.
    assert abs(deviations[0]) <= (1e-5 if kind == "svd" else 0.06)
    # Eight probes see what the basis does not; worst seen 3.6%. A random basis of 6 sees next to nothing: 9.7%.
    assert 0 < max(map(abs, deviations)) <= (0.15 if kind == "random" else 0.06)


def test_the_exact_norm_where_gradients_are_formed(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    norms = parts.go(5)
    expected, _ = autograd_run(parts.model, parts.specs, 5)
    assert norms == pytest.approx(expected, rel=1e-5)  # worst seen 7.2e-8


def test_micro_batches_in_another_order(tmp_path: Path) -> None:
    parts, other = Parts(tmp_path), Parts(tmp_path)
    begun = parts.weights()
    for step in range(1, 4):
        one, one_norm = parts.stepper.take(whole(ragged_batches(step)), step=step, factor=1.0)
        two, two_norm = other.stepper.take(whole(ragged_batches(step)[::-1]), step=step, factor=1.0)
        assert one.loss == pytest.approx(two.loss, rel=1e-5)
        assert one_norm == pytest.approx(two_norm, rel=1e-5)
    # Sums over micro-batches in another order, and three steps of Adam; worst seen 2.0e-6.
    assert worst_error(other.weights(), parts.weights(), begun) <= 1e-5


class Counting(ParamOptimizer):
    """Writes down which steps looked at the curvature, and at what."""

    def observe_curvature(self, name: str, grad: Gradient, *, step: int, num_samples: int) -> None:
        seen.append((step, name, num_samples, isinstance(grad, ProjectedGradient)))
        super().observe_curvature(name, grad, step=step, num_samples=num_samples)


seen: list[tuple[int, str, int, bool]] = []


@pytest.mark.parametrize("fast", [False, True])
def test_curvature_is_looked_at_every_so_often(tmp_path: Path, fast: bool) -> None:
    seen.clear()
    parts = Parts(tmp_path, subspace=replace(SUBSPACE, fast=fast, gap=50), rule="sophia", curvature_every=3)
    parts.stepper._optimizer = Counting(parts.specs, seed=0, device=CPU)
    parts.go(7)
    assert sorted({step for step, *_ in seen}) == [1, 4, 7]
    assert len(seen) == 3 * len(parts.specs)
    counted = {step: sum(batch.num_counted for batch in ragged_batches(step)) for step in (1, 4, 7)}
    assert all(num_samples == counted[step] for step, _, num_samples, _ in seen)
    assert any(projected for *_, projected in seen) == fast
    state = parts.stepper._optimizer.states.named()
    curvatures = [tensor for name, tensor in state.items() if name.endswith("/curvature")]
    assert len(curvatures) == len(parts.specs) and all((h >= 0).all() and h.any() for h in curvatures)


def test_no_curvature_no_pass(tmp_path: Path) -> None:
    seen.clear()
    parts = Parts(tmp_path)
    parts.stepper._optimizer = Counting(parts.specs, seed=0, device=CPU)
    parts.go(2)
    assert not seen


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("where", ["layers.0.self_attn.q_proj.weight", "model.norm.weight", "embed_tokens.weight"])
def test_one_bad_gradient_under_clipping_by_the_model_moves_no_weight(tmp_path: Path, where: str, fast: bool) -> None:
    """Nor any state; but bases that were due (here none is) have been refreshed by then."""
    subspace = replace(SUBSPACE, kind="svd", fast=fast, gap=1000)
    parts = Parts(tmp_path, subspace=subspace, clip_by="model", max_grad_norm=1.0)
    parts.go(2)
    before = parts.weights()
    kept = {name: tensor.clone() for name, tensor in parts.optimizer.states.named().items()}
    engine = parts.stepper._engine
    original = engine.backward

    def spoiled(forward: ForwardPass) -> Iterator[FinishedGradients]:
        for layer in original(forward):
            for name, gradient in layer.gradients.items():
                if name.endswith(where):
                    tensor_of(gradient).view(-1)[0] = float("nan")
            yield layer

    engine.backward = spoiled  # type: ignore[method-assign,assignment]
    with pytest.raises(NonFiniteError):
        parts.stepper.take(whole(ragged_batches(3)), step=3, factor=1.0)
    after = parts.weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    state = parts.optimizer.states.named()
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_projectors_are_asked_for_at_the_step_that_runs(tmp_path: Path) -> None:
    """At a refresh full gradients come, at others products: of all matrices, and of nothing else."""
    parts = Parts(tmp_path, subspace=replace(SUBSPACE, fast=True, gap=50))
    engine = parts.stepper._engine
    original, shapes = engine.forward, []

    def watching(batches: list[MicroBatch], *, wants: Wants, **more: Any) -> ForwardPass:
        shapes.append({spec.name for spec in parts.specs if isinstance(wants(spec.name), Projector)})
        return original(batches, wants=wants, **more)

    engine.forward = watching  # type: ignore[method-assign,assignment]
    parts.go(3)
    matrices = {spec.name for spec in parts.specs if spec.subspace}
    assert shapes[0] == set()
    # Tracked bases are refreshed once in the octave 2-3: those with early offsets at 2, the others at 3.
    assert shapes[1] | shapes[2] == matrices and not shapes[1] & shapes[2]


class _Open(Observer):
    """The phases that were entered and not left."""

    def __init__(self) -> None:
        self.entered: list[Phase] = []

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        self.entered.append(name)
        try:
            yield
        finally:
            self.entered.pop()


def probe(parts: Parts, stopped: Callable[[], bool]) -> None:
    take_probe(
        parts.stepper._engine,
        whole(ragged_batches()),
        step=1,
        optimizer=parts.optimizer,
        trained=[],
        held_shapes={},
        max_length=99,
        stopped=stopped,
    )


@pytest.mark.parametrize("at_call", [1, 4, 25], ids=["the head", "a layer", "a later layer"])
@pytest.mark.parametrize("method", ["prepare", "apply", "observe_curvature", "probe"])
def test_an_error_in_a_step_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, at_call: int
) -> None:
    """No phase, no borrowed weights, no generator that waits; autograd is as it was, and the next step goes well."""
    observer = _Open()
    parts = Parts(tmp_path, rule="sophia", curvature_every=1, observer=observer)
    engine, num_calls, num_borrowed = parts.stepper._engine, 0, 0
    borrow, backward = WeightStore.borrow, engine.backward
    generators: list[Generator[FinishedGradients]] = []

    @contextmanager
    def counted(store: WeightStore, *names: str, **more: Any) -> Iterator[Borrowed]:
        nonlocal num_borrowed
        num_borrowed += 1
        try:
            with borrow(store, *names, **more) as weights:
                yield weights
        finally:
            num_borrowed -= 1

    def remembered(forward: ForwardPass) -> Generator[FinishedGradients]:
        generators.append(backward(forward))
        return generators[-1]

    original = getattr(parts.optimizer, method, lambda: False)

    def fails(*given: Any, **more: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == (min(at_call, 3) if method == "probe" else at_call):  # which asks once a layer
            assert observer.entered == ["step"] and num_borrowed == 1
            raise KeyboardInterrupt
        return original(*given, **more)

    monkeypatch.setattr(WeightStore, "borrow", counted)
    monkeypatch.setattr(engine, "backward", remembered)
    monkeypatch.setattr(parts.optimizer, method, fails, raising=False)
    with pytest.raises(KeyboardInterrupt) as error:
        if method == "probe":
            probe(parts, fails)
        else:
            parts.go(1)
    # While the error, and with it every frame that it went through, is still there.
    assert not observer.entered and not num_borrowed and torch.is_grad_enabled()
    assert generators and all(getgeneratorstate(each) == GEN_CLOSED for each in generators)
    del error
    parts.stepper.take(whole(ragged_batches(2)), step=2, factor=1.0)
    assert not observer.entered and not num_borrowed and torch.is_grad_enabled()
