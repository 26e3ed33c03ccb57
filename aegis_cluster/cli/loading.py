"""Variables of users' modules, named on the command line as MODULE:VARIABLE."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click


def load_variable(target: str, *, example: str) -> Any:
    """The current directory is searched first. Raises `BadParameter`, which names what is wrong."""
    module_name, _, variable = target.partition(":")
    if not module_name or not variable:
        raise click.BadParameter(f'"{target}" is not like "{example}"')
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise click.BadParameter(f"there is no module {error.name}") from error
    if not hasattr(module, variable):
        raise click.BadParameter(f"{module_name} has no {variable}")
    return getattr(module, variable)
