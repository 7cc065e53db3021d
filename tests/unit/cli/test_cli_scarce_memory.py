"""Memory that is too small for the program itself: one message, whatever fails first, and no traceback."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from sophia_galore.cli import start
from sophia_galore.errors import lacks_memory
from sophia_galore.streaming.lanes import CpuLane, Jobs
from unit.cli.tiny_run import World, command

# By whoever ran out of it: Python, torch, the system, C++, the loader.
SAID: list[Exception] = [
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("std::bad_alloc"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize("error", SAID, ids=str)
def test_memory_that_ran_out_is_known(error: Exception) -> None:
    assert lacks_memory(error)
    later = ImportError("cannot import name 'Tensor' from partially initialized module 'torch'")
    assert not lacks_memory(later)
    later.__context__ = error
    assert lacks_memory(later), "what came up while it was handled"
    later.__suppress_context__ = True
    assert not lacks_memory(later)


@pytest.mark.parametrize("error", SAID, ids=str)
def test_an_import_that_finds_no_memory(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = builtins.__import__

    def failing(name: str, *given: Any, **more: Any) -> Any:
        if name == "sophia_galore.cli.main":
            raise error
        return found(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", failing)
    assert start.main(["train"]) == 1
    with pytest.raises(SystemExit) as ended:
        start.entry()
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert said.count("Error: Out of memory") == 2 and "ulimit -v" in said and "Traceback" not in said


def test_an_explanation_that_finds_no_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(sys.modules["sophia_galore.cli.main"], "_complain", failing)
    assert command("train", "no.key=3").code == 1
    said = capfd.readouterr().err
    assert said.startswith("Error: Out of memory") and "Traceback" not in said


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_a_thread_that_finds_no_memory(placement: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Jobs, "give", failing)
    ended = world.train("threadless", f"memory.placement={placement}")
    assert ended.code == 1 and "Out of memory" in ended.err and "should not happen" not in ended.err


def test_what_is_not_in_host_memory_is_not_blamed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: CpuLane) -> None:
        raise MemoryError

    monkeypatch.setattr(CpuLane, "now", failing)
    ended = world.train("blamed", "memory.placement=disk")
    assert ended.code == 1 and "Out of memory" in ended.err and "memory.placement=disk" not in ended.err


def test_pictures_that_find_no_memory_do_not_fail_a_finished_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(sys.modules["sophia_galore.cli.train"], "plot_loss", failing)
    ended = world.train("undrawn", "training.max_steps=1")
    assert ended.code == 0 and "Pictures: none. MemoryError" in ended.out
