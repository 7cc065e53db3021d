"""Proofs of architectures, remembered: one takes seconds, and its result depends on versions and code alone."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sophia_galore import __version__
from sophia_galore.engine.proof import Proof, prove
from sophia_galore.model.architecture import SUPPORTED
from sophia_galore.model.cache import Say
from sophia_galore.model.skeleton import config_digest
from sophia_galore.records.schema import write_text

_FILE = "proofs.json"


def proof_of(config: Any, cache: Path, say: Say, *, trust_remote_code: bool = False) -> Proof | None:
    """Return the proof that an architecture can be trained.

    Args:
        config: The model's Hugging Face configuration.
        cache: The folder in which models are kept; proofs are remembered there.
        say: Called with a line for the user before a proof that takes a while.
        trust_remote_code: Whether to run Python code of the model's folder.

    Returns:
        The proof; None for architectures that the tests cover.
    """
    has_own_code = trust_remote_code and bool(getattr(config, "auto_map", None))
    if config.model_type in SUPPORTED and not has_own_code:
        return None
    path, key = cache / _FILE, _key(config)
    known = _read(path)
    remembered = _proof_from(known.get(key))
    if remembered is not None:
        return remembered
    say(f"Architecture {config.model_type}: comparing its gradients with autograd's on a small twin ...")
    proof = prove(config, trust_remote_code=trust_remote_code)
    if not has_own_code:  # code of a folder may change without a trace in the key
        _remember(path, {**known, key: asdict(proof)})
    return proof


def _proof_from(values: Any) -> Proof | None:
    """Return a proof from plain data; None if it is damaged."""
    try:
        return Proof(**{**values, "unreached": tuple(values["unreached"])})
    except (KeyError, TypeError):
        return None


def _key(config: Any) -> str:
    """Return a digest of everything that the result depends on."""
    import transformers

    return config_digest(config, (__version__, torch.__version__, transformers.__version__), _code_digest(config))


def _code_digest(config: Any) -> str:
    """Return a digest of the file that defines the model's class; empty if it has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) if isinstance(kind, type) else None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(path: Path, known: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(known, indent=2) + "\n")
    except OSError:
        return  # it is proved again next time
