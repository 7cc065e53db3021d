"""What `doctor` says: causes instead of tracebacks, files without names, and what there is of a card and a disk."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sophia_galore.cli import doctor
from sophia_galore.doctor import gpus, machine, storage
from sophia_galore.doctor.findings import Check, Finding, Outcome, examine, look, skipped, well, wrong
from sophia_galore.doctor.report import DoctorReport, hide, is_well, personal, report_of
from sophia_galore.doctor.subject import Subject, subject_of
from sophia_galore.doctor.trials import Trials
from sophia_galore.errors import RunError
from sophia_galore.plan.facts import DeviceFacts
from sophia_galore.train.folder import refuse_unwritable
from unit.cli.tiny_run import Ended, command

CPU = torch.device("cpu")


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    (tmp_path / "work").mkdir()
    return Subject("cpu", tmp_path / "outputs", tmp_path / "work")


def check_of(outcome: Outcome | Exception, name: str = "one") -> Check:
    def find(subject: Subject) -> Outcome:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return Check(name, name.capitalize(), find)


# ---- checks


@pytest.mark.parametrize(
    ("error", "words", "remedy"),
    [
        (RunError("The disk is gone.", "Look for it."), "The disk is gone.", "Look for it."),
        (RunError("The disk is gone."), "The disk is gone.", "attach it to an issue"),
        (ValueError("no\nsuch\nthing"), "It failed with ValueError: no.", "attach it to an issue"),
        (AssertionError(), "It failed with AssertionError: AssertionError.", "attach it to an issue"),
    ],
)
def test_what_a_check_raises_is_found(error: Exception, words: str, remedy: str, subject: Subject) -> None:
    finding = look(check_of(error), subject)
    assert (finding.status, finding.words) == ("wrong", words)
    assert remedy in finding.remedy


def test_an_unexpected_error_says_where_but_names_no_folder(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: 1 / 0)
    finding = look(Check("files", "Files", machine.file_system), subject)
    assert finding.words == "It failed with ZeroDivisionError: division by zero."
    assert [place.split()[1] for place in finding.raised][-1] == "has_hard_links"
    assert all(place.startswith("doctor/") for place in finding.raised)


def test_ctrl_c_ends_an_examination(subject: Subject) -> None:
    with pytest.raises(KeyboardInterrupt):
        examine([Check("one", "One", _stopped)], subject)


def test_every_check_is_told_and_what_needs_a_device_waits_for_one(tmp_path: Path) -> None:
    subject = Subject("mps", tmp_path, tmp_path)
    told: list[Finding] = []
    checks = [check_of(well("Fine.")), Check("two", "Two", lambda subject: well("Fine."), needs_device=False)]
    found = examine([Check("device", "Device", machine.device, needs_device=False), *checks], subject, told.append)
    assert told == found
    assert [finding.status for finding in found] == ["wrong", "skipped", "well"]
    assert found[0].words == "--device mps is not supported."
    assert found[1].words == "The device mps can't be used, as is said above."


def test_a_run_that_failed_is_told_once(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Trials, name: str, *words: str, resume: bool = False) -> None:
        raise RunError("It is broken.")

    monkeypatch.setattr(Trials, "train", fails)
    asks = Check("runs", "Runs", lambda subject: well(str(subject.trials.run("plain"))))
    first, second = examine([asks, asks], subject)
    assert (first.status, first.words) == ("wrong", "It is broken.")
    assert second.status == "skipped"
    assert second.words == 'It needs the run "plain", which failed, as is said above.'


@pytest.mark.parametrize(("name", "cause"), [("cuda", "PyTorch finds no GPU"), ("mps", "is not supported")])
def test_a_device_that_is_not_there_is_wrong(name: str, cause: str, tmp_path: Path) -> None:
    if torch.cuda.is_available() and name == "cuda":
        pytest.skip("there is one")
    finding = look(Check("device", "Device", machine.device, needs_device=False), Subject(name, tmp_path, tmp_path))
    assert finding.status == "wrong" and cause in finding.words and "cpu" in finding.remedy


# ---- CUDA


def act_a_card(monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
    """There is a card of 8 GiB, of which a desktop takes 300 MiB and the context 200."""
    subject.__dict__["device"] = torch.device("cuda", 0)
    subject.gpu_bytes["GPU-1"] = 300 * 2**20
    facts = DeviceFacts("cuda:0", "Some GPU", (8, 6), real_bf16=True, total_bytes=8 * 2**30)
    monkeypatch.setattr(machine, "detect_device", lambda device: facts)
    monkeypatch.setattr(machine, "id_of", lambda device: "GPU-1")
    monkeypatch.setattr(machine, "outside_bytes", lambda device, reserve: 500 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30 - 500 * 2**20, 8 * 2**30))


def test_what_is_said_of_a_card(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    act_a_card(monkeypatch, subject)
    assert machine.device(subject).words == "cuda:0: Some GPU, compute capability 8.6."
    assert machine.cuda(subject).words == "What follows was tried on Some GPU, one of 1 CUDA cards here."
    found = machine.memory(subject)
    assert found.status == "well"
    assert "the desktop and other programs take 300 MiB and CUDA's context 200 MiB" in found.words
    assert found.figures["context_bytes"] == 200 * 2**20


def test_a_driver_that_says_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    act_a_card(monkeypatch, subject)
    subject.gpu_bytes.clear()
    found = machine.memory(subject)
    assert "500 MiB are taken by CUDA's context and other programs" in found.words
    assert found.figures["desktop_bytes"] is None


@pytest.mark.parametrize(
    ("built", "capability", "fits"),
    [
        (["sm_80", "sm_90"], (8, 0), True),
        (["sm_80", "sm_90"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (7, 5), False),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_90a", "sm_100"], (10, 0), True),
        ([], (7, 5), True),
    ],
)
def test_a_build_for_a_card(
    built: list[str], capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    assert machine._is_built_for(*capability) is fits


def test_a_card_that_is_not_asked_for(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = machine.cuda(subject)
    assert (found.status, found.words) == ("skipped", "Nothing was tried on CUDA, since --device is cpu.")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("GPU-1, 300\nGPU-2, 0\n", {"GPU-1": 300 * 2**20, "GPU-2": 0}),
        ("GPU-1, [N/A]\nFailed to initialise\n", {}),
        ("", {}),
    ],
)
def test_what_the_driver_says(said: str, found: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **more: subprocess.CompletedProcess([], 0, said, ""))
    assert gpus.used_bytes() == found


@pytest.mark.parametrize("error", [OSError("gone"), subprocess.TimeoutExpired("nvidia-smi", 10)])
def test_a_driver_that_does_not_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", fails)
    assert gpus.used_bytes() == {}


# ---- the disk


def test_what_a_file_system_can_do(tmp_path: Path) -> None:
    found = storage.find_storage(tmp_path)
    assert found.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert found.kind == storage.kind_of(tmp_path)
    other = tmp_path / "other"
    (tmp_path / "file").write_text("x")
    os.link(tmp_path / "file", other)
    assert found.hard_links is other.samefile(tmp_path / "file") is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"], "nothing is left behind"


def test_hard_links_that_are_copies(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", shutil.copyfile)
    found = machine.file_system(subject)
    assert found.figures["hard_links"] is False
    assert "hard links no" in found.words
    assert found.remedy.startswith("Checkpoints of layers that live on disk are copied")


@pytest.mark.skipif(sys.platform != "linux", reason="nothing else is asked on other systems")
def test_a_file_system_that_refuses_everything(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(95, "not supported")

    import fcntl

    monkeypatch.setattr(os, "link", refuses)
    monkeypatch.setattr(os, "preadv", refuses)
    monkeypatch.setattr(fcntl, "ioctl", refuses)
    found = machine.file_system(subject)
    assert (found.figures["hard_links"], found.figures["reflinks"], found.figures["direct"]) == (False, False, False)


def test_a_slow_disk_is_well_with_a_hint(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from sophia_galore.memory.transfers import Machine

    monkeypatch.setattr(machine, "measure", lambda *_: Machine(1e12, 1e10, 1e9, 1e8, measured=True))
    found = machine.speeds(subject)
    assert (found.status, found.remedy) == ("well", "For memory.placement=disk take a faster disk.")


def test_the_examination_happens_on_the_disk_of_the_runs_and_leaves_nothing(tmp_path: Path) -> None:
    with subject_of("cpu", tmp_path / "not" / "yet") as made:
        assert made.work.parent == tmp_path
        assert not any(made.work.iterdir())
    assert not any(tmp_path.iterdir())


def test_it_happens_elsewhere_if_that_disk_can_not_be_written_to(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with subject_of("cpu", file / "outputs") as made:
        assert made.work.is_dir() and tmp_path not in made.work.parents
    with pytest.raises(Exception, match="can't be written to"):
        refuse_unwritable(file / "outputs")


# ---- versions


@pytest.mark.parametrize(
    ("requirement", "name"),
    [("torch>=2.13", "torch"), ("trl<2,>=1.16", "trl"), ("ruamel.yaml>=0.19", "ruamel.yaml"), ("rich", "rich")],
)
def test_the_name_of_a_requirement(requirement: str, name: str) -> None:
    assert machine._name_of(requirement) == name


def test_without_an_installation_versions_are_not_compared(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    found = machine.versions(subject)
    assert found.status == "skipped" and found.figures["python"] == platform.python_version()


# ---- names


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ada Lovelace at her engine."""
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "engine.london.example")
    monkeypatch.setattr(platform, "node", lambda: "engine")
    for name in ("USER", "USERNAME", "LOGNAME"):
        monkeypatch.setenv(name, "ada")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("The file /home/ada/runs/x is gone.", "The file ~/runs/x is gone."),
        ("/home/ada: no", "~: no"),
        ("/home/adamant/x", "/home/adamant/x"),
        ("/mnt/ada/x", "/mnt/<user>/x"),
        ("Ada's disk", "<user>'s disk"),
        ("canada", "canada"),
        ("host engine, engine.london.example", "host <host>, <host>"),
        ("//ENGINE/share", "//<host>/share"),
        ("engines", "engines"),
        ("/data/secret-project/run/x", "<folder>/x"),
        ("nothing of anybody", "nothing of anybody"),
    ],
)
def test_names_are_replaced(text: str, hidden: str, somebody: None) -> None:
    assert hide(text, personal([("/data/secret-project/run", "<folder>")])) == hidden


