"""The categories of memory: their order from what always stands to what comes and goes, and their colours."""

from __future__ import annotations

from collections.abc import Iterable

from sophia_galore.report.style import AMBER, BLUE, GREEN, PALE, PURPLE, SILVER, SKY

COLOURS = {
    "weights": BLUE,
    "optimizer state": SKY,
    "projections": PALE,
    "activations": GREEN,
    "gradients": AMBER,
    "logits": PURPLE,
    "other": SILVER,
}
"""In order of the stack: blue is what stays through the run, the rest lives within a step."""


def in_order(names: Iterable[str]) -> list[str]:
    """The names in the order of the stack; those that are not known come last, in their own order."""
    known = list(COLOURS)
    return sorted(dict.fromkeys(names), key=lambda name: known.index(name) if name in COLOURS else len(known))


def colour_of(name: str) -> str:
    """Its colour; of what is not known, that of "other"."""
    return COLOURS.get(name, COLOURS["other"])
