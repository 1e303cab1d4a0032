"""How a script starts: `python train.py ...` in a clone, and `minilora train ...` where the package is installed."""

import time

START = time.perf_counter()

import importlib  # noqa: E402
import sys  # noqa: E402

from minilora import interrupts  # noqa: E402
from minilora.command import Parser, exit_cleanly  # noqa: E402
from minilora.errors import InputError, shown  # noqa: E402
from minilora.fields import near  # noqa: E402

SCRIPTS = {
    "train": "train a cell or a grid, go on with one, or show how far a grid is",
    "evaluate": "test a finished run again, or write a grid's report",
    "ls": "list the words that flags take: families, triggers, presets, data, targets",
}


def run(name, argv=None):
    """Run a script by name; signals are heard from the first import on, and end it in one line."""
    interrupts.quit_early()  # until `exit_cleanly` has the signals
    exit_cleanly(importlib.import_module(f"minilora.scripts.{name}").main, argv)


def main():
    """The command `minilora`."""
    words = sys.argv[1:]
    if words and words[0] in SCRIPTS:
        return run(words[0], words[1:])
    exit_cleanly(no_script, words)


def no_script(words):
    """`minilora` itself: its help and version, and an error for a script that does not exist."""
    parser = Parser(
        prog="minilora",
        usage="minilora COMMAND ...",
        description="LoRA ablations against injected tokens. `minilora COMMAND --help` has the flags of a command.",
    )
    commands = parser.add_argument_group("commands")
    for name, words_of_it in SCRIPTS.items():
        commands.add_argument(name, nargs="?", help=words_of_it)
    if words and words[0].startswith("-"):
        parser.parse_args(words)
    if words:
        raise InputError(f"unknown command {shown(words[0])}{near(words[0], SCRIPTS)}")
    raise InputError("a command is missing: see minilora --help")
