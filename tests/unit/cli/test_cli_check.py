"""`check`: the summary, every parameter, the verdicts, and what share of the model is trained."""

from __future__ import annotations

import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import save_file

from sophia_galore.cli.route_tables import trained_share, verdict_line
from sophia_galore.config import load_config
from sophia_galore.plan.facts import BitsandbytesFacts
from sophia_galore.plan.plan import RunPlan
from sophia_galore.plan.verdicts import Decided
from sophia_galore.train import prepare as preparing
from sophia_galore.train.callback import Callback
from tiny import tiny_tokenizer
from unit.cli.tiny_run import Ended, World, command

BNB = ["quantization.load_in_8bit=true", "quantization.backend=bitsandbytes"]


def check(world: World, *words: str) -> Ended:
    return command("check", "--config", str(world.config), f"training.output_dir={world.folder / 'none'}", *words)


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bitsandbytes that works, wherever the tests run."""
    monkeypatch.setattr(preparing, "detect_bitsandbytes", lambda device: BitsandbytesFacts("0.50.2"))


def test_all_of_a_model_is_trained(world: World) -> None:
    ended = check(world)
    assert ended.code == 0
    assert "100% of the parameters are trained" in ended.out.splitlines()
    assert "Also: embedding and head in one: both gradients, one step (1 tensor)" in ended.out
    assert "fall back" not in ended.out and "use:" not in ended.out


@pytest.mark.usefixtures("works")
def test_what_bitsandbytes_freezes_is_said(world: World) -> None:
    ended = check(world, *BNB)
    assert ended.code == 0, ended.err
    plan = json.loads(check(world, *BNB, "--json").out)
    share = plan["num_trained_parameters"] / plan["num_parameters"]
    assert plan["trained_fraction"] == share and 0.1 < share < 0.3
    assert f"{int(1000 * share) / 10:g}% of the parameters are trained" in ended.out.splitlines()
    assert "fall back to adamw: The matrices that optimizer.type=galore is for are held by bitsandbytes" in ended.out
    assert "quantization.backend=native trains all weights." in ended.out
    assert "bnb8" in ended.out and "frozen" in ended.out
    assert [verdict["key"] for verdict in plan["verdicts"]] == ["frozen_for_the_optimizer"]
    assert plan["notes"] == [f"{verdict['reason']} {verdict['remedy']}" for verdict in plan["verdicts"]]
    assert plan["optimizer"] == "adamw"
    for route in plan["routes"]:
        frozen = ".layers." in route["name"] and len(route["shape"]) == 2
        assert route["trained"] is not frozen and route["why"]
        assert route["rule"] == ("frozen" if frozen else "adamw")
        if frozen:
            m, n = route["shape"]
            assert (route["format"], route["weight_bytes"], route["state_bytes"]) == ("bnb8", m * n + 4 * m, 0)


def test_without_bitsandbytes_the_way_out_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "detect_bitsandbytes", lambda device: BitsandbytesFacts())
    ended = check(world, *BNB, "model.name=no/such")
    assert (ended.code, ended.out) == (2, ""), "before any model is looked for"
    assert 'pip install "sophia-galore[bitsandbytes]"' in ended.err and "Traceback" not in ended.err


def test_bitsandbytes_is_not_asked_where_it_is_not_needed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(preparing, "detect_bitsandbytes")
    assert check(world, "quantization.load_in_8bit=true").code == 0


def test_every_parameter_has_a_row(world: World) -> None:
    out = check(world, "--parameters", "optimizer.state_bits=8").out
    plan = json.loads(check(world, "optimizer.state_bits=8", "--json").out)
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith("model.")}
    assert rows.keys() == {route["name"] for route in plan["routes"]}
    for route in plan["routes"]:
        row = rows[route["name"]]
        assert " x ".join(map(str, route["shape"])) in row and route["why"] in row and " yes " in row
        assert f" {route['format']} " in row and "…" not in row


def test_several_refusals_come_in_one_message(world: World) -> None:
    ended = check(world, "training.max_length=999", "quantization.load_in_8bit=true", "quantization.skip=[nix]")
    assert ended.code == 2
    assert "2 problems with this run" in ended.err and "128 positions" in ended.err and "'nix'" in ended.err


def test_what_is_no_causal_language_model_is_refused_by_name(world: World, tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    save_file({"never.read": torch.ones(1)}, tmp_path / "model.safetensors")
    ended = check(world, f"model.name={tmp_path}")
    assert ended.code == 2
    assert "The architecture 't5' is not one of transformers' causal language models." in ended.err


def plan_of(world: World, *words: str) -> RunPlan:
    return preparing.prepare(load_config(world.config, list(words)), Callback()).plan


@pytest.mark.usefixtures("works")
def test_less_than_all_is_red(world: World) -> None:
    def colours(plan: RunPlan) -> str:
        out = io.StringIO()
        Console(file=out, force_terminal=True, color_system="standard", highlight=False).print(trained_share(plan))
        return out.getvalue()

    assert "\x1b[1;31m" in colours(plan_of(world, *BNB))
    assert "\x1b[" not in colours(plan_of(world))


def test_a_fall_back_stands_out() -> None:
    plain, bold = (verdict_line(Decided("key", verdict, "So.", "")) for verdict in ("use", "fall back to fp16"))
    assert (str(plain.style), str(bold.style)) == ("yellow", "bold yellow")
    assert bold.plain == "fall back to fp16: So."


@pytest.mark.usefixtures("works")
@pytest.mark.parametrize("words", [[], ["training.max_grad_norm=1", "training.compute_dtype=fp16"], BNB])
def test_plan_json_has_all_of_the_plan(world: World, words: list[str]) -> None:
    plan = plan_of(world, *words)
    written: dict[str, Any] = json.loads(json.dumps(plan.to_json()))
    assert {entry.name for entry in fields(RunPlan)} <= written.keys()
    assert tuple(Decided(**verdict) for verdict in written["verdicts"]) == plan.verdicts
    for route, plain in zip(plan.routes, written["routes"], strict=True):
        assert plain == json.loads(json.dumps(route.to_json()))
    assert written["bytes"]["weights"] == sum(route["weight_bytes"] for route in written["routes"])
    assert written["num_trained_parameters"] == sum(
        route.num_elements for route, plain in zip(plan.routes, written["routes"], strict=True) if plain["trained"]
    )
