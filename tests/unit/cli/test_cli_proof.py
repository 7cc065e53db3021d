"""An architecture that the tests do not cover, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sophia_galore.memory import forecast
from strange_models import strange_config
from tiny import tiny_tokenizer
from unit.cli.tiny_run import World, command


def write_strange(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(strange_config(name)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def words_for(world: World, folder: Path, model: Path) -> list[str]:
    return [f"model.name={model}", f"model.cache_dir={folder / 'cache'}", f"training.output_dir={folder / 'run'}"]


def test_what_nothing_reaches_stays_as_it_is(world: World, tmp_path: Path) -> None:
    model = write_strange(tmp_path / "model", "idle")
    words = words_for(world, tmp_path, model)
    checked = command("check", "--config", str(world.config), *words)
    assert checked.code == 0, checked.err
    out = " ".join(checked.out.split())
    assert "strange_idle was compared with autograd on a small twin of 2 layers" in out
    assert "97.5% of the parameters are trained" in out
    assert (
        "Architecture strange_idle: comparing its gradients" in out and (tmp_path / "cache" / "proofs.json").is_file()
    )

    ended = world.train(str(tmp_path / "run"), *words)
    assert ended.code == 0, ended.err
    assert "comparing its gradients" not in ended.out + ended.err, "it is remembered"
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert sorted(plan["proof"]["unreached"]) == ["mlp.idle.weight", "model.nowhere"]
    assert plan["proof"]["problem"] == "" and plan["proof"]["difference"] < 1e-6
    assert [verdict["key"] for verdict in plan["verdicts"]] == ["proven"]
    assert {route["why"] for route in plan["routes"] if not route["trained"]} == {
        "the model keeps it as it is: it gets no gradient"
    }
    frozen = {route["name"] for route in plan["routes"] if not route["trained"]}
    assert frozen == {"model.nowhere", *(f"model.layers.{layer}.mlp.idle.weight" for layer in range(3))}
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("scaled", "this strange_scaled model would get wrong gradients: on a small twin that of model."),
        ("sees_later_tokens", "This strange_sees_later_tokens model is no causal language model"),
    ],
)
def test_wrong_gradients_are_refused(world: World, tmp_path: Path, name: str, reason: str) -> None:
    words = words_for(world, tmp_path, write_strange(tmp_path / "model", name))
    for verb in ("check", "train"):
        ended = command(verb, "--config", str(world.config), *words)
        assert ended.code == 2 and reason in " ".join(ended.err.split())
        assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_covered_architectures_have_no_proof(world: World) -> None:
    plan: dict[str, Any] = json.loads(command("check", "--config", str(world.config), "--json").out)
    assert plan["proof"] is None and not plan["verdicts"]


def test_a_model_whose_memory_cannot_be_predicted_is_trained(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a tensor on cpu meets one on meta")

    monkeypatch.setattr(forecast, "simulate", failing)
    words = words_for(world, tmp_path, write_strange(tmp_path / "model", "same"))
    ended = world.train(str(tmp_path / "run"), *words, "memory.predict=true", "memory.limit=4GiB")
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert "can't be predicted" in said and "a tensor on cpu meets one on meta" in said
    planned = command("plan", "--config", str(world.config), *words)
    assert planned.code == 2 and "memory.predict=false" in planned.err
