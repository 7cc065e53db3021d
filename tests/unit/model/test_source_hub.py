"""Downloads from Hugging Face, against a hub that runs on this machine."""

from __future__ import annotations

import errno
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save

from fake_hub import MODEL, WEIGHTS, FakeHub, fresh_probes, serving
from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import EnvironmentProblem, ModelError
from sophia_galore.model import hub, reach
from sophia_galore.model.source import ResolvedModel, resolve_model

TENSORS = {"model.embed_tokens.weight": torch.arange(40_000, dtype=torch.float32).reshape(200, 200)}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "README.md": b"for its licence",
    "pytorch_model.bin": b"not wanted",
    "onnx/model.safetensors": b"not wanted",
    "modeling_tiny.py": b"raise SystemExit",
    WEIGHTS: save(TENSORS),
}


@pytest.fixture(autouse=True)
def _fresh_probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fresh_probes(monkeypatch):
        yield


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    # The library writes pieces of 10 MB; a cut loses at most one. The weights here are 160 kB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    with serving(FILES, monkeypatch) as server:
        yield server


class Spoken(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self)


def resolve(cache_dir: Path, say: Spoken | None = None, **asked: Any) -> ResolvedModel:
    config = ModelConfig(**{"name": MODEL, "source": "hf", "cache_dir": str(cache_dir), **asked})
    return resolve_model(config, say if say is not None else Spoken())


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(FILES["config.json"])
    (folder / WEIGHTS).write_bytes(FILES[WEIGHTS])
    return folder


def test_download_takes_the_wanted_files_and_the_second_call_asks_nobody(fake_hub: FakeHub, tmp_path: Path) -> None:
    model = resolve(tmp_path)
    assert (model.source, model.name, model.used_fallback) == ("hf", MODEL, False)
    assert model.folder == tmp_path / "someone--tiny"
    names = sorted(path.name for path in model.folder.iterdir())
    assert names == ["README.md", "config.json", WEIGHTS, "sophia_galore_model.json", "tokenizer.json"]
    loaded = load_file(model.folder / WEIGHTS)
    assert torch.equal(loaded["model.embed_tokens.weight"], TENSORS["model.embed_tokens.weight"])

    fake_hub.log.clear()
    again = resolve(tmp_path, source="auto")
    assert (again.source, again.folder) == ("local cache", model.folder)
    assert fake_hub.log == []


def test_the_hub_is_probed_once_per_process(fake_hub: FakeHub, tmp_path: Path) -> None:
    for number in range(2):
        resolve(tmp_path / str(number))
    assert [path for _, path, _ in fake_hub.log].count("/") == 1


def test_python_files_come_only_when_trusted(fake_hub: FakeHub, tmp_path: Path) -> None:
    without = resolve(tmp_path)
    assert not (without.folder / "modeling_tiny.py").exists()
    fake_hub.log.clear()
    trusting = resolve(tmp_path, trust_remote_code=True)
    assert (trusting.folder / "modeling_tiny.py").is_file()
    assert fake_hub.ranges(WEIGHTS) == [], "the weights were there already"
    assert resolve(tmp_path).source == "local cache"


