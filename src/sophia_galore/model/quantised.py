"""Detect and refuse models whose weights are quantised, before anything else is read.

Quantised weights can't be trained. They are detected by config.json and by the dtypes in the headers of the weights,
since a `quantization_config` may be left over although the weights have full precision, or be missing although they
are quantised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sophia_galore.errors import ModelError
from sophia_galore.model.headers import read_folder_headers
from sophia_galore.model.origin import is_hub_id, read_origin
from sophia_galore.weights.folder import INVERSE_FREQUENCIES, is_int8
from sophia_galore.weights.safetensors_header import TensorHeader

_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
_MLX = "MLX"
_FULL_PRECISION = ("F64", "F32", "F16", "BF16")
# What counts and numbers are stored in, such as positions in the part of a model that sees.
_NO_WEIGHTS = ("I64", "BOOL")
# Tensors that quantisations store with weights; their dtype may be an ordinary one. Weights of norms end otherwise.
_BESIDE = re.compile(r"\.(qweight|weight_packed|weight_scale(_inv)?|SCB|g_idx|codebooks|W_q)$")
_ENDING = re.compile(
    r"[-_.](unsloth|bnb|gptq|awq|fp8|nvfp4|mxfp4|int[48]|w[48]a\d+|[48]-?bits?|mlx|quantized|dynamic|g\d+)$",
    re.IGNORECASE,
)


def declared_quantisation(config: Mapping[str, Any]) -> str | None:
    """Return the quantisation that a config.json declares, by its name; None: none.

    Args:
        config: Its keys and values.
    """
    if isinstance(config.get("quantization"), Mapping) and "bits" in config["quantization"]:
        return _MLX
    declared = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(declared, Mapping):
        return None
    method = str(declared.get("quant_method") or "").lower()
    if method in ("bitsandbytes", "") and ("load_in_4bit" in declared or "load_in_8bit" in declared):
        return f"bitsandbytes in {'4' if declared.get('load_in_4bit') else '8'} bits"
    if method == "" and declared.get("bits"):
        return f"{declared['bits']} bits"
    if method == "" and "format" in declared:
        return _NAMES["compressed-tensors"]
    return _NAMES.get(method, method or "a kind that it does not name")


def found_quantisation(headers: Mapping[str, TensorHeader]) -> str | None:
    """Return the quantisation that the headers of weights show; None: they are in full precision.

    Args:
        headers: The tensors by name.
    """
    kinds = {header.dtype for name, header in headers.items() if not name.endswith(INVERSE_FREQUENCIES)}
    endings = {match[1] for name in headers if (match := _BESIDE.search(name))}
    odd = sorted(kinds - {*_FULL_PRECISION, *_NO_WEIGHTS})
    if not odd and not endings:
        return None
    if "qweight" in endings:
        return "GPTQ or AWQ"
    if "SCB" in endings:
        return "bitsandbytes in 8 bits"
    if any(".quant_state.bitsandbytes" in name for name in headers):
        return "bitsandbytes in 4 bits"
    if "weight_packed" in endings:
        return _NAMES["compressed-tensors"]
    if any(kind.startswith("F8") for kind in odd):
        return "FP8"
    if "U32" in odd:
        return _MLX
    return (
        f"tensors of type {', '.join(odd)}" if odd else f"tensors beside them that end in {', '.join(sorted(endings))}"
    )


def refuse_quantised(folder: Path) -> str | None:
    """Refuse a model folder whose weights are packed.

    Args:
        folder: The folder; its config.json may be all that is there.

    Returns:
        What config.json declares although the weights are in full precision, by its name; None: nothing.

    Raises:
        ModelError: The weights are packed.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the reader of the configuration reports the error
    declared = declared_quantisation(config) if isinstance(config, dict) else None
    if is_int8(folder):
        return declared  # weights in our own eight-bit format
    has_weights = any(folder.glob("*.safetensors"))
    try:
        found = found_quantisation(read_folder_headers(folder)) if has_weights else declared
    except (ModelError, OSError, ValueError):
        found = declared
    if found is not None:
        raise quantised_error(str(folder), declared or found, read_origin(folder).base_model)
    return declared


def quantised_error(name: str, kind: str, base: str = "") -> ModelError:
    """Return the error for a model whose weights are quantised.

    Args:
        name: The name to show.
        kind: The quantisation.
        base: The model that it was derived from; "": unknown.
    """
    given = f"{base}, which it was made from" if base else "its full-precision version"
    if not base and is_hub_id(name) and (plain := _without_ending(name.partition("/")[2])):
        given += f" (such as {plain} of its authors)"
    return ModelError(
        f"{name} is quantised ({kind}): packed weights can't be trained.",
        f"Give {given} instead; eight bits are made from that here, by quantization.enabled=true.",
    )


def _without_ending(name: str) -> str:
    """Return a model's name without the suffixes for quantisations; "" if it has none."""
    plain = name
    while (shorter := _ENDING.sub("", plain)) != plain:
        plain = shorter
    return "" if plain == name else plain
