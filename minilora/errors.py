"""The errors that a user can fix, and how a value looks in their messages."""


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
