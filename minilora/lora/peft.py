"""An adapter in PEFT's terms, and back: tensors by PEFT's names, slices of fused projections as one whole."""

import re
from dataclasses import dataclass

import torch

from minilora import parallel
from minilora.base import families
from minilora.errors import InputError
from minilora.lora import peft_config
from minilora.lora.adapter import Adapter, Part, place_of
from minilora.lora.layer import LoRALinear
from minilora.lora.peft_config import CONFIG, SLOTS, TENSORS
from minilora.lora.targets import SCALES, Slot
from minilora.lora.variants import STARTS, VARIANTS, widened

PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_(magnitude)_vector(?:\.weight)?)")


# --- to PEFT


@dataclass
class Whole:
    """The adapter of one linear map of the checkpoint: A [R, in], B [out, R], the scale of B A, magnitude [out]."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    slots: list[Slot]
    magnitude: torch.Tensor | None

    def tensors(self):
        named = {"lora_A.weight": self.A, "lora_B.weight": self.B}
        return named if self.magnitude is None else named | {"lora_magnitude_vector": self.magnitude}

    def alpha(self, rslora):
        slot, rank = self.slots[0], len(self.A)
        if all(s == slot for s in self.slots) and slot.rank == rank and is_rslora([slot]) == rslora:
            return slot.alpha
        return self.scale * (rank**0.5 if rslora else rank)


def is_rslora(slots):
    """Whether it is alpha/sqrt(R) that gives these slots' scales, and not alpha/R."""
    plain, stable = SCALES["constant"], SCALES["rslora"]
    return all(s.scale == stable(s.alpha, s.rank) for s in slots) and any(
        s.scale != plain(s.alpha, s.rank) for s in slots
    )


def modules_of(spec):
    """{module in PEFT's model, without prefix: the modules of model.py that are its slices}, in order."""
    family, found = families.find(spec.family), {}
    for layer in range(len(spec.layers)):
        for target in spec.targets:
            name = f"layers.{layer}.{target}"
            found.setdefault(family.place(name, spec, family.peft).module, []).append(name)
    return found


def rows_of(name, spec):
    family = families.find(spec.family)
    return family.place(name, spec, family.peft).rows


@torch.no_grad()
def to_peft(adapter, base):
    """({module in PEFT's model, without prefix: Whole}, the record that undoes it)."""
    spec, wholes, places = base.spec, {}, {}
    for module, slices in modules_of(spec).items():
        here = [name for name in slices if name in adapter.parts]
        if not here:
            continue
        slots = [adapter.parts[name].slot for name in here]
        largest = max(slot.scale for slot in slots)
        stacked, blocks = [], []
        for name in here:
            A, B = adapter.parts[name].factors()
            first = next((at for at, other in stacked if other.shape == A.shape and other.equal(A)), None)
            if first is None:
                first = sum(len(other) for _, other in stacked)
                stacked.append((first, A))
            blocks.append((name, first, scaled(B, adapter.parts[name].slot.scale, largest)))
            places[name] = first
        A = torch.cat([other for _, other in stacked])
        out_features = sum(spec.shape(name.rpartition(".")[2], int(name.split(".")[1]))[0] for name in slices)
        B = A.new_zeros(out_features, len(A))
        for name, first, block in blocks:
            whole = B[:, first : first + block.shape[1]]
            whole[rows_of(name, spec)] = block
        magnitude = None
        if adapter.variant == "dora":
            magnitude = A.new_empty(out_features)
            for name in slices:
                part = adapter.parts.get(name)
                found = norms(base, name, module).to(A.device) if part is None else part.magnitude
                magnitude[rows_of(name, spec)] = found
        wholes[module] = Whole(A, B, largest, slots, magnitude)
    moved = any(part.A0 is not None for part in adapter.parts.values())
    slots = {name: vars(adapter.parts[name].slot) | {"row": first} for name, first in places.items()}
    return wholes, {"variant": adapter.variant, "moved": moved, "slots": slots}


