"""`quantization.enabled` is the switch, `load_in_8bit` says which kind: all nine combinations, in every layering."""

from __future__ import annotations

from pathlib import Path

import pytest

from sophia_galore.config import load_config
from sophia_galore.errors import ConfigError

# (enabled, load_in_8bit): whether weights are in eight bits; None: refused.
COMBINATIONS: dict[tuple[str, str], bool | None] = {
    ("null", "null"): False,
    ("null", "false"): False,
    ("null", "true"): True,
    ("false", "null"): False,
    ("false", "false"): False,
    ("false", "true"): False,
    ("true", "null"): True,
    ("true", "false"): None,
    ("true", "true"): True,
}
# What stands in the file, and what in overrides after it; "other" is what an override replaces.
LAYERS = ["both in the file", "enabled later", "load_in_8bit later", "both later", "alias later", "left out"]


def words_of(layer: str, enabled: str, load: str) -> tuple[list[str], list[str]]:
    """Lines of the section `quantization`, and overrides."""
    other = {"true": "false", "false": "true", "null": "null"}
    on, kind = f"enabled: {enabled}", f"load_in_8bit: {load}"
    if layer == "both in the file":
        return [on, kind], []
    if layer == "enabled later":
        return [f"enabled: {other[enabled]}", kind], [f"quantization.enabled={enabled}"]
    if layer == "load_in_8bit later":
        return [on, f"load_in_8bit: {other[load]}"], [f"quantization.load_in_8bit={load}"]
    if layer == "both later":
        return ["enabled: true", "load_in_8bit: true"], [
            f"quantization.enabled={enabled}",
            f"quantization.load_in_8bit={load}",
        ]
    if layer == "alias later":
        return [on], [f"load_in_8bit={load}"]
    return [line for line in (on, kind) if not line.endswith("null")], []


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("enabled", "load"), COMBINATIONS)
def test_enabled_is_the_switch(enabled: str, load: str, layer: str, tmp_path: Path) -> None:
    lines, overrides = words_of(layer, enabled, load)
    path = tmp_path / "run.yaml"
    path.write_text("quantization:\n" + "".join(f"  {line}\n" for line in lines))
    expected = COMBINATIONS[enabled, load]
    if expected is None:
        with pytest.raises(ConfigError, match=r"enabled: true .*load_in_8bit: false"):
            load_config(path, overrides)
    else:
        assert load_config(path, overrides).quantization.int8 is expected


def test_the_second_mode_is_one_key() -> None:
    """What the default configuration switches on, one word switches off."""
    config = Path(__file__).parents[3] / "configs" / "galore_config.yaml"
    assert load_config(config).quantization.int8
    assert not load_config(config, ["quantization.enabled=false"]).quantization.int8
