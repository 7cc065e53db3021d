"""Linear layers whose weights bitsandbytes holds in eight bits, frozen; their biases are trained like any other.

A `Linear8bitLt` takes the place of a linear layer inside the decoder layers, and computes with its own weight: the
engine passes in the rest of a layer (norms, biases) and the gradient by the layer's input flows through. What it
computes depends on the device, and that is bitsandbytes' choice: on CUDA the input is rounded to float16 and, row by
row, to eight bits; on a CPU so in evaluation only, while in training the weight is decoded and the product is exact.

The package is an optional extra, which is imported where it is used and nowhere else; whether it works on the
device is asked when a run is planned (`plan.detect`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from sophia_galore.errors import EnvironmentProblem, ModelError, RunError, short
from sophia_galore.numerics.noise import Noise
from sophia_galore.weights.row_int8 import RowInt8Weight
from sophia_galore.weights.weight import Rows, Weight

QUANTISED_FROM = torch.float16
"""bitsandbytes rounds a weight to this first, so that is what it has to be finite in."""

# Columns of the input with an entry above this are multiplied in floating point, as published (LLM.int8()) and as
# load_in_8bit means elsewhere. With one entry of 100 among those of size 1, the product is 0.05 % off; without, 1.7 %.
_OUTLIER_THRESHOLD = 6.0


class Frozen8bit(Weight):
    """The weight of one `Linear8bitLt`.

    Args:
        module: The module, which stays the owner of codes and scales.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    @property
    def format(self) -> str:
        """bnb8."""
        return "bnb8"

    @property
    def shape(self) -> torch.Size:
        """See `Weight`, even where codes or scales were lost."""
        return torch.Size((self._module.out_features, self._module.in_features))

    @property
    def held_by_module(self) -> bool:
        """Yes."""
        return True

    def __getitem__(self, rows: Rows) -> RowInt8Weight:
        """See `Weight`."""
        return self.held()[rows]

    def values(self, dtype: torch.dtype) -> Tensor:
        """See `Weight`: the values with which the module computes."""
        return self.held().values(dtype)

    def write(self, values: Tensor, noise: Noise | None) -> None:
        """Refuse: the weight is frozen.

        Raises:
            RunError: Always.
        """
        self.held().write(values, noise)

    def copied_to(self, device: torch.device) -> RowInt8Weight:
        """See `Weight`, outside of the module."""
        return self.held().copied_to(device)

    def copy_(self, other: Weight) -> None:
        """Nothing: it never changes, so that of the same run is what it is."""

    def held(self) -> RowInt8Weight:
        """Return the module's codes and scales themselves, not a copy.

        Raises:
            RunError: They are not there.
        """
        codes, absmax = self._pair()
        if codes is None or absmax is None:
            raise RunError(f"A Linear8bitLt of shape {tuple(self.shape)} {self.problem()}.")
        return RowInt8Weight(codes, absmax)

    def tensors(self) -> dict[str, Tensor]:
        """See `Weight`."""
        return self.held().tensors()

    def problem(self) -> str | None:
        """See `Weight`, of the module."""
        codes, absmax = self._pair()
        if codes is None or absmax is None:
            return f"has lost its {'codes (CB)' if codes is None else 'scales (SCB)'}"
        if codes.shape != self.shape:
            return f"holds codes of shape {tuple(codes.shape)} instead of {tuple(self.shape)}"
        if self._module.weight.requires_grad or self._module.state.has_fp16_weights:
            return "is set to be trained, which weights in eight bits of bitsandbytes can't be"
        return RowInt8Weight(codes, absmax).problem()

    def _pair(self) -> tuple[Tensor | None, Tensor | None]:
        """Codes and scales from where the next forward takes them.

        They are made on the parameter; the first forward moves both to the module's state.
        """
        module = self._module
        place = module.state if getattr(module.weight, "CB", None) is None else module.weight
        return place.CB, getattr(place, "SCB", None)


class Freezer:
    """Puts a `Linear8bitLt` in place of one linear layer after the other, as their weights are read.

    Args:
        model: The model, parameters on the meta device; changed in place.
        linears: Names of the weights of the linear layers inside its decoder layers.
        names: Names of the weights to freeze.
        device: Where the frozen weights live.

    Raises:
        EnvironmentProblem: bitsandbytes is missing or broken.
        ModelError: A name is not that of a plain linear layer's weight inside a decoder layer.
    """

    def __init__(
        self, model: nn.Module, linears: Collection[str], names: Collection[str], device: torch.device
    ) -> None:
        _silence()
        try:
            self._nn: Any = importlib.import_module("bitsandbytes.nn")
        except Exception as error:  # a broken installation fails in whatever way its native library does
            raise EnvironmentProblem(
                f"quantization.backend: bitsandbytes can't be used here, importing the package fails: {short(error)}.",
                'Install it: pip install "sophia-galore[bitsandbytes]".',
            ) from error
        for name in names:
            # What a model's own kind of linear layer does beside the product is not known, and would be lost.
            if name in linears and type(model.get_submodule(name.removesuffix(".weight"))) is nn.Linear:
                continue
            raise ModelError(
                f"bitsandbytes can't hold {name}: it is not the weight of a plain linear layer in a decoder layer.",
                "Use quantization.backend: native for this model.",
            )
        self.names = frozenset(names)
        self._model, self._device = model, device

    def freeze(self, name: str, weight: Weight) -> Frozen8bit:
        """Put a `Linear8bitLt` in a linear layer's place. Its bias stays the same parameter, and stays trained.

        Args:
            name: The weight's name, one of `names`.
            weight: (m, n), finite in `QUANTISED_FROM`. Codes and scales are copied as they are; anything else is
                quantised by bitsandbytes, on the device.

        Returns:
            The module's weight.

        Raises:
            RunError: The module is not as it should be, so this version of bitsandbytes works in another way.
        """
        place = name.removesuffix(".weight")
        parent_name, _, key = place.rpartition(".")
        linear: Any = self._model.get_submodule(place)
        module = self._nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=_OUTLIER_THRESHOLD,
            device="meta",
        )
        module.weight = self._parameter(weight)
        module.bias = linear.bias
        module.train(linear.training)
        made = Frozen8bit(module)
        if problem := made.problem():
            raise RunError(
                f"bitsandbytes was given {name}, which now {problem}.",
                "Take the version of bitsandbytes that constraints.txt names, or quantization.backend: native.",
            )
        setattr(self._model.get_submodule(parent_name), key, module)
        return made

    def _parameter(self, weight: Weight) -> Any:
        settings = {"requires_grad": False, "has_fp16_weights": False}
        if isinstance(weight, RowInt8Weight):
            own = weight.copied_to(self._device)
            return self._nn.Int8Params(own.codes, CB=own.codes, SCB=own.absmax, **settings)
        # It quantises what comes from a CPU only; a tensor that is on the device already it would leave as it is.
        return self._nn.Int8Params(weight.values(QUANTISED_FROM).to("cpu"), **settings).to(self._device)


class _Known(logging.Filter):
    """Drops what bitsandbytes says at each import or each call, and what is meant to be so here."""

    _BEGINNINGS = (
        # At each product, hundreds of times a step. What it says is how the format works; the docstring above says it.
        "MatMul8bitLt: inputs will be cast",
        # A kernel for four bits, which nothing here uses.
        "Failed to load CPU gemm_4bit_forward",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._BEGINNINGS)


_KNOWN = _Known()


def _silence() -> None:
    # A logger ignores a filter that it has already.
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(_KNOWN)
