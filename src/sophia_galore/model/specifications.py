"""Configurations of well-known models, for planning without weights and without a network.

A specification has only those keys of the published config.json that determine shapes and memory; it is not enough to
run the model (rotary frequencies, for example, are left out). The numbers of parameters are those of the published
weights, with a tied head counted once; a test builds each model and counts.

Variants of a model (base, instruct) share a specification, since their shapes are equal. If they differ in the maximum
length or the padding token, the values are those of the variant in `aliases.py`.
"""

from __future__ import annotations

from sophia_galore.model.known_gemma import GEMMA
from sophia_galore.model.known_granite import GRANITE
from sophia_galore.model.known_lfm import LFM
from sophia_galore.model.known_llama import LLAMA
from sophia_galore.model.known_mistral import MISTRAL
from sophia_galore.model.known_olmo import OLMO
from sophia_galore.model.known_others import OTHERS
from sophia_galore.model.known_phi import PHI
from sophia_galore.model.known_qwen import QWEN
from sophia_galore.model.known_smollm import SMOLLM
from sophia_galore.model.specification import Specification

__all__ = ["SPECIFICATIONS", "Specification", "find_specification"]

SPECIFICATIONS: tuple[Specification, ...] = (
    *SMOLLM,
    *QWEN,
    *LLAMA,
    *GEMMA,
    *PHI,
    *MISTRAL,
    *OLMO,
    *GRANITE,
    *LFM,
    *OTHERS,
)


def find_specification(name: str) -> Specification | None:
    """Find the specification of a model.

    Args:
        name: Its short name, one of its ids on a hub, or such an id without the owner; case does not matter.
    """
    wanted = name.lower()
    for specification in SPECIFICATIONS:
        ids = [hub_id.lower() for hub_id in specification.hub_ids]
        if wanted == specification.name or wanted in ids or wanted in (hub_id.split("/")[1] for hub_id in ids):
            return specification
    return None
