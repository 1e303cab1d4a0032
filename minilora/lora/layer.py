"""LoRA by hand. A frozen linear map W x + b has a trained map of low rank beside it (Hu et al. 2021, arXiv 2106.09685):

    y = W x + b + s B A x        A [R, in], B [out, R], the scale s

`LoRALinear` is that layer; `attach`, `detach`, `merge`, `unmerge` and `scale_by` put it on a base and take it off. The
base's own tensors are never written to: merging swaps in a new weight and keeps the old one aside, so nothing drifts,
and `detach` gives the base back bit for bit. `variants.py` has other equations, and where A and B start.
"""

import contextlib

import torch
from torch import nn

from minilora.errors import InputError
from minilora.kernels.dropout import Hashes, dropout, dropouts, size_of
from minilora.kernels.lora_linear import lora_linears
from minilora.lora.targets import MOVING, check_variant
from minilora.lora.variants import STARTS, VARIANTS, check_written
from minilora.seeds import generator, number_of

MOST_MERGED = 1 << 30


class Undo(contextlib.AbstractContextManager):
    """A change that is made already: leave it, or use it in a `with` to take it back at the end."""

    def __init__(self, undo):
        self._undo = undo  # a function without arguments

    def __exit__(self, *error):
        self._undo()


class LoRALinear(nn.Module):
    """x [..., in] -> W x + b + s B A x [..., out]: `linear` is frozen, `A` and `B` are trained.

    Shapes and types: A [R, in] and B [out, R], float32. A0 and B0, of the same shapes, are the frozen start where it is
    a part of W, and `magnitude` [out] is DoRA's; else these are None. `factor` multiplies what the adapter changes.
    What dropout drops follows from `keys`, int32 [1] (see `use_keys`), and from the module's `salt`.
    """

    def __init__(self, linear, slot, dropout=0.0, generator=None, variant="lora", init="kaiming", form="auto", salt=0):
        super().__init__()
        self.linear = linear
        self.slot = slot  # rank R, alpha and scale s
        self.variant = VARIANTS[variant]
        self.form = form
        self.factor = 1.0
        self.dropout, self.salt = dropout, salt
        self.keys = torch.zeros(1, dtype=torch.int32, device=linear.weight.device)
        self.hashes = None  # of the tokens, shared by all modules of a model: see `use_keys`
        self.base_weight = None  # the frozen weight, kept aside while merged
        # Drawn on the CPU, so that every device starts from the same adapter.
        A, B = (
            factor.to(linear.weight.device, torch.float32) for factor in STARTS[init](linear.weight, slot, generator)
        )
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_parameter("magnitude", None)
        self.register_buffer("A0", A.clone() if init in MOVING else None)
        self.register_buffer("B0", B.clone() if init in MOVING else None)
        self.variant.init(self)
        for name in ("A", "B"):
            getattr(self, name).requires_grad_(name in self.variant.trains)

    def forward(self, x, seen=None):
        """W x + b + s B A x, where dropout takes numbers out of the second x only; `seen` is that, if made already."""
        if self.merged:
            return self.linear(x)
        if self.drops and seen is None:
            [seen] = seen_by([self], x)
        return self.variant.forward(self, x, seen)

    @property
    def drops(self):
        return self.training and self.dropout > 0

    @property
    def joins(self):
        """Whether `joint` may compute it in one product with its neighbours."""
        return not (self.merged or self.drops or self.variant.projection is None)

    def projection(self):
        return self.variant.projection(self)

    @staticmethod
    def joint(x, linears):
        """The outputs of `linears`, some of them adapted, for one x [..., in]; in one product where it is exact."""
        adapted = [linear for linear in linears if hasattr(linear, "joins")]
        dropping = [layer for layer in adapted if isinstance(layer, LoRALinear) and layer.drops and not layer.merged]
        if dropping:
            seen = dict(zip(dropping, seen_by(dropping, x), strict=True))
            return [linear(x, seen[linear]) if linear in seen else linear(x) for linear in linears]
        if not all(layer.joins for layer in adapted):
            return [linear(x) for linear in linears]
        return lora_linears(x, [
            linear.projection() if linear in adapted else (linear.weight, linear.bias, None, None, 1.0)
            for linear in linears
        ], form=adapted[0].form)  # fmt: skip

    def __repr__(self):
        name = next(name for name, variant in VARIANTS.items() if variant is self.variant)
        out_features, in_features = self.original.shape
        rank, scale = self.slot.rank, round(self.slot.scale, 4)
        return f"LoRALinear({in_features} -> {out_features}, rank={rank}, scale={scale}, {name})"

    @property
    def merged(self):
        return self.base_weight is not None

    @property
    def original(self):
        """The base's own weight [out, in], merged or not."""
        return self.base_weight if self.merged else self.linear.weight

    @torch.no_grad()
    def merged_weight(self):
        """The weight [out, in] that merging puts in place, in the base's dtype; summed in float32 or wider."""
        dtype = self.original.dtype
        return self.variant.merge(self, torch.promote_types(dtype, torch.float32)).to(dtype)

    @torch.no_grad()
    def merge_error(self):
        """||M - W'|| / ||W' - W||: the share of the adapter's change that merging loses to rounding.

        Frobenius norms; M is `merged_weight` and W' the exact sum, in float64. Above 1 the merged base is further from
        the adapter than the plain base is; 0.0 for an adapter that changes nothing.
        """
        exact = self.variant.merge(self, torch.float64)
        lost, change = (exact - self.merged_weight()).norm(), (exact - self.original).norm()
        return (lost / change).item() if lost else 0.0

    def merge(self):
        if not self.merged:
            merged = nn.Parameter(self.merged_weight(), requires_grad=False)
            self.linear.weight, self.base_weight = merged, self.linear.weight

    def unmerge(self):
        if self.merged:
            self.linear.weight, self.base_weight = self.base_weight, None