def scaled(B, scale, unit):
    """B * scale / unit, bit for bit B where these are the same."""
    return B if scale == unit else (B.double() * (scale / unit)).to(B.dtype)


def norms(base, name, module):
    """The norms of the weight's rows [out] of a slice without an adapter: PEFT's DoRA leaves these rows as they are."""
    found = widened(weight_of(base, name)).norm(dim=1)
    if (found == 0).any():
        raise InputError(
            f"row {int(found.argmin())} of {name} is 0, so that PEFT's format, where it is a part of {module}, cannot "
            "hold a DoRA on the rest of that: use another variant, or other targets"
        )
    return found


def weight_of(base, name):
    module = base.get_submodule(name)
    return parallel.gathered(module.original if isinstance(module, LoRALinear) else module.weight)


# --- from PEFT


def sort_tensors(tensors, spec, config, folder):
    """(prefix of the modules in PEFT's model, {module: {"A", "B", "magnitude"}}, head), all float32.

    Raises InputError, with the first differences, for tensors that are not those of an adapter of this base.
    """
    modules, prefixes = modules_of(spec), sorted(families.find(spec.family).prefixes, key=len, reverse=True)
    found, heads, used, wrong = {}, {}, set(), []
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        parsed = FACTOR.fullmatch(name)
        module, kind = (parsed[1], parsed[2] or parsed[3]) if parsed else (None, None)
        prefix = next((p for p in prefixes if parsed and module.startswith(p) and module[len(p) :] in modules), None)
        owner, _, leaf = name.rpartition(".")
        if not value.is_floating_point():
            wrong.append(f"{name} is of type {str(value.dtype).removeprefix('torch.')}")
        elif prefix is not None:
            used.add(prefix)
            found.setdefault(module[len(prefix) :], {})[kind] = value.float()
        elif owner in (config.get("modules_to_save") or ()) and leaf in ("weight", "bias"):
            heads.setdefault(owner, {})[leaf] = value.float()
        else:
            wrong.append(f"{name} has no place in it")
    prefix = next(iter(used), "")
    if len(used) > 1:
        wrong.append(f"modules have several prefixes ({', '.join(map(repr, sorted(used)))})")
    keys = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    for module, names in modules.items():
        factors = found.get(module, {})
        targeted = peft_config.is_targeted(config, prefix + module, folder / CONFIG)
        if targeted and set(factors) != keys:
            absent, over = sorted(keys - set(factors)), sorted(set(factors) - keys)
            wrong.append(f"{module} {'lacks its ' + absent[0] if absent else 'has a ' + over[0]}")
        elif factors and not targeted:
            wrong.append(f"{module} has factors, but is not one of target_modules")
        elif factors:
            shapes = [spec.shape(name.rpartition(".")[2], int(name.split(".")[1])) for name in names]
            out_features, in_features = sum(out for out, _ in shapes), shapes[0][1]
            A, B, m = (list(factors[key].shape) if key in factors else None for key in ("A", "B", "magnitude"))
            if A[1:] != [in_features] or B != [out_features, A[0]] or m not in (None, [out_features]):
                wrong.append(
                    f"{module} has A {A} and B {B}, where the base asks for A [R, {in_features}] and "
                    f"B [{out_features}, R]"
                )
    head = check_head(heads, spec, wrong)
    if not found and not wrong:
        wrong.append("it has no LoRA factor")
    if wrong:
        raise InputError(
            f"{folder / TENSORS} is not an adapter for this {spec.family} base of {len(spec.layers)} layers: "
            f"{'; '.join(wrong[:3])}" + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    return prefix, {module: found[module] for module in modules if module in found}, head


def check_head(heads, spec, wrong):
    """The only head among `heads`, with a bias; what does not fit is added to `wrong`."""
    for name, head in heads.items():
        shapes = {leaf: list(value.shape) for leaf, value in head.items()}
        weight = shapes.get("weight", [])
        if (
            len(weight) != 2
            or weight[1] not in (spec.width, 2 * spec.width)
            or shapes.get("bias", weight[:1]) != weight[:1]
        ):
            wrong.append(f"{name} has shapes {shapes}, where a head has weight [C, {spec.width}] and bias [C]")
            return {}
    if len(heads) > 1:
        wrong.append(f"it has {len(heads)} heads")
    return next(({"bias": head["weight"].new_zeros(len(head["weight"]))} | head for head in heads.values()), {})


@torch.no_grad()
def split(found, slots, config, base, folder):
    """The `Adapter` of PEFT's factors: each linear map's is shared by its slices."""
    parts, start, modules = {}, peft_config.start_of(config), modules_of(base.spec)
    for module, factors in found.items():
        A0 = B0 = None
        if start in peft_config.MOVING_STARTS:
            if slots[module].scale == 0:
                raise InputError(f"{folder / CONFIG}: alpha of {module} is 0, by which init_lora_weights divides")
            weights = [weight_of(base, name) for name in modules[module]]
            whole = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1])
            for name, weight in zip(modules[module], weights, strict=True):
                whole[rows_of(name, base.spec)] = weight
            try:
                A0, B0 = (factor.cpu() for factor in STARTS[start](whole, slots[module], None))
            except InputError as error:
                raise InputError(f"{folder / CONFIG}: {module}: {error}") from None
        for name in modules[module]:
            rows = rows_of(name, base.spec)
            parts[name] = Part(
                slots[module],
                factors["A"],
                factors["B"][rows],
                A0,
                None if B0 is None else B0[rows],
                factors["magnitude"][rows] if "magnitude" in factors else None,
            )
    return Adapter(parts, "dora" if config.get("use_dora") else "lora")


