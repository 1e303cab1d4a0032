"""LoRA by hand: the layer, and the verbs that put it on a base and take it off.

`make`, `put`, `attach`, `detach`, `merge`, `unmerge`, `scale`. The base's own tensors are never written to: merging
swaps in a new weight and keeps the old one aside, so that nothing drifts and `detach` gives the base back bit for bit.
What an adapter computes and where it starts is in `variants.py`. What this module does not know: triggers, heads, files
(`adapter.py`).
"""

import torch
from torch import nn

from minilora.errors import InputError
from minilora.kernels.dropout import dropout as drop
from minilora.kernels.lora_linear import lora_linears
from minilora.lora.targets import MOVING, check_variant
from minilora.lora.variants import STARTS, VARIANTS
from minilora.seeds import generator, number_of


class LoRALinear(nn.Module):
    """A frozen linear map with a trained low-rank one beside it: see `variants.py` for the equations.

    `A` [R, in] and `B` [out, R] are float32, as are `A0` and `B0`, the frozen start where it is a part of the base's
    weight, and `magnitude` [out], where the variant has one; else these are None. `factor` multiplies what the
    adapter changes. What dropout drops follows from `keys` int32 [1] (see `use_keys`) and the module's `salt`.
    """

    def __init__(self, linear, slot, dropout=0.0, generator=None, variant="lora", init="kaiming", form="auto", salt=0):
        super().__init__()
        self.linear = linear
        self.slot = slot
        self.variant = VARIANTS[variant]
        self.form = form
        self.factor = 1.0
        self.dropout, self.salt = dropout, salt
        self.keys = torch.zeros(1, dtype=torch.int32, device=linear.weight.device)
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

    def forward(self, x):
        if self.merged:
            return self.linear(x)
        return self.variant.forward(self, x, drop(x, self.dropout, self.keys, self.salt) if self.drops else None)

    @property
    def drops(self):
        return self.training and self.dropout > 0

    @staticmethod
    def joint(x, linears):
        """The outputs of `linears`, some of them LoRALinear, for one x [..., in]; in one product where it is exact."""
        layers = [linear for linear in linears if isinstance(linear, LoRALinear)]
        if any(layer.merged or layer.drops or layer.variant.projection is None for layer in layers):
            return [linear(x) for linear in linears]
        projections = [
            linear.variant.projection(linear)
            if isinstance(linear, LoRALinear)
            else (linear.weight, linear.bias, None, None, 1.0)
            for linear in linears
        ]
        return lora_linears(x, projections, form=layers[0].form)

    def factors(self):
        """A [R', in] and B [out, R'] of the plain adapter on the original base, with the slot's scale s (that of the
        direction, where there is a magnitude): R' = R, or 2R where the start is a part of the base's weight.
        """
        if self.A0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], 1)

    @property
    def merged(self):
        return self.base_weight is not None

    @property
    def original(self):
        """The base's own weight [out, in], merged or not."""
        return self.base_weight if self.merged else self.linear.weight

    @torch.no_grad()
    def merged_weight(self):
        """The weight that merging puts in place, in the base's dtype; summed in float32, or wider if the base is."""
        dtype = self.original.dtype
        return self.variant.merge(self, torch.promote_types(dtype, torch.float32)).to(dtype)

    @torch.no_grad()
    def merge_error(self):
        """||M - W'|| / ||W' - W||, Frobenius norms: of what the adapter changes, how much merging loses to rounding.

        M is `merged_weight` and W' the exact sum, in float64. Above 1 the merged base is further from the adapter
        than the plain base is; 0.0 for an adapter that changes nothing.
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


def named_layers(model):
    """The (name, LoRALinear) pairs on a model, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def make_layers(model, slots, dropout=0.0, seed=0, variant="lora", init="kaiming", form="auto"):
    """{module name: LoRALinear} for every module of `model` named in `slots` ({module name: coverage.Slot}).

    What a start draws comes from a stream of its own, made of `seed` and the module's name: adding a target leaves
    the others as they were, and (kaiming, gaussian) a smaller rank starts with the first rows of a larger one.
    Raises InputError if there is an adapter already or for what `coverage.check_variant` and the variant refuse.
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
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return layers


def put(model, layers):
    """Put layers that `make` made for `model`, or that were taken off it, in their places."""
    for name, layer in layers.items():
        replace_module(model, name, layer.train(model.training))
    return model


def attach(model, slots, dropout=0.0, seed=0, variant="lora", init="kaiming", form="auto"):
    """`make` an adapter and `put` it on; freeze everything else. Raises InputError as `make`, with nothing attached."""
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
    """Undo `merge`: the very tensors of before."""
    for _, layer in named_layers(model):
        layer.unmerge()
    return model


def scale_by(model, factor):
    """Multiply by `factor` what the adapter changes: the weights are W + factor (W' - W), W the original base's and
    W' those with the adapter as trained. So 0 is the original base and 1 the adapter, whatever variant and start.

    Raises InputError while the adapter is merged.
    """
    for name, layer in named_layers(model):
        if layer.merged:
            raise InputError(f"the adapter of {name} is merged: unmerge it before scaling it")
        layer.factor = factor
    return model


def use_keys(model, keys):
    """Let dropout follow `keys` int32 [1], a tensor that is then changed in place from step to step."""
    for _, layer in named_layers(model):
        layer.keys = keys
