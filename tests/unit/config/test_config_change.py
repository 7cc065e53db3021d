"""A configuration with other values for some keys."""

from __future__ import annotations

from sophia_galore.config.dump import changed, flatten
from sophia_galore.config.schema import RunConfig


def test_some_keys_change_and_no_other() -> None:
    before = RunConfig()
    values = {"training.batch_size": 7, "optimizer.galore.rank": 3, "memory.limit": 2**30, "engine.keep_layers": "auto"}
    after = changed(before, values)
    old, new = flatten(before), flatten(after)
    assert {key: new[key] for key in new if new[key] != old[key]} == values
    assert flatten(before) == flatten(RunConfig()), "the given one stays what it is"


def test_they_count_as_given() -> None:
    after = changed(RunConfig(), {"training.max_length": RunConfig().training.max_length})
    assert "max_length" in after.training.model_fields_set and "training" in after.model_fields_set
    assert changed(after, {}) == after
