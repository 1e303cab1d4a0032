"""An adapter in PEFT's terms, and back: tensors by PEFT's names, slices of fused projections as one whole.

Where a checkpoint fuses projections into one linear map, PEFT can only adapt that. So the adapters of its slices are
written as one adapter of the whole, exact up to the rounding of a product: A is theirs stacked (once, where equal),
B has a block for each and is 0 elsewhere. Where scales differ, the whole has the largest, and B holds the rest. An
adapter that starts from a part of the weight is written as the plain adapter of rank 2R that it is (`variants.py`).
Read back, a whole's adapter is that of each slice.
"""

import re
from dataclasses import dataclass

import torch

from minilora import console, parallel
from minilora.base import families
from minilora.errors import InputError
from minilora.lora import peft_config
from minilora.lora.adapter import Adapter, Part
from minilora.lora.layer import LoRALinear
from minilora.lora.peft_config import CONFIG, TENSORS
from minilora.lora.targets import SCALES, Slot
from minilora.lora.variants import STARTS, plain_factors, widened

PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_(magnitude)_vector(?:\.weight)?)")
# In a whole model's state dict PEFT puts the adapter's name, such as "default", into a key.
OWN_NAME = re.compile(r"(?<=\.)(lora_A|lora_B|lora_magnitude_vector)\.[^.]+(?=\.weight$)|modules_to_save\.[^.]+\.")
# Modules of transformers' classifiers beside the base, and the layer of an encoder's that has no place here.
TASK_HEAD = re.compile(r"(classifier|score|pooler|pre_classifier|head)\.")
BEFORE_HEAD = {"bert": "pooler", "roberta": "classifier.dense", "xlm-roberta": "classifier.dense",
               "distilbert": "pre_classifier", "modernbert": "head"}  # fmt: skip


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
    """{module in PEFT's model, without prefix: Whole}."""
    spec, wholes = base.spec, {}
    for module, slices in modules_of(spec).items():
        here = [name for name in slices if name in adapter.parts]
        if not here:
            continue
        slots = [adapter.parts[name].slot for name in here]
        largest = max(slot.scale for slot in slots)
        stacked, blocks = [], []
        for name in here:
            A, B = plain_factors(adapter.parts[name])
            first = next((at for at, other in stacked if other.shape == A.shape and other.equal(A)), None)
            if first is None:
                first = sum(len(other) for _, other in stacked)
                stacked.append((first, A))
            blocks.append((name, first, scaled(B, adapter.parts[name].slot.scale, largest)))
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
    return wholes


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


