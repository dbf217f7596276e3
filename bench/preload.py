"""What the processes of single cases share, imported before they are forked off: some libraries take seconds."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module

VARIABLE = "BERTLOSS_FAST_BENCH_PRELOAD"

for module in os.environ.get(VARIABLE, "").split():
    with suppress(Exception):  # broken: the rows of the table will say so
        import_module(module)
