"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, head included.

`PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), FOLDER)` gives the same hidden states, and for the lm task
`AutoModelForCausalLM` the same logits. What PEFT trained loads here, whichever of the two it was trained on. The
head is stored as PEFT stores a saved module called `classifier`; `head.json` adds what PEFT has no field for (pooling,
label names). A run of another method stores what it trained in `trained.safetensors`. What cannot be represented
is refused: `peft_format.py` has the list.

Where a checkpoint fuses projections into one linear map, PEFT can only adapt that. So the adapters of its slices are
written as one adapter of the whole, exact but for the rounding of a product: A is theirs stacked (once, where equal),
B has a block for each and is 0 elsewhere, and where scales differ, the largest is the whole's and B holds the rest.
An adapter that starts from a part of the weight is written as the plain adapter of rank 2R that it is
(`variants.py`). `slots.json`, which PEFT does not read or write, lets `load` undo both. Where it does not describe the
rest of the folder, the adapter is refused. (It is not in the tensor file's header, whose entries have no fixed order:
the same cell gives the same bytes.)
"""

from dataclasses import dataclass, field

import torch

from minilora.base.spec import TARGETS
from minilora.errors import InputError
from minilora.lora.layer import attach, named_layers
from minilora.lora.targets import Slot
from minilora.lora.variants import VARIANTS


@dataclass
class Part:
    """The adapter of one projection, as on a `lora.LoRALinear`: float32 on the CPU or the base's device."""

    slot: Slot
    A: torch.Tensor  # [R, in]
    B: torch.Tensor  # [out, R]
    A0: torch.Tensor | None = None  # the frozen start, where it is a part of the base's weight
    B0: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None  # [out]

    def factors(self):
        """A [R', in] and B [out, R'] of the plain adapter on the original base: see `LoRALinear.factors`."""
        if self.A0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], 1)


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
    parts = {n: Part(la.slot, la.A, la.B, la.A0, la.B0, la.magnitude) for n, la in layers}
    _, first = layers[0]
    return Adapter(parts, variant_of(first), first.dropout)


def variant_of(layer):
    """The name of a LoRALinear's variant."""
    return next(name for name, variant in VARIANTS.items() if variant is layer.variant)


def put_adapter(adapter, base):
    """Attach an `Adapter` to `base`. Raises InputError as `lora.attach`."""
    attach(base, adapter.slots, adapter.dropout, variant=adapter.variant)
    with torch.no_grad():
        for name, layer in named_layers(base):
            part = adapter.parts[name]
            for key in ("A", "B", "magnitude"):
                if (value := getattr(part, key)) is not None:
                    getattr(layer, key).copy_(value)
            if part.A0 is not None:
                layer.A0, layer.B0 = (value.to(layer.A.device) for value in (part.A0, part.B0))


def combine(weighted):
    """One plain `Adapter` that changes the base by the sum over `weighted` [(Adapter, weight)] of weight times what
    each one changes: factors one after the other, of the summed rank. The head is the first's.

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
                factors = part.factors()
                A.append(factors[0])
                B.append(weight * part.slot.scale * factors[1])
        A, B = torch.cat(A), torch.cat(B, 1)
        parts[name] = Part(Slot(len(A), float(len(A)), 1.0), A, B)
    return Adapter(parts, head=weighted[0][0].head)


def place_of(name):
    _, layer, target = name.split(".")
    return int(layer), TARGETS.index(target)
