"""The cache of tokenised rows: the arrays of the tokenizer itself, whatever has happened to the files."""

import os
import pickle
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, VOCABULARY, WORDS

from minilora.base import tokenizer
from minilora.data import token_cache

TEXTS = [" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(i % 23 + 1)) for i in range(300)]
ADDED = [[WORDS[i % 5]] * (i % 3) for i in range(300)]
ROOMS = np.arange(300) % 11 + 4


def make_tokenizer(folder, words=VOCABULARY, embedded=None):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return tokenizer.load(folder, embedded)


@pytest.fixture
def words(tmp_path):
    return make_tokenizer(tmp_path / "words")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the entries are; every set is kept there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LEAST", 0)
    token_cache.say_once.cache_clear()
    return tmp_path / "cache/minilora/tokens"


def spied(made, method):
    def spy(*arguments):
        made.append(method.__name__)
        return method(*arguments)

    return spy


@pytest.fixture
def calls(monkeypatch):
    """The names of the tokenizer's methods that were called."""
    made = []
    for name in ("encode", "visible", "prompts", "visible_in_prompts"):
        monkeypatch.setattr(tokenizer.TextTokenizer, name, spied(made, getattr(tokenizer.TextTokenizer, name)))
    return made


def plain(value):
    """What a method returned, with dtypes and shapes, in a form that compares."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, tokenizer.Encoded):
        return [plain(array) for array in (value.ids, value.offsets, value.kept)], value.answers
    return [plain(part) for part in value]


WAYS = {
    "encode": (TEXTS, 9),
    "visible": (TEXTS, ADDED, 9),
    "prompts": (TEXTS, "the ", " is", ROOMS),
    "visible_in_prompts": (TEXTS, ADDED, "the ", " is", ROOMS),
}


@pytest.mark.parametrize("way", WAYS)
def test_cached_and_fresh_are_bit_equal(way, words, folder, calls):
    fresh = plain(getattr(words, way)(*WAYS[way]))
    for _ in range(3):
        found = getattr(token_cache, way)(words, *WAYS[way])
        assert plain(found) == fresh
    assert calls == [way] * 2  # ours, and the cache's first
    assert len(list(folder.iterdir())) == 1
    arrays = {"encode": lambda: [found.ids, found.offsets, found.kept], "prompts": lambda: [*found[0], found[1]]}
    assert all(array.flags.writeable for array in arrays.get(way, lambda: [found])())


def test_no_rows(words, folder):
    for way, (_, *rest) in WAYS.items():
        rest = [value[:0] if isinstance(value, (list, np.ndarray)) else value for value in rest]
        for _ in range(2):
            assert plain(getattr(token_cache, way)(words, [], *rest)) == plain(getattr(words, way)([], *rest))
    assert len(list(folder.iterdir())) == len(WAYS) == 4


def test_all_that_counts_is_in_the_key(tmp_path, words, folder, calls):
    """Each call differs from the others in one thing, and finds the entry of none of them, but its own."""
    fewer = [word for word in VOCABULARY if word != "good"] + ["good"]
    other = make_tokenizer(tmp_path / "other", fewer)
    smaller = make_tokenizer(tmp_path / "words", embedded=1000)
    cased = make_tokenizer(tmp_path / "cased")
    cased._tokenizer.normalizer = None
    changed = [*TEXTS[:-1], TEXTS[-1] + "x"]
    cases = [("encode", tok, TEXTS, 9) for tok in (words, other, smaller, cased)]
    cases += [("encode", words, TEXTS, 10), ("encode", words, changed, 9), ("encode", words, TEXTS[:-1], 9)]
    cases += [
        ("encode", words, TEXTS[::-1], 9),
        ("encode", words, ["a", *TEXTS], 9),
        ("encode", words, TEXTS + ["a"], 9),
    ]
    cases += [("encode", words, ["ab", "c"], 9), ("encode", words, ["a", "bc"], 9), ("encode", words, ["a b", "c"], 9)]
    cases += [("encode", words, ['a", "b'], 9), ("encode", words, ["a", "b"], 9), ("encode", words, ["a\0b"], 9)]
    cases += [("visible", words, TEXTS, added, 9) for added in (ADDED, ADDED[::-1], [[]] * 300)]
    cases += [("visible", words, TEXTS, ADDED, 10)]
    rooms = [ROOMS, ROOMS + 1]
    cases += [("prompts", words, TEXTS, before, after, room) for before in ("the", "") for after in ("", "the")
              for room in rooms]  # fmt: skip
    cases += [("visible_in_prompts", words, TEXTS, added, before, "", room) for added in (ADDED, ADDED[::-1])
              for before in ("the", "") for room in rooms]  # fmt: skip
    for number, (way, tok, *arguments) in enumerate(cases, 1):
        getattr(token_cache, way)(tok, *arguments)
        assert len(calls) == len(list(folder.iterdir())) == number
    for way, tok, *arguments in cases:
        found = plain(getattr(token_cache, way)(tok, *arguments))
        assert len(calls) == len(cases) == 36
        assert found == plain(getattr(tok, way)(*arguments))
        calls.pop()


def test_long_lists_are_hashed_in_pieces(monkeypatch):
    lists = [["a"], ["a", "b"], ["a", "b", "c"], ["b", "a", "c"], ["a", "b", "c", "d"], ["a, b", "c"]]
    keys = [token_cache.key_of(*pair) for pair in combinations(lists, 2)] + [token_cache.key_of(one) for one in lists]
    monkeypatch.setattr(token_cache, "HASHED_AT_ONCE", 2)
    keys += [token_cache.key_of(["a", "b"], []), token_cache.key_of(["a"], ["b"]), token_cache.key_of([], ["a", "b"])]
    assert len(set(keys) - {token_cache.key_of(["a"], ["b"])}) == len(keys) - 1 == 23


def test_the_fingerprint_is_the_same_in_every_process(tmp_path, words):
    program = f"from minilora.base import tokenizer; print(tokenizer.load({str(tmp_path / 'words')!r}).fingerprint)"
    found = set()
    for seed in "12":
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        found.add(subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).strip())
    assert found == {words.fingerprint} and len(words.fingerprint) == 64


def test_a_small_set_is_not_kept(words, folder, calls, monkeypatch):
    size = sum(map(len, TEXTS))
    monkeypatch.setattr(token_cache, "LEAST", size + 1)
    token_cache.encode(words, TEXTS, 9)
    assert not folder.exists()
    monkeypatch.setattr(token_cache, "LEAST", size)
    token_cache.encode(words, TEXTS, 9)
    token_cache.encode(words, TEXTS, 9)
    assert len(list(folder.iterdir())) == 1 and len(calls) == 2


# --- files that are not as they were written


def test_an_altered_file_is_ignored_and_rewritten(words, folder, calls):
    token_cache.encode(words, TEXTS[:200], 9)
    [foreign] = [path.read_bytes() for path in folder.iterdir()]  # a good entry, of other rows
    [old] = folder.iterdir()
    old.unlink()
    fresh = plain(words.encode(TEXTS, 9))
    token_cache.encode(words, TEXTS, 9)
    [path] = folder.iterdir()
    good = path.read_bytes()
    assert path != old and good != foreign

    from safetensors.numpy import save

    alien = save({"ids": np.arange(4), "offsets": np.arange(3)})
    bad = [b"", b"\0" * 5, good[:-1], good[:9], good[: len(good) // 2], good + b"\0", foreign, alien, b"\x80\x04N."]
    for place in range(8, len(good), len(good) // 40):  # one bit, anywhere
        bad.append(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
    for content in bad:
        path.write_bytes(content)
        calls.clear()
        assert plain(token_cache.encode(words, TEXTS, 9)) == fresh
        assert calls == ["encode"] and path.read_bytes() == good and list(folder.iterdir()) == [path]
        assert plain(token_cache.encode(words, TEXTS, 9)) == fresh and calls == ["encode"]
    assert len(bad) >= 49


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path, words, folder):
    token_cache.encode(words, TEXTS, 9)
    [path] = folder.iterdir()
    with open(path, "wb") as file:
        pickle.dump(Bomb(tmp_path / "exploded"), file)
    token_cache.encode(words, TEXTS, 9)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_a_folder_in_the_place_of_an_entry(words, folder, capsys):
    token_cache.encode(words, TEXTS, 9)
    [path] = folder.iterdir()
    path.unlink()
    path.mkdir()
    assert plain(token_cache.encode(words, TEXTS, 9)) == plain(words.encode(TEXTS, 9))
    assert "cannot be written" in capsys.readouterr().err


# --- room


def entry_size(words, path):
    encoded = words.encode(TEXTS, 11)
    arrays = {"ids": encoded.ids, "offsets": encoded.offsets, "kept": encoded.kept}
    token_cache.write_arrays(path, arrays, {"sha256": "0" * 64})
    return path.stat().st_size


def test_written_arrays_are_read_by_the_library(tmp_path):
    from safetensors import safe_open

    arrays = {"a": np.arange(7, dtype=np.uint16), "none": np.empty(0, np.int32), "b": np.arange(-4, 8.0).reshape(3, 4),
              "turned": np.arange(6).reshape(2, 3).T}  # fmt: skip
    token_cache.write_arrays(tmp_path / "file", arrays, {"sha256": "0", "other": "é"})
    with safe_open(tmp_path / "file", "numpy") as file:
        assert file.metadata() == {"sha256": "0", "other": "é"} and set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            found = file.get_tensor(name)
            assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)


def test_the_entries_unused_for_longest_make_room(words, folder, monkeypatch):
    paths = {}
    for age, length in enumerate((5, 6, 7, 8)):
        token_cache.encode(words, TEXTS, length)
        [paths[length]] = set(folder.iterdir()) - {*paths.values()}
        os.utime(paths[length], (age, age))
    token_cache.encode(words, TEXTS, 5)  # the oldest, used again
    abandoned, unfinished = folder / ".killed", folder / ".writing"
    for path in (abandoned, unfinished):
        path.write_bytes(b"x" * 100)
    os.utime(abandoned, (0, 0))
    left = {*paths.values(), unfinished}

    # Room for all but the abandoned file and the oldest entry, and not for a byte more.
    entries = sum(path.stat().st_size for path in paths.values())
    size = entry_size(words, folder.parent / "size")
    monkeypatch.setattr(token_cache, "LIMIT", entries + size - paths[6].stat().st_size)
    token_cache.encode(words, TEXTS, 11)
    [new] = set(folder.iterdir()) - left
    assert set(folder.iterdir()) == left - {paths[6]} | {new}
    monkeypatch.setattr(token_cache, "LIMIT", token_cache.LIMIT - 1)
    token_cache.make_room(folder)
    assert set(folder.iterdir()) == left - {paths[6], paths[7]} | {new}


def test_what_exceeds_the_limit_alone_is_not_kept(words, folder, monkeypatch):
    token_cache.encode(words, TEXTS[:2], 9)
    monkeypatch.setattr(token_cache, "LIMIT", 1000)
    token_cache.encode(words, TEXTS, 9)
    assert len(list(folder.iterdir())) == 1


# --- folders and processes


@pytest.mark.parametrize("place", ["cache", "cache/minilora", "cache/minilora/tokens"])
def test_a_folder_that_cannot_be_written(place, words, folder, tmp_path, capsys):
    blocked = tmp_path / place
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file")
    for _ in range(2):
        assert plain(token_cache.encode(words, TEXTS, 9)) == plain(words.encode(TEXTS, 9))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("tokens ") and str(folder) in line and "cannot be written" in line


PROCESS = """
import sys
from pathlib import Path
from minilora.base import tokenizer
from minilora.data import token_cache
token_cache.LEAST, token_cache.LIMIT = 0, int(sys.argv[2])
words = tokenizer.load(Path(sys.argv[1]))
texts = Path(sys.argv[3]).read_text().split("\\n")
for turn in range(20):
    for length in (9, 10, 11):
        encoded, fresh = token_cache.encode(words, texts, length), words.encode(texts, length)
        for name in ("ids", "offsets", "kept"):
            found, wanted = getattr(encoded, name), getattr(fresh, name)
            assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes()
print("done")
"""


@pytest.mark.parametrize("entries", [9, 1])
def test_processes_share_the_folder(entries, words, folder, tmp_path):
    """Some at once write, read and, where there is room for one entry, remove the same three."""
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    limit = entries * entry_size(words, tmp_path / "size") + 100
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "words"), str(limit), str(tmp_path / "texts")]
    running = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.PIPE) for _ in range(3)]  # fmt: skip
    for process in running:
        out, err = process.communicate(timeout=600)
        assert (process.returncode, out, err) == (0, "done\n", "")
    left = list(folder.iterdir())
    assert all(path.suffix == ".safetensors" for path in left) and len(left) == min(entries, 3)
