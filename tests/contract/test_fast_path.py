"""Products of gradients from the layer-wise engine against the gradients themselves, multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engines import fixed, load_parts, make_engine, parts_of, take_step
from sophia_galore.engine import cross_entropy
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.observe import Category, Observer, Phase
from sophia_galore.engine.projected_gradient import ProjectedSum
from sophia_galore.engine.projected_linear import ProjectedLinears, plain_product, projected_linear
from sophia_galore.errors import RunError
from sophia_galore.memory.tracker import StorageTracker
from sophia_galore.numerics.subspace import Projector, Side, projected_shape, projection_side
from tiny import FAMILIES, more_families, ragged_batches, tiny_model

RANK = 8
# Sums of up to 320 float32 terms in two orders; over all tests here the worst seen is 7.2e-7.
TOLERANCE = 3e-6
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
SIDES: list[Side] = ["left", "right"]


def everything(name: str) -> bool:
    return True


def random_projectors(
    shapes: dict[str, torch.Size], wanted: Callable[[str], bool] = everything, side: Side | None = None
) -> dict[str, Projector]:
    """A random A with columns of about unit length for each wanted matrix; its side is the shorter one, or `side`."""
    draw = torch.Generator().manual_seed(1)
    made: dict[str, Projector] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and wanted(name):
            its_side = side or projection_side(shape)
            length = shape[1] if its_side == "right" else shape[0]
            made[name] = Projector(torch.randn(length, RANK, generator=draw) / length**0.5, its_side)
    return made


def run(engine: LayerwiseEngine, projectors: dict[str, Projector], batches: list | None = None) -> dict[str, Tensor]:  # type: ignore[type-arg]
    got: dict[str, Tensor] = {}
    take_step(engine, batches or ragged_batches(), lambda grads: got.update(grads), step=1, wants=projectors.get)
    return got


def worst_error(got: dict[str, Tensor], whole: dict[str, Tensor], projectors: dict[str, Projector]) -> float:
    """Largest relative error, by norms, of products and gradients against the ordinary path's gradients."""
    assert got.keys() == whole.keys()
    worst = 0.0
    for name, grad in whole.items():
        expected = projectors[name].of(grad) if name in projectors else grad
        assert got[name].shape == expected.shape and got[name].dtype == torch.float32, name
        worst = max(worst, float((got[name] - expected).norm() / expected.norm()))
    return worst


@TIED
@pytest.mark.parametrize("family", FAMILIES)
def test_products_equal_the_gradients_multiplied(tmp_path: Path, family: str, tied: bool) -> None:
    """Everything that is a matrix is projected; norms and biases, which are not, get their gradients."""
    tiny_model(family, tied=tied).save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    engine = make_engine(architecture, store)
    projectors = random_projectors(architecture.parameter_shapes())
    whole, got = run(engine, {}), run(engine, projectors)
    assert all(got[name].shape == projected_shape(whole[name].shape, RANK) for name in projectors)
    assert worst_error(got, whole, projectors) <= TOLERANCE  # worst seen 3.2e-7


@TIED
@pytest.mark.parametrize("family", more_families())
def test_products_of_more_families_equal_the_gradients_multiplied(family: str, tied: bool) -> None:
    """States, experts and shared tensors beside the linear maps change nothing."""
    architecture, store = parts_of(tiny_model(family, tied=tied))
    engine = make_engine(architecture, store, frozen=fixed(architecture))
    whole = run(engine, {})
    # Gradients of what is before the first layer and behind the last one are formed: these are few and small.
    apart = {*architecture.entry_names, *architecture.norm_names}
    projectors = random_projectors(architecture.parameter_shapes(), (whole.keys() - apart).__contains__)
    got = run(engine, projectors)
    assert all(got[name].shape == projected_shape(whole[name].shape, RANK) for name in projectors)
    assert (
        worst_error(got, whole, projectors) <= 1e-5
    )  # sums in another order, through gradients that are differences of larger numbers


@TIED
@pytest.mark.parametrize("side", SIDES)
def test_either_side_will_do(tmp_path: Path, side: Side, tied: bool) -> None:
    """The side is the projector's; the engine does not ask for the shape. Chunks of the head add up."""
    tiny_model("qwen2", tied=tied).save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    engine = make_engine(architecture, store)
    projectors = random_projectors(architecture.parameter_shapes(), side=side)
    assert worst_error(run(engine, projectors), run(engine, {}), projectors) <= TOLERANCE  # worst seen 4.8e-7


