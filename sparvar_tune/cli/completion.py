"""Completion of commands, options and names in bash, zsh and fish, by argcomplete (extra `completion`).

eval "$(register-python-argcomplete sparvar-tune)"      # in ~/.bashrc; zsh and fish: argcomplete's manual
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable


def complete() -> None:
    """Answers the shell and ends the process; without argcomplete it offers nothing."""
    try:
        import argcomplete
    except ImportError:
        os._exit(1)
    from sparvar_tune.cli.parser import COMMANDS, build_parser

    parser = build_parser()
    tables = {"--gpu": _gpus, "--model": _models}
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    for command in commands.values():
        for action in command._actions:
            table = next((tables[word] for word in action.option_strings if word in tables), None)
            if table:
                action.completer = table
    words = os.environ["COMP_LINE"].split()[1:]
    default = bool(words) and words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")
    argcomplete.autocomplete(commands[COMMANDS[0]] if default else parser)  # `tune` is what a line of options alone does


def _gpus(**_: object) -> Iterable[str]:
    from sparvar_tune.catalog.gpus import ALIASES, GPUS

    return ("auto", *GPUS, *ALIASES)


def _models(**_: object) -> Iterable[str]:
    from sparvar_tune.catalog.models import MODELS

    return MODELS
