"""The errors that a user can fix, and what their messages are made of: values from outside, and lines to type."""

import shlex
import sys
from pathlib import Path

CLONE = Path(__file__).parent.parent  # where train.py is, in a clone


class InputError(ValueError):
    """Bad input. The message is one line that says what is wrong, where, and what to do about it."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what was kept."""


def shown(value):
    """A value from outside, in a message: as Python writes it, at most 80 characters."""
    return cut(repr(value))


def cut(text):
    """The first 80 characters of a text."""
    return text if len(text) <= 80 else text[:77] + "..."


def first_words(error):
    """What a library says of a file, on one line: at most 200 characters, since it may quote the file."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def to_type(script, *arguments):
    """The line that runs a script (train or evaluate), as its user runs them: `minilora train ...`, or in a clone
    `python train.py ...`."""
    started = Path(sys.argv[0] or ".")
    here = started.name in ("train.py", "evaluate.py")
    if here:
        words = ["python", started.with_name(f"{script}.py")]
    elif started.stem != "minilora" and (CLONE / f"{script}.py").is_file():
        words = ["python", f"{script}.py"]
    else:
        words = ["minilora", script]
    return shlex.join(map(str, (*words, *arguments)))
