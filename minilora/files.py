"""Atomic file writes: a reader finds the old file or the whole new one, never a part."""

import functools
import hashlib
import json
import os
import stat
import uuid
from contextlib import contextmanager
from pathlib import Path

from minilora.errors import InputError


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`."""
    path = Path(path)
    # Not tempfile's: its files are closed to other users, and the name would keep that.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, records):
    """One JSON object a line."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_jsonl(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


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


def read_json(path):
    """The JSON object in a file. Raises InputError for anything else, and for a key that stands twice."""
    check_regular(path)
    try:
        value = _parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); fetch the checkpoint again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, not an object; fetch the checkpoint again")
    return value


def _parse_json(text):
    def unique(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return value

    return json.loads(text, object_pairs_hook=unique)


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