@pytest.mark.parametrize(
    "wanted",
    [
        lambda name: "q_proj" in name or "down_proj" in name,
        lambda name: "layers.1." in name,
        lambda name: "embed" in name,
        lambda name: "lm_head" in name,
    ],
    ids=["by kind", "one layer", "embedding", "head"],
)
def test_projected_and_whole_stand_side_by_side(tmp_path: Path, wanted: Callable[[str], bool]) -> None:
    tiny_model("qwen2", tied=False).save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    engine = make_engine(architecture, store)
    projectors = random_projectors(architecture.parameter_shapes(), wanted)
    assert projectors
    assert worst_error(run(engine, projectors), run(engine, {}), projectors) <= TOLERANCE  # worst seen 2.8e-7


def test_products_with_a_chunked_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("gemma2").save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    engine = make_engine(architecture, store)
    projectors = random_projectors(architecture.parameter_shapes())
    whole = run(engine, {})
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(cross_entropy, "_MIN_TOKENS", 3)
    assert worst_error(run(engine, projectors), whole, projectors) <= TOLERANCE  # worst seen 7.2e-7


# Against float32's gradients the ordinary path is allowed 6e-2 and 1e-2 (tests/reference/test_gradients.py). Both
# paths round, the ordinary one G, the other A and x A or d A; forward and backward before them weigh more: with
# these models the ordinary path's gradients, multiplied, are as far off within three in a hundred.
@pytest.mark.parametrize(
    ("compute_dtype", "tolerance"),
    [(torch.bfloat16, 6e-2), (torch.float16, 1e-2)],  # worst seen 2.6e-2 and 3.8e-3
    ids=["bf16", "fp16"],
)
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_products_in_half_precision(tmp_path: Path, family: str, compute_dtype: torch.dtype, tolerance: float) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    projectors = random_projectors(architecture.parameter_shapes())
    whole = run(make_engine(architecture, store), {})
    got = run(make_engine(architecture, store, compute_dtype=compute_dtype), projectors)
    assert worst_error(got, whole, projectors) <= tolerance


def test_fp16_tries_again_from_empty_products(tmp_path: Path) -> None:
    """A product that is not finite has the layer done again, and nothing of the first try stays in the second's."""
    tiny_model("llama").save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    projectors = random_projectors(architecture.parameter_shapes(), lambda name: "o_proj" in name)
    whole = run(make_engine(architecture, store), {})
    engine = make_engine(architecture, store, compute_dtype=torch.float16)
    original, tries = engine._layers._one_pass, [0]

    def first_try_overflows(*args):  # type: ignore[no-untyped-def]
        grads, in_grads = original(*args)
        tries[0] += 1
        if tries[0] % 2:
            next(grad for name, grad in grads.items() if "o_proj" in name).product[0, 0] = float("inf")
        return grads, in_grads

    engine._layers._one_pass = first_try_overflows  # type: ignore[method-assign]
    got = run(engine, projectors)
    assert tries[0] == 2 * 3
    assert worst_error(got, whole, projectors) <= 1e-2  # as above; worst seen 4.2e-3


