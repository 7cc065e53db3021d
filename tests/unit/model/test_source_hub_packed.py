"""What can't be trained is refused before its weights are downloaded, against a hub that runs on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fake_hub import MODEL, WEIGHTS, FakeHub, fresh_probes, serving
from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import ModelError
from sophia_galore.model.quantised import quantised_error
from sophia_galore.model.shapes import find_shape
from sophia_galore.model.source import resolve_model

NAME = "model.layers.0.mlp.up_proj."
PLAIN = {f"{NAME}weight": torch.ones(200, 200)}
PACKED = {f"{NAME}qweight": torch.ones(100, 200, dtype=torch.int32), f"{NAME}scales": torch.ones(2, 200)}
GPTQ = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}

Hub = Callable[[dict[str, bytes]], AbstractContextManager[FakeHub]]


@pytest.fixture
def hub_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    @contextmanager
    def made(files: dict[str, bytes]) -> Iterator[FakeHub]:
        with serving(files, monkeypatch) as server:
            yield server

    with fresh_probes(monkeypatch):
        yield made


def asked(folder: Path) -> ModelConfig:
    return ModelConfig(name=MODEL, source="hf", cache_dir=str(folder))


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_weights_that_are_packed_are_not_downloaded(
    declared: bool, packed: bool, hub_with: Hub, tmp_path: Path
) -> None:
    config = GPTQ if declared else {"model_type": "llama"}
    files = {"config.json": json.dumps(config).encode(), WEIGHTS: save(PACKED if packed else PLAIN)}
    with hub_with(files) as hub:
        if declared and packed:
            with pytest.raises(ModelError, match=rf"{MODEL} is quantised \(GPTQ\)"):
                resolve_model(asked(tmp_path), lambda _: None)
            # The header alone: 8 bytes, and what they say.
            assert sum(size for name, size in hub.sent if name == WEIGHTS) < 1000
            assert not (tmp_path / "someone--tiny").exists()
        else:
            # Where nothing is declared, the headers are looked at when the folder is read.
            assert (resolve_model(asked(tmp_path), lambda _: None).folder / WEIGHTS).is_file()


@pytest.mark.parametrize("config", [GPTQ, {"model_type": "llama"}])
def test_nothing_is_planned_with_packed_weights(config: dict[str, object], hub_with: Hub, tmp_path: Path) -> None:
    with (
        hub_with({"config.json": json.dumps(config).encode(), WEIGHTS: save(PACKED)}),
        pytest.raises(ModelError, match="is quantised"),
    ):
        find_shape(asked(tmp_path), lambda _: None)


def test_an_adapter_is_named(hub_with: Hub, tmp_path: Path) -> None:
    with hub_with({"adapter_config.json": b"{}", "adapter_model.safetensors": save(PLAIN)}) as hub:
        with pytest.raises(ModelError, match="holds an adapter") as caught:
            resolve_model(asked(tmp_path), lambda _: None)
        assert "merge_and_unload" in caught.value.remedy and not hub.sent


PUBLISHED = {
    "unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit": "Qwen2.5-0.5B-Instruct",
    "unsloth/Llama-3.2-1B-unsloth-bnb-4bit": "Llama-3.2-1B",
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": "Qwen2.5-7B-Instruct",
    "x/Mistral-7B-v0.1-AWQ": "Mistral-7B-v0.1",
    "x/Llama-3.1-8B-FP8-dynamic": "Llama-3.1-8B",
    "x/Meta-Llama-3-8B-quantized.w4a16": "Meta-Llama-3-8B",
    "mlx-community/Qwen3-0.6B-4bit": "Qwen3-0.6B",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plain_model_is_guessed_from_the_name(name: str) -> None:
    assert f"(such as {PUBLISHED[name]} of its authors)" in quantised_error(name, "4 bits").remedy
    assert "such as" not in quantised_error("someone/plain-name", "4 bits").remedy
