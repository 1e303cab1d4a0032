"""The errors that a user can mend, and how the two scripts show them."""

import contextlib
import sys
import traceback


class InputError(ValueError):
    """Bad input. The message is one line that says what is wrong, where, and what to do about it."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what was kept."""


def exit_cleanly(main, argv=None):
    """Run `main(argv)` as a script: an `InputError` becomes one line on stderr and exit status 2.

    A `TrainingError` or a failing disk exits with status 1, an interrupt with 130. `--traceback` among the arguments
    (by default those of the command line) shows the full trace as well. Of several processes one prints.
    """
    from . import parallel

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.nullcontext() if parallel.speaks() else contextlib.redirect_stdout(None):
            main(argv)
    except (InputError, TrainingError, OSError) as error:
        if parallel.speaks():
            if "--traceback" in argv:
                traceback.print_exc()
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt as error:
        if parallel.speaks():
            print(f"interrupted: {error}".removesuffix(": "), file=sys.stderr)
        sys.exit(130)
    except Exception:
        if parallel.speaks():
            raise
        sys.exit(1)
