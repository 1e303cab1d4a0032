"""Files: written whole or not at all, read strictly, and locked against other processes."""

import csv
import errno
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import stat
import time
import uuid
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from minilora.console import duration
from minilora.errors import InputError, shown, to_type

FULL = (errno.ENOSPC, errno.EDQUOT)
GLANCE = 0.1  # seconds to try for a lock: one that `holder` only looks at is free again sooner
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # the names of unfinished files


class FullDisk(OSError):
    """No space is left for a file. The message is one line: which folder, and how much there is."""

    def __str__(self):
        return self.strerror

    def go_on(self, arguments):
        """The same, with the line that goes on: the script train with `arguments`."""
        return FullDisk(self.errno, f"{self}: make room, then go on with {to_type('train', *arguments)}")


def is_full(error):
    """Whether it is a full disk that made `error`, or what that was raised from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk(error, path, size=0):
    """The `FullDisk` that made `error`, which `is_full`; of another error one for a file at `path` of `size` bytes."""
    at = error
    while at is not None:
        if isinstance(at, FullDisk):
            return at
        at = at.__cause__ or at.__context__
    folder, number = Path(path).parent, getattr(error, "errno", None) or errno.ENOSPC
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if size > free:
            needed, missing = (-(-count // 1024) for count in (size, size - free))
            words = f"{Path(path).name} needs {needed:,} KiB, of which {missing:,} KiB are missing"
            return FullDisk(number, f"no space is left in {folder}: {words}")
    return FullDisk(number, f"no space is left in {folder}")


@contextmanager
def replacing(path, size=0):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    Raises FullDisk where the disk has no space for it; `size` is how many bytes are to be written, where that is known.
    """
    path = Path(path)
    # Not tempfile's: its files are closed to other users, and the name would keep that.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (temporary, str(temporary)):
            error.filename = str(path)  # the name that the user knows
        with suppress(OSError):  # on a read-only disk there is nothing to remove
            size = max(size, temporary.stat().st_size + 1)
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in FULL:
            raise full_disk(error, path, size) from error
        raise


def delete_unfinished(folder, names=None):
    """Delete what a killed process left unfinished in a folder: of the files `names`, by default of all.

    Only for who holds the lock under which those files are written.
    """
    for path in Path(folder).iterdir():
        if TEMPORARY.fullmatch(path.name) and (names is None or path.name[1:-33] in names):
            path.unlink(missing_ok=True)


@contextmanager
def lock(path, wait=True):
    """Hold the lock file at `path`; yields whether it is held, which with `wait` it always is.

    The system drops the lock when its process ends, however it ends. Without `wait`, a file beside it says who holds
    it (`holder`). Raises OSError where no lock file can be made.
    """
    from filelock import FileLock, Timeout

    Path(path).parent.stat()  # the library would make a missing folder
    held = FileLock(path, timeout=-1 if wait else GLANCE, poll_interval=GLANCE / 5)
    with suppress(Timeout):
        held.acquire()
    noted = held.is_locked and not wait
    try:
        if noted:
            with suppress(OSError):  # only people read it: training goes on without
                note = {"process": os.getpid(), "host": platform.node(), "since": time.time()}
                note_of(path).write_text(json.dumps(note))
        yield held.is_locked
    finally:
        if noted:
            with suppress(OSError):
                note_of(path).unlink(missing_ok=True)
        held.release()


def note_of(path):
    """The file that says who holds the lock file at `path`, which cannot say so itself: who tries to lock it empties
    it."""
    return Path(f"{path}.json")


def holder(path):
    """Who holds the lock file at `path`, in words such as `process 71 for 5 min`; None where nobody does.

    What a killed process left beside the lock does not count, because its lock is free.
    """
    from filelock import FileLock, Timeout

    if not os.path.exists(path):
        return None
    try:
        with FileLock(path, timeout=0):
            return None
    except Timeout:
        pass
    except OSError:  # we may not write here, so the note is all there is
        if not note_of(path).exists():
            return None
    try:
        note = parse_json(note_of(path).read_text(encoding="utf-8"))
        where = "" if note["host"] == platform.node() else f" on {note['host']}"
        return f"process {note['process']}{where} for {duration(max(0, time.time() - note['since']))}"
    except (OSError, ValueError, LookupError, TypeError):  # half written, or by an older version
        return "a process"


def try_folder(path, flag):
    """Raise InputError, which names the flag, where no folder can be made at `path`. Leaves nothing behind."""
    made = []
    try:
        for folder in (*reversed(Path(path).parents), Path(path)):
            if not os.path.lexists(folder):
                folder.mkdir()
                made.append(folder)
    except OSError as error:
        raise InputError(f"cannot make the folder {path} ({error.strerror}): choose another {flag}") from None
    finally:
        for folder in reversed(made):
            folder.rmdir()


def write_text(path, text):
    with replacing(path, len(text.encode(errors="replace"))) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path, records):
    """One JSON object a line."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path, advice="fetch the checkpoint again"):
    """The JSON object in a file. Raises InputError, which ends in `advice`, for anything else."""
    check_regular(path)
    try:
        value = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, not an object; {advice}")
    return value


def read_jsonl(path, advice="train the run again"):
    """The JSON values in a file, one a line. Raises InputError, which ends in `advice`, where a line is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return [parse_json(line) for line in file]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: a line is not valid JSON ({error}); {advice}") from error


def parse_json(text):
    """The value of a JSON text. Raises ValueError, also for a key given twice and for a number that is not finite."""

    def unique(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise ValueError(f"the key {shown(max(counts, key=counts.get))} stands twice")
        return value

    def finite(text):
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is not a finite number")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)


def to_csv(lines):
    """CSV text of dicts with the same keys, at least one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: for_csv(value) for name, value in line.items()} for line in lines)
    return text.getvalue()


def for_csv(value):
    """A value as a cell of CSV: an apostrophe precedes text that a spreadsheet would take for a formula."""
    if not isinstance(value, str) or value[:1] not in tuple("=+-@\t\r"):
        return value
    try:
        float(value)
    except ValueError:
        return "'" + value
    return value


def write_tensors(path, tensors, metadata=None):
    """Write tensors {name: tensor} to a safetensors file, as readable for others as any file of the user's.

    Raises OSError where the disk fails, which the library reports by an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path, sum(value.nbytes for value in tensors.values())) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata=metadata or {"format": "pt"})
        except SafetensorError as error:
            if not (number := re.search(r"os error (\d+)", str(error))):
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        temporary.chmod(mode)  # the library closes its files to all other users


def cache():
    """Our own cache folder (a `Path`): $XDG_CACHE_HOME/minilora, else ~/.cache/minilora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minilora"


def check_regular(path):
    """Raise InputError unless `path` is a regular file, or a link to one: a pipe or a device may never end.

    A path that does not exist passes: its reader says what is missing.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is not a regular file (a folder, pipe or device): put the file itself there")


def sha256(*paths):
    """The SHA-256 (hexadecimal) of the files, one after the other. Raises InputError for one that cannot be read."""
    for path in paths:
        check_regular(path)
    try:
        return _sha256_of(tuple((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error


@functools.lru_cache
def _sha256_of(stamps):
    digest = hashlib.sha256()
    for path, _, _ in stamps:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
