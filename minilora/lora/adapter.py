"""An adapter as an object: what a base carries, apart from the base.

`peft.py` has its form in PEFT's files, `storage.py` its folder.
"""

from dataclasses import dataclass, field

import torch

from minilora.base.spec import TARGETS
from minilora.errors import InputError
from minilora.lora.layer import attach, named_layers
from minilora.lora.targets import LARGEST, Slot
from minilora.lora.variants import VARIANTS, plain_factors

TENSORS = ("A", "B", "A0", "B0", "magnitude")  # of a Part, and of a LoRALinear


@dataclass
class Part:
    """The adapter of one projection, as on a `LoRALinear`: float32, on the CPU or on the base's device."""

    slot: Slot
    A: torch.Tensor  # [R, in]
    B: torch.Tensor  # [out, R]
    A0: torch.Tensor | None = None  # the frozen start, where it is a part of the base's weight
    B0: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None  # [out]

    def tensors(self):
        """{name: tensor} of those that it has."""
        return {name: value for name in TENSORS if (value := getattr(self, name)) is not None}


@dataclass
class Adapter:
    """What a base carries: {module of model.py: Part}. `head`: {"weight" [C, P], "bias" [C]}, or {}."""

    parts: dict[str, Part]
    variant: str = "lora"
    dropout: float = 0.0
    head: dict = field(default_factory=dict)

    @property
    def slots(self):
        return {name: part.slot for name, part in self.parts.items()}


# --- on a base


def adapter_of(base):
    """The `Adapter` that `base` carries, its tensors not copied."""
    layers = named_layers(base)
    parts = {name: Part(layer.slot, *(getattr(layer, key) for key in TENSORS)) for name, layer in layers}
    _, first = layers[0]
    return Adapter(parts, variant_of(first), first.dropout)


def variant_of(layer):
    """The name of a LoRALinear's variant."""
    return next(name for name, variant in VARIANTS.items() if variant is layer.variant)


def put_adapter(adapter, base):
    """Attach an `Adapter` to `base`. Raises InputError as `layer.attach`."""
    attach(base, adapter.slots, adapter.dropout, variant=adapter.variant)
    with torch.no_grad():
        for name, layer in named_layers(base):
            part = adapter.parts[name]
            for key in ("A", "B", "magnitude"):
                if (value := getattr(part, key)) is not None:
                    getattr(layer, key).copy_(value)
            if part.A0 is not None:
                layer.A0, layer.B0 = (value.to(layer.A.device) for value in (part.A0, part.B0))


def check_strength(adapter, where, weight=1.0):
    """Raise InputError, which begins with `where`, unless `weight` times what the adapter changes can be computed with:
    every tensor is finite, and no change of a weight is larger than `LARGEST` (Frobenius norm, bounded from above).
    """
    named = {f"{key} of {name}": value for name, part in adapter.parts.items() for key, value in part.tensors().items()}
    for name, value in (named | {f"the head's {leaf}": value for leaf, value in adapter.head.items()}).items():
        if not value.isfinite().all():
            raise InputError(f"{where}: {name} has NaN or infinity: nothing can be computed with it; train it again")
    for name, part in adapter.parts.items():
        A, B = plain_factors(part)
        change = abs(part.slot.scale) * (A.double().norm() * B.double().norm()).item()
        if part.magnitude is not None:
            change = max(change, abs(weight) * part.magnitude.double().norm().item())
        else:
            change *= abs(weight)
        if not change <= LARGEST:
            raise InputError(
                f"{where}: it changes the weight of {name} by up to {change:.1g}, too much for float32 (at most "
                f"{LARGEST:.0e}): use a smaller scale"
            )


def combine(weighted):
    """One plain `Adapter` that changes the base by the weighted sum of what several change.

    weighted  [(Adapter, weight)]

    The factors stand one after the other, so the ranks add up. The head is the first one's.

    Raises InputError for DoRA: a sum of its changes has no low rank.
    """
    for adapter, _ in weighted:
        if adapter.variant == "dora":
            raise InputError(
                "an adapter with magnitudes (DoRA) cannot be added to others: what it changes is not of low rank; "
                "merge it (--merge-to), and use the result as the base"
            )
    names = {name for adapter, _ in weighted for name in adapter.parts}
    parts = {}
    for name in sorted(names, key=place_of):
        A, B = [], []
        for adapter, weight in weighted:
            if name in adapter.parts:
                part = adapter.parts[name]
                own_A, own_B = plain_factors(part)
                A.append(own_A)
                B.append(weight * part.slot.scale * own_B)
        A, B = torch.cat(A), torch.cat(B, 1)
        parts[name] = Part(Slot(len(A), float(len(A)), 1.0), A, B)
    return Adapter(parts, head=weighted[0][0].head)


def place_of(name):
    _, layer, target = name.split(".")
    return int(layer), TARGETS.index(target)
