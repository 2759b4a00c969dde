"""One file a command, each `run(options) -> exit code`. What they raise as ValueError or OSError is one line in parser.py."""
