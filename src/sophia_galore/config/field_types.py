"""What the sections of the configuration are made of: their base, and types of fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sophia_galore.optim.recipes import LARGEST, MOST

Count = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST)]

TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
"""A tracker, called as its package."""


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _listed(value: object) -> object:
    """A name, "none" or a list as a tuple of names, each of them once."""
    names = list(value) if isinstance(value, list | tuple) else [value]
    if names == ["none"]:
        return ()
    # What is no name is left to the check of types. "all", whatever is installed, is none: what a run does would
    # depend on the machine.
    return tuple(dict.fromkeys(names)) if all(isinstance(name, str) for name in names) else value


TrackerNames = Annotated[tuple[TrackerName, ...], BeforeValidator(_listed)]
"""Any number of trackers; in a configuration also one name, or "none", as Hugging Face's `report_to` takes them."""
