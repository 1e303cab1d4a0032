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

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from . import checkpoint, families, files, lora, parallel, peft_format
from .coverage import SCALES, Slot, ranges
from .errors import InputError
from .spec import TARGETS
from .variants import STARTS, VARIANTS, widened

CONFIG, TENSORS, SLOTS = "adapter_config.json", "adapter_model.safetensors", "slots.json"
TRAINED, HEAD = "trained.safetensors", "head.json"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_(magnitude)_vector(?:\.weight)?)")


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


def taken(base):
    """The `Adapter` that `base` carries, its tensors not copied."""
    layers = lora.named_layers(base)
    parts = {n: Part(la.slot, la.A, la.B, la.A0, la.B0, la.magnitude) for n, la in layers}
    _, first = layers[0]
    return Adapter(parts, variant_of(first), first.dropout)


def variant_of(layer):
    """The name of a LoRALinear's variant."""
    return next(name for name, variant in VARIANTS.items() if variant is layer.variant)


def put(adapter, base):
    """Attach an `Adapter` to `base`. Raises InputError as `lora.attach`."""
    lora.attach(base, adapter.slots, adapter.dropout, variant=adapter.variant)
    with torch.no_grad():
        for name, layer in lora.named_layers(base):
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
    for name in sorted(names, key=_place):
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


def _place(name):
    _, layer, target = name.split(".")
    return int(layer), TARGETS.index(target)


# --- files


def save(folder, model, cell, label_names):
    """Write what was trained on `model` to `folder`, and its head, where it has one, whether trained or not.

    Raises InputError for a DoRA on a slice of a fused projection another slice of which has a row of zeros.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = getattr(model, "classifier", None)
    state = {} if head is None else {"classifier." + name: value for name, value in head.state_dict().items()}
    if cell.method == "lora":
        adapter, family = taken(model.base), families.find(model.base.spec.family)
        lm = cell.task == "lm"
        prefix = family.prefixes[-1] if lm else ""
        wholes, record = to_peft(adapter, model.base)
        tensors = {PREFIX + name: value for name, value in state.items()}
        for module, whole in wholes.items():
            tensors |= {f"{PREFIX}{prefix}{module}.{key}": value for key, value in whole.tensors().items()}
        rslora = is_rslora(adapter.slots.values())
        slots = {prefix + module: (len(whole.A), whole.alpha(rslora)) for module, whole in wholes.items()}
        config = peft_format.make_config(
            slots, rslora, adapter.variant == "dora", family.transposed, adapter.dropout, "CAUSAL_LM" if lm else None,
            cell.model, cell.revision, bool(state),
        )  # fmt: skip
        write_tensors(folder / TENSORS, tensors)
        files.write_json(folder / SLOTS, record)
        files.write_json(folder / CONFIG, config)
    else:
        trained = {"base." + name: p for name, p in model.base.named_parameters() if p.requires_grad}
        write_tensors(folder / TRAINED, trained | state)
    if head is not None:
        files.write_json(folder / HEAD, {"pooling": model.pooling, "label_names": list(label_names)})


def restore(folder, model, method, weight=1.0, added=()):
    """Put what `save` wrote for `method` onto `model`, a fresh one of the same base.

    weight  multiplies what the adapter changes
    added   further adapters on top: [(folder, weight)]; their heads are left aside
    """
    folder = Path(folder)
    if method == "lora":
        own = read(folder, model.base)
        put(combine([(own, weight), *((read(f, model.base), w) for f, w in added)]) if added else own, model.base)
        lora.scale(model.base, 1.0 if added else weight)
        state = {"classifier." + name: value for name, value in own.head.items()}
    elif added or weight != 1:
        raise InputError(f"method = {method!r} trained no adapter: there is nothing to scale or to stack on")
    else:
        state = read_tensors(folder / TRAINED)
    have = dict(model.named_parameters())
    wrong = [name for name, value in state.items() if name not in have or have[name].shape != value.shape]
    absent = [name for name in have if name.startswith("classifier.") and name not in state]
    if wrong or absent:
        raise InputError(f"{folder}: {(wrong + absent)[0]} is missing or does not fit the base and the labels")
    with torch.no_grad():
        for name, value in state.items():
            have[name].copy_(value)


def load(folder, base):
    """Attach the adapter in `folder` to `base`, and return its head: {"weight", "bias"}, or {} without one.

    The folder may be PEFT's own. Raises InputError, with nothing attached, for a missing file, a setting that is not
    implemented, and tensors that do not fit this base.
    """
    adapter = read(folder, base)
    put(adapter, base)
    return adapter.head


def begin(base, cell, slots):
    """Attach the adapter that a cell starts from, and return its `fingerprint`.

    Raises InputError unless it has the cell's `slots` {module: Slot}, and magnitudes just if the cell's variant has.
    """
    folder = find(cell.start)
    found = read(folder, base)
    if found.slots != slots or (found.variant == "dora") != (cell.variant == "dora"):
        differing = [
            name for name in sorted(slots | found.slots, key=_place) if slots.get(name) != found.slots.get(name)
        ]
        differing = f"{differing[0]}, and {len(differing) - 1} more" if differing else "the variant"
        raise InputError(
            f"{folder} is not the cell's adapter (they differ in {differing}): it has {flags(found)}; use these flags, "
            "or another --start"
        )
    if cell.dropout and any(part.A0 is not None for part in found.parts.values()):
        raise InputError(
            f"dropout is {cell.dropout}, but {folder} holds a part of the base, which it would drop: use 0"
        )
    put(Adapter(found.parts, cell.variant, cell.dropout), base)
    return fingerprint(folder)


def flags(adapter):
    """The flags of train.py that give an adapter's slots, or words where no flags do."""
    by_target, stable = {}, is_rslora(adapter.slots.values())
    for name, slot in adapter.slots.items():
        layer, target = _place(name)
        by_target.setdefault(TARGETS[target], {})[layer] = slot
    layers = {tuple(sorted(slots)) for slots in by_target.values()}
    if len(layers) > 1 or any(len(set(slots.values())) > 1 for slots in by_target.values()):
        return "ranks, alphas or targets that differ from layer to layer, for which there are no flags"
    texts = [f"{t}:{s.rank}:{s.alpha:g}" for t, s in ((t, next(iter(by_target[t].values()))) for t in by_target)]
    return (
        f"--targets {' '.join(texts)} --layers {ranges(layers.pop())}"
        + " --scaling rslora" * stable
        + " --variant dora" * (adapter.variant == "dora")
    )