def test_a_superuser_has_no_name(monkeypatch: pytest.MonkeyPatch, somebody: None) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/root"))
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    for name in ("USER", "USERNAME", "LOGNAME"):
        monkeypatch.delenv(name)
    assert hide("the root of /root/x", personal()) == "the root of ~/x"


@pytest.mark.parametrize("home", [Path("/"), None])
def test_no_home_is_no_reason_to_hide_slashes(
    home: Path | None, monkeypatch: pytest.MonkeyPatch, somebody: None
) -> None:
    def found() -> Path:
        if home is None:
            raise RuntimeError("Could not determine home directory.")
        return home

    monkeypatch.setattr(Path, "home", found)
    finding = Finding(name="one", title="One", status="well", words="/mnt/ada/x and /usr")
    assert report_of([finding], "cpu", 1.0, [Path("/")]).findings[0].words == "/mnt/<user>/x and /usr"


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch, somebody: None) -> None:
    def fails() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", fails)
    assert hide("/home/ada/x", personal()) == "~/x"


def test_no_text_of_a_report_has_names(somebody: None) -> None:
    finding = Finding(
        name="ada", title="One", status="wrong", words="/home/ada", remedy="ask ada", figures={"kind": "engine", "n": 1}
    )
    report = report_of([finding], "cpu", 1.26)
    assert (report.is_well, report.took_s) == (False, 1.3)
    (found,) = report.findings
    assert (found.name, found.words, found.remedy) == ("ada", "~", "ask <user>")
    assert found.figures == {"kind": "<host>", "n": 1}
    assert DoctorReport.of(json.loads(json.dumps(report.to_json())), "it") == report


