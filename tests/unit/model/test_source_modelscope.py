"""ModelScope: its library is optional, so a stand-in takes its place."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import save_file

from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import EnvironmentProblem, ModelError
from sophia_galore.model import hub, hub_modelscope, reach
from sophia_galore.model.reach import Unreachable
from sophia_galore.model.source import ResolvedModel, resolve_model

Download = Callable[..., str]


def good_download(model_id: str, *, local_dir: str, allow_patterns: list[str]) -> str:
    assert model_id == "a/b" and "model*.safetensors" in allow_patterns
    (Path(local_dir) / "config.json").write_text("{}")
    save_file({"weight": torch.ones(4)}, Path(local_dir) / "model.safetensors")
    return local_dir


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Download], None]:
    """Installs a stand-in for the library, and makes both hubs answer."""
    monkeypatch.setattr(hub_modelscope, "probe_modelscope", lambda endpoint: None)
    monkeypatch.setattr(hub, "probe_hugging_face", lambda endpoint: "switched off")

    def stand_in(download: Download) -> None:
        module = types.ModuleType("modelscope")
        module.__spec__ = importlib.machinery.ModuleSpec("modelscope", None)
        module.snapshot_download = download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "modelscope", module)

    return stand_in


def resolve(cache_dir: Path, **options: Any) -> ResolvedModel:
    prefer = options.pop("prefer", "hf")
    config = ModelConfig(**{"name": "a/b", "source": "modelscope", "cache_dir": str(cache_dir), **options})
    return resolve_model(config, [].append, prefer=prefer)


@pytest.mark.parametrize("source", ["modelscope", "auto"])
def test_the_library_is_used_where_it_is_installed(install: Any, tmp_path: Path, source: str) -> None:
    install(good_download)
    assert resolve(tmp_path, source=source) == ResolvedModel(tmp_path / "a--b.modelscope", "a/b", "modelscope")
    install(lambda *args, **kwargs: pytest.fail("the cache was there"))
    assert resolve(tmp_path, source=source).source == "local cache"


def test_preferred_it_is_asked_before_hugging_face(install: Any, tmp_path: Path, monkeypatch: Any) -> None:
    install(good_download)
    monkeypatch.setattr(hub, "require_reachable", lambda: pytest.fail("Hugging Face was asked first"))
    assert resolve(tmp_path, source="auto", prefer="modelscope").source == "modelscope"


def test_without_the_library_the_way_to_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_modelscope.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="package modelscope is not installed") as caught:
        resolve(tmp_path)
    assert "pip install 'sophia-galore[modelscope]'" in caught.value.remedy


def answer(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} error", response=response)


NotExistError = type("NotExistError", (Exception,), {})


@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        (answer(404), ModelError, "ModelScope has no model a/b"),
        (NotExistError("no such repo"), ModelError, "ModelScope has no model a/b"),
        (answer(401), ModelError, "refuses access"),
        (answer(403), ModelError, "refuses access"),
        (requests.ConnectionError("reset by peer"), EnvironmentProblem, "was interrupted: reset by peer"),
        (OSError(28, "No space left on device"), EnvironmentProblem, "is full"),
    ],
)
def test_errors_of_the_library_are_explained(
    install: Any, tmp_path: Path, error: Exception, kind: type[Exception], cause: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    install(fail)
    with pytest.raises(kind, match=cause):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("", "https://www.modelscope.cn"),
        ("www.modelscope.ai", "https://www.modelscope.ai"),
        ("http://127.0.0.1:9/", "http://127.0.0.1:9"),
    ],
)
def test_the_endpoint_follows_the_environment(monkeypatch: pytest.MonkeyPatch, domain: str, expected: str) -> None:
    monkeypatch.delenv("MODELSCOPE_ENDPOINT", raising=False)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", domain)
    assert hub_modelscope.endpoint() == expected


def test_an_endpoint_that_refuses_is_unreachable(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(good_download)
    monkeypatch.setattr(hub_modelscope, "probe_modelscope", reach.probe_modelscope)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="does not answer"):
        hub_modelscope.require_reachable()
