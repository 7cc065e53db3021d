"""A model's shape from each of the places that may know it; weights are never asked for."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

from fake_hub import MODEL, WEIGHTS, FakeHub, fresh_probes, serving
from other_models import write_other_model
from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import ModelError
from sophia_galore.model import hub_modelscope, reach
from sophia_galore.model.shapes import ModelShape, find_shape
from sophia_galore.model.source import resolve_model
from tiny import tiny_model, write_tiny_model
from tiny_gguf import write_tiny_gguf

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16 with a tied head."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen3")
    tiny_model("qwen3").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def num_parameters() -> int:
    return sum(parameter.numel() for parameter in tiny_model("qwen3").parameters())


@pytest.fixture(autouse=True)
def _fresh_probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fresh_probes(monkeypatch):
        yield


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(reach, "probe", forbidden)


@pytest.fixture
def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serves the model's files with some replaced, or left out where None is given."""
    open_hubs = []

    def serve(**replaced: bytes | None) -> FakeHub:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        files |= {name: content for name, content in replaced.items() if content is not None}
        files = {name: content for name, content in files.items() if replaced.get(name, b"") is not None}
        context = serving(files, monkeypatch)
        open_hubs.append(context)
        return context.__enter__()

    yield serve
    for context in open_hubs:
        context.__exit__(None, None, None)


def shape_of(name: str | Path, cache_dir: Path, say: list[str] | None = None, **asked: Any) -> ModelShape:
    check = {"check": asked.pop("check")} if "check" in asked else {}
    settings = ModelConfig(**{"name": str(name), "cache_dir": str(cache_dir), **asked})
    return find_shape(settings, (say if say is not None else []).append, **check)


def header_bytes(content: bytes) -> int:
    return 8 + int(struct.unpack("<Q", content[:8])[0])


def test_a_folder(folder: Path, tmp_path: Path, num_parameters: int, no_network: None) -> None:
    shape = shape_of(folder, tmp_path)
    assert (shape.name, shape.source, shape.folder) == (str(folder), "local", folder)
    assert (shape.config.model_type, shape.stored_dtype) == ("qwen3", torch.bfloat16)
    assert shape.num_parameters == num_parameters


