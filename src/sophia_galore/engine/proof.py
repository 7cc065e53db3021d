"""Proof that the engine trains an architecture: its gradients are those of plain autograd.

The engine runs a model layer by layer and knows nothing of what its code does around the layers. So before an
architecture is trained that the tests don't cover, the engine and autograd both train a small twin of it, with random
weights and a few examples of different lengths. Autograd sees every example alone, the engine sees them padded, and
packed into rows; so what leaks from padding or between examples is found as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sophia_galore.data.batches import IGNORED, MicroBatch, collate
from sophia_galore.data.example import Example
from sophia_galore.data.portion import whole
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.errors import ModelError, SophiaGaloreError, short
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.experts import run_one_by_one, separate_experts
from sophia_galore.model.find_parts import find_architecture
from sophia_galore.model.twin import VOCABULARY, twins
from sophia_galore.numerics.subspace import tensor_of
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.store import WeightStore

TOLERANCE = 1e-5
"""Largest difference of a parameter's gradient from autograd's, relative to its norm, in float32. Where autograd's own
rounding is worse than that, it counts instead, times `_ROUNDING`."""

_ROUNDING = 10.0
_MOST_ROUNDING = 1e-4

# Gradients that are smaller than the largest by this factor are compared with it times this: they are differences of
# larger numbers, whose rounding would be mistaken for a fault.
_FLOOR = 1e-2
FindRounding = Callable[[], Mapping[str, float]]
_LENGTHS = (11, 5, 17, 8)
_PADDING = 2  # as in the configurations of twins
_CPU = torch.device("cpu")
# A larger twin would take minutes.
_MOST_PARAMETERS = 200_000_000
_MOST_TRIES = 8


@dataclass(frozen=True)
class Proof:
    """What the comparison showed.

    Args:
        problem: Why the architecture can't be trained, as a sentence; empty if it can.
        packing_problem: The same for packed examples.
        unreached: Parameters that autograd gives no gradient either, by their names inside a layer or, outside of the
            layers, in the model. They stay as they are.
        parameter: The parameter whose gradient differs most.
        difference: By how much, relative to its norm.
        num_parameters: Parameters of the twin.
        num_layers: Layers of the twin.
    """

    problem: str = ""
    packing_problem: str = ""
    unreached: tuple[str, ...] = ()
    parameter: str = ""
    difference: float = 0.0
    num_parameters: int = 0
    num_layers: int = 0


def prove(config: Any, *, trust_remote_code: bool = False) -> Proof:
    """Compare the engine with autograd on a twin.

    Args:
        config: The Hugging Face configuration of the model; not changed.
        trust_remote_code: Whether to run Python code that came with it.

    Returns:
        The proof, or what is against it.
    """
    reason = ""
    candidates = twins(config)
    for _ in range(_MOST_TRIES):
        try:
            twin = next(candidates, None)
            if twin is None or _num_parameters(twin, trust_remote_code) > _MOST_PARAMETERS:
                break
            model = _random_model(twin, trust_remote_code)
            expected = _autograd(model, _alone())
            is_causal = _is_causal(model)
        except Exception as error:  # whatever a model's code says of sizes that it does not take
            reason = f"{type(error).__name__}: {short(error)}"
            continue
        if not is_causal:
            return Proof(
                f"This {config.model_type} model is no causal language model: what it says of a token depends on the "
                "tokens behind it."
            )
        return _compared(model, *expected, partial(_rounding, twin, trust_remote_code, expected[1]))
    return Proof(
        f"No small twin of this {config.model_type} model runs ({reason}), so nothing is known of its gradients."
    )


def _num_parameters(config: Any, trust_remote_code: bool) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def _random_model(config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                # Fresh norms and biases are all equal; a swap of two of them would not be seen.
                parameter.add_((0.1 if parameter.ndim == 1 else 0.02) * torch.randn(parameter.shape))
    model.config.use_cache = False
    return model.train()


def _examples() -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in _LENGTHS]
    ids[0][3] = _PADDING  # texts may hold it too
    return [Example.of(tokens, [place != 1 for place in range(len(tokens))], "") for tokens in ids]


def _alone() -> list[MicroBatch]:
    return [collate([[example]], pad_id=_PADDING) for example in _examples()]


def _padded() -> list[MicroBatch]:
    first, second, third, fourth = _examples()
    return [collate([[first], [second]], pad_id=_PADDING), collate([[third], [fourth]], pad_id=_PADDING)]


def _packed() -> list[MicroBatch]:
    first, second, third, fourth = _examples()
    return [collate([[first, second], [third, fourth]], pad_id=_PADDING)]


def _autograd(model: Any, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss a token and the gradients."""
    num_counted = sum(batch.num_counted for batch in batches)
    total = 0.0
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = functional.cross_entropy(
            logits.flatten(0, 1).to(_at_least_float32(logits)),
            batch.labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        (loss / num_counted).backward()
        total += float(loss.detach()) / num_counted
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    if not math.isfinite(total):
        raise ValueError(f"the loss of the twin is {total}")
    return total, {name: grad for name, grad in found.items() if grad is not None}


@torch.no_grad()
def _is_causal(model: Any) -> bool:
    """Return whether logits are the same, up to rounding, if later tokens are others."""
    ids = torch.tensor([_examples()[2].input_ids.tolist()])
    other = ids.clone()
    other[:, ids.shape[1] // 2 :] = ids[:, ids.shape[1] // 2 :].flip(1)
    one, two = (model(input_ids=each, use_cache=False).logits[:, : ids.shape[1] // 2].double() for each in (ids, other))
    return _size(one - two) <= _MOST_ROUNDING * _size(one)


def _at_least_float32(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _rounding(config: Any, trust_remote_code: bool, expected: dict[str, Tensor]) -> dict[str, float]:
    """Return how much autograd's gradients differ in float64, and with padding; at most `_MOST_ROUNDING`."""
    found = dict.fromkeys(expected, 0.0)
    for batches, dtype in ((_alone(), torch.float64), (_padded(), torch.float32)):
        try:
            other = _autograd(_random_model(config, trust_remote_code).to(dtype), batches)[1]
        except Exception:  # some models compute in float32 whatever is asked for
            continue
        for name in found.keys() & other.keys():
            difference = _size(expected[name].double() - other[name].double()) / (_size(other[name]) or 1.0)
            found[name] = max(found[name], min(difference, _MOST_ROUNDING))
    return found


def _compared(model: Any, expected_loss: float, expected: dict[str, Tensor], find_rounding: FindRounding) -> Proof:
    """Compare the engine with what autograd found; the rounding of its gradients is found if something differs."""
    rounding = cache(find_rounding)
    kind = model.config.model_type
    try:
        run_one_by_one(model.config)
        separate_experts(model)
        architecture = find_architecture(model)
        unreached = _unreached(architecture, expected)
        loss, found = _engine(architecture, _padded(), expected)
    except Exception as error:  # whatever a model's code says if it is run in another way than it expects
        return Proof(f"The engine can't run this {kind} model layer by layer: {_cause(error)}")
    parameter, difference = _worst(architecture, expected, found, rounding)
    proof = Proof(
        unreached=unreached,
        parameter=parameter,
        difference=difference,
        num_parameters=sum(each.numel() for each in model.parameters()),
        num_layers=len(architecture.layers),
    )
    if abs(loss - expected_loss) > TOLERANCE * abs(expected_loss) or not difference <= TOLERANCE:
        problem = (
            f"Trained layer by layer, this {kind} model would get wrong gradients: on a small twin that of {parameter} "
            f"differs from autograd's by {100 * difference:.2g} %, and the loss is {loss:.6f} instead of "
            f"{expected_loss:.6f}."
        )
        return replace(proof, problem=problem)
    return replace(proof, packing_problem=_packing_problem(architecture, expected, rounding))


def _packing_problem(architecture: Architecture, expected: dict[str, Tensor], rounding: FindRounding) -> str:
    try:
        found = _engine(architecture, _packed(), expected)[1]
        parameter, difference = _worst(architecture, expected, found, rounding)
    except Exception as error:  # as above
        return _cause(error)
    if difference <= TOLERANCE:
        return ""
    return f"Packed examples would see each other: the gradient of {parameter} differs by {100 * difference:.2g} %."


def _cause(error: Exception) -> str:
    return error.cause if isinstance(error, SophiaGaloreError) else f"{type(error).__name__}: {short(error)}"


def _unreached(architecture: Architecture, expected: dict[str, Tensor]) -> tuple[str, ...]:
    """Return the parameters without a gradient, by names that are the same in every layer.

    Raises:
        ModelError: One has a gradient in some layers only.
    """
    reached: dict[str, set[bool]] = {}
    gradients = _by_expert(architecture, expected)
    for name, _ in architecture.model.named_parameters():
        if not architecture.is_expert(name):
            reached.setdefault(architecture.inner_name(name), set()).add(name in gradients)
    mixed = next((name for name, found in reached.items() if len(found) > 1), None)
    if mixed is not None:
        raise ModelError(f"{mixed} gets a gradient in some layers only.", "Take another model.")
    return tuple(name for name, found in reached.items() if found == {False})


def _engine(
    architecture: Architecture, batches: Sequence[MicroBatch], expected: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Return the engine's loss and gradients; what autograd gives no gradient is frozen."""
    parameters = dict(architecture.model.named_parameters())
    reached = _by_expert(architecture, expected)
    store = WeightStore({name: PlainWeight(parameter.detach()) for name, parameter in parameters.items()})
    frozen = [name for name in parameters if name not in reached and not architecture.is_expert(name)]
    engine = LayerwiseEngine(
        architecture, store, compute_dtype=torch.float32, device=_CPU, seed=0, frozen=frozenset(frozen)
    )
    forward = engine.forward(whole(list(batches)), step=1)
    result = forward.result
    found: dict[str, Tensor] = {}
    for part in engine.backward(forward):
        with engine.using(part) as gradients:
            found |= {name: tensor_of(gradients[name]).clone() for name in gradients}
    return result.loss, found


def _worst(
    architecture: Architecture,
    expected: dict[str, Tensor],
    found: dict[str, Tensor],
    rounding: FindRounding,
) -> tuple[str, float]:
    """Return the parameter whose gradient differs most, and by how much; one that is missing differs by 100 %.

    What is within autograd's own rounding counts as a difference within the tolerance.
    """
    wanted = _by_expert(architecture, expected)
    floor = _FLOOR * max(_size(grad) for grad in wanted.values())
    differences: dict[str, float] = {}
    for name, grad in (wanted | found).items():
        if name not in wanted or name not in found:
            differences[name] = float(_size(grad) > 0)
            continue
        difference = _size(grad.double() - wanted[name].double()) / max(_size(wanted[name]), floor)
        if difference > TOLERANCE and difference <= _ROUNDING * rounding().get(architecture.of_all_experts(name), 0.0):
            difference = TOLERANCE
        differences[name] = difference
    worst = max(differences, key=differences.__getitem__)
    return worst, differences[worst]


def _size(grad: Tensor) -> float:
    """Return the root of the mean square of a gradient's entries."""
    return float(grad.norm()) / math.sqrt(grad.numel())


def _by_expert(architecture: Architecture, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients with those of experts apart."""
    apart: dict[str, Tensor] = {}
    for name, grad in gradients.items():
        if name in architecture.expert_tensors:
            apart |= {f"{name}.{number}": part for number, part in enumerate(grad.unbind())}
        else:
            apart[name] = grad
    return apart
