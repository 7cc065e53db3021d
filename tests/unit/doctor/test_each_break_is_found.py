"""Each check of `doctor` finds what it is there for: something is broken on purpose, and the right one says so.

The runs of a healthy machine are made once, by the command itself; a broken part is tried on new runs alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from sophia_galore.cli import doctor
from sophia_galore.doctor import machine, trials
from sophia_galore.doctor.findings import Finding, look
from sophia_galore.doctor.report import CHECKS
from sophia_galore.doctor.subject import Subject, subject_of
from sophia_galore.doctor.trials import Trials
from sophia_galore.engine import logits
from sophia_galore.memory import tracker
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.memory.transfers import Machine
from sophia_galore.numerics import rounding
from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.states import ParamStates
from sophia_galore.plan.facts import BitsandbytesFacts, DeviceFacts
from sophia_galore.streaming.checked_file import CheckedFile
from sophia_galore.streaming.homes import HostHome
from sophia_galore.train import run
from sophia_galore.weights.int8 import Int8Weight
from sophia_galore.weights.plain import PlainWeight
from unit.cli.tiny_run import Ended, command

BY_NAME = {check.name: check for check in CHECKS}
MOST_S = 60.0
"""Processor time of the whole command with one thread; worst seen 43."""


@dataclass(frozen=True)
class Healthy:
    """A whole examination of this machine.

    Attributes:
        ended: How the command ended.
        subject: What was examined; its folders are still there.
        killed: The run that was killed, as it was before it was resumed.
        output: The file that the command wrote.
        processor_s: Processor time that it took, its child's included.
    """

    ended: Ended
    subject: Subject
    killed: Path
    output: Path
    processor_s: float


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Healthy]:
    folder = tmp_path_factory.mktemp("healthy")
    with subject_of("cpu", folder / "outputs") as subject, pytest.MonkeyPatch.context() as patch:
        kill_one = Trials.kill_one

        def kill_and_copy(self: Trials) -> None:
            kill_one(self)
            shutil.copytree(subject.work / "self-test" / "killed", folder / "killed")

        patch.setattr(Trials, "kill_one", kill_and_copy)
        patch.setattr(doctor, "subject_of", lambda device, runs: nullcontext(subject))
        before = os.times()
        ended = command("doctor", "--device", "cpu", "--output", str(folder / "doctor.json"))
        after = os.times()
        processor_s = sum(after[:4]) - sum(before[:4])
        yield Healthy(ended, subject, folder / "killed", folder / "doctor.json", processor_s)


def test_all_is_well_here(healthy: Healthy) -> None:
    assert healthy.ended.code == 0, healthy.ended.out + healthy.ended.err
    assert healthy.processor_s < MOST_S
    report = json.loads(healthy.output.read_text())
    assert report["is_well"] is True
    assert [finding["name"] for finding in report["findings"]] == list(BY_NAME)
    assert [finding["name"] for finding in report["findings"] if finding["status"] != "well"] == ["cuda"]
    assert "othing was tried on CUDA" in healthy.ended.out
    assert str(healthy.subject.work.parent) not in healthy.output.read_text()
    assert "Written, for a bug report: " in healthy.ended.out
    assert healthy.ended.err == ""


# ---- what can be broken

Break = Callable[[pytest.MonkeyPatch, Subject], object]
Memory = namedtuple("Memory", "total available")


def _other_version(name: str, version: str | None) -> Break:
    """A package has another version, or is not there."""

    def change(patch: pytest.MonkeyPatch, subject: Subject) -> None:
        found = importlib.metadata.version

        def versions(asked: str) -> str:
            if asked != name:
                return found(asked)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(asked)
            return version

        patch.setattr(importlib.metadata, "version", versions)

    return change


def _wrong_products(dtype: torch.dtype) -> Break:
    """Products of matrices of one precision are a little off."""

    def change(patch: pytest.MonkeyPatch, subject: Subject) -> None:
        multiply = torch.Tensor.__matmul__

        def off(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            made = multiply(left, right)
            return made * 1.05 if left.dtype == dtype else made

        patch.setattr(torch.Tensor, "__matmul__", off)

    return change


def _speeds(**changed: float) -> Break:
    fast = Machine(1e12, 1e10, 1e9, 1e9, measured=True)
    return lambda patch, subject: patch.setattr(machine, "measure", lambda *_: replace(fast, **changed))


def _raising(owner: Any, name: str, error: Exception) -> Break:
    def fails(*_: object, **more: object) -> None:
        raise error

    return lambda patch, subject: patch.setattr(owner, name, fails)


def _wrong_gradients(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    right = logits.loss_sum_and_grad

    def wrong(*given: Any) -> Any:
        loss, grad = right(*given)
        return loss, grad * 1.001

    patch.setattr(logits, "loss_sum_and_grad", wrong)


def _to_nearest(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    patch.setattr(rounding, "stochastic_round_bf16", lambda values, noise: values.bfloat16())


def _int8_to_nearest(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    write = Int8Weight.write
    patch.setattr(Int8Weight, "write", lambda self, values, noise: write(self, values, None))


def _noise(change: Callable[[torch.Tensor, int], torch.Tensor]) -> Break:
    """The noise is another one; the number of the call is told as well."""

    def patched(patch: pytest.MonkeyPatch, subject: Subject) -> None:
        integers, calls = Noise.integers, []

        def changed(self: Noise, like: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return change(integers(self, like), len(calls))

        patch.setattr(Noise, "integers", changed)

    return patched


def _forgets(kind: type, method: str, which: Callable[..., bool]) -> Break:
    """Some writes are not done."""

    def change(patch: pytest.MonkeyPatch, subject: Subject) -> None:
        write = getattr(kind, method)

        def forgetful(self: Any, *given: Any, **more: Any) -> None:
            if not which(self, *given):
                write(self, *given, **more)

        patch.setattr(kind, method, forgetful)

    return change


def _rule(change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    """The rule gives another direction."""

    def patched(patch: pytest.MonkeyPatch, subject: Subject) -> None:
        rule = RULES["adamw"]

        def changed(*given: Any) -> Any:
            direction, state = rule.update(*given)
            return change(direction), state

        patch.setitem(RULES, "adamw", replace(rule, update=changed))

    return patched


def _a_plan_that_is_off(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    report = MemoryMonitor.report

    def off(self: MemoryMonitor) -> dict[str, Any]:
        found = report(self)
        return {**found, "predicted_peak_bytes": int(1.1 * (found["predicted_peak_bytes"] or 0))}

    patch.setattr(MemoryMonitor, "report", off)


def _without_words(name: str, *words: str) -> Break:
    """A setting of a run has no effect."""

    def change(patch: pytest.MonkeyPatch, subject: Subject) -> None:
        kept = tuple(word for word in trials.VARIANTS[name] if word not in words)
        assert len(kept) < len(trials.VARIANTS[name])
        patch.setitem(trials.VARIANTS, name, kept)

    return change


def _ends_by_itself(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    shutil.rmtree(subject.work / "self-test" / "killed")
    done = subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: surprise\n")
    patch.setattr(subprocess, "run", lambda *_, **more: done)


def _counts_too_little(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    """No tensor is refused."""
    patch.setattr(tracker.StorageTracker, "_exceeds", lambda self, num_bytes: False)


def _no_answer(when: str) -> Break:
    def change(patch: pytest.MonkeyPatch, subject: Subject) -> None:
        path = subject.trials.made["plain"].folder / "answers.json"
        given = json.loads(path.read_text())
        given[when] = dict.fromkeys(given[when], "")
        path.write_text(json.dumps(given))

    return change


def _final_model(change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    """The head of the final model is another one."""

    def patched(patch: pytest.MonkeyPatch, subject: Subject) -> None:
        path = subject.trials.made["plain"].folder / "model.safetensors"
        weights = load_file(path)
        weights["lm_head.weight"] = change(weights["lm_head.weight"])
        save_file(weights, path, metadata={"format": "pt"})

    return patched


def _a_card(**facts: Any) -> Break:
    """There is a card; what it computes stays on the CPU."""

    def change(patch: pytest.MonkeyPatch, subject: Subject) -> None:
        patch.setitem(subject.__dict__, "device", torch.device("cuda", 0))
        card = DeviceFacts("cuda:0", "Some GPU", (9, 0), real_bf16=True, total_bytes=8 * 2**30)
        patch.setattr(machine, "detect_device", lambda device: replace(card, **facts))
        patch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 8 * 2**30))
        patch.setattr(machine, "outside_bytes", lambda device, reserve: 7 * 2**30 + 2**29)
        patch.setattr(machine, "id_of", lambda device: "GPU-1")

    return change


FREE = shutil.disk_usage(".")
TABLE: dict[str, tuple[str, tuple[str, ...], Break, str]] = {
    # What is broken: the check that finds it, runs that are made anew, how, what it says.
    "an old package": ("versions", (), _other_version("numpy", "1.26.4"), "numpy 1.26.4 is installed, but numpy>="),
    "no package": ("versions", (), _other_version("trl", None), "trl is not installed"),
    "a library that can't be loaded": (
        *("packages", ()),
        lambda patch, subject: patch.setattr(
            machine, "detect_bitsandbytes", lambda device: BitsandbytesFacts("0.50", "it has no code for this card")
        ),
        "bitsandbytes is installed but can't be used on cpu: it has no code for this card",
    ),
    "a build without CUDA": (
        *("device", ()),
        lambda patch, subject: (
            subject.gpu_bytes.update({"GPU-1": 0}),
            patch.setattr(torch.version, "cuda", None),
        ),
        "There is an NVIDIA card, but PyTorch",
    ),
    "a card that is too new": ("device", (), _a_card(capability=(12, 0)), "for which this PyTorch has no code"),
    "wrong products": ("arithmetic", (), _wrong_products(torch.float32), "Products in fp32 are wrong on cpu"),
    "wrong products in bf16": ("bf16", (), _wrong_products(torch.bfloat16), "Products in bf16 are wrong on cpu"),
    "a full memory": (
        *("memory", ()),
        lambda patch, subject: patch.setattr(psutil, "virtual_memory", lambda: Memory(2**34, 2**28)),
        "Only 256 MiB are free in the host's memory",
    ),
    "a full card": ("memory", (), _a_card(), "Only 512 MiB are free on the card"),
    "a full disk": (
        *("folder", ()),
        lambda patch, subject: patch.setattr(shutil, "disk_usage", lambda path: FREE._replace(free=2**30)),
        "Only 1.00 GiB are free on the disk",
    ),
    "no folder": (
        *("folder", ()),
        lambda patch, subject: (subject.runs.parent.mkdir(), subject.runs.write_text("a file")),
        "can't be written to",
    ),
    "locks without effect": (
        *("folder", ()),
        lambda patch, subject: patch.setattr(machine, "locked", nullcontext),
        "Locks have no effect",
    ),
    "no replacing": ("folder", (), _raising(os, "replace", PermissionError("in use")), "can't be replaced in one go"),
    "slow copies": ("speeds", (), _speeds(host_bytes_per_s=1e8), "Copies are too slow"),
    "a slow disk": ("speeds", (), _speeds(disk_write_bytes_per_s=1e6), "The disk is too slow for checkpoints"),
    "a disk with an error": (
        "speeds",
        (),
        _raising(machine, "measure", OSError(5, "I/O error")),
        "failed with OSError",
    ),
    "wrong gradients": ("gradients", (), _wrong_gradients, "differ"),
    "rounding to nearest": ("rounding", (), _to_nearest, "0.0000 in bf16"),
    "rounding to nearest in int8": ("rounding", (), _int8_to_nearest, "0.0000 in int8"),
    "noise of one kind": ("noise", (), _noise(lambda drawn, call: drawn * 0 + 1), "is not uniform"),
    "noise that is too small": ("noise", (), _noise(lambda drawn, call: drawn // 2), "is not uniform"),
    "noise of a device's own": ("noise", (), _noise(lambda drawn, call: drawn + (call - 1)), "differs between cpu and"),
    "a step that forgets a weight": (
        *("trains", ("plain",)),
        _forgets(ParamOptimizer, "apply", lambda optimizer, name, *_: name.endswith("layers.1.mlp.up_proj.weight")),
        "1 of 30 weights did not change, the first is model.layers.1.mlp.up_proj.weight",
    ),
    "a rule with the wrong sign": ("trains", ("plain",), _rule(lambda direction: -direction), "did not lower the loss"),
    "a run that fails": (
        *("trains", ("plain",)),
        _raising(run, "load", ValueError("surprise")),
        "It failed with ValueError: surprise.",
    ),
    "a rule that draws": (
        *("repeats", ("again",)),
        _rule(lambda direction: direction + 1e-6 * torch.rand_like(direction)),
        "are not the same to the bit",
    ),
    "a plan that is off": ("plans", ("plain",), _a_plan_that_is_off, "The plan of memory is off: "),
    "a resume that loses state": (
        *("resumes", ("killed",)),
        lambda patch, subject: patch.setattr(ParamStates, "load", lambda self, saved: None),
        "A run that was killed after step 3 and resumed is not the same",
    ),
    "a process that ends by itself": ("resumes", ("killed",), _ends_by_itself, "ended by itself with exit code 1"),
    "updates that bf16 loses": ("bf16-store", ("bf16",), _to_nearest, "do not learn what weights in fp32 do"),
    "a setting without effect": (
        *("bf16-store", ("bf16",)),
        _without_words("bf16", "model.store=bf16"),
        "matrices are not stored in bf16",
    ),
    "updates that int8 loses": ("int8-store", ("int8",), _int8_to_nearest, "weights did not change, the first is "),
    "a bf16 store that forgets writes": (
        *("bf16-store", ("bf16",)),
        _forgets(PlainWeight, "write", lambda weight, *_: weight.dtype == torch.bfloat16),
        "weights did not change, the first is ",
    ),
    "an int8 store that forgets writes": (
        *("int8-store", ("int8",)),
        _forgets(Int8Weight, "write", lambda weight, *_: bool(weight.codes.any())),
        "weights did not change, the first is ",
    ),
    "host memory that forgets": (
        *("streams-host", ("host",)),
        _forgets(HostHome, "write", lambda home, *_: home.unit.name.endswith("layers.1")),
        "Layers that live in host memory give other results",
    ),
    "layers that stay": (
        *("streams-host", ("host",)),
        _without_words("host", "memory.placement=host"),
        "The run that was asked to keep its layers in host memory did not",
    ),
    "a disk that forgets": (
        *("streams-disk", ("disk",)),
        _forgets(CheckedFile, "write", lambda file, *_: file.path.name == "weights-00001.safetensors"),
        "Layers that live in files on the disk of this folder give other results",
    ),
    "a limit that is not respected": ("limits", (), _counts_too_little, "memory.limit is not respected"),
    "no answer before": ("answers", (), _no_answer("before"), "The model gave no answer before training"),
    "no answer after": ("answers", (), _no_answer("after"), "The model gave no answer after training"),
    "another final model": ("answers", (), _final_model(lambda head: head.flip(0)), "but the run itself answered"),
    "a final model of NaN": ("answers", (), _final_model(lambda head: head / 0), "its logits are not finite"),
}


@contextmanager
def as_before(healthy: Healthy, folder: Path, anew: tuple[str, ...], check: str) -> Iterator[Subject]:
    """The machine with the runs that it made, but for some that are made anew."""
    subject = Subject("auto" if check == "device" else "cpu", folder / "runs" / "outputs", folder / "work")
    (subject.work / "self-test").mkdir(parents=True)
    made = subject.trials
    for name in ("model", "data"):  # made once
        made.__dict__[name] = getattr(healthy.subject.trials, name)
    made.made |= {name: trial for name, trial in healthy.subject.trials.made.items() if name not in anew}
    if "killed" in anew:
        shutil.copytree(healthy.killed, subject.work / "self-test" / "killed")
    if check == "answers":  # whose files are changed
        copied = shutil.copytree(made.made["plain"].folder, subject.work / "plain")
        made.made["plain"] = replace(made.made["plain"], folder=copied)
    yield subject


def find(healthy: Healthy, folder: Path, name: str) -> Finding:
    check, anew, how, _ = TABLE[name]
    with as_before(healthy, folder, anew, check) as subject, pytest.MonkeyPatch.context() as patch:
        how(patch, subject)
        return look(BY_NAME[check], subject)


@pytest.mark.parametrize("name", TABLE)
def test_a_break_is_found(name: str, healthy: Healthy, tmp_path: Path) -> None:
    words = TABLE[name][3]
    finding = find(healthy, tmp_path, name)
    assert finding.status == "wrong", finding
    assert words in finding.words
    assert finding.remedy.endswith((".", ")"))
    assert "Traceback" not in finding.words + finding.remedy


@pytest.mark.parametrize(("check", "anew"), [("resumes", ("killed",)), ("streams-disk", ("disk",)), ("answers", ())])
def test_without_a_break_nothing_is_found(check: str, anew: tuple[str, ...], healthy: Healthy, tmp_path: Path) -> None:
    """The same as above, so that what is found there is the break."""
    with as_before(healthy, tmp_path, anew, check) as subject:
        finding = look(BY_NAME[check], subject)
        assert finding.status == "well", finding


def test_every_check_is_broken_at_least_once() -> None:
    # These two only say what there is.
    assert {row[0] for row in TABLE.values()} == set(BY_NAME) - {"cuda", "file-system"}
