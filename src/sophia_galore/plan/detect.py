"""Detects the facts that verdicts depend on. Nothing here decides."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterable
from typing import Any

import torch

from sophia_galore.config.field_types import TrackerName
from sophia_galore.errors import short
from sophia_galore.model.architecture import Architecture
from sophia_galore.plan.device import choose_device
from sophia_galore.plan.facts import MIN_BITSANDBYTES, BitsandbytesFacts, DeviceFacts, ModelFacts, Param


def detect_device(device: torch.device) -> DeviceFacts:
    """What a device can do.

    Args:
        device: One that exists, with its index if it is a GPU.
    """
    if device.type != "cuda":
        return DeviceFacts(str(device))
    return DeviceFacts(
        place=str(device),
        name=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        real_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        total_bytes=int(torch.cuda.mem_get_info(device)[1]),
    )


def planned_device(name: str) -> DeviceFacts:
    """What is known of the device that is planned for; a GPU that is not here is taken for one with bfloat16.

    Args:
        name: As `training.device`.

    Raises:
        EnvironmentProblem: There is no such kind of device.
    """
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        return DeviceFacts(place="cuda:0", name="a CUDA card", real_bf16=True)
    return detect_device(choose_device(name))


def detect_bitsandbytes(device: torch.device) -> BitsandbytesFacts:
    """Whether bitsandbytes is there, and holds a matrix in eight bits on a device: by letting it do so.

    Args:
        device: Where weights would be held.
    """
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return BitsandbytesFacts()
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MIN_BITSANDBYTES:
        wanted = ".".join(map(str, MIN_BITSANDBYTES))
        return BitsandbytesFacts(version, f"it is older than {wanted}, the first version that is supported")
    # What it says while it is imported is about things that are not asked of it here.
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
        from bitsandbytes.cextension import lib

        # Where loading its library failed, a stand-in keeps the reason.
        if reason := vars(lib).get("error_msg"):
            return BitsandbytesFacts(version, short(RuntimeError(reason)))
        if device.type == "cuda" and not lib.compiled_with_cuda:
            return BitsandbytesFacts(version, "the library that it loaded is for CPUs only")
        functional.int8_vectorwise_quant(torch.ones(2, 16, dtype=torch.float16, device=device))
    except Exception as error:  # whatever it is, weights can't be held by it
        return BitsandbytesFacts(version, short(error))
    finally:
        log.setLevel(level)
    return BitsandbytesFacts(version)


def missing_trackers(names: Iterable[TrackerName]) -> tuple[TrackerName, ...]:
    """Those trackers whose package is not installed. None is imported: that takes seconds.

    Args:
        names: The trackers that are asked for.
    """
    # Trackers write into folders of their own names: one beside the program would pass for a package without a file.
    found = {name: importlib.util.find_spec(name) for name in names}
    return tuple(name for name, spec in found.items() if spec is None or spec.origin is None)


def model_facts(model_config: Any, *, name: str = "", instead_of: str = "") -> ModelFacts:
    """What a model's configuration says.

    Args:
        model_config: The Hugging Face configuration.
        name: What is trained.
        instead_of: What was asked for, if that could not be had.
    """
    return ModelFacts(
        model_type=model_config.model_type,
        positions=getattr(model_config, "max_position_embeddings", None),
        vocab_size=getattr(model_config, "vocab_size", None),
        name=name,
        instead_of=instead_of,
    )


def parameter_facts(architecture: Architecture) -> tuple[Param, ...]:
    """Every parameter of a model, in its order.

    Args:
        architecture: The model's modules.
    """
    linears, routers = frozenset(architecture.linear_names()), architecture.router_names()
    return tuple(
        Param(
            name,
            tuple(parameter.shape),
            part=_part_of(name, architecture),
            is_head=name == architecture.head_name,
            is_linear=name in linears,
            padding_row=architecture.padding_idx.get(name),
            requires_grad=parameter.requires_grad,
            inner=architecture.inner_name(name),
            is_expert=architecture.is_expert(name),
            is_router=name in routers,
        )
        for name, parameter in architecture.model.named_parameters()
    )


def largest_token(tokenizer: Any) -> int:
    """The largest token id that a tokenizer knows, its special tokens included.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """
    ids: list[int] = [len(tokenizer) - 1, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()]
    return max(ids)


def _part_of(name: str, architecture: Architecture) -> str:
    # The embedding first: a tied head is it.
    if name == architecture.embed_name:
        return "embed"
    if name in (architecture.head_name, architecture.head_bias_name):
        return "head"
    if name in architecture.norm_names:
        return "norm"
    return "layer" if name.startswith(tuple(f"{layer}." for layer in architecture.layer_names)) else "entry"
