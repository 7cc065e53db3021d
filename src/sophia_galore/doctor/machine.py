"""The checks of the machine itself: versions, device, precision, memory, disk, and how fast they are."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import psutil
import torch

from sophia_galore import __version__
from sophia_galore.config import RunConfig
from sophia_galore.config.size import bytes_in_words
from sophia_galore.doctor.findings import Check, Figure, Outcome, skipped, well, wrong
from sophia_galore.doctor.gpus import id_of
from sophia_galore.doctor.self_test import REPORT
from sophia_galore.doctor.storage import find_storage
from sophia_galore.doctor.subject import Subject
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.memory.budget import outside_bytes
from sophia_galore.memory.transfers import flops, measure
from sophia_galore.plan.detect import detect_bitsandbytes, detect_device
from sophia_galore.plan.facts import Facts
from sophia_galore.plan.rules import compute_dtype
from sophia_galore.train.environment import processor
from sophia_galore.train.folder import locked, refuse_unwritable

_PACKAGE = "sophia-galore"
# Of the extras of this package: what a part of the program needs, and the program does without.
_OPTIONAL = ("bitsandbytes", "modelscope", "tensorboard", "trackio", "wandb", "mlflow")
_GIB = 2**30
_LEAST_FREE_BYTES = _GIB
_LEAST_DISK_BYTES = 2 * _GIB
# Below these, something is broken rather than slow: an old hard disk writes 50 MB/s.
_LEAST_COPY_BYTES_PER_S = 200e6
_LEAST_DISK_BYTES_PER_S = 10e6
# Where streaming from it takes longer than most steps compute.
_SLOW_DISK_BYTES_PER_S = 500e6
_SIZE = 512
_LARGE_SIZE = 4096
# Rounding of a product of so many terms, relative to its largest entry; worst seen 4e-7 and 3e-3.
_PRODUCT_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def versions(subject: Subject) -> Outcome:
    """Compare the installed packages with what this one requires."""
    figures: dict[str, Figure] = {
        _PACKAGE: __version__,
        "python": platform.python_version(),
        "system": platform.platform(aliased=True, terse=True),
    }
    try:
        required = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return Outcome(
            "skipped", f"{_PACKAGE} is not installed as a package, so nothing says what it needs.", "", figures
        )
    problems: list[str] = []
    num_required = 0
    for requirement in required:
        wanted, _, condition = requirement.partition(";")
        if condition and "'train'" not in condition.replace('"', "'"):
            continue
        num_required += 1
        name = _name_of(wanted)
        figures[name] = _version(name)
        if problem := _unmet(wanted.strip()):
            problems.append(problem)
    said = f"Python {figures['python']}, torch {figures['torch']}, transformers {figures.get('transformers')}"
    if problems:
        remedy = f'Install what is missing: pip install --upgrade "{_PACKAGE}[train]".'
        return wrong(f"{said}; {'; '.join(problems)}.", remedy, figures=figures)
    return well(f"{_PACKAGE} {__version__}, {said}; all {num_required} requirements are met.", figures=figures)


def packages(subject: Subject) -> Outcome:
    """Try the optional packages that are installed."""
    figures: dict[str, Figure] = {name: _version(name) for name in _OPTIONAL}
    there = [f"{name} {version}" for name, version in figures.items() if version]
    missing = [name for name, version in figures.items() if not version]
    device = subject.device if subject.has_device else torch.device("cpu")
    if problem := detect_bitsandbytes(device).problem:
        return wrong(
            f"bitsandbytes is installed but can't be used on {device}: {problem}.",
            "Only quantization.backend=bitsandbytes needs it: install another version, or remove it.",
            figures=figures,
        )
    said = f"{', '.join(there) or 'none'}. Not installed: {', '.join(missing) or 'none'}."
    return well(said, figures=figures)


def device(subject: Subject) -> Outcome:
    """Say what the device is; the error of one that can't be used says why."""
    found = subject.device
    figures: dict[str, Figure] = {
        "device": str(found),
        "processor": processor(),
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "cuda_of_torch": torch.version.cuda,
        "cards_of_driver": len(subject.gpu_bytes),
    }
    if found.type != "cuda":
        if subject.device_name == "auto" and subject.gpu_bytes:
            built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
            return wrong(
                f"There is an NVIDIA card, but PyTorch {torch.__version__} {built} and does not find it.",
                "Install the build of PyTorch for your driver's CUDA (https://pytorch.org), or name --device cpu.",
                figures=figures,
            )
        cores, threads = figures["cores"], figures["threads"]
        return well(f"The CPU: {figures['processor']}; cores: {cores}, threads of torch: {threads}.", figures=figures)
    facts = detect_device(found)
    major, minor = facts.capability or (0, 0)
    figures |= {"gpu": facts.name, "capability": f"{major}.{minor}", "gpu_bytes": facts.total_bytes}
    if not _is_built_for(major, minor):
        return wrong(
            f"{facts.name} has compute capability {major}.{minor}, for which this PyTorch has no code.",
            "Install a build of PyTorch that supports this card, or name --device cpu.",
            figures=figures,
        )
    return well(f"{found}: {facts.name}, compute capability {major}.{minor}.", figures=figures)


