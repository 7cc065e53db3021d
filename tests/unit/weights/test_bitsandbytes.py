"""Weights in bitsandbytes' modules: there and back to the bit, what their products are worth, what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitsandbytes_here import NEEDS_BITSANDBYTES
from engines import CPU, load_frozen_parts, load_parts, make_engine, open_store, take_step
from sophia_galore.errors import ModelError, RunError
from sophia_galore.model.skeleton import build_skeleton, load_model_config
from sophia_galore.records.files import INT8_FILE
from sophia_galore.weights.bitsandbytes import Freezer, Frozen8bit
from sophia_galore.weights.files import load_store, save_weights
from sophia_galore.weights.int8 import Int8Format, Int8Weight, quantise
from sophia_galore.weights.plain import as_weight
from sophia_galore.weights.row_int8 import RowInt8Weight
from tiny import FAMILIES, ragged_batches, tiny_model, write_tiny_model

pytestmark = NEEDS_BITSANDBYTES

Q = "model.layers.0.self_attn.q_proj.weight"


def module_for(columns: int, rows: int, *, bias: bool = True, seed: int = 0) -> tuple[Any, Frozen8bit]:
    """A frozen linear layer of random weights, and its weight."""
    from types import SimpleNamespace

    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(columns, rows, bias=bias))
    values = layer[0].weight.detach().clone()
    model = nn.ModuleDict({"layer": layer})
    architecture: Any = SimpleNamespace(model=model, linear_names=lambda: ["layer.0.weight"])
    freezer = Freezer(architecture.model, architecture.linear_names(), ["layer.0.weight"], CPU)
    made = freezer.freeze("layer.0.weight", as_weight(values))
    return layer[0], made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_layers_is_frozen_and_nothing_else(family: str, tmp_path: Path) -> None:
    architecture, store, names = load_frozen_parts(write_tiny_model(tmp_path, family, tied=False))
    plain = dict(tiny_model(family, tied=False).named_parameters())
    assert set(names) == {name for name, weight in plain.items() if ".layers." in name and weight.ndim == 2}
    assert {name for name, weight in store.items() if isinstance(weight, Frozen8bit)} == set(names)
    assert list(architecture.parameter_shapes().items()) == [(name, weight.shape) for name, weight in plain.items()]
    for layer in architecture.layer_names:
        with store.borrow(layer) as borrowed:
            given = [f"{layer}.{key}" for key in borrowed.values_of(layer, torch.float32)]
        assert given and not set(given) & set(names), "the engine passes in norms and biases only"
    for name, weight in store.items():
        if isinstance(weight, Frozen8bit):
            assert weight.problem() is None
            # Half a code, of which the largest magnitude of a row is 127; and the rounding to float16.
            error = (weight.values(torch.float32) - plain[name]).abs().amax(1)
            assert bool((error <= plain[name].abs().amax(1) * (0.5 / 127 + 2**-10)).all())
        else:
            assert torch.equal(weight.values(torch.float32), plain[name])
    with pytest.raises(ModelError, match="plain linear layer"):
        Freezer(architecture.model, architecture.linear_names(), names, CPU)  # what is frozen is not frozen again


def test_there_and_back_to_the_bit_before_and_after_a_forward(tmp_path: Path) -> None:
    architecture, store, names = load_frozen_parts(write_tiny_model(tmp_path / "model", "qwen2"))
    saved: list[bytes] = []
    for which in ("fresh", "after a step"):
        folder = write_tiny_model(tmp_path / which, "qwen2")
        (folder / "model.safetensors").unlink()
        save_weights(folder, store)
        saved.append((folder / INT8_FILE).read_bytes())
        if which == "fresh":
            take_step(make_engine(architecture, store), ragged_batches(), lambda grads: None, step=1)
            make_engine(architecture, store).evaluate(ragged_batches())
    assert saved[0] == saved[1], "working with a weight does not change it"
    written = load_file(tmp_path / "after a step" / INT8_FILE)
    assert written[Q].dtype == torch.int8 and written[f"{Q}.scb"].dtype == torch.float32
    assert written.keys() == store.tensors().keys() == {name for name, _ in store.items()} | {f"{n}.scb" for n in names}
    other, again, _ = load_frozen_parts(tmp_path / "after a step")
    for key, tensor in again.tensors().items():
        assert torch.equal(tensor, written[key]) and torch.equal(tensor, store.tensors()[key]), key
    # A module that was made of codes computes what the one does that was made of floats.
    assert make_engine(other, again).evaluate(ragged_batches()) == make_engine(architecture, store).evaluate(
        ragged_batches()
    )


def test_codes_and_scales_of_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    """Not decoded and quantised anew, which would round; and not left in the mapped file, which may change."""
    folder = write_tiny_model(tmp_path)
    _, store, names = load_frozen_parts(folder)
    (folder / "model.safetensors").unlink()
    draw = torch.Generator().manual_seed(0)
    tensors = {key: tensor.clone() for key, tensor in store.tensors().items()}
    for name in names:
        tensors[name] //= 2  # the largest code of a row is not 127
        tensors[f"{name}.scb"] *= 1 + 1e-3 * torch.rand(len(tensors[name]), generator=draw)  # and no float16
    save_file(tensors, folder / INT8_FILE)
    _, again, _ = load_frozen_parts(folder)
    (folder / INT8_FILE).write_bytes(bytes((folder / INT8_FILE).stat().st_size))
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in again.tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoded_values_are_those_that_it_computes_with(dtype: torch.dtype) -> None:
    """To the bit, shown by products with single ones."""
    module, weight = module_for(64, 48, bias=False)
    assert torch.equal(module(torch.eye(64, dtype=dtype)).T, weight.values(dtype))


def test_there_is_one_copy_of_the_codes(tmp_path: Path) -> None:
    architecture, store, names = load_frozen_parts(write_tiny_model(tmp_path))
    for _ in range(2):
        for name in names:
            weight: Any = store[name]
            parameter = architecture.model.get_parameter(name)
            assert parameter.data_ptr() == weight.held().codes.data_ptr() and parameter.dtype == torch.int8
        make_engine(architecture, store).evaluate(ragged_batches())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_checkpoint_is_read_by_other_stores(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    architecture, store, names = load_frozen_parts(folder, dtype)
    save_weights(folder, store)
    (folder / "model.safetensors").unlink()
    _, plain = load_parts(folder, dtype)
    for name, weight in plain.items():
        assert torch.equal(weight.values(dtype), store[name].values(dtype)), name
    shapes, form = architecture.parameter_shapes(), Int8Format(32)
    native = load_store(folder, shapes, tied_head=None, dtype=dtype, device=CPU, int8=names, form=form)
    for name in names:
        expected, got = quantise(store[name].values(torch.float32), form), native[name]
        assert isinstance(got, Int8Weight) and torch.equal(got.codes, expected.codes)
    opened = open_store(folder, CPU)
    assert isinstance(opened[Q], RowInt8Weight), "which needs no bitsandbytes"
    assert opened.tensors().keys() == store.tensors().keys()
    assert all(torch.equal(tensor, store.tensors()[key]) for key, tensor in opened.tensors().items())


def test_it_reads_a_checkpoint_of_native_int8(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    architecture, _ = load_parts(folder)
    names, shapes = architecture.linear_names(), architecture.parameter_shapes()
    native = load_store(folder, shapes, tied_head=None, dtype=torch.float32, device=CPU, int8=names)
    save_weights(folder, native)
    (folder / "model.safetensors").unlink()
    _, store, _ = load_frozen_parts(folder)
    for name in names:
        values = native[name].values(torch.float32)
        error = (store[name].values(torch.float32) - values).abs().amax(1)
        assert bool((error <= values.abs().amax(1) * (0.5 / 127 + 2**-10)).all())


# Relative errors against float64 with the decoded weights, worst over 20 seeds. Products with a decoded weight
# (backward everywhere, forward in training on a CPU): float32 2.8e-7, bf16 3.2e-3. Forward with inputs in eight bits
# (evaluation on a CPU; CUDA): 7.0e-3.
EXACT = {torch.float32: 5e-7, torch.bfloat16: 6e-3}
EIGHT_BITS = 1.4e-2


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["decoded", "eight-bit inputs"])
@pytest.mark.parametrize("outlier", [0.0, 100.0])
def test_products_are_those_with_the_decoded_weight(outlier: float, training: bool, dtype: torch.dtype) -> None:
    for seed in range(3):
        module, weight = module_for(96, 48, seed=seed)
        module.train(training)
        decoded, bias = weight.values(torch.float64), module.bias.detach().to(dtype)
        module.bias = nn.Parameter(bias.clone())
        entering = torch.randn(2, 9, 96).to(dtype)
        entering[..., 5] += outlier
        entering[0, 0] = 0
        entering.requires_grad_()
        signal = torch.randn(2, 9, 48).to(dtype)
        out = module(entering)
        out.backward(signal)
        limit = EXACT[dtype]
        assert entering.grad is not None and module.weight.grad is None
        assert relative(out, entering.detach().double() @ decoded.T + bias.double()) <= (
            limit if training else EIGHT_BITS
        )
        assert relative(entering.grad, signal.double() @ decoded) <= limit
        assert relative(module.bias.grad, signal.double().sum((0, 1))) <= limit


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm())


def test_a_row_of_zeros_stays_zero() -> None:
    module, _ = module_for(16, 4, bias=False)
    with torch.no_grad():
        values = torch.randn(4, 16)
        values[2] = 0
        module.weight = type(module.weight)(values, requires_grad=False, has_fp16_weights=False).to("cpu")
    weight = Frozen8bit(module)
    assert weight.problem() is None
    assert not weight.values(torch.float32)[2].any()
    assert not module.eval()(torch.randn(3, 16))[:, 2].any()


def test_it_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    architecture, store, _ = load_frozen_parts(write_tiny_model(tmp_path))
    with caplog.at_level(logging.DEBUG):
        make_engine(architecture, store).evaluate(ragged_batches())
        logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert [record.message for record in caplog.records if "bitsandbytes" in record.name] == ["something else"]


def test_rows_and_refusals() -> None:
    _, weight = module_for(16, 8)
    assert (weight.shape, weight.numel(), weight.device) == ((8, 16), 128, CPU)
    assert torch.equal(weight[2:5].values(torch.float32), weight.values(torch.float32)[2:5])
    with pytest.raises(RunError, match="frozen"):
        weight.write(torch.zeros(8, 16), torch.Generator())


def _set(name: str, value: Any) -> Callable[[Any], None]:
    """Change codes or scales where the module has them at the moment."""

    def change(module: Any) -> None:
        place = module.weight if module.weight.CB is not None else module.state
        setattr(place, name, value(getattr(place, name)) if callable(value) else value)

    return change


def _set_nan(absmax: Tensor) -> Tensor:
    absmax[1] = torch.nan
    return absmax


DAMAGE: list[tuple[Callable[[Any], None], str]] = [
    (_set("SCB", None), "lost its scales (SCB)"),
    (_set("SCB", lambda absmax: absmax.half()), "float16 scales"),
    (_set("SCB", _set_nan), "not finite"),
    (_set("SCB", lambda absmax: -absmax), "negative"),
    (_set("SCB", lambda absmax: absmax[:-1]), "scales of shape (7,)"),
    (_set("CB", lambda codes: codes.float()), "float32 codes"),
    (_set("CB", lambda codes: codes[:, :-1]), "codes of shape (8, 15) instead of (8, 16)"),
    (lambda module: setattr(module.state, "has_fp16_weights", True), "to be trained"),
]


@pytest.mark.parametrize("worked", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize(("damage", "cause"), DAMAGE, ids=[cause for _, cause in DAMAGE])
def test_a_broken_state_is_told(damage: Callable[[Any], None], cause: str, worked: bool) -> None:
    module, weight = module_for(16, 8)
    if worked:
        module(torch.ones(1, 16))
        assert module.weight.CB is None, "bitsandbytes moved it, which is what is tested here"
    assert weight.problem() is None
    damage(module)
    assert cause in str(weight.problem())


def test_what_is_broken_is_neither_made_nor_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "model")
    _, store, _ = load_frozen_parts(folder)
    broken: Any = store[Q]
    broken.held().absmax[1] = torch.nan
    (tmp_path / "target").mkdir()
    with pytest.raises(RunError, match=rf"{Q} holds scales that are not finite, or negative, so it is not saved"):
        save_weights(tmp_path / "target", store)
    assert not any((tmp_path / "target").iterdir())
    assert store.first_non_finite() == Q
    # As another version might do it.
    monkeypatch.setattr("bitsandbytes.functional.int8_vectorwise_quant", lambda B: (B.char(), B[:, 0], None))
    with pytest.raises(RunError, match=r"bitsandbytes was given .*\.weight, which now holds .*float16 scales"):
        load_frozen_parts(folder)


def test_lost_codes_are_told() -> None:
    module, weight = module_for(16, 8)
    module.weight.CB = None
    assert "lost its codes (CB)" in str(weight.problem())
    with pytest.raises(RunError, match=r"Linear8bitLt of shape \(8, 16\) has lost its codes"):
        weight.values(torch.float32)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "x.weight"])
def test_only_linears_of_layers_can_be_frozen(name: str, tmp_path: Path) -> None:
    architecture = build_skeleton(load_model_config(write_tiny_model(tmp_path, tied=False)), CPU)
    with pytest.raises(ModelError, match=f"can't hold {name}"):
        Freezer(architecture.model, architecture.linear_names(), [Q, name], CPU)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e5])
def test_what_float16_cannot_hold_is_named(value: float, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[Q][3, 4] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{Q} holds values that are not finite in torch\.float16"):
        load_frozen_parts(folder)


FILE_DAMAGE: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda tensors: tensors.pop(f"{Q}.scb"), "its scales are not there"),
    (lambda tensors: tensors[f"{Q}.scb"].fill_(torch.nan), "not finite"),
    (lambda tensors: tensors.update({f"{Q}.scb": torch.ones(3)}), "scales of shape (3,)"),
    (lambda tensors: tensors[Q].fill_(-128), "-128"),
    (lambda tensors: tensors.pop(Q), "which this architecture does not have"),
]


@pytest.mark.parametrize(("damage", "cause"), FILE_DAMAGE, ids=[cause for _, cause in FILE_DAMAGE])
def test_a_damaged_checkpoint_is_told(damage: Callable[[dict[str, Tensor]], Any], cause: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    _, store, _ = load_frozen_parts(folder)
    (folder / "model.safetensors").unlink()
    tensors = {key: tensor.clone() for key, tensor in store.tensors().items()}
    damage(tensors)
    save_file(tensors, folder / INT8_FILE)
    with pytest.raises(ModelError) as caught:
        load_frozen_parts(folder)
    assert cause in caught.value.cause and Q in caught.value.cause
