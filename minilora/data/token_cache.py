"""What the tokenizer made of large sets of rows, kept on disk and found again by the hash of what it was made from.

A sentence takes 10 to 40 microseconds to tokenise (by words, or by the library) and one to hash and read back. Sets of
fewer than `LEAST` characters are tokenised in less than 0.1 s and not kept: the test rows of a grid would fill the
folder and save nothing that anyone notices.

An entry is one safetensors file in the folder `tokens` of minilora's cache, named by the sha256 of all that its arrays
depend on, and carries a sha256 of the arrays. Nothing is unpickled; a file that is truncated, altered or not ours
counts as missing and is written anew. Files are replaced whole, so processes may share the folder, and the ones that
were not used for longest make room once all exceed `LIMIT`.
"""

import contextlib
import functools
import hashlib
import json
import os
import time

import numpy as np

from minilora import console
from minilora.base.tokenizer import Encoded
from minilora.files import cache, replacing

FORMAT = 1  # of an entry; raise it when this file makes another one of the same
LEAST = 1 << 18  # characters of a set that is kept
LIMIT = 2 << 30  # bytes of all files
ABANDONED = 3600  # seconds after which nobody is writing an unfinished file any more
HASHED_AT_ONCE = 4096  # items of a list
say_once = functools.cache(console.say)


def encode(tokenizer, texts, max_length):
    """As `tokenizer.encode(texts, max_length)`."""

    def make():
        encoded = tokenizer.encode(texts, max_length)
        return {"ids": encoded.ids, "offsets": encoded.offsets, "kept": encoded.kept}

    return Encoded(**remembered(make, tokenizer, texts, ["encode", max_length]))


def visible(tokenizer, texts, added, max_length):
    """As `tokenizer.visible(texts, added, max_length)`."""

    def make():
        return {"visible": tokenizer.visible(texts, added, max_length)}

    return remembered(make, tokenizer, texts, added, ["visible", max_length])["visible"]


def prompts(tokenizer, texts, before, after, rooms):
    """As `tokenizer.prompts(texts, before, after, rooms)`, `rooms` an array."""

    def make():
        rows, kept = tokenizer.prompts(texts, before, after, rooms)
        offsets = np.cumsum([0, *map(len, rows)])
        return {"ids": np.concatenate([np.empty(0, np.int32), *rows]), "offsets": offsets, "kept": kept}

    found = remembered(make, tokenizer, texts, rooms.tolist(), ["prompts", before, after])
    ids, offsets = found["ids"], found["offsets"].tolist()
    return [ids[start:stop] for start, stop in zip(offsets, offsets[1:])], found["kept"]


def visible_in_prompts(tokenizer, texts, added, before, after, rooms):
    """As `tokenizer.visible_in_prompts(texts, added, before, after, rooms)`, `rooms` an array."""

    def make():
        return {"visible": tokenizer.visible_in_prompts(texts, added, before, after, rooms)}

    made_from = added, rooms.tolist(), ["visible_in_prompts", before, after]
    return remembered(make, tokenizer, texts, *made_from)["visible"]


def remembered(make, tokenizer, texts, *made_from):
    """The arrays {name: array} of `make()`, which depend only on `texts`, the lists `made_from` and the tokenizer.

    They come from the cache where they are in it, and go into it where `texts` have `LEAST` characters. A cache that
    cannot be written is no error: a line on stderr says so, once.
    """
    if sum(map(len, texts)) < LEAST:
        return make()
    key = key_of([tokenizer.fingerprint], texts, *made_from)
    path = cache() / "tokens" / f"{key}.safetensors"
    arrays = read(path, key)
    if arrays is None:
        arrays = make()
        write(path, key, arrays)
    return arrays


def key_of(*lists):
    """The sha256 (hexadecimal) of lists of what JSON can say, and of `FORMAT`."""
    digest = hashlib.sha256(json.dumps([FORMAT, *map(len, lists)]).encode())
    for items in lists:
        for start in range(0, len(items), HASHED_AT_ONCE):
            digest.update(json.dumps(items[start : start + HASHED_AT_ONCE]).encode())
    return digest.hexdigest()


def digest_of(key, arrays):
    """The sha256 (hexadecimal) of an entry: its key, and its arrays with their names, dtypes and shapes."""
    digest = hashlib.sha256(key.encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def read(path, key):
    """The arrays of an entry; None where there is none, or one that is not what `write` wrote for this key."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            digest = (file.metadata() or {}).get("sha256")
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, TypeError):  # the last two: dtypes that numpy does not have
        return None
    if digest != digest_of(key, arrays):
        return None
    with contextlib.suppress(OSError):  # a folder that can only be read
        os.utime(path)  # when it was last used
    return arrays


def write(path, key, arrays):
    """Put an entry into the cache, and remove those that were not used for longest where all take too much room."""
    if sum(array.nbytes for array in arrays.values()) > LIMIT:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_arrays(temporary, arrays, {"sha256": digest_of(key, arrays)})
        make_room(path.parent)
    except OSError as error:
        say_once(f"tokens     not kept for other runs: {path.parent} cannot be written ({error.strerror or error})")


def write_arrays(path, arrays, metadata):
    """A safetensors file, array by array: the library's own `save_file` copies all of them first."""
    entries, end = {"__metadata__": metadata}, 0
    for name, array in arrays.items():
        kind = {"f": "F", "i": "I", "u": "U"}[array.dtype.kind] + str(8 * array.itemsize)
        entries[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [end, end := end + array.nbytes]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # so that arrays are aligned
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array))


def make_room(folder):
    """Remove the files that were not used for longest, until all in `folder` take at most `LIMIT` bytes."""
    used = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process made room, or finished
            stat = path.stat()
            unfinished = path.name.startswith(".")  # of a process that is writing it, or was killed
            if not unfinished or time.time() - stat.st_mtime > ABANDONED:
                used.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if total <= LIMIT:
            break
        path.unlink(missing_ok=True)
        total -= size