def test_order_of_micro_batches_does_not_matter(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    engine = make_engine(architecture, store)
    projectors = random_projectors(architecture.parameter_shapes())
    one, other = run(engine, projectors), run(engine, projectors, list(reversed(ragged_batches())))
    assert worst_error(one, other, {}) <= 2e-6  # sums of three float32 terms in another order; worst seen 2e-7


def test_without_projectors_no_mode_is_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode makes every operation slower; only layers that have a projected weight pay for it."""
    tiny_model("llama").save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    engine = make_engine(architecture, store)
    entered: list[object] = []
    original = ProjectedLinears.__enter__
    monkeypatch.setattr(ProjectedLinears, "__enter__", lambda mode: entered.append(mode) or original(mode))
    run(engine, {})
    assert not entered
    run(engine, random_projectors(architecture.parameter_shapes(), lambda name: "layers.1." in name))
    assert len(entered) == len(ragged_batches())


class _Made(StorageTracker):
    """Sizes of all storages that operations made; those of the store are given."""

    def __init__(self, given: set[int]) -> None:
        super().__init__(torch.device("cpu"))
        self.given, self.sizes = given, set[int]()

    def _add(self, tensor: Tensor, category: Category) -> bool:
        if tensor.untyped_storage().data_ptr() not in self.given:
            self.sizes.add(tensor.untyped_storage().nbytes())
        return super()._add(tensor, category)


class _Early(Observer):
    """Bytes of what was tagged as a gradient before it was handed on."""

    watches_tensors = True

    def __init__(self) -> None:
        self.now, self.tagged = "", list[int]()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        self.now = name
        yield

    def tag(self, tensor: Tensor, category: Category) -> None:
        if category == "gradients" and self.now != "step":
            self.tagged.append(tensor.untyped_storage().nbytes())


@TIED
@pytest.mark.parametrize("side", [None, *SIDES])
def test_no_projected_weights_gradient_is_ever_formed(tmp_path: Path, tied: bool, side: Side | None) -> None:
    """No operation makes as many bytes as any weight has: numbers of tokens are such that no activation can."""
    tiny_model("llama", tied=tied).save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    shapes = architecture.parameter_shapes()
    sizes = {4 * shape.numel() for shape in shapes.values() if len(shape) == 2}

    def made(projectors: dict[str, Projector]) -> tuple[set[int], list[int]]:
        observer = _Early()
        tracker = _Made({store[name].first.untyped_storage().data_ptr() for name in shapes})
        with tracker:
            run(make_engine(architecture, store, observer=observer), projectors)
        return tracker.sizes, observer.tagged

    assert sizes <= made({})[0], "the tracker sees gradients where they are formed"
    projectors = random_projectors(shapes, side=side)
    made_sizes, tagged = made(projectors)
    assert not made_sizes & sizes
    products = sorted(4 * projector.of(store[name].first).numel() for name, projector in projectors.items())
    norms = sorted(size for size in tagged if size == 4 * 64)  # tagged too: they are the gradients beside
    assert sorted(set(tagged) - set(norms)) == sorted(set(products)) and len(tagged) - len(norms) == len(products)


@pytest.mark.parametrize("both", [False, True], ids=["outside alone", "both ways"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float16], ids=str)
def test_a_weight_used_outside_of_linear(tmp_path: Path, both: bool, compute_dtype: torch.dtype) -> None:
    """A module may multiply in its own way: its weight's gradient is formed, and multiplied."""
    tiny_model("llama").save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    mlp = architecture.layers[1].mlp

    def forward(hidden: Tensor) -> Tensor:
        up = hidden @ mlp.up_proj.weight.T
        if both:
            up = up + functional.linear(weight=mlp.up_proj.weight, input=hidden.tanh())
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden)) * up)  # type: ignore[no-any-return]

    mlp.forward = forward  # type: ignore[method-assign]
    projectors = random_projectors(architecture.parameter_shapes())
    whole = run(make_engine(architecture, store), {})
    got = run(make_engine(architecture, store, compute_dtype=compute_dtype), projectors)
    tolerance = TOLERANCE if compute_dtype == torch.float32 else 1e-2  # worst seen 2.9e-7 and 2.1e-3
    assert worst_error(got, whole, projectors) <= tolerance


def test_a_projected_parameter_without_gradient_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    mlp = architecture.layers[1].mlp
    mlp.forward = lambda hidden: hidden  # type: ignore[method-assign]
    projectors = random_projectors(architecture.parameter_shapes())
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.\w+\.weight gets no gradient"):
        run(make_engine(architecture, store), projectors)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("side", SIDES)
def test_projected_linear_against_its_plain_twin(side: Side, with_bias: bool) -> None:
    """In float64: the output to the bit, gradients by differences, the product by forming G; two calls add up."""
    draw = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    weight = random(6, 5).requires_grad_()
    bias = random(6).requires_grad_() if with_bias else None
    projector = Projector(random(5 if side == "right" else 6, 3), side)
    product = ProjectedSum(projector, weight.shape, torch.float64)
    expected = torch.zeros_like(product.sum, dtype=torch.float64)
    for _ in range(2):
        entering, signal = random(2, 4, 5).requires_grad_(), random(2, 4, 6)
        out = projected_linear(entering, weight, bias, product)
        assert torch.equal(out, functional.linear(entering, weight, bias))
        out.backward(signal)
        expected += plain_product(entering.detach(), signal, projector)
    assert weight.grad is None and product.touched
    # The sum is float32: two roundings of 6e-8.
    assert float((product.sum - expected).norm() / expected.norm()) <= 2e-7

    def by_input(entering: Tensor, *bias: Tensor) -> Tensor:
        return projected_linear(entering, weight, *(bias or (None,)), product)

    inputs = (random(2, 4, 5).requires_grad_(), *(() if bias is None else (bias,)))
    assert torch.autograd.gradcheck(by_input, inputs)
