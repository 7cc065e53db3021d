"""Download models from ModelScope with its library, which is an optional package."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

from sophia_galore.errors import EnvironmentProblem, ModelError, short
from sophia_galore.model.cache import Say, disk_problem
from sophia_galore.model.reach import Unreachable, probe_modelscope
from sophia_galore.records.files import MODEL_INDEX

_INSTALL = "Install it: pip install 'sophia-galore[modelscope]'."
_PATTERNS = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    MODEL_INDEX,
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
    "chat_template.json",
    "*.tiktoken",
    "*.model",
    "LICENSE*",
    "README.md",
]


def endpoint() -> str:
    """Return the URL of ModelScope: MODELSCOPE_ENDPOINT, MODELSCOPE_DOMAIN, or the public one."""
    chosen = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return (chosen if "://" in chosen else f"https://{chosen}").rstrip("/")


def require_reachable() -> None:
    """Check within seconds that the library is installed and ModelScope answers.

    Raises:
        Unreachable: The library is missing, or ModelScope does not answer.
    """
    if importlib.util.find_spec("modelscope") is None:
        raise Unreachable("the package modelscope is not installed", _INSTALL)
    reason = probe_modelscope(endpoint())
    if reason is not None:
        raise Unreachable(
            f"{endpoint()} does not answer ({reason})",
            "Check the network and HTTPS_PROXY, or set MODELSCOPE_DOMAIN to a host that you can reach.",
        )


def download(model_id: str, staging: Path, say: Say, *, with_code: bool) -> str:
    """Download the files of a model into a folder; call `require_reachable` first.

    The library verifies each file's SHA-256 and resumes partial files.

    Args:
        model_id: "owner/name" on ModelScope.
        staging: Folder to fill; files of an earlier attempt are used.
        say: Called with each line for the user.
        with_code: Whether to download the repository's Python files too.

    Returns:
        The requested revision.

    Raises:
        ModelError: No such model, or no access.
        EnvironmentProblem: The disk is full, or the connection broke; the next call resumes.
    """
    say(f"Downloading {model_id} from ModelScope.")
    _snapshot(model_id, staging, [*_PATTERNS, "*.py"] if with_code else _PATTERNS)
    return "master"


def download_config(model_id: str, folder: Path) -> None:
    """Download only a model's config.json; call `require_reachable` first.

    Args:
        model_id: "owner/name" on ModelScope.
        folder: Folder to write it to.

    Raises:
        ModelError: No such model, no access, or no config.json.
        EnvironmentProblem: The disk is full, or the connection broke.
    """
    _snapshot(model_id, folder, ["config.json"])
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"The repository {model_id} holds no config.json.", "Give the id of a transformers model (owner/name)."
        )


def _snapshot(model_id: str, folder: Path, patterns: list[str]) -> None:
    # Imported by name, because type checkers run without the optional package.
    snapshot_download = importlib.import_module("modelscope").snapshot_download
    try:
        snapshot_download(model_id, local_dir=str(folder), allow_patterns=patterns)
    except Exception as error:
        raise _explain(error, model_id, folder) from error


def _explain(error: Exception, model_id: str, staging: Path) -> Exception:
    if isinstance(error, OSError) and (problem := disk_problem(error, staging)) is not None:
        return problem
    # The class of the "not found" error changed between versions of the library; its status code and name did not.
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = type(error).__name__
    if status == 404 or kind in ("NotExistError", "InvalidParameter"):
        return ModelError(f"ModelScope has no model {model_id}.", "Check the spelling (owner/name).")
    if status in (401, 403) or kind in ("AuthenticationError", "PermissionDeniedError", "NotLoginException"):
        return ModelError(f"ModelScope refuses access to {model_id}.", "Log in with `modelscope login --token ...`.")
    return EnvironmentProblem(
        f"The download of {model_id} from ModelScope was interrupted: {short(error)}.",
        "Run the same command again: it goes on where it stopped.",
    )
