"""Upload a model folder to the Hugging Face hub: only the files of the model."""

from __future__ import annotations

import re
from pathlib import Path

from sophia_galore.errors import ArgumentError, EnvironmentProblem, ModelError, short
from sophia_galore.model.origin import CARD, is_hub_id
from sophia_galore.model.skeleton import load_model_config, load_tokenizer
from sophia_galore.model.source_files import CONFIG, SOURCE_TENSORS, read_source_files
from sophia_galore.records.files import weights_entry
from sophia_galore.weights.folder import is_int8, weight_files
from sophia_galore.weights.manifest import check_model_folder, read_manifest, verify

_GGUF = re.compile(r"[^/]+\.gguf")
_OLLAMA = "Modelfile"


def files_to_push(folder: Path) -> list[Path]:
    """Return the files of a folder that belong to its model, without the records of a run.

    Args:
        folder: A model's folder, or one with GGUF files.

    Raises:
        ModelError: It is not a complete model that other programs can open.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder.", "Give the folder of a model, such as a finished run's.")
    card = [path for path in (folder / CARD,) if path.is_file()]
    ggufs = sorted(path for path in folder.iterdir() if _GGUF.fullmatch(path.name))
    if ggufs and not (folder / CONFIG).is_file():
        return [*card, *(path for path in (folder / _OLLAMA,) if path.is_file()), *ggufs]
    if is_int8(folder):
        raise ModelError(
            f"{folder} holds weights in eight bits of this project, which no other program opens.",
            f"Write them in an ordinary format first: sophia-galore export {folder} --to bf16 --output FOLDER.",
        )
    if (folder / SOURCE_TENSORS).is_file():
        raise ModelError(
            f"{folder} holds weights under names of this project, which no other program opens.",
            f"Write them in an ordinary format first: sophia-galore export {folder} --to bf16 --output FOLDER.",
        )
    manifest = read_manifest(folder)
    if manifest is not None:
        verify(folder, manifest, deep=True)
    check_model_folder(folder)
    config = load_model_config(folder)
    load_tokenizer(folder)
    with_code = bool(getattr(config, "auto_map", None))
    settings = [folder / name for name in read_source_files(folder, with_code=with_code).files]
    weights = weight_files(folder)
    index = [entry for entry in (weights_entry(folder),) if entry is not None and entry not in weights]
    return [*card, *settings, *index, *weights]


def push(folder: Path, files: list[Path], hub_id: str, *, private: bool) -> str:
    """Create a repository if it does not exist, and upload files in one commit.

    Args:
        folder: The folder of the files.
        files: The files to upload.
        hub_id: "owner/name".
        private: Whether the repository must be private.

    Returns:
        The URL of its page.

    Raises:
        ModelError: The hub refuses it.
        EnvironmentProblem: The hub can't be reached, or the upload was interrupted.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise EnvironmentProblem("HF_HUB_OFFLINE is set, so nothing is uploaded.", "Unset HF_HUB_OFFLINE.")
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        api.create_repo(hub_id, private=True if private else None, exist_ok=True)
        if private and not api.model_info(hub_id).private:
            raise ModelError(
                f"{hub_id} is there already, and everybody can see it.",
                "Make it private on its settings page, or push to another name.",
            )
        message = "Upload of a model by sophia-galore"
        names = [file.name for file in files]
        api.upload_folder(repo_id=hub_id, folder_path=folder, allow_patterns=names, commit_message=message)
    except ModelError:
        raise
    except Exception as error:
        raise _explain(error, hub_id) from error
    return f"{constants.ENDPOINT}/{hub_id}"


def refuse_hub_id(hub_id: str) -> None:
    """Refuse what is no id of a model on the hub.

    Raises:
        ArgumentError: It is not owner/name.
    """
    if not is_hub_id(hub_id):
        raise ArgumentError(f"{hub_id!r} is not a model id.", "Give owner/name, owner being you or your organisation.")


def _explain(error: Exception, hub_id: str) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    login = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."
    if isinstance(error, HFValidationError):
        return ArgumentError(f"{hub_id!r} is not a model id: {short(error)}.", "A model id reads owner/name.")
    if isinstance(error, LocalTokenNotFoundError):
        return ModelError("You are not logged in to Hugging Face.", login)
    if isinstance(error, ValueError) and CARD in str(error):
        return ModelError(
            f"Hugging Face does not accept {CARD}: {' '.join(str(error).split())}.", "Mend the keys at its beginning."
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status == 401:
        return ModelError(f"Hugging Face does not know who uploads {hub_id} (HTTP 401).", login)
    if status == 403:
        return ModelError(f"Hugging Face does not let you write to {hub_id} (HTTP 403).", f"Check its owner. {login}")
    if status == 404:
        return ModelError(
            f"Hugging Face has no {hub_id} that you can write to (HTTP 404).", f"Check its owner. {login}"
        )
    if status:
        return EnvironmentProblem(f"Hugging Face answers HTTP {status}: {short(error)}.", "Try again later.")
    return EnvironmentProblem(
        f"The upload to {hub_id} was interrupted: {short(error)}.",
        "Check the network, HTTPS_PROXY and HF_ENDPOINT, then run the same command again.",
    )
