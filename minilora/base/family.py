"""A row of the table of model families (`families.py`): what a family may set, and where its tensors lie."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from minilora.base.names import Layout
from minilora.base.spec import TARGETS


class Place(NamedTuple):
    """Where a projection lies in the checkpoint: the out rows `rows` (a slice or an int64 tensor) of `module`."""

    module: str
    rows: object = slice(None)


@dataclass(frozen=True)
class Family:
    layout: Layout
    prefixes: tuple[str, ...]  # the checkpoint may hold the base bare, or under the last of these in a task model
    causal: bool = False
    norm: str = "layer"  # this and the next: see Spec
    placement: str = "post"
    gated: bool = False
    biases: Callable = lambda take: TARGETS  # the targets that have a bias
    qk_norm: Callable = lambda take: None
    window: str | None = None  # a key of WINDOWS
    ropes: dict[str, tuple[str, float]] = field(default_factory=dict)  # full, local -> key of theta, its default
    partial: tuple[str, float] | None = None  # key and default of the part of a head that is rotated
    keys: dict[str, str] = field(default_factory=dict)  # Llama's key -> this family's
    defaults: dict[str, object] = field(default_factory=dict)  # by Llama's keys
    absent: dict[str, object] = field(default_factory=dict)  # defaults where the key itself is absent: null is none
    only: dict[str, object] = field(default_factory=dict)  # the only value of a key that is implemented
    traits: Callable = lambda take: {}  # further fields of the Spec
    inner: int | None = None  # F / D where the configuration does not say
    unembed: str = "lm_head"
    unused: str = r""  # a regular expression for the tensors, without prefix, that the base does not need
    transposed: bool = False  # projections are stored [in, out]
    by_head: bool = False  # a fused projection has head by head each part's rows, not part by part all heads'
    skips_ropes: bool = False  # whether some layers have no rotation
    first_normed: bool = True  # whether attention's input is normalised in the first layer too
    peft: Layout | None = None  # transformers' own names, where they differ from the checkpoint's
    read: Callable | None = None  # of a configuration unlike Llama's

    def place(self, name, spec, layout=None):
        """The `Place` of a module in `layout` (default: the checkpoint's):
        `layers.3.q` -> encoder.layer.3.attention.self.query, whole."""
        layout = layout or self.layout
        if name == "unembedding":
            return Place(self.unembed)
        if name in layout.embeddings:
            return Place(layout.embeddings[name])
        _, index, part = name.split(".", 2)
        parts, module = next((k.split(), v) for k, v in layout.modules.items() if part in k.split())
        module = layout.layer.format(i=index) + module
        if len(parts) == 1:
            return Place(module)
        sizes = [spec.shape(target, int(index))[0] for target in parts]
        first = sum(sizes[: parts.index(part)])
        if not self.by_head:
            return Place(module, slice(first, first + spec.shape(part, int(index))[0]))
        import torch  # the rest of this module, and with it --help and the coverage report, does without

        heads = spec.layers[int(index)].heads
        rows = torch.arange(sum(sizes)).view(heads, len(parts), -1)[:, parts.index(part)]
        return Place(module, rows.reshape(-1))

    def fused(self, name, spec, layout=None):
        """The modules of the same layer that share the checkpoint's module with `name`, itself included, in order."""
        _, index, part = name.split(".", 2)
        parts = next(k.split() for k in (layout or self.layout).modules if part in k.split())
        return [f"layers.{index}.{target}" for target in parts]
