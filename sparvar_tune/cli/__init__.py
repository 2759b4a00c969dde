"""The command line: parser.py, a file a command in commands/."""

from sparvar_tune.cli.parser import build_parser, main

__all__ = ["build_parser", "main"]
