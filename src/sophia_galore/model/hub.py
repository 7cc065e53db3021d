"""Download models from Hugging Face: list the files, fetch them with resume, and verify them.

One request returns the size and digest of every file; then each file is fetched with the library's `http_get` into
`<file>.<digest>.incomplete`, verified and renamed. `snapshot_download` is not used for two reasons, both seen in
huggingface_hub 2.4: it deletes a partial file when the connection breaks, so that a large file starts from zero, and if
the hub fails while the folder is not empty, it returns the incomplete folder without an error.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sophia_galore.errors import EnvironmentProblem, ModelError, short
from sophia_galore.model.cache import Say, disk_problem, format_bytes, require_space
from sophia_galore.model.reach import Unreachable, probe_hugging_face
from sophia_galore.weights.manifest import ADAPTER, adapter_error, sha256_of

LIST_TIMEOUT_S = 15.0
"""Timeout of requests other than downloads of whole files."""

# Only files that transformers reads for a decoder-only model: no *.bin, no GGUF, no subfolders for other runtimes.
_WANTED = re.compile(
    r"(generation_)?config\.json|model[^/]*\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer[^/]*|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|[^/]*\.jinja|chat_template\.json|[^/]*\.tiktoken|(spiece|sentencepiece[^/]*)\.model|LICENSE[^/]*|README\.md"
)
_CODE = re.compile(r"[^/]+\.py")

_RESUME = "Run the same command again: it goes on where it stopped."


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub, with its size and digest."""

    name: str
    size_bytes: int
    sha256: str | None  # of large files (LFS)
    git_sha1: str | None  # of all others, as git counts it

    @property
    def partial_name(self) -> str:
        # The digest in the name distinguishes two revisions.
        return f"{self.name}.{(self.sha256 or self.git_sha1 or 'unknown')[:12]}.incomplete"

    def matches(self, path: Path) -> bool:
        if path.stat().st_size != self.size_bytes:
            return False
        if self.sha256 is not None:
            return sha256_of(path) == self.sha256
        if self.git_sha1 is not None:
            content = path.read_bytes()
            git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
            return git_sha1.hexdigest() == self.git_sha1
        return True


def require_reachable() -> None:
    """Check within seconds that Hugging Face, or the mirror named by HF_ENDPOINT, answers.

    Raises:
        Unreachable: It does not.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise Unreachable("HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE to allow downloads.")
    reason = probe_hugging_face(constants.ENDPOINT)
    if reason is not None:
        raise Unreachable(
            f"{constants.ENDPOINT} does not answer ({reason})",
            "Check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror that you can reach.",
        )


def download(
    model_id: str, staging: Path, say: Say, *, with_code: bool, refuse: Callable[[Path], None] = lambda _: None
) -> str:
    """Download the files of a model into a folder; call `require_reachable` first.

    Args:
        model_id: "owner/name".
        staging: Folder to fill; files of an earlier attempt are used.
        say: Called with each line for the user.
        with_code: Whether to download the repository's Python files too.
        refuse: Called with the folder as soon as config.json is there, before weights are downloaded; raises an error
            if the model can't be used.

    Returns:
        The commit that was downloaded.

    Raises:
        ModelError: No such model, no access, no safetensors weights, or a file that differs from the hub's digest.
        EnvironmentProblem: The disk is full, or the connection broke; the next call resumes.
        Unreachable: The hub's answer is not valid.
    """
    with hub_problems(model_id, staging, listing=True):
        commit, files = list_files(model_id, with_code=with_code)
    missing = [file for file in files if not _is_here(file, staging)]
    to_fetch_bytes = sum(file.size_bytes for file in missing) - sum(_partial_bytes(file, staging) for file in missing)
    say(f"Downloading {model_id} from Hugging Face: {len(missing)} files, {format_bytes(to_fetch_bytes)}.")
    require_space(staging, to_fetch_bytes)
    # config.json first, so that `refuse` is called before weights are downloaded.
    missing.sort(key=lambda file: file.name != "config.json")
    for done, file in enumerate(missing):
        left = [later.size_bytes - _partial_bytes(later, staging) for later in missing[done:]]
        with hub_problems(model_id, staging, listing=False, needed_bytes=sum(left)):
            _fetch(model_id, commit, file, staging)
        if file.name == "config.json":
            refuse(staging)
    return commit


def list_files(model_id: str, *, with_code: bool) -> tuple[str, list[RemoteFile]]:
    """Return the commit of a model's newest revision, and the needed files; call it inside `hub_problems`."""
    from huggingface_hub import HfApi, constants

    info = HfApi(endpoint=constants.ENDPOINT).model_info(model_id, files_metadata=True, timeout=LIST_TIMEOUT_S)
    files = [
        RemoteFile(
            name=sibling.rfilename,
            size_bytes=sibling.size or 0,
            sha256=sibling.lfs.sha256 if sibling.lfs is not None else None,
            git_sha1=sibling.blob_id if sibling.lfs is None else None,
        )
        for sibling in info.siblings or ()
        if _WANTED.fullmatch(sibling.rfilename) or (with_code and _CODE.fullmatch(sibling.rfilename))
    ]
    names = {file.name for file in files}
    if any(sibling.rfilename == ADAPTER for sibling in info.siblings or ()):
        raise adapter_error(f"The repository {model_id}")
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"The repository {model_id} holds no config.json with model*.safetensors weights.",
            "Give the id of a transformers model whose weights are in the safetensors format.",
        )
    return info.sha or "main", files


