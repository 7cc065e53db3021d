"""Names of trackers, in the forms in which Hugging Face's `report_to` gives them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
"""A tracker, called as its package."""


def _listed(value: object) -> object:
    """A name, "none" or a list as a tuple of names, each of them once."""
    names = list(value) if isinstance(value, list | tuple) else [value]
    if names == ["none"]:
        return ()
    # What is no name is left to the check of types. "all", whatever is installed, is none: what a run does would
    # depend on the machine.
    return tuple(dict.fromkeys(names)) if all(isinstance(name, str) for name in names) else value


TrackerNames = Annotated[tuple[TrackerName, ...], BeforeValidator(_listed)]
"""Any number of trackers; in a configuration also one name, or "none"."""
