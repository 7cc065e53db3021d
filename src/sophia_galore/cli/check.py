"""`sophia-galore check`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sophia_galore.cli.arguments import DEFAULT_CONFIG, ConfigOption, OptimizerOption, Overrides, read_config
from sophia_galore.cli.show import Terminal
from sophia_galore.train.callback import Callback
from sophia_galore.train.earlier_run import refuse_unsafe_folder
from sophia_galore.train.prepare import prepare
from sophia_galore.train.run_date import fill_date


def check(
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    optimizer: OptimizerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON, a route a parameter.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Print a row for each parameter as well.")] = False,
) -> None:
    """Show what `train` would do, without loading a weight; only a model that is not here yet is downloaded."""
    asked = fill_date(read_config(config, optimizer, overrides))
    refuse_unsafe_folder(asked, config, None)
    if as_json:
        print(json.dumps(prepare(asked, Callback()).plan.to_json(), indent=2))
        return
    terminal = Terminal()
    plan = prepare(asked, terminal).plan
    if parameters:
        terminal.routed(plan)
    print("Configuration OK.")