def sort_tensors(tensors, base, config, folder):
    """(prefix of the modules in PEFT's model, {module: {"A", "B", "magnitude"}}, head), all float32.

    Raises InputError, with the first differences, for tensors that are not those of an adapter of this base.
    """
    spec, family = base.spec, families.find(base.spec.family)
    modules, prefixes = modules_of(spec), sorted(family.prefixes, key=len, reverse=True)
    saved = peft_config.as_list(config.get("modules_to_save"), "modules_to_save", folder / CONFIG)
    tensors = plain_names(tensors, folder)
    found, heads, used, wrong = {}, {}, set(), []
    for name, value in tensors.items():
        parsed = FACTOR.fullmatch(name)
        module, kind = (parsed[1], parsed[2] or parsed[3]) if parsed else (name, None)
        prefix = next(p for p in prefixes if module.startswith(p))  # the last is ""
        if not value.is_floating_point():
            wrong.append(f"{name} is of type {str(value.dtype).removeprefix('torch.')}")
        elif parsed and module.removeprefix(prefix) in modules:
            used.add(prefix)
            found.setdefault(module.removeprefix(prefix), {})[kind] = value.float()
        elif (own := own_tensor(name, base)) is not None:
            if own.shape != value.shape or not own.equal(value.to(own)):
                wrong.append(f"{name} is not the base's, and minilora does not train it")
        elif TASK_HEAD.match(name.removeprefix(prefix)) and any(f".{m}." in f".{name}" for m in saved):
            heads[name] = value.float()
        else:
            wrong.append(f"{name} has no place in it")
    for module in saved:
        if module not in peft_config.HEADS and not any(f".{module}." in f".{name}" for name in tensors):
            wrong.append(f"modules_to_save names {module!r:.80}, but there is no tensor of it")
    prefix = next(iter(used), "")
    if len(used) > 1:
        wrong.append(f"modules have several prefixes ({', '.join(map(repr, sorted(used)))})")
    wrong += factor_faults(found, prefix, spec, config, folder)
    whole = is_whole(heads, family, prefix, config)
    head = check_head(heads, spec, wrong) if whole else {}
    if not found and not wrong:
        wrong.append("it has no LoRA factor")
    if wrong:
        raise InputError(
            f"{folder / TENSORS} is not an adapter for this {spec.family} base of {len(spec.layers)} layers: "
            f"{'; '.join(wrong[:3])}" + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    if not whole:
        before = BEFORE_HEAD.get(spec.family, "another layer")
        console.say(
            f"adapter    {folder}: its head is left out ({', '.join(sorted(heads))}): it is one of transformers' task "
            f"models, with {before} before the last map, which has no place here"
        )
    return prefix, {module: found[module] for module in modules if module in found}, head


def factor_faults(found, prefix, spec, config, folder):
    """What is wrong with the factors of {module: {"A", "B", "magnitude"}}, in words."""
    wrong, keys = [], {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    for module, names in modules_of(spec).items():
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
    return wrong


def plain_names(tensors, folder):
    """{name as PEFT saves it, without its prefix: tensor}. Raises InputError where two tensors have the same name."""
    found = {}
    for key, value in tensors.items():
        while key.startswith(PREFIX):
            key = key.removeprefix(PREFIX)
        if ".original_module." in f".{key}":  # what a saved module was before training
            continue
        name = OWN_NAME.sub(lambda match: match[1] or "", key)
        if name in found:
            raise InputError(f"{folder / TENSORS} has several tensors {name}: keep those of one adapter only")
        found[name] = value
    return found


def own_tensor(name, base):
    """The base's own tensor of that name in PEFT's model: an embedding, the last norm, the unembedding; else None."""
    family = families.find(base.spec.family)
    layout = family.peft or family.layout
    module, _, leaf = name.rpartition(".")
    places = {family.unembed: "embed.tokens" if base.spec.tied else "unembedding"}
    places |= {prefix + there: here for here, there in layout.embeddings.items() for prefix in family.prefixes}
    try:
        return parallel.gathered(getattr(base.get_submodule(places[module]), leaf).detach())
    except (KeyError, AttributeError):  # also where the base was loaded without it
        return None


def is_whole(heads, family, prefix, config):
    """Whether {name: tensor} holds all of a head: one linear map of the base's hidden states, or none at all.

    A decoder's `score` reads the last token's (pooling last). An encoder's head in a task model of transformers, which
    the prefix or the task tells, reads what further layers made of the first token's.
    """
    of_task_model = prefix or config.get("task_type") == "SEQ_CLS"
    linear = all(re.fullmatch(r"[^.]+\.(weight|bias)", name) for name in heads)
    return not heads or linear and (family.causal or not of_task_model)


def check_head(heads, spec, wrong):
    """The linear head in {name: tensor}, with a bias, or {}; what does not fit is added to `wrong`."""
    by_module = {}
    for name, value in heads.items():
        module, _, leaf = name.rpartition(".")
        by_module.setdefault(module, {})[leaf] = value
    for name, head in by_module.items():
        shapes = {leaf: list(value.shape) for leaf, value in head.items()}
        weight = shapes.get("weight", [])
        if (
            len(weight) != 2
            or weight[1] not in (spec.width, 2 * spec.width)
            or shapes.get("bias", weight[:1]) != weight[:1]
        ):
            wrong.append(f"{name} has shapes {shapes}, where a head has weight [C, {spec.width}] and bias [C]")
            return {}
    if len(by_module) > 1:
        wrong.append(f"it has {len(by_module)} heads")
    return next(({"bias": head["weight"].new_zeros(len(head["weight"]))} | head for head in by_module.values()), {})


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
