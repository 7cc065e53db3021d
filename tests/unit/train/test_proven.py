"""Proofs are remembered, and made anew where what they depend on has changed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.engine.proof import Proof
from sophia_galore.train import proven
from sophia_galore.train.proven import proof_of
from strange_models import strange_config
from tiny import tiny_config

FOUND = Proof(unreached=("mlp.idle.weight",), parameter="q", difference=1e-7, num_parameters=9, num_layers=2)
CODE = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class Config(LlamaConfig):
    model_type = "from_a_file"


class ForCausalLM(LlamaForCausalLM):
    config_class = Config


AutoConfig.register("from_a_file", Config, exist_ok=True)
AutoModelForCausalLM.register(Config, ForCausalLM, exist_ok=True)
"""


class Asked:
    """Takes the place of the comparison, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.cache, self.num_made, self.said = cache, 0, list[str]()
        monkeypatch.setattr(proven, "prove", self._prove)

    def _prove(self, config: Any, *, trust_remote_code: bool = False) -> Proof:
        self.num_made += 1
        return FOUND

    def __call__(self, config: Any, **more: Any) -> Proof | None:
        return proof_of(config, self.cache, self.said.append, **more)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    return Asked(monkeypatch, tmp_path / "cache")


def test_what_the_tests_cover_is_not_proved(asked: Asked) -> None:
    assert asked(tiny_config("llama")) is None and asked(tiny_config("gemma4_text")) is None
    assert not asked.num_made and not asked.said and not asked.cache.exists()


def test_it_is_made_once_and_said(asked: Asked) -> None:
    assert asked(strange_config("idle")) == asked(strange_config("idle")) == FOUND
    assert asked.num_made == 1
    assert asked.said == [
        "Architecture strange_idle: comparing its gradients with autograd's on a small twin ..."
    ]  # not the second time
    assert [path.name for path in asked.cache.iterdir()] == ["proofs.json"]


def test_a_refusal_is_remembered_too(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "prove", lambda config, **more: Proof("It is wrong."))
    assert asked(strange_config("idle")) == Proof("It is wrong.")
    monkeypatch.setattr(proven, "prove", asked._prove)
    assert asked(strange_config("idle")) == Proof("It is wrong.") and not asked.num_made


@pytest.mark.parametrize("module", ["torch", "transformers", "sophia_galore.train.proven"])
def test_another_version_proves_anew(asked: Asked, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(strange_config("idle"))
    monkeypatch.setattr(sys.modules[module], "__version__", "99.0")
    asked(strange_config("idle"))
    assert asked.num_made == 2
    monkeypatch.undo()
    assert len(json.loads((asked.cache / "proofs.json").read_text())) == 2


def test_another_configuration_proves_anew(asked: Asked) -> None:
    one, two = strange_config("idle"), strange_config("idle")
    two.hidden_act = "gelu"
    asked(one)
    asked(two)
    assert asked.num_made == 2
    two._name_or_path = "elsewhere/same"  # where it came from does not count
    asked(two)
    assert asked.num_made == 2


def test_other_code_proves_anew(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "from_a_file.py"
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("from_a_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "from_a_file", module)
    spec.loader.exec_module(module)
    asked(module.Config())
    asked(module.Config())
    assert asked.num_made == 1
    path.write_text(CODE + "\n# changed\n")
    asked(module.Config())
    assert asked.num_made == 2


def test_code_of_a_folder_is_proved_every_time(asked: Asked) -> None:
    config = strange_config("idle")
    config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    for _ in range(2):
        asked(config, trust_remote_code=True)
    assert asked.num_made == 2 and not asked.cache.exists()
    covered = tiny_config("llama")
    covered.auto_map = config.auto_map
    assert asked(covered) is None, "without trust, the code of transformers runs"
    assert asked(covered, trust_remote_code=True) == FOUND


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": {}}', "{KEY: null}", '{KEY: {"problem": 3}}', "{KEY: []}"])
def test_a_damaged_memory_is_written_anew(asked: Asked, text: str) -> None:
    asked(strange_config("idle"))
    path = asked.cache / "proofs.json"
    (key,) = json.loads(path.read_text())
    path.write_text(text.replace("KEY", json.dumps(key)))
    assert asked(strange_config("idle")) == FOUND
    assert asked.num_made == 2


def test_a_folder_that_can_not_be_written_to_is_no_fault(asked: Asked) -> None:
    asked.cache.write_text("a file where the folder should be")
    assert asked(strange_config("idle")) == asked(strange_config("idle")) == FOUND
    assert asked.num_made == 2
