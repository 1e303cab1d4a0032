"""Which projections an adapter covers, with which rank and scale. Knows words and shapes, no weights."""

import math
import re
from dataclasses import dataclass

from minilora.base.spec import GROUPS, TARGETS
from minilora.errors import InputError

SCALES = {
    "constant": lambda alpha, rank: alpha / rank,  # Hu et al. 2021 (arXiv 2106.09685), section 4.1
    "rank": lambda alpha, rank: 1.0,  # the same with alpha = R
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),  # Kalajdzievski 2023 (arXiv 2312.03732), definition 3.1
}
# The largest scale, and the largest change of a weight (Frobenius norm). Far below float32's 3e38, since activations
# are squared and multiplied with each other; beside a change of 2e7 float32 has no digit left for the weight itself.
LARGEST = 1e12
VARIANTS = ["lora", "dora", "lora-fa"]  # what each computes: variants.py, whose `add_variant` adds to these
STARTS = ["kaiming", "gaussian", "orthogonal", "pissa", "olora"]  # of A and B; `add_start` adds to these
MOVING = ("pissa", "olora")  # the starts whose B A is a part of the base's weight


@dataclass(frozen=True)
class Slot:
    """The adapter of one projection: its rank R, alpha, and the scale that multiplies B A."""

    rank: int
    alpha: float
    scale: float


def parse_targets(targets, rank, alpha, scaling):
    """`("q:8", "mlp")` -> {target: Slot}, in canonical order, each group's members included.

    A target's own `:RANK` and `:ALPHA` win over the cell's. `alpha` is None where scaling is "rank".
    Raises InputError for an unknown or repeated target, and for a scale above `LARGEST`.
    """
    slots, source = {}, {}
    if not targets:
        raise InputError("targets is empty: name at least one projection, or use method = 'head'")
    for text in targets:
        name, *own = text.split(":")
        members = GROUPS.get(name, (name,) if name in TARGETS else ())
        if not members:
            raise InputError(f"target {text!r} is not one of {', '.join(TARGETS)} or a group ({', '.join(GROUPS)})")
        try:
            own_rank = int(own[0]) if own else rank
            own_alpha = float(own[1]) if len(own) > 1 else alpha
            if own_rank < 1 or len(own) > 2 or (len(own) > 1 and not 0 <= own_alpha < math.inf):
                raise ValueError
        except ValueError:
            raise InputError(f"target {text!r} is not TARGET, TARGET:RANK or TARGET:RANK:ALPHA") from None
        if scaling == "rank":
            if len(own) > 1:
                raise InputError(f"target {text!r} has an alpha, but scaling = 'rank' sets alpha to the rank")
            own_alpha = float(own_rank)
        for member in members:
            if member in slots:
                raise InputError(f"targets {source[member]!r} and {text!r} both name {member}: drop one of them")
            slots[member] = Slot(own_rank, own_alpha, SCALES[scaling](own_alpha, own_rank))
            if slots[member].scale > LARGEST:
                raise InputError(f"target {text!r} has alpha {own_alpha:g}, too large for float32: use a smaller one")
            source[member] = text
    return {target: slots[target] for target in TARGETS if target in slots}


def check_variant(variant, init, slots, dropout):
    """Raises InputError for a variant and a start of `slots` {name: Slot} that mean nothing, or not together."""
    for field, value, known in (("variant", variant, VARIANTS), ("init", init, STARTS)):
        if value not in known:
            raise InputError(f"{field} is {value!r}, but must be one of {', '.join(known)}")
    if variant == "lora-fa" and init == "orthogonal":
        raise InputError(
            "variant = 'lora-fa' freezes A, and the A of init = 'orthogonal' has half the rank: change one of them"
        )
    if init in MOVING and dropout:
        raise InputError(
            f"dropout is {dropout}, but with init = {init!r} it would drop a part of the base: use dropout = 0"
        )
    for name, slot in slots.items():
        if init == "orthogonal" and slot.rank % 2:
            raise InputError(f"rank of {name} is {slot.rank}, but init = 'orthogonal' halves it: use an even one")
        if init in MOVING and slot.scale == 0:
            raise InputError(f"alpha of {name} is 0, but init = {init!r} divides by the scale: use an alpha above 0")