def _is_here(file: RemoteFile, staging: Path) -> bool:
    path = staging / file.name
    return path.is_file() and file.matches(path)


def _partial_bytes(file: RemoteFile, staging: Path) -> int:
    path = staging / file.partial_name
    return path.stat().st_size if path.is_file() else 0


def _fetch(model_id: str, commit: str, file: RemoteFile, staging: Path) -> None:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    partial = staging / file.partial_name
    if _partial_bytes(file, staging) > file.size_bytes:
        partial.unlink()
    headers = build_hf_headers()
    # With compressed transfer, the byte counts for resuming would be wrong.
    headers["Accept-Encoding"] = "identity"
    with partial.open("ab") as target:
        http_get(
            hf_hub_url(model_id, file.name, revision=commit, endpoint=constants.ENDPOINT),
            target,
            resume_size=target.tell(),
            headers=headers,
            expected_size=file.size_bytes,
            displayed_filename=file.name,
        )
    if not file.matches(partial):
        partial.unlink()
        raise ModelError(
            f"{file.name} of {model_id} arrived damaged: its digest differs from the one that the hub states.",
            "Run the same command again; if it stays so, the mirror or a proxy changes the file.",
        )
    os.replace(partial, staging / file.name)


@contextmanager
def hub_problems(model_id: str, staging: Path, *, listing: bool, needed_bytes: int = 0) -> Iterator[None]:
    """Convert the library's errors to errors with cause and remedy.

    Args:
        model_id: "owner/name".
        staging: Folder that is written.
        listing: Whether nothing is downloaded yet, so that another source can be tried.
        needed_bytes: About how many bytes remain to be written; 0: unknown.
    """
    try:
        yield
    except (ModelError, EnvironmentProblem):
        raise
    except Exception as error:
        # The bytes downloaded so far already reduce the disk's free space, so `needed_bytes` must not include them.
        problem = disk_problem(error, staging, needed_bytes) if isinstance(error, OSError) else None
        raise problem or _explain(error, model_id, listing=listing) from error


def _explain(error: Exception, model_id: str, *, listing: bool) -> Exception:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, HFValidationError):
        return ModelError(f"{model_id!r} is not a model id: {short(error)}.", "A model id reads owner/name.")
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{model_id} is gated: its authors ask for consent to their licence first.",
            f"Accept the licence on the model's page ({_page(model_id)}), then log in with `hf auth login` "
            "(older: `huggingface-cli login`) and run the same command again.",
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"Hugging Face has no model {model_id}, or it is private.",
            "Check the spelling (owner/name); for a private model log in with `hf auth login` first.",
        )
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error.response.status_code, error, model_id, listing=listing)
    if listing:
        return Unreachable(f"Hugging Face broke off ({short(error)})", "Check the network and try again.")
    return EnvironmentProblem(f"The download of {model_id} was interrupted: {short(error)}.", _RESUME)


def _explain_status(status: int, error: Exception, model_id: str, *, listing: bool) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(error, HfHubHTTPError)
    # The hub explains its refusals in a header; the block page of a firewall does not have it.
    from_hub = any(name in error.response.headers for name in ("X-Error-Code", "X-Error-Message"))
    if status == 404:
        return ModelError(f"Hugging Face has no model {model_id}.", "Check the spelling (owner/name).")
    if status == 401 or (status == 403 and from_hub):
        return ModelError(
            f"Hugging Face refuses access to {model_id} (HTTP {status}).",
            "Log in with `hf auth login` (older: `huggingface-cli login`), with a token that may read this model, "
            f"and accept its licence on {_page(model_id)} if it asks for that.",
        )
    if listing:
        return Unreachable(f"Hugging Face answers HTTP {status}", "Try again later.")
    return EnvironmentProblem(f"The download of {model_id} was interrupted: the hub answered HTTP {status}.", _RESUME)


def _page(model_id: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{model_id}"