def cuda(subject: Subject) -> Outcome:
    """Say plainly whether anything is tried on CUDA."""
    if not torch.cuda.is_available():
        return skipped("PyTorch finds no CUDA card here, so nothing was tried on CUDA.")
    if not subject.has_device or subject.device.type != "cuda":
        return skipped(f"Nothing was tried on CUDA, since --device is {subject.device_name}.")
    count = torch.cuda.device_count()
    return well(
        f"What follows was tried on {torch.cuda.get_device_name(subject.device)}, one of {count} CUDA cards here.",
        figures={"cards": count},
    )


def bf16(subject: Subject) -> Outcome:
    """Find out whether the device computes in bfloat16 itself, and whether the results are right."""
    place = subject.device
    facts = detect_device(place)
    native = facts.real_bf16 if place.type == "cuda" else _cpu_has_bf16()
    size = _LARGE_SIZE if place.type == "cuda" else _SIZE
    rates = {dtype: flops(place, dtype, size) for dtype in (torch.float32, torch.bfloat16)}
    error = product_error(place, torch.bfloat16)
    computes = str(compute_dtype(Facts(RunConfig(), device=facts))).removeprefix("torch.")
    figures: dict[str, Figure] = {
        "native": native,
        "fp32_flops": rates[torch.float32],
        "bf16_flops": rates[torch.bfloat16],
        "product_error": error,
        "computes_in": computes,
    }
    speeds = f"{rates[torch.bfloat16] / 1e9:.3g} GFLOP/s in bf16, {rates[torch.float32] / 1e9:.3g} in fp32"
    if not error <= _PRODUCT_TOLERANCES[torch.bfloat16]:
        return wrong(
            f"Products in bf16 are wrong on {place}: off by {error:.1e} of the largest entry.",
            "Use training.compute_dtype=fp32. " + REPORT,
            figures=figures,
        )
    how = {True: "itself", False: "by emulation", None: "in a way that is not known"}[native]
    return well(
        f"{place} computes in bf16 {how}: {speeds}. A run computes in {computes} here unless training.compute_dtype "
        "says otherwise.",
        figures=figures,
    )


def arithmetic(subject: Subject) -> Outcome:
    """Compare a product on the device with the same in float64 on the CPU."""
    error = product_error(subject.device, torch.float32)
    limit = _PRODUCT_TOLERANCES[torch.float32]
    if not error <= limit:
        return wrong(
            f"Products in fp32 are wrong on {subject.device}: off by {error:.1e} of the largest entry, {limit:.0e} is "
            "allowed.",
            "If torch is told to use TF32, leave that out; else the device, its driver or PyTorch is faulty.",
            figures={"error": error},
        )
    return well(
        f"Products in fp32 are right on {subject.device}, to {error:.1e} of the largest entry.",
        figures={"error": error},
    )