def test_a_broken_connection_is_resumed_within_the_call(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.cut_at = 50_000
    model = resolve(tmp_path)
    assert fake_hub.ranges(WEIGHTS) == [None, "bytes=50000-"]
    assert (model.folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_an_interrupted_download_is_resumed_by_the_next_call(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.cut_at, fake_hub.after_cut = 50_000, 503
    with pytest.raises(EnvironmentProblem, match="interrupted") as caught:
        resolve(tmp_path)
    assert "goes on where it stopped" in caught.value.remedy
    assert not (tmp_path / "someone--tiny").exists()
    partial = list((tmp_path / "someone--tiny.incomplete").glob("*.incomplete"))
    assert [path.stat().st_size for path in partial] == [50_000]

    fake_hub.refuse_files = 0
    fake_hub.log.clear()
    model = resolve(tmp_path)
    assert fake_hub.ranges(WEIGHTS) == ["bytes=50000-"]
    assert fake_hub.ranges("config.json") == [], "finished files are not fetched twice"
    assert (model.folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert not list(model.folder.glob("*.incomplete"))


def test_damaged_bytes_are_refused_and_not_kept(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.damage = True
    with pytest.raises(ModelError, match=r"model\.safetensors of someone/tiny arrived damaged"):
        resolve(tmp_path)
    assert not (tmp_path / "someone--tiny").exists()
    fake_hub.damage = False
    assert (resolve(tmp_path).folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]


@pytest.mark.parametrize(
    ("status", "headers", "cause", "remedy"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "has no model someone/tiny", "spelling"),
        (404, {}, "has no model someone/tiny", "spelling"),
        (401, {"X-Error-Code": "GatedRepo"}, "is gated", "Accept the licence .*hf auth login"),
        (403, {"X-Error-Code": "GatedRepo"}, "is gated", "Accept the licence .*hf auth login"),
        (401, {"X-Error-Code": "RepoNotFound"}, "or it is private", "hf auth login"),
        (401, {}, "refuses access", "hf auth login"),
        (403, {"X-Error-Message": "token lacks the scope"}, "refuses access", "token"),
    ],
)
def test_refusals_of_the_hub_end_the_search(
    fake_hub: FakeHub, tmp_path: Path, status: int, headers: dict[str, str], cause: str, remedy: str
) -> None:
    fake_hub.refuse = (status, headers)
    fallback = make_folder(tmp_path / "fallback")
    say = Spoken()
    with pytest.raises(ModelError, match=cause) as caught:
        resolve(tmp_path / "cache", say, source="auto", fallback=str(fallback))
    assert re.search(remedy, caught.value.remedy)
    assert "fallback" not in say.text, "a hub that answers is believed"
    assert not list((tmp_path / "cache").glob("someone*")), "nothing is left behind"


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_a_hub_out_of_order_or_behind_a_firewall_counts_as_not_reached(
    fake_hub: FakeHub, tmp_path: Path, status: int
) -> None:
    fake_hub.refuse = (status, {})
    with pytest.raises(EnvironmentProblem, match=f"answers HTTP {status}"):
        resolve(tmp_path)


def test_a_page_that_is_no_hub_counts_as_not_reached(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.listing = "please log in to this network"
    with pytest.raises(EnvironmentProblem, match="No source of the model"):
        resolve(tmp_path)


def test_a_repository_without_safetensors_is_refused(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings = fake_hub.listing["siblings"]
    fake_hub.listing["siblings"] = [entry for entry in siblings if entry["rfilename"] != WEIGHTS]
    with pytest.raises(ModelError, match=r"no config\.json with model\*\.safetensors"):
        resolve(tmp_path)


def test_refused_connection_takes_the_fallback_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    fallback = make_folder(tmp_path / "fallback")
    say = Spoken()
    start_s = time.monotonic()
    model = resolve(tmp_path, say, source="auto", fallback=str(fallback))
    assert time.monotonic() - start_s < 5
    assert (model.folder, model.used_fallback, model.name) == (fallback, True, str(fallback))
    assert "Hugging Face: not available" in say.text
    assert f"WARNING: using the fallback model '{fallback}' INSTEAD OF 'someone/tiny'" in say.text


def test_refused_connection_without_fallback_names_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentProblem, match=r"Hugging Face: .*; ModelScope: ") as caught:
        resolve(tmp_path, source="auto")
    assert "HF_ENDPOINT" in caught.value.remedy and "model.fallback" in caught.value.remedy


def test_offline_mode_of_the_library_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="HF_HUB_OFFLINE is set"):
        resolve(tmp_path)


def test_a_server_that_accepts_but_keeps_silent_is_given_up_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start_s = time.monotonic()
        with pytest.raises(EnvironmentProblem, match="does not answer"):
            resolve(tmp_path)
        # The probe waits 3 s for a step and 4 s in total.
        assert time.monotonic() - start_s < 5


def test_a_probe_that_blocks_outside_of_sockets_is_given_up_too() -> None:
    blocked = threading.Event()
    reason = reach.probe(lambda timeout_s: int(blocked.wait(30)), timeout_s=0.2)
    blocked.set()
    assert reason == "no answer within 0.2 s"


def test_a_transfer_that_stalls_ends_after_a_few_attempts(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library makes 6 attempts of HF_HUB_DOWNLOAD_TIMEOUT (10 s) each: about a minute, here 6 x 0.1 s.
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    fake_hub.stall.set()
    with pytest.raises(EnvironmentProblem, match="interrupted"):
        resolve(tmp_path)
    assert len(fake_hub.ranges(WEIGHTS)) <= 6


def test_a_listing_that_stalls_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "probe_hugging_face", lambda endpoint: None)
        monkeypatch.setattr(hub, "LIST_TIMEOUT_S", 0.2)
        with pytest.raises(EnvironmentProblem, match="No source of the model"):
            resolve(tmp_path)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "can't be written"),
    ],
)
def test_disk_problems_are_told_as_such(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, cause: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    with pytest.raises(EnvironmentProblem, match=cause) as caught:
        resolve(tmp_path)
    assert "cache_dir" in caught.value.remedy


def test_a_download_that_can_not_fit_is_not_started(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("sophia_galore.model.cache.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(EnvironmentProblem, match=r"has 1 kB free; \d+ kB are needed"):
        resolve(tmp_path)
    assert fake_hub.ranges(WEIGHTS) == []


def test_ctrl_c_keeps_what_was_downloaded(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(url: str, target: Any, **kwargs: Any) -> None:
        target.write(b"first bytes")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.file_download.http_get", stop)
        with pytest.raises(KeyboardInterrupt):
            resolve(tmp_path)
    assert list((tmp_path / "someone--tiny.incomplete").glob("*.incomplete"))