def parse_layers(text, count=None):
    """`"0-2,5"` -> (0, 1, 2, 5); `"all"` -> every layer below `count`, or None where `count` is not given.

    Raises InputError for what cannot be read, and for layers that a base of `count` layers does not have.
    """
    if text == "all":
        return None if count is None else tuple(range(count))
    layers = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        named = range(int(found[1]), int(found[2] or found[1]) + 1) if found else ()
        if not named:
            raise InputError(f"layers is {text!r}: write all, or numbers and ranges from 0 such as 0-2,5")
        layers.update(named)
    layers = sorted(layers)
    if count is not None and layers[-1] >= count:
        found = [str(layer) for layer in layers if layer < count]
        raise InputError(
            f"layers {text!r} names layer {layers[-1]}, but the base has layers 0-{count - 1} "
            f"(of those named it has: {', '.join(found) or 'none'})"
        )
    return tuple(layers)


def plan_slots(spec, cell):
    """{module name: Slot} for every projection of `spec` that the cell's adapter covers; {} without an adapter.

    Raises InputError when a target matches no projection of this family, or a rank exceeds its matrix.
    """
    if cell.method != "lora":
        return {}
    slots = parse_targets(cell.targets, cell.rank, cell.alpha, cell.scaling)
    grouped = {member for text in cell.targets for member in GROUPS.get(text.split(":")[0], ())}
    absent = [target for target in slots if target not in spec.targets]
    here = {target: slot for target, slot in slots.items() if target in spec.targets}
    if refused := [target for target in absent if target not in grouped] or (absent if not here else []):
        raise InputError(
            f"target {refused[0]!r} matches nothing in a {spec.family} base, which has {' '.join(spec.targets)} "
            f"(the targets matched: {' '.join(here) or 'none'})"
        )
    layers = parse_layers(cell.layers, len(spec.layers))
    for target, slot in here.items():
        out_features, in_features = min((spec.shape(target, layer) for layer in layers), key=min)
        if slot.rank > min(out_features, in_features):
            raise InputError(
                f"rank {slot.rank} of target {target!r} is larger than its matrix ({out_features} x {in_features}): "
                f"use at most {min(out_features, in_features)}"
            )
    return {f"layers.{layer}.{target}": slot for layer in layers for target, slot in here.items()}


def describe_slots(slots, spec, variant="lora"):
    """Lines that say which modules in which layers carry an adapter, and how many of its parameters are trained."""
    if not slots:
        return ["none"]
    groups, lines = {}, []
    for name, slot in slots.items():
        _, layer, target = name.split(".")
        groups.setdefault((target, slot, spec.shape(target, int(layer))), []).append(int(layer))
    for (target, slot, shape), layers in groups.items():
        trained = len(layers) * count_trained(slot, shape, variant)
        lines.append(
            f"{target:<5}{shape[0]:>5} x {shape[1]:<5} rank {slot.rank:<4} scale {slot.scale:<8.4g}"
            f"layers {ranges(layers)}, {trained:,} trained"
        )
    return lines


def count_trained(slot, shape, variant="lora"):
    """The trained parameters of an adapter of one projection [out, in]: LoRA-FA trains B [out, R] only, DoRA also the
    magnitude [out]."""
    out_features, in_features = shape
    seen = 0 if variant == "lora-fa" else in_features
    return slot.rank * (out_features + seen) + (out_features if variant == "dora" else 0)


def ranges(numbers):
    """Ascending integers as text: 0, 1, 2, 5 -> "0-2,5"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