def product_error(place: torch.device, dtype: torch.dtype) -> float:
    """Return the largest error of a product of matrices, relative to its largest entry.

    Args:
        place: The device.
        dtype: Precision of the matrices.
    """
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIZE, _SIZE, generator=draw).to(dtype) for _ in range(2))
    expected = left.double() @ right.double()
    found = (left.to(place) @ right.to(place)).cpu().double()
    return float((found - expected).abs().max() / expected.abs().max())


def memory(subject: Subject) -> Outcome:
    """Measure what is free of the host's memory and the card's, and what takes the rest."""
    host = psutil.virtual_memory()
    figures: dict[str, Figure] = {"host_bytes": host.total, "host_free_bytes": host.available}
    said = f"{bytes_in_words(host.available)} of the host's {bytes_in_words(host.total)} are free"
    least, place = host.available, "in the host's memory"
    if subject.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(subject.device)
        outside = outside_bytes(subject.device, None)
        others = subject.gpu_bytes.get(id_of(subject.device))
        context = None if others is None else max(0, outside - others)
        figures |= {
            "gpu_bytes": total,
            "gpu_free_bytes": free,
            "outside_bytes": outside,
            "desktop_bytes": others,
            "context_bytes": context,
        }
        said += f"; {bytes_in_words(total - outside)} of the card's {bytes_in_words(total)} are for tensors"
        if others is None or context is None:
            said += f", {bytes_in_words(outside)} are taken by CUDA's context and other programs"
        else:
            said += f", the desktop and other programs take {bytes_in_words(others)}"
            said += f" and CUDA's context {bytes_in_words(context)}"
        if total - outside < least:
            least, place = total - outside, "on the card"
    if least < _LEAST_FREE_BYTES:
        return wrong(f"Only {bytes_in_words(least)} are free {place}: {said}.", "End other programs.", figures=figures)
    return well(f"{said[0].upper()}{said[1:]}.", figures=figures)


def folder(subject: Subject) -> Outcome:
    """Try what runs rely on in their folder: room, locks, files that replace others."""
    refuse_unwritable(subject.runs)
    storage = find_storage(subject.work)
    free = storage.free_bytes
    if free < _LEAST_DISK_BYTES:
        return wrong(
            f"Only {bytes_in_words(free)} are free on the disk of {subject.runs}; a checkpoint and a model need more.",
            "Free some space, or choose a training.output_dir on another disk.",
            figures={"free_bytes": free},
        )
    if not _locks(subject.work / "locked"):
        return wrong(
            f"Locks have no effect on the disk of {subject.runs}, so that two runs could write to one folder.",
            "Choose a training.output_dir on another disk, one of this machine.",
        )
    if not _replaces(subject.work):
        return wrong(
            f"A file can't be replaced in one go on the disk of {subject.runs}, so that checkpoints could be lost.",
            "Choose a training.output_dir on another disk, one of this machine.",
        )
    return well(
        f"Runs in {subject.runs} can write, lock and replace files; {bytes_in_words(free)} are free.",
        figures={"free_bytes": free},
    )


def file_system(subject: Subject) -> Outcome:
    """Say what the file system can do beyond that."""
    storage = find_storage(subject.work)
    figures: dict[str, Figure] = {
        "kind": storage.kind,
        "hard_links": storage.hard_links,
        "reflinks": storage.reflinks,
        "direct": storage.direct,
    }
    words = {True: "yes", False: "no", None: "not on this system"}
    said = (
        f"{storage.kind or 'unknown'}: hard links {words[storage.hard_links]}, reflinks {words[storage.reflinks]}, "
        f"O_DIRECT {words[storage.direct]}"
    )
    remedy = "" if storage.hard_links else "Checkpoints of layers that live on disk are copied there, which takes time."
    return well(f"{said}.", remedy, figures=figures)


