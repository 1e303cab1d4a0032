"""Signals that ask a process to end: Ctrl-C, SIGTERM (from a scheduler), SIGHUP (from a terminal that closes).

A script then ends with one line, and exits with 128 + the signal's number. Training first saves its state (`Stop`); a
second Ctrl-C does not wait for that.
"""

import contextlib
import os
import signal
import threading

from minilora.errors import to_type

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_asked = None  # the signal that came
_waits = False  # whether it is only noted down
_terminals = []  # of standard output and error, those that were a terminal


class Interrupted(KeyboardInterrupt):
    """The signal `number` asked the process to end; `folders` are the run folders of the runs that stopped."""

    def __init__(self, message="", number=signal.SIGINT, folders=()):
        super().__init__(message)
        self.number, self.folders = number, tuple(folders)

    def go_on(self, arguments):
        """The same, with the line that goes on: the script train with `arguments`."""
        stopped = f"{', '.join(map(str, self.folders))} stopped; " if self.folders else ""
        line = f"{stopped}go on with {to_type('train', *arguments)}"
        return type(self)(line, self.number, self.folders)


def note(number, frame):
    """The handler of a signal."""
    global _asked
    at_once = not _waits or number == _asked == signal.SIGINT
    _asked = number
    if number != signal.SIGINT:
        leave_terminal()
    if at_once:
        raise Interrupted(number=number)


def leave_terminal():
    """Write no more to a terminal that has gone: each write would fail."""
    for stream in _terminals:
        if not os.isatty(stream):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def quit_now(number, frame):
    """The handler while nothing would be lost: print one line and exit."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def quit_early():
    """Until a script is imported, a signal ends it with one line."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, quit_now)


@contextlib.contextmanager
def handled(handler=note):
    """Handle signals with `handler` during this block, except those that are ignored or have a handler already."""
    own = (signal.SIG_DFL, signal.default_int_handler, quit_now)
    global _asked
    _asked = None
    _terminals[:] = [stream for stream in (1, 2) if os.isatty(stream)]
    with kept() as before:
        for number, other in before.items():
            if other in own:
                signal.signal(number, handler)
        yield


@contextlib.contextmanager
def kept():
    """Yield {signal: handler} as they are now, and restore these handlers after the block."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield before
    finally:
        for number, other in before.items():
            signal.signal(number, other)


def ignore():
    """The process is ending: further signals change nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is note:
                signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def not_swallowed():
    """An error after a signal becomes `Interrupted`: an import that the signal stopped may raise another error."""
    try:
        yield
    except Exception as error:
        if _asked is None:
            raise
        raise Interrupted(number=_asked) from error


class Stop:
    """A context that delays signals, from the first call of `asked` on; before that call nothing would be lost."""

    def __enter__(self):
        self.own = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a notebook's
                self.own.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, note))
        return self

    def asked(self):
        """Whether the process was asked to end."""
        global _waits
        _waits = True
        return _asked is not None

    def __exit__(self, *error):
        global _asked, _waits
        _asked, _waits = None, False
        self.own.close()

    def end(self):
        raise Interrupted(number=_asked or signal.SIGINT)
