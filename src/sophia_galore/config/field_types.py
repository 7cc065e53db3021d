"""The base class of configuration sections, and types of their fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sophia_galore.optim.recipes import LARGEST, MOST

Count = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST)]

TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
"""A tracker, by the name of its package."""


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _listed(value: object) -> object:
    """Convert a name, "none" or a list to a tuple of unique names."""
    names = list(value) if isinstance(value, list | tuple) else [value]
    if names == ["none"]:
        return ()
    # Anything else fails the check of types, also "all" (whatever is installed): a run would depend on the machine.
    return tuple(dict.fromkeys(names)) if all(isinstance(name, str) for name in names) else value


TrackerNames = Annotated[tuple[TrackerName, ...], BeforeValidator(_listed)]
"""Any number of trackers; in a configuration also one name, or "none", as Hugging Face's `report_to` takes them."""