def speeds(subject: Subject) -> Outcome:
    """Measure how fast the device's memory and the disk are."""
    found = measure(subject.device, torch.float32, subject.work)
    rates = {
        "host_bytes_per_s": found.host_bytes_per_s,
        "disk_read_bytes_per_s": found.disk_read_bytes_per_s,
        "disk_write_bytes_per_s": found.disk_write_bytes_per_s,
    }
    copied = f"from host to {subject.device}" if subject.device.type != "cpu" else "within the host's memory"
    said = (
        f"{found.host_bytes_per_s / 1e9:.3g} GB/s {copied}; the disk of {subject.runs} reads "
        f"{found.disk_read_bytes_per_s / 1e9:.3g} and writes {found.disk_write_bytes_per_s / 1e9:.3g} GB/s"
    )
    if found.host_bytes_per_s < _LEAST_COPY_BYTES_PER_S:
        return wrong(
            f"Copies are too slow to train: {said}.", "End other programs; look at the card's slot.", figures=rates
        )
    disk = min(found.disk_read_bytes_per_s, found.disk_write_bytes_per_s)
    if disk < _LEAST_DISK_BYTES_PER_S:
        return wrong(
            f"The disk is too slow for checkpoints: {said}.",
            "Choose a training.output_dir on another disk, one of this machine.",
            figures=rates,
        )
    slow = "For memory.placement=disk take a faster disk." if disk < _SLOW_DISK_BYTES_PER_S else ""
    return well(f"{said}.", slow, figures=rates)


CHECKS = (
    Check("versions", "Versions", versions, needs_device=False),
    Check("packages", "Optional packages", packages, needs_device=False),
    Check("device", "Device", device, needs_device=False),
    Check("cuda", "CUDA", cuda, needs_device=False),
    Check("arithmetic", "Arithmetic", arithmetic),
    Check("bf16", "bf16", bf16),
    Check("memory", "Memory", memory),
    Check("folder", "Folder of runs", folder, needs_device=False),
    Check("file-system", "File system", file_system, needs_device=False),
    Check("speeds", "Speeds", speeds),
)
"""In this order."""


def _name_of(requirement: str) -> str:
    return next((requirement[:end] for end, sign in enumerate(requirement) if sign in "<>=!~ ["), requirement)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unmet(requirement: str) -> str:
    """Return what is wrong with an installed package, as a clause; empty: nothing."""
    from transformers.utils.versions import require_version

    name = _name_of(requirement)
    found = _version(name)
    if found is None:
        return f"{name} is not installed"
    try:
        require_version(requirement)
    except ImportError:
        return f"{name} {found} is installed, but {requirement} is needed"
    return ""


def _is_built_for(major: int, minor: int) -> bool:
    """Return whether torch has code for a card, or code that its driver can translate for it."""
    built = torch.cuda.get_arch_list()
    own = [int(name[3:].rstrip("af")) for name in built if name.startswith("sm_")]
    general = [int(name[8:].rstrip("af")) for name in built if name.startswith("compute_")]
    # Code for a card also runs on later ones of the same major version.
    same = any(number // 10 == major and number % 10 <= minor for number in own)
    return not built or same or any(number <= 10 * major + minor for number in general)


def _cpu_has_bf16() -> bool | None:
    """Return whether the CPU multiplies in bfloat16 itself; None: it is not known."""
    can = torch.cpu.get_capabilities()
    known = [bool(can[name]) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "arm_bf16") if name in can]
    return any(known) if known else None


def _locks(place: Path) -> bool:
    with locked(place):
        try:
            with locked(place):
                return False
        except EnvironmentProblem:
            return True


def _replaces(place: Path) -> bool:
    old, new = place / "replaced", place / "replaced.new"
    try:
        old.write_bytes(b"old")
        with new.open("wb") as file:
            file.write(b"new")
            os.fsync(file.fileno())
        os.replace(new, old)
        return old.read_bytes() == b"new" and not new.exists()
    except OSError:
        return False
    finally:
        for path in (old, new):
            path.unlink(missing_ok=True)
