"""A cell's base: its folder, spec and tokenizer, and the loaded base that cells share."""

from dataclasses import dataclass

import torch

from minilora import parallel, precision
from minilora.base import checkpoint, families, model, tokenizer
from minilora.base.source import fingerprint_tokenizer, resolve_base, resolve_tokenizer
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.fields import grouped, value_of
from minilora.runs.record import free_memory


@dataclass(frozen=True)
class Setting:
    """What members have in common: folders and spec of the base, its tokenizer, device and precision."""

    folder: object
    words: object  # the tokenizer's folder
    spec: object
    tokenizer: object
    device: torch.device
    dtype: torch.dtype
    products: torch.dtype  # that of the base's matrices
    inputs: dict  # their fingerprints

    @classmethod
    def of(cls, cell):
        """Raises InputError for all that can be refused of a base before its weights are read."""
        device, dtype = parallel.pick_device(cell.device), getattr(torch, cell.dtype)
        precision.check(cell, device)
        products = torch.bfloat16 if cell.products == "bfloat16" else dtype
        folder = resolve_base(cell.model, cell.revision, cell.tokenizer)
        spec = families.read_spec(checkpoint.read_config(folder))
        words = resolve_tokenizer(cell.tokenizer, folder)
        inputs = {"base": checkpoint.fingerprint(folder), "tokenizer": fingerprint_tokenizer(words)}
        return cls(folder, words, spec, tokenizer.load(words, spec.vocabulary), device, dtype, products, inputs)


class Shared:
    """What cells have in common and one of them made: rows, tests, tokens. Of each kind the last `KEPT` are kept."""

    KEPT = 8

    def __init__(self):
        self._made = {}  # {kind: {key: value}}

    def __call__(self, kind, cell, names, *more, make):
        """`make()`, once for all cells with the same values of the fields `names` and of what else it depends on."""
        key, made = repr([[value_of(cell, name) for name in names], more]), self._made.setdefault(kind, {})
        found = made.pop(key) if key in made else make()
        made[key] = found  # the last that was used
        if len(made) > self.KEPT:
            del made[next(iter(made))]
        return found


class Settings:
    """The `Setting` of each cell that is asked for, and the base that was loaded last, for the cells that share it."""

    def __init__(self, shard=False):
        """`shard`: the processes that train together share the base out."""
        self._known, self._base, self.shared = {}, (None, None), Shared()
        self.shard = shard

    def forget(self):
        """Let the base be loaded anew."""
        self._base = None, None

    @staticmethod
    def key(cell):
        """The fields that a setting follows from."""
        return tuple(value_of(cell, name) for name in grouped(Cell, "base"))

    def of(self, cell):
        key = self.key(cell)
        if key not in self._known:
            self._known[key] = Setting.of(cell)
        model.check_fits(self._known[key].spec, cell.max_length)
        return self._known[key]

    def load(self, cell, unembedding):
        """The bare base of a cell, with its unembedding if asked for."""
        key, setting = (self.key(cell), unembedding), self.of(cell)
        if self._base[0] != key or cell.method == "full":
            self._base = None, None  # one at a time in memory
            check_memory(cell, setting)
            then = parallel.sharding() if self.shard else None
            base = model.load(setting.folder, setting.dtype, setting.device, unembedding, then, setting.products)
            self._base = (key if cell.method != "full" else None), base  # a trained base is nobody else's
        return self._base[1]


def check_memory(cell, setting):
    """Raise InputError for a base that does not fit into the memory that is free, where the system says how much."""
    free, needed = free_memory(setting.device), bytes_of_base(setting) / parallel.count()
    if free is not None and needed > free:
        less = "" if cell.dtype == "bfloat16" else ", or --dtype bfloat16"
        raise InputError(
            f"{cell.model} in {cell.dtype} needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory "
            f"are free on {setting.device}: choose a smaller base{less}"
        )


def bytes_of_base(setting):
    """Bytes of the base's matrices, in the dtype of their products, and of its token embedding."""
    table = setting.spec.vocabulary * setting.spec.width
    return setting.products.itemsize * (size_of_base(setting.spec) - table) + setting.dtype.itemsize * table


def size_of_base(spec):
    """Parameters of the base's matrices and its token embedding."""
    layers = [spec.shape(target, layer) for layer in range(len(spec.layers)) for target in spec.targets]
    return spec.vocabulary * spec.width + sum(out * inner for out, inner in layers)