def test_what_can_not_be_tried_is_not_wrong() -> None:
    assert is_well([Finding(name="one", title="One", status="skipped", words="No card.")])


# ---- the command


@pytest.fixture
def with_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command with three checks, one of each kind; the name of the wrong one's file is the user's."""
    monkeypatch.chdir(tmp_path)
    outcomes = {
        "first": well("It works [well].", "It could be faster.", figures={"bytes": 7}),
        "second": skipped("There is no card."),
        "third": wrong(f"{tmp_path}/x is broken.", "Repair it."),
    }
    checks = [check_of(outcome, name) for name, outcome in outcomes.items()]
    monkeypatch.setattr(doctor, "CHECKS", checks)
    return tmp_path


def test_what_is_wrong_is_said_at_the_end_with_what_to_do(with_checks: Path) -> None:
    ended = command("doctor", "--device", "cpu")
    assert ended == Ended(1, ended.out, "")
    assert ended.out.splitlines() == [
        "well    First: It works [well].",
        "skipped Second: There is no card.",
        f"WRONG   Third: {with_checks}/x is broken.",
        "",
        "Well (0 s): First.",
        "  First: It could be faster.",
        "Not tried: Second.",
        f"Wrong: Third. {with_checks}/x is broken.",
        "  What to do: Repair it.",
        "For a bug report, write all of this to a file: --output doctor.json",
    ]
    assert not any(with_checks.iterdir())


def test_json_is_all_that_is_printed_and_what_is_written(with_checks: Path) -> None:
    ended = command("doctor", "--device", "cpu", "--json", "--output", "new/doctor.json")
    assert (ended.code, ended.err) == (1, "")
    printed = json.loads(ended.out)
    assert printed == json.loads((with_checks / "new" / "doctor.json").read_text())
    assert [finding["status"] for finding in printed["findings"]] == ["well", "skipped", "wrong"]
    assert printed["findings"][0]["figures"] == {"bytes": 7}
    assert printed["findings"][2]["words"] == "<folder>/x is broken."
    assert str(with_checks) not in ended.out


def test_nothing_wrong_is_exit_code_0(with_checks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", doctor.CHECKS[:2])
    ended = command("doctor", "--device", "cpu", "--output", "doctor.json")
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == "Written, for a bug report: doctor.json"
    assert command("doctor", "--device", "cpu", "--output", "doctor.json").code == 0, "its own file is replaced"


def test_on_a_card_the_result_is_asked_for(with_checks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [check_of(well("It was tried on a card."), "cuda")])
    ended = command("doctor", "--device", "cpu")
    assert ended.code == 0 and "Please share the result" in ended.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "tpu"], "tpu"),
        (["--fast"], "--fast"),
        (["extra"], "extra"),
        (["--output", "notes.txt"], "notes.txt exists and is no JSON document, so it is not replaced."),
        (["--output", "."], "is no JSON document"),
        (["--output", "notes.txt/doctor.json"], "can't be written"),
    ],
)
def test_wrong_arguments_are_exit_code_2(words: list[str], said: str, with_checks: Path) -> None:
    (with_checks / "notes.txt").write_text("Do not lose this.")
    ended = command("doctor", *words)
    assert ended.code == 2 and said in ended.err and not ended.out
    assert (with_checks / "notes.txt").read_text() == "Do not lose this."


def test_ctrl_c_is_exit_code_130_and_leaves_nothing(with_checks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [check_of(well("Fine.")), Check("two", "Two", _stopped)])
    ended = command("doctor", "--device", "cpu", "--output", "doctor.json")
    assert (ended.code, ended.out) == (130, "well    One: Fine.\n")
    assert not any(with_checks.iterdir())


def _stopped(subject: Subject) -> Outcome:
    raise KeyboardInterrupt