def find(folder):
    """The adapter folder that `folder` is, or that of the run that it holds. Raises InputError."""
    for candidate in (Path(folder) / "adapter", Path(folder)):
        if (candidate / CONFIG).is_file():
            return candidate
    raise InputError(
        f"{folder} holds no LoRA adapter (there is no {CONFIG}): name a finished run or an adapter's folder"
    )


def fingerprint(folder):
    """sha256 (hexadecimal) of an adapter's files, one after the other."""
    paths = [Path(folder) / name for name in (CONFIG, TENSORS, SLOTS)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths if path.is_file())).hexdigest()


def read(folder, base):
    """The `Adapter` in `folder`, for a `base` whose weights say what a start took from them."""
    folder, spec = Path(folder), base.spec
    config = checkpoint.read_json(folder / CONFIG)
    family = families.find(spec.family)
    peft_format.check(config, folder / CONFIG, family.transposed)
    tensors = read_tensors(folder / TENSORS)
    prefix, found, head = sort_tensors(tensors, spec, config, folder)
    slots = {module: peft_format.read_slot(config, prefix + module, folder / CONFIG) for module in found}
    for module, slot in slots.items():
        if slot.rank != len(found[module]["A"]):
            raise InputError(
                f"{folder / CONFIG}: {module} has rank {slot.rank}, but its factors have rank {len(found[module]['A'])}"
            )
    adapter = split(found, slots, config, base, folder)
    if (folder / SLOTS).is_file():
        adapter = recorded(checkpoint.read_json(folder / SLOTS), found, slots, adapter, base, folder)
    adapter.dropout, adapter.head = config.get("lora_dropout") or 0.0, head
    return adapter


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
    return parallel.gathered(module.original if isinstance(module, lora.LoRALinear) else module.weight)


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
        targeted = peft_format.is_targeted(config, prefix + module, folder / CONFIG)
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
    parts, start, modules = {}, peft_format.start_of(config), modules_of(base.spec)
    for module, factors in found.items():
        A0 = B0 = None
        if start in peft_format.MOVING_STARTS:
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
        parts = {name: parts[name] for name in sorted(parts, key=_place)}
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


def write_tensors(path, tensors):
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with files.replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def read_tensors(path):
    """Every tensor of a safetensors file. Raises InputError naming it when it is missing or corrupt."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: the folder holds no finished adapter") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): fetch or train it again") from None
