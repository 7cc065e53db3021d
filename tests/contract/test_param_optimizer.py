"""One contract for every rule, subspace, format and shape: what must be true whatever the rule is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract.cases import MEANINGLESS, TABLES, Case, all_cases, is_meaningful, main_product, pairs_of
from contract.drive import copies, go, gradient, make, one_step, same, start, values
from engines import CPU
from sophia_galore.errors import CheckpointError, NonFiniteError
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.weights.tensor_stream import TensorStream, read_stream, write_stream

NUM_STEPS = 6

pytestmark = pytest.mark.pairwise

every_case = pytest.mark.parametrize("case", all_cases(), ids=str)
# For what does not depend on the combination so much; they were shuffled, so every word is among them.
every_third = pytest.mark.parametrize("case", all_cases()[::3], ids=str)


def test_every_pair_meets() -> None:
    """Two words that can be combined at all are combined in some case."""
    met = set().union(*(pairs_of(case) for case in all_cases()))
    possible = set()
    for main in main_product():
        for bits, dtype, shape, adaptive in itertools.product(
            TABLES["state_bits"], TABLES["dtype"], TABLES["shape"], TABLES["adaptive"]
        ):
            case = replace(main, state_bits=bits, dtype=dtype, shape=shape, adaptive=adaptive)
            if is_meaningful(case):
                possible |= pairs_of(case)
    assert not possible - met, possible - met
    assert all(is_meaningful(case) for case in all_cases())


def test_every_reason_rules_something_out() -> None:
    """Each reason forbids something that no other one does."""
    for reason, applies in MEANINGLESS:
        others = [rule for text, rule in MEANINGLESS if text != reason]
        found = (
            Case(*words)
            for words in itertools.product(*TABLES.values())
            if applies(Case(*words)) and not any(rule(Case(*words)) for rule in others)
        )
        assert next(found, None) is not None, reason


@every_case
def test_zero_gradient_moves_nothing_but_decay(case: Case) -> None:
    zeros = torch.zeros(case.shape)
    optimizer = make(case.spec(weight_decay=0.0))
    weight = optimizer.with_deferred_update("w", start(case))
    for step in range(1, NUM_STEPS):
        optimizer.step_param("w", weight, zeros.clone(), step=step, factor=1.0)
    assert torch.equal(values(weight), values(start(case)))
    decayed = values(start(case))
    spec = case.spec()
    make(spec).step_param("w", decayed, zeros.clone(), step=1, factor=1.0)
    assert torch.equal(decayed, values(start(case)) * (1 - spec.learning_rate * spec.weight_decay))


@every_third
def test_rate_0_moves_nothing(case: Case) -> None:
    optimizer = make(case.spec())
    weight = optimizer.with_deferred_update("w", start(case))
    for step in range(1, NUM_STEPS):
        optimizer.step_param("w", weight, gradient(optimizer.specs["w"], step), step=step, factor=0.0)
    assert torch.equal(values(weight), values(start(case)))


@every_third
def test_goes_downhill(case: Case) -> None:
    """On |w|^2 / 2, whose gradient is w itself, every rule comes nearer to the bottom."""
    optimizer = make(case.spec(weight_decay=0.0))
    weight = optimizer.with_deferred_update("w", start(case))
    before = float(values(weight).norm())
    for step in range(1, 21):
        optimizer.step_param("w", weight, values(weight), step=step, factor=1.0)
    after = float(values(weight).norm())
    assert after < 0.99 * before  # worst seen 0.982 (AdamW in a random subspace), most far below


@every_case
def test_state_goes_to_disk_and_back_to_the_bit(case: Case, tmp_path: Path) -> None:
    """And the steps that follow are those of the run that was never interrupted, states included."""
    spec = case.spec()
    straight, first, second = make(spec), make(spec), make(spec)
    whole = go(straight, start(case), range(1, 2 * NUM_STEPS))
    weight = go(first, start(case), range(1, NUM_STEPS))
    write_stream(tmp_path, "state", first.states.stream())
    second.states.load(read_stream([tmp_path / "state.safetensors"]))
    assert same(second.states.named(), first.states.named())
    assert torch.equal(values(go(second, weight, range(NUM_STEPS, 2 * NUM_STEPS))), values(whole))
    assert same(second.states.named(), straight.states.named())


@every_case
def test_a_bad_gradient_touches_neither_weight_nor_state(case: Case) -> None:
    """At a step with a refresh and at one without."""
    spec = case.spec()
    optimizer = make(spec)
    weight = go(optimizer, start(case), range(1, 3))
    kept, state = values(weight), copies(optimizer)
    for bad, step in itertools.product((float("nan"), float("inf"), float("-inf")), (3, 4)):
        broken = gradient(spec, step)
        broken.view(-1)[-1] = bad
        with pytest.raises(NonFiniteError, match=f"w is not finite at step {step}"):
            optimizer.step_param("w", weight, broken, step=step, factor=1.0)
        if case.rule == "sophia":
            with pytest.raises(NonFiniteError, match=f"w is not finite at step {step}"):
                optimizer.observe_curvature("w", broken, step=step, num_samples=2)
    assert torch.equal(values(weight), kept)
    assert same(optimizer.states.named(), state)


@every_third
def test_what_a_state_is_made_of(case: Case) -> None:
    """Declared and made are the same, whatever was done; formats are those that were asked for."""
    spec = case.spec()
    optimizer = make(spec)
    go(optimizer, start(case), range(1, NUM_STEPS))
    declared = {f"w/{name}": tensor for name, tensor in spec.state_tensors().items()}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in optimizer.states.named().items()} == declared
    stored = {name for name in declared if name.startswith("w/basis")}
    assert bool(stored) == (case.kind in ("svd", "randomized", "tracked"))
    # What was just folded in leaves nothing.
    empty = ("w/next_refresh", "w/remainder")
    kept = {name: tensor for name, tensor in optimizer.states.named().items() if name not in empty}
    assert all(tensor.any() for tensor in kept.values())
    floats = [tensor for tensor in kept.values() if tensor.is_floating_point()]
    assert all(tensor.isfinite().all() for tensor in floats)


@every_third
def test_the_seed_matters_only_where_something_is_drawn(case: Case) -> None:
    one, other = (values(go(make(case.spec(), seed), start(case), range(1, 2 * NUM_STEPS))) for seed in (0, 1))
    if case.may_not_feel_its_basis:
        assert torch.isfinite(one).all() and torch.isfinite(other).all()
    elif case.kind != "randomized" or not case.draws:
        assert torch.equal(one, other) == (not case.draws)
    elif case.dtype == torch.float32 and case.state_bits == 32:
        # With so short sides the sketch sees everything, and its draws show in roundings at most.
        assert torch.allclose(one, other, atol=1e-4)


@every_third
def test_what_was_there_is_not_changed(case: Case) -> None:
    """A step writes to its weight and its state, never to the gradient or to another parameter's state."""
    specs = [case.spec(name) for name in "wv"]
    optimizer = ParamOptimizer(specs, seed=0, device=CPU)
    weight, grad = start(case), gradient(specs[0], 1)
    optimizer.step_param("w", weight, grad, step=1, factor=1.0)
    assert torch.equal(grad, gradient(specs[0], 1))
    others = {name: tensor for name, tensor in optimizer.states.named().items() if name.startswith("v/")}
    assert not any(tensor.any() for name, tensor in others.items() if name != "v/shrink")  # which begins with 1