def recorded(record, found, slots, plain, base, folder):
    """The `Adapter` that a record describes, of which the folder holds what `to_peft` makes.

    Raises InputError if it holds something else. `plain` is the adapter as PEFT understands the folder.
    """
    modules, parts = modules_of(base.spec), {}
    try:
        moved, variant = record["moved"], record["variant"]
        if any(part.A0 is not None for part in plain.parts.values()):
            raise ValueError("minilora writes no start that PEFT takes off the base")
        for module, factors in found.items():
            here = {name: dict(record["slots"][name]) for name in modules[module] if name in record["slots"]}
            first = {name: values.pop("row") for name, values in here.items()}
            here = {name: Slot(**values) for name, values in here.items()}
            if any(s.scale not in (scale(s.alpha, s.rank) for scale in SCALES.values()) for s in here.values()):
                raise ValueError("a scale is not that of its rank and alpha")
            largest = max(slot.scale for slot in here.values())
            for name, slot in here.items():
                columns = slice(first[name], first[name] + slot.rank * (2 if moved else 1))
                A, B = factors["A"][columns], factors["B"][rows_of(name, base.spec)][:, columns]
                B = B if slot.scale in (largest, 0) else scaled(B, largest, slot.scale)
                R, magnitude = slot.rank, plain.parts[name].magnitude
                A0, B0 = (A[R:], -B[:, R:]) if moved else (None, None)
                parts[name] = Part(slot, A[:R].contiguous(), B[:, :R].contiguous(), A0, B0, magnitude)
        parts = {name: parts[name] for name in sorted(parts, key=place_of)}
        adapter = Adapter(parts, variant)
        wholes, again = to_peft(adapter, base)
        same = again == record and (variant == "dora") == (plain.variant == "dora") and variant in VARIANTS
        differing = [m for m in found if not (same and agree(wholes.get(m), found[m], slots[m].scale))]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError):
        differing = list(found)
    if differing:
        raise InputError(
            f"{folder}: {SLOTS} does not describe {CONFIG} and {TENSORS} (first difference: {differing[0]}): undo the "
            f"change to them, or delete {SLOTS} to read them as PEFT does"
        )
    return adapter


def agree(whole, factors, scale):
    if whole is None or abs(whole.scale - scale) > 1e-9 * abs(scale):
        return False
    return all(
        value.shape == factors[key].shape and torch.allclose(value, factors[key], rtol=1e-6, atol=0)
        for key, value in (("A", whole.A), ("B", whole.B))
    )
