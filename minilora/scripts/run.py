"""How a script starts: `python train.py ...` in a clone, and `minilora train ...` where the package is installed."""

import time

START = time.perf_counter()

import importlib  # noqa: E402
import sys  # noqa: E402

from minilora import interrupts  # noqa: E402
from minilora.command import exit_cleanly  # noqa: E402

SCRIPTS = ("train", "evaluate")


def run(name, argv=None):
    """Run a script by name; signals are heard from the first import on, and end it in one line."""
    interrupts.quit_early()  # until `exit_cleanly` has the signals
    exit_cleanly(importlib.import_module(f"minilora.scripts.{name}").main, argv)


def main():
    """The command `minilora`."""
    if sys.argv[1:2] and sys.argv[1] in SCRIPTS:
        return run(sys.argv[1], sys.argv[2:])
    print(f"usage: minilora {{{','.join(SCRIPTS)}}} ...", file=sys.stderr)
    sys.exit(0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2)
