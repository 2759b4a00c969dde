"""The command line; see parser.py."""

from sparvar_tune.cli.parser import build_parser, main

__all__ = ["build_parser", "main"]
