"""The command line of the bench; ``python -m bench --help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# The module of each has a main; without a command the bench runs.
COMMANDS = ("report", "compare", "static")


def main(argv: Sequence[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("run", argv)
    status: int = import_module(f".{command}", __package__).main(rest)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