def seen_by(layers, x):
    """What dropout leaves of x for each of `layers`, which drop the same share."""
    share, keys, hashes = layers[0].dropout, layers[0].keys, layers[0].hashes
    if hashes is None:
        return [dropout(x, share, keys, layer.salt) for layer in layers]
    return dropouts(x, share, *hashes.of([layer.salt for layer in layers], *size_of(x, keys)))


def named_layers(model):
    """The (name, LoRALinear) pairs on a model, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def make_layers(model, slots, dropout=0.0, seed=0, variant="lora", init="kaiming", form="auto"):
    """{module name: LoRALinear} for every module of `model` named in `slots` ({module name: targets.Slot}).

    Each start is drawn from a stream of its own, which follows from `seed` and the module's name: adding a target
    leaves the others as they were, and (kaiming, gaussian) a smaller rank starts with the first rows of a larger one.
    Raises InputError if there is an adapter already, and for what `targets.check_variant` and the variant refuse.
    """
    if named_layers(model):
        raise InputError("the base carries an adapter already: detach it first")
    check_variant(variant, init, slots, dropout)
    layers = {}
    for name, slot in slots.items():
        try:
            layers[name] = LoRALinear(
                model.get_submodule(name), slot, dropout, generator(seed, name), variant, init, form, number_of(name)
            )
            check_written(layers[name], variant)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return layers


def put(model, layers):
    """Put layers that `make_layers` made for `model`, or that were taken off it, in their places."""
    for name, layer in layers.items():
        replace_module(model, name, layer.train(model.training))
    return model


def attach(model, slots, dropout=0.0, seed=0, variant="lora", init="kaiming", form="auto"):
    """Make an adapter, put it on, freeze everything else. Raises InputError as `make_layers`, with nothing attached."""
    layers = make_layers(model, slots, dropout, seed, variant, init, form)
    model.requires_grad_(False)
    return put(model, layers)


def detach(model):
    """Take the adapter off: the base is again what it was, bit for bit."""
    for name, layer in named_layers(model):
        layer.unmerge()
        replace_module(model, name, layer.linear)
    return model


def replace_module(model, name, module):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def merge(model):
    """Fold the adapter into the weights that the forward uses (Hu et al. 2021, section 4.1); merging twice is once."""
    for _, layer in named_layers(model):
        layer.merge()
    return model


def unmerge(model):
    """Undo `merge`: the same tensors as before."""
    for _, layer in named_layers(model):
        layer.unmerge()
    return model


@contextlib.contextmanager
def merged_meanwhile(model):
    """Merge the adapter for this block, for predictions: where the sum is in float32 or wider, and at most
    `MOST_MERGED` bytes of weights are kept aside. The weights are the same tensors afterwards.
    """
    layers = [layer for _, layer in named_layers(model) if not layer.merged]
    weights = [layer.original for layer in layers]
    exact = all(w.dtype in (torch.float32, torch.float64) and not hasattr(w, "full_tensor") for w in weights)
    if not exact or sum(w.nbytes for w in weights) > MOST_MERGED:
        layers = []
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def scale_by(model, factor):
    """Multiply by `factor` what the adapter changes. W' is the weight with the adapter as trained: the layers compute
    with W + factor (W' - W), so 0 is the original base and 1 the adapter, whatever variant and start.

    Raises InputError while the adapter is merged.
    """
    for name, layer in named_layers(model):
        if layer.merged:
            raise InputError(f"the adapter of {name} is merged: unmerge it before scaling it")
        layer.factor = factor
    return model


def use_keys(model, keys):
    """Let dropout follow `keys`, an int32 tensor [1] that the training changes in place from step to step."""
    layers = [layer for _, layer in named_layers(model)]
    hashes = Hashes(keys, [layer.salt for layer in layers])
    for layer in layers:
        layer.keys, layer.hashes = keys, hashes