def test_the_weights_say_how_they_are_stored_and_a_folder_without_them_is_enough(
    folder: Path, tmp_path: Path, num_parameters: int, no_network: None
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(folder / "config.json", other / "config.json")
    assert shape_of(other, tmp_path).stored_dtype == torch.bfloat16, "as config.json says"
    assert shape_of(other, tmp_path).num_parameters == num_parameters
    weights = {name: tensor.to(torch.float16) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, other / WEIGHTS)
    assert shape_of(other, tmp_path).stored_dtype == torch.float16


@pytest.mark.parametrize("content", [b"", b"12345678" * 3, struct.pack("<Q", 4) + b"[12]"])
def test_damaged_weights_are_said_so(folder: Path, tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(folder / "config.json", other / "config.json")
    (other / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match=r"weights in .*other can't be read"):
        shape_of(other, tmp_path)


def test_a_path_that_is_no_model(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(ModelError, match="Folder not found"):
        shape_of(tmp_path / "nope", tmp_path)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        shape_of(tmp_path, tmp_path)


def test_the_cache_comes_before_the_specification(folder: Path, tmp_path: Path, no_network: None) -> None:
    cached = shutil.copytree(folder, tmp_path / "Qwen--Qwen3-8B")
    shape = shape_of("qwen3-8b", tmp_path)
    assert (shape.source, shape.folder) == ("local cache", cached)
    assert shape.config.hidden_size == 64


@pytest.mark.parametrize("source", ["auto", "hf", "modelscope", "local"])
def test_a_built_in_model_asks_nobody(tmp_path: Path, no_network: None, source: str) -> None:
    shape = shape_of("Qwen/Qwen3-8B-Base", tmp_path / "cache", source=source)
    assert (shape.name, shape.source, shape.folder) == ("Qwen/Qwen3-8B-Base", "built-in", None)
    assert (shape.num_parameters, shape.stored_dtype) == (8_190_735_360, torch.bfloat16)
    assert shape.config.num_hidden_layers == 36
    assert not (tmp_path / "cache").exists()


def test_what_a_specification_leaves_out_is_said(tmp_path: Path, no_network: None) -> None:
    lines: list[str] = []
    assert shape_of("gemma-3-4b", tmp_path, lines).config.model_type == "gemma3_text"
    assert "sees images too" in lines[-1]


def test_a_gguf_file_is_not_converted(tmp_path: Path, no_network: None) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    shape = shape_of(path, tmp_path / "cache")
    assert (shape.source, shape.stored_dtype, shape.folder) == ("local", None, None)
    assert not (tmp_path / "cache").exists()
    converted = resolve_model(ModelConfig(name=str(path), cache_dir=str(tmp_path / "cache")), [].append)
    assert shape.num_parameters == sum(tensor.numel() for tensor in load_file(converted.folder / WEIGHTS).values())


def test_a_broken_gguf_file(tmp_path: Path, no_network: None) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF and nothing else")
    with pytest.raises(ModelError, match=r"metadata of .* can't be read") as caught:
        shape_of(path, tmp_path)
    assert "sophia-galore download" in caught.value.remedy


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_the_hub_is_asked_for_headers_only(
    hub_of: Any, tmp_path: Path, num_parameters: int, knows_ranges: bool
) -> None:
    fake_hub = hub_of()
    fake_hub.knows_ranges = knows_ranges
    shape = shape_of(MODEL, tmp_path / "cache", source="hf")
    assert (shape.name, shape.source, shape.folder) == (MODEL, "hf", None)
    assert (shape.config.model_type, shape.stored_dtype) == ("qwen3", torch.bfloat16)
    assert shape.num_parameters == num_parameters
    length = header_bytes(fake_hub.files[WEIGHTS])
    assert fake_hub.ranges(WEIGHTS) == ["bytes=0-7", f"bytes=8-{length - 1}"]
    if knows_ranges:
        assert sum(size for name, size in fake_hub.sent if name == WEIGHTS) == length
    assert {path.rsplit("/", 1)[-1] for _, path, _ in fake_hub.log if MODEL in path} == {"tiny", "config.json", WEIGHTS}
    assert not (tmp_path / "cache").exists()


def test_shards_are_named_by_the_index(folder: Path, hub_of: Any, tmp_path: Path, num_parameters: int) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    index = {"weight_map": {name: part for part, its in parts.items() for name in its}}
    fake_hub = hub_of(
        **{
            WEIGHTS: None,
            INDEX: json.dumps(index).encode(),
            **{part: save({name: tensors[name] for name in its}) for part, its in parts.items()},
        }
    )
    assert shape_of(MODEL, tmp_path).num_parameters == num_parameters
    assert all(len(fake_hub.ranges(part)) == 2 for part in parts)


def test_a_second_copy_of_a_tied_head_is_not_counted(
    folder: Path, hub_of: Any, tmp_path: Path, num_parameters: int
) -> None:
    # As the files of Qwen3-0.6B have it.
    tensors = load_file(folder / WEIGHTS)
    hub_of(**{WEIGHTS: save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})})
    assert shape_of(MODEL, tmp_path).num_parameters == num_parameters


@pytest.mark.parametrize("name", ["gemma3", pytest.param("qwen3_5_moe", marks=pytest.mark.thorough)])
def test_of_a_model_that_sees_too_its_language_model_is_counted(hub_of: Any, tmp_path: Path, name: str) -> None:
    write_other_model(tmp_path / "whole", name)
    hub_of(**{file: (tmp_path / "whole" / file).read_bytes() for file in ("config.json", WEIGHTS)})
    shape = shape_of(MODEL, tmp_path / "cache", source="hf")
    text = AutoModelForCausalLM.from_config(shape.config)
    assert shape.num_parameters == sum(parameter.numel() for parameter in text.parameters())


def test_weights_of_another_number_are_refused(folder: Path, hub_of: Any, tmp_path: Path, num_parameters: int) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("model.norm.weight")
    hub_of(**{WEIGHTS: save(tensors)})
    with pytest.raises(ModelError, match=f"{num_parameters:,} parameters, .* {num_parameters - 64:,}"):
        shape_of(MODEL, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("config.json", b"{", r"config\.json of someone/tiny can't be read: it is not valid JSON"),
        ("config.json", b"[]", "not a table"),
        ("config.json", b"{}", "no model_type"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ("config.json", b'{"model_type": "t5"}', "'t5' is not one of transformers' causal language models"),
        (WEIGHTS, b"12345678" * 3, "its header would have"),
        (WEIGHTS, struct.pack("<Q", 4) + b"[12]", "no safetensors file"),
    ],
)
def test_what_the_hub_has_can_be_of_no_use(hub_of: Any, tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    hub_of(**{name: content})
    with pytest.raises(ModelError, match=cause) as caught:
        shape_of(MODEL, tmp_path)
    assert caught.value.remedy


def test_the_caller_may_say_more_of_what_can_not_be_trained(hub_of: Any, tmp_path: Path) -> None:
    hub_of(**{"config.json": b'{"model_type": "mixtral"}'})

    def check(config: Any) -> None:
        raise ModelError(f"{config.num_local_experts} experts")

    with pytest.raises(ModelError, match="8 experts"):
        shape_of(MODEL, tmp_path, check=check)


def test_a_hub_that_has_no_such_model_is_believed(hub_of: Any, tmp_path: Path) -> None:
    hub_of()
    with pytest.raises(ModelError, match="has no model someone/qwen3-6b") as caught:
        shape_of("someone/qwen3-6b", tmp_path)
    assert "qwen3-8b" in caught.value.remedy and "download --list" in caught.value.remedy


def test_a_header_that_breaks_off_counts_as_not_reached(hub_of: Any, tmp_path: Path) -> None:
    hub_of(**{WEIGHTS: struct.pack("<Q", 1000) + b"{"})
    with pytest.raises(ModelError, match="Hugging Face broke off"):
        shape_of(MODEL, tmp_path, source="hf")


def test_an_unknown_name_asks_nobody(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(ModelError, match="Unknown model 'quen3-8b'") as caught:
        shape_of("quen3-8b", tmp_path)
    assert "qwen3-8b" in caught.value.remedy and "download --list" in caught.value.remedy


def test_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set") as caught:
        shape_of(MODEL, tmp_path, source="hf")
    assert "Unset HF_HUB_OFFLINE" in caught.value.remedy
    assert shape_of("qwen2-7b", tmp_path, source="hf").source == "built-in"


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"not built in\. Hugging Face: .* does not answer"):
        shape_of(MODEL, tmp_path, source="hf")


def test_local_only_asks_no_hub(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(ModelError, match=r"model\.source is local"):
        shape_of(MODEL, tmp_path, source="local")


def test_modelscope_gives_its_config(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_parameters: int
) -> None:
    def snapshot(model_id: str, target: Path, patterns: list[str]) -> None:
        assert (model_id, patterns) == (MODEL, ["config.json"])
        shutil.copyfile(folder / "config.json", target / "config.json")

    monkeypatch.setattr(hub_modelscope, "require_reachable", lambda: None)
    monkeypatch.setattr(hub_modelscope, "_snapshot", snapshot)
    shape = shape_of(MODEL, tmp_path, source="modelscope")
    assert (shape.source, shape.num_parameters) == ("modelscope", num_parameters)
    assert shape.stored_dtype == torch.bfloat16
