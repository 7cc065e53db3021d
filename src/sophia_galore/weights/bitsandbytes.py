"""Linear layers with frozen eight-bit weights of bitsandbytes; their biases are trained.

A `Linear8bitLt` replaces a linear module inside the decoder layers and holds its weight: the engine passes only the
other weights of a layer (norms, biases), and the gradient with respect to the layer's input flows through. Its result
depends on the device: on CUDA, bitsandbytes rounds the input to float16 and, row by row, to eight bits; on a CPU it
does so in evaluation only, while in training the weight is decoded and the product is exact.

The package is optional and only imported here; whether it works on the device is checked when a run is planned
(`plan.detect`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sophia_galore.errors import EnvironmentProblem, ModelError, RunError, short
from sophia_galore.numerics.noise import Noise
from sophia_galore.weights.row_int8 import RowInt8Weight
from sophia_galore.weights.weight import Rows, Weight

QUANTISED_FROM = torch.float16
"""bitsandbytes rounds a weight to this first, so the weight must be finite in it."""

# Columns of the input with an entry above this are multiplied in floating point, as published (LLM.int8()) and as with
# load_in_8bit. With one entry of 100 among entries of size 1, the product is 0.05 % off; without the threshold, 1.7 %.
_OUTLIER_THRESHOLD = 6.0


class Frozen8bit(Weight):
    """The weight of one `Linear8bitLt`.

    Args:
        module: The module, which owns codes and scales.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    @property
    def format(self) -> str:
        """bnb8."""
        return "bnb8"

    @property
    def shape(self) -> torch.Size:
        """See `Weight`; known even if codes or scales were lost."""
        return torch.Size((self._module.out_features, self._module.in_features))

    @property
    def held_by_module(self) -> bool:
        """Yes."""
        return True

    def __getitem__(self, rows: Rows) -> RowInt8Weight:
        """See `Weight`."""
        return self.held()[rows]

    def values(self, dtype: torch.dtype) -> Tensor:
        """See `Weight`; these are the values that the module uses."""
        return self.held().values(dtype)

    def write(self, values: Tensor, noise: Noise | None) -> None:
        """Raise an error: the weight is frozen.

        Raises:
            RunError: Always.
        """
        self.held().write(values, noise)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> RowInt8Weight:
        """See `Weight`; the result is not part of a module."""
        return self.held().with_tensors(tensors)

    def copied_to(self, device: torch.device) -> RowInt8Weight:
        """See `Weight`; the copy is not part of a module."""
        return self.held().copied_to(device)

    def copy_(self, other: Weight) -> None:
        """Do nothing: the weight is frozen, so a copy from the same run is equal."""

    def held(self) -> RowInt8Weight:
        """Return the module's codes and scales, not a copy.

        Raises:
            RunError: They are missing.
        """
        codes, absmax = self._pair()
        if codes is None or absmax is None:
            raise RunError(f"A Linear8bitLt of shape {tuple(self.shape)} {self.problem()}.")
        return RowInt8Weight(codes, absmax)

    def tensors(self) -> dict[str, Tensor]:
        """See `Weight`."""
        return self.held().tensors()

    def problem(self) -> str | None:
        """See `Weight`; the module is checked too."""
        codes, absmax = self._pair()
        if codes is None or absmax is None:
            return f"has lost its {'codes (CB)' if codes is None else 'scales (SCB)'}"
        if codes.shape != self.shape:
            return f"holds codes of shape {tuple(codes.shape)} instead of {tuple(self.shape)}"
        if self._module.weight.requires_grad or self._module.state.has_fp16_weights:
            return "is set to be trained, which weights in eight bits of bitsandbytes can't be"
        return RowInt8Weight(codes, absmax).problem()

    def _pair(self) -> tuple[Tensor | None, Tensor | None]:
        """Return codes and scales from where the next forward reads them.

        They are created on the parameter; the first forward moves both to the module's state.
        """
        module = self._module
        place = module.state if getattr(module.weight, "CB", None) is None else module.weight
        return place.CB, getattr(place, "SCB", None)


class Freezer:
    """Replaces linear modules by `Linear8bitLt`, one by one, as their weights are read.

    Args:
        model: The model, with parameters on the meta device; changed in place.
        linears: Names of the weights of linear modules inside its decoder layers.
        names: Names of the weights to freeze.
        device: Device of the frozen weights.

    Raises:
        EnvironmentProblem: bitsandbytes is missing or broken.
        ModelError: A name is not the weight of a plain linear module inside a decoder layer.
    """

    def __init__(
        self, model: nn.Module, linears: Collection[str], names: Collection[str], device: torch.device
    ) -> None:
        _hide_known_warnings()
        try:
            self._nn: Any = importlib.import_module("bitsandbytes.nn")
        except Exception as error:  # a broken installation fails in whatever way its native library does
            raise EnvironmentProblem(
                f"quantization.backend: bitsandbytes can't be used here, importing the package fails: {short(error)}.",
                'Install it: pip install "sophia-galore[bitsandbytes]".',
            ) from error
        for name in names:
            # A subclass of nn.Linear may do more than the product, which would be lost.
            if name in linears and type(model.get_submodule(name.removesuffix(".weight"))) is nn.Linear:
                continue
            raise ModelError(
                f"bitsandbytes can't hold {name}: it is not the weight of a plain linear layer in a decoder layer.",
                "Use quantization.backend: native for this model.",
            )
        self.names = frozenset(names)
        self._model, self._device = model, device

    def freeze(self, name: str, weight: Weight) -> Frozen8bit:
        """Replace a linear module by a `Linear8bitLt`. Its bias stays the same parameter and trainable.

        Args:
            name: The weight's name, one of `names`.
            weight: (m, n), finite in `QUANTISED_FROM`. Codes and scales are copied; other formats are quantised by
                bitsandbytes on the device.

        Returns:
            The module's weight.

        Raises:
            RunError: The module is not as expected, so this version of bitsandbytes works differently.
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
        # Moving a tensor from the CPU quantises it; a tensor that is already on the device would stay as it is.
        return self._nn.Int8Params(weight.values(QUANTISED_FROM).to("cpu"), **settings).to(self._device)


class _KnownWarnings(logging.Filter):
    """Drops warnings of bitsandbytes that are expected here."""

    _BEGINNINGS = (
        # Logged at each product, hundreds of times per step. It describes the format, as the docstring above does.
        "MatMul8bitLt: inputs will be cast",
        # About a kernel for four bits, which is not used here.
        "Failed to load CPU gemm_4bit_forward",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._BEGINNINGS)


_KNOWN_WARNINGS = _KnownWarnings()


def _hide_known_warnings() -> None:
    # A logger ignores a filter that it already has.
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(_KNOWN_WARNINGS)
