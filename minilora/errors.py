"""The errors that a user can fix: each message is one line."""


class InputError(ValueError):
    """Bad input. The message is one line that says what is wrong, where, and what to do about it."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what was kept."""
