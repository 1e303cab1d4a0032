"""The command line: a parser, flags from declared fields, and how a script ends."""

import argparse
import contextlib
import difflib
import os
import signal
import sys
import textwrap
import traceback

from minilora import __version__, interrupts
from minilora.console import columns
from minilora.errors import InputError, TrainingError
from minilora.fields import declared, kind_of, nested
from minilora.files import full_disk, is_full


def exit_cleanly(main, argv=None):
    """Run `main(argv)` as a script: an `InputError` becomes one line on stderr and exit status 2.

    A `TrainingError`, a failing disk or a missing package exits with status 1, a signal with 128 + its number, and
    without a word where the reader of standard output is gone. `--traceback` among the arguments (by default those of
    the command line) shows the full trace as well. Of several processes, only the first prints.
    """
    with interrupts.handled():
        run_cleanly(main, argv)


def run_cleanly(main, argv):
    from minilora import parallel
    from minilora.console import visible

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        quiet = contextlib.nullcontext() if parallel.speaks() else contextlib.redirect_stdout(None)
        with interrupts.not_swallowed(), quiet:
            main(argv)
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:  # its reader, such as head, has read enough
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        sys.exit(141)  # as a shell names the signal SIGPIPE
    except (InputError, TrainingError, OSError) as error:
        if is_full(error):
            error = full_disk(error, getattr(error, "filename", None) or "./file")
        if parallel.speaks():
            if "--traceback" in argv:
                traceback.print_exc()
            print(f"error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except ImportError as error:
        if parallel.speaks():
            if "--traceback" in argv:
                traceback.print_exc()
            name = (error.name or "").partition(".")[0]
            hint = f"install it (pip install {name})" if name else "install the package that it names"
            print(f"error: a package is missing or broken ({' '.join(str(error).split())}): {hint}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        interrupts.ignore()
        number = getattr(error, "number", signal.SIGINT)
        if parallel.speaks():
            by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
            print(f"interrupted{by}: {error}".removesuffix(": "), file=sys.stderr)
        parallel.leave(128 + number)
    except Exception:
        if parallel.launched() == 1:
            raise
        if parallel.speaks():
            traceback.print_exc()
        parallel.leave(1)


WIDEST = 120  # columns of help: longer lines are hard to read
METAVARS = {str: "TEXT", int: "N", float: "X"}


class Help(argparse.HelpFormatter):
    """Help that fits the terminal, of at most `WIDEST` columns, with lines broken between words only."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=min(columns(), WIDEST))

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)

    def _fill_text(self, text, width, indent):
        return "\n".join(indent + line for line in self._split_lines(text, width - len(indent)))


class Parser(argparse.ArgumentParser):
    """An argument parser with `--version`, whose errors are InputErrors of one line."""

    def __init__(self, **settings):
        super().__init__(
            allow_abbrev=False,
            formatter_class=Help,
            **settings,
        )
        self.add_argument(
            "--version", action="version", version=f"minilora {__version__}", help="show the version and exit"
        )

    def error(self, message):
        hint = " (put it before the flags)" if "required" in message else ""
        raise InputError(f"{message}{hint}: see {self.prog} --help")

    def parse_args(self, arguments=None):
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            self.error(f"unknown argument {unknown[0]}{hint}")
        return known


def add_flags(parser, kind, only=None, default=None):
    """A flag for each field of the dataclass `kind` (or those named in `only`), in titled groups.

    Defaults are shown, not set: only the flags that are given appear in the result, under the names of
    `fields.declared`. `default` is shown in place of the fields' own defaults.
    """
    for name, f in declared(kind).items():
        if only is not None and name not in only:
            continue
        words, (kind_of_value, many) = f.metadata, kind_of(f.type)
        stated = default or (words["unset"] if f.default is None else f.default)
        stated = " ".join(stated) if isinstance(stated, tuple) else stated
        stated = "" if stated in (None, "") else f" (default: {stated})"
        choices = words["limits"]["choices"]
        flag_group(parser, words["group"]).add_argument(
            "--" + (words["flag"] or name).replace(".", "-").replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            type=kind_of_value,
            choices=choices,
            nargs="+" if many else None,
            action="extend" if many else "store",
            metavar=None if choices else METAVARS[kind_of_value],
            help=(words["help"] + stated).replace("%", "%%"),
        )


def flag_group(parser, title):
    """The parser's argument group of that title. It is made if there is none."""
    for existing in parser._action_groups:
        if existing.title == title:
            return existing
    return parser.add_argument_group(title)


def given_flags(arguments, kind):
    """The fields of `kind` that the command line gave, as a dict; a nested dataclass is a dict of its own."""
    return nested({name: getattr(arguments, name) for name in declared(kind) if hasattr(arguments, name)})