@every_third
def test_order_of_parameters_does_not_matter(case: Case) -> None:
    specs = [case.spec(name) for name in "abc"]
    results = []
    for order in ("abc", "cab"):
        optimizer = ParamOptimizer(specs, seed=3, device=CPU)
        weights = {name: optimizer.with_deferred_update(name, start(case)) for name in "abc"}
        for step in range(1, NUM_STEPS):
            for name in order:
                one_step(optimizer, name, weights[name], step)
        results.append(({name: values(weight) for name, weight in weights.items()}, copies(optimizer)))
    assert same(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])
    # Same start and gradients, but every parameter draws for itself.
    if case.kind != "randomized" and not case.may_not_feel_its_basis:
        assert torch.equal(results[0][0]["a"], results[0][0]["b"]) == (not case.draws)


@every_third
def test_two_halves_are_one_step(case: Case) -> None:
    """`hold` and `step_held` with other parameters' in between; gradients may be scaled there."""
    spec = case.spec()
    whole, halves = make(spec), make(spec)
    one, other = whole.with_deferred_update("w", start(case)), halves.with_deferred_update("w", start(case))
    for step in range(1, NUM_STEPS):
        whole.step_param("w", one, 0.5 * gradient(spec, step), step=step, factor=1.0)
        held = halves.prepare("w", gradient(spec, step), step=step)
        for tensor in held.tensors():
            tensor.mul_(0.5)
        halves.apply("w", other, held, step=step, factor=1.0)
    if case.kind in ("dense", "random", "gaussian"):
        assert torch.equal(values(one), values(other))  # half of a float32 is exact
    else:
        # Eigenvectors and QR factors of G and of G / 2 differ by roundings, by which a code may become its neighbour:
        # these are at most 3.5 / 125 apart, for the largest weight in any of the cases.
        assert torch.allclose(
            values(one), values(other), rtol=2**-7, atol=0.03 if case.dtype in (torch.int8, "folded") else 1e-5
        )


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case("adamw", "svd", projection_bits=16), "basis"),
        (Case("adamw", "tracked", projection_bits=4, state_bits=8), "basis.packed"),
        (Case("adamw", "dense", state_bits=8), "exp_avg.codes"),
        (Case("adamw", "svd", adaptive=True), "next_refresh"),
        (Case("adafactor", "svd", residual="fira"), "update_norm"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_is_refused_whole(change: str, case: Case, name: str) -> None:
    optimizer = make(case.spec())
    state = {key: torch.ones_like(tensor) for key, tensor in optimizer.states.named().items()}
    key = f"w/{name}"
    if change == "missing":
        del state[key]
    elif change == "extra":
        state[f"v/{name}"] = torch.ones(1)
    elif change == "shape":
        state[key] = torch.ones(state[key].numel() + 1, dtype=state[key].dtype)
    else:
        state[key] = state[key].to(torch.float64)
    with pytest.raises(CheckpointError, match=rf"[wv]/{name}"):
        optimizer.states.load(TensorStream.of(state))
    assert all(not tensor.any() for name, tensor in optimizer.states.named().items() if name != "w/shrink")


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_declares_what_it_returns(rule: str) -> None:
    spec = ParamSpec("w", (6, 4), 1e-2, 0.0, Case(rule, "dense").spec().hyper, rule=rule)
    slots = RULES[rule].slots
    before: dict[str, Tensor] = {name: torch.zeros(spec.slot_shape(slot)) for name, slot in slots.items()}
    direction, after = RULES[rule].update(gradient(spec, 1), before, spec.hyper, 1)
    assert direction.shape == spec.shape
    assert after.keys() <= before.keys() and all(after[name].shape == before[name].shape for name in after)
    assert not any(tensor.any() for tensor in before.values())  # pure: what it was given it did not change
    assert all((after[name] >= 0).all() for name in after if slots[name].moment == 2)
