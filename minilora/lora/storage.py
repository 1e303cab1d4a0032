"""Adapters in folders: save what a run trained, read it again, put it on a model.

A run's folder has two forms of its adapter. `factors.safetensors` has the factors bit for bit, with ranks, alphas and
scales: evaluating the run, `--start RUN` and `--add RUN` read it. `adapter/` has PEFT's format, head included, so that
`PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), "RUN/adapter")` gives the same hidden states, and for the
lm task `AutoModelForCausalLM` the same logits; `head.json` there adds what PEFT has no field for: pooling and label
names. An adapter's folder, a run's `adapter/` or one that PEFT wrote, is read as PEFT reads it. What cannot be
represented is refused or said: `peft_config.py` has the list. A run of another method has only
`adapter/trained.safetensors`.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import safetensors
import torch

from minilora import console, files
from minilora.base import families
from minilora.base.spec import TARGETS
from minilora.errors import InputError, first_words
from minilora.lora import peft_config
from minilora.lora.adapter import TENSORS as PARTS
from minilora.lora.adapter import Adapter, Part, adapter_of, check_strength, combine, place_of, put_adapter
from minilora.lora.layer import scale_by
from minilora.lora.peft import PREFIX, is_rslora, sort_tensors, split, to_peft
from minilora.lora.peft_config import CONFIG, TENSORS
from minilora.lora.targets import Slot, ranges
from minilora.lora.variants import VARIANTS

TRAINED, HEAD, FACTORS = "trained.safetensors", "head.json", "factors.safetensors"
RECORD = "minilora"  # the only key of the metadata, since the library writes several in any order


# --- write


def save_run(run, model, cell, label_names):
    """Write what was trained on `model` to a run's folder: `save` into its `adapter/`, and the factors beside it."""
    run = Path(run)
    save(run / "adapter", model, cell, label_names)
    if cell.method == "lora":
        write_factors(run, adapter_of(model.base), getattr(model, "classifier", None))


def write_factors(run, adapter, head):
    tensors = {f"{name}.{key}": value for name, part in adapter.parts.items() for key, value in part.tensors().items()}
    tensors |= {} if head is None else {f"classifier.{leaf}": value for leaf, value in head.state_dict().items()}
    record = {
        "variant": adapter.variant,
        "dropout": adapter.dropout,
        "slots": {name: vars(slot) for name, slot in adapter.slots.items()},
        "adapter": {name: files.sha256(run / "adapter" / name) for name in (CONFIG, TENSORS)},
    }
    files.write_tensors(run / FACTORS, tensors, {RECORD: json.dumps(record)})


def save(folder, model, cell, label_names):
    """Write what was trained on `model` to an adapter's folder, and its head, if it has one, trained or not.

    Raises InputError for a DoRA on a slice of a fused projection another slice of which has a row of zeros.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = getattr(model, "classifier", None)
    state = {} if head is None else {"classifier." + name: value for name, value in head.state_dict().items()}
    if cell.method == "lora":
        adapter, family = adapter_of(model.base), families.find(model.base.spec.family)
        lm = cell.task == "lm"
        prefix = family.prefixes[-1] if lm else ""
        wholes = to_peft(adapter, model.base)
        tensors = {PREFIX + name: value for name, value in state.items()}
        for module, whole in wholes.items():
            tensors |= {f"{PREFIX}{prefix}{module}.{key}": value for key, value in whole.tensors().items()}
        rslora = is_rslora(adapter.slots.values())
        slots = {prefix + module: (len(whole.A), whole.alpha(rslora)) for module, whole in wholes.items()}
        config = peft_config.make_config(
            slots, rslora, adapter.variant == "dora", family.transposed, adapter.dropout, "CAUSAL_LM" if lm else None,
            cell.model, cell.revision, bool(state),
        )  # fmt: skip
        files.write_tensors(folder / TENSORS, tensors)
        files.write_json(folder / CONFIG, config)
    else:
        trained = {"base." + name: p for name, p in model.base.named_parameters() if p.requires_grad}
        files.write_tensors(folder / TRAINED, trained | state)
    if head is not None:
        files.write_json(folder / HEAD, {"pooling": model.pooling, "label_names": list(label_names)})


# --- put on a model


def restore(folder, model, method, weight=1.0, added=()):
    """Put what was saved for `method` onto `model`, a fresh one of the same base.

    folder  a run's, or an adapter's
    weight  multiplies what the adapter changes
    added   further adapters on top: [(folder, weight)]; their heads are left out

    Raises InputError, also for a weight with which the adapter cannot be computed.
    """
    folder = Path(folder)
    if method == "lora":
        weighted = []
        for other, times in ((folder, weight), *added):
            weighted.append((read(other, model.base), times))
            check_strength(weighted[-1][0], f"{other}, {times:g} times", times)
        own = weighted[0][0]
        put_adapter(combine(weighted) if added else own, model.base)
        scale_by(model.base, 1.0 if added else weight)
        state = {"classifier." + name: value for name, value in own.head.items()}
    elif added or weight != 1:
        raise InputError(f"method = {method!r} trained no adapter: there is nothing to scale or to stack on")
    else:
        state = read_tensors((folder / "adapter" if (folder / "adapter").is_dir() else folder) / TRAINED)
    have = dict(model.named_parameters())
    wrong = [name for name, value in state.items() if name not in have or have[name].shape != value.shape]
    absent = [name for name in have if name.startswith("classifier.") and name not in state]
    if wrong or absent:
        raise InputError(f"{folder}: {(wrong + absent)[0]} is missing or does not fit the base and the labels")
    with torch.no_grad():
        for name, value in state.items():
            have[name].copy_(value)


def load(folder, base):
    """Attach the adapter in `folder`, a run's or an adapter's, to `base`; returns its head {"weight", "bias"}, or {}.

    Raises InputError, with nothing attached, for a missing file, a setting that is not implemented, and tensors that
    do not fit this base.
    """
    adapter = read(folder, base)
    put_adapter(adapter, base)
    return adapter.head


def begin(base, cell, slots):
    """Attach the adapter that a cell starts from, and return its `fingerprint`.

    Raises InputError unless it has the cell's `slots` {module: Slot}, and magnitudes exactly when the cell's variant
    has them.
    """
    folder = find(cell.start)
    found = read(folder, base)
    if found.slots != slots or (found.variant == "dora") != (cell.variant == "dora"):
        differing = [
            name for name in sorted(slots | found.slots, key=place_of) if slots.get(name) != found.slots.get(name)
        ]
        differing = f"{differing[0]}, and {len(differing) - 1} more" if differing else "the variant"
        raise InputError(
            f"{folder} is not the cell's adapter (they differ in {differing}): it has {flags_of(found)}; "
            "use these flags, or another --start"
        )
    if cell.dropout and any(part.A0 is not None for part in found.parts.values()):
        raise InputError(
            f"dropout is {cell.dropout}, but {folder} holds a part of the base, which it would drop: use 0"
        )
    put_adapter(Adapter(found.parts, cell.variant, cell.dropout), base)
    return fingerprint(folder)


def flags_of(adapter):
    """The flags of train.py that give an adapter's slots, or words where no flags do."""
    by_target, stable = {}, is_rslora(adapter.slots.values())
    for name, slot in adapter.slots.items():
        layer, target = place_of(name)
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


# --- read


def find(folder):
    """What `read` reads of a run's folder or an adapter's: the run's if it has factors, else the adapter's.

    Raises InputError where there is neither.
    """
    folder = Path(folder)
    for candidate, file in ((folder, FACTORS), (folder, CONFIG), (folder / "adapter", CONFIG)):
        if (candidate / file).is_file():
            return candidate
    raise InputError(
        f"{folder} holds no LoRA adapter (there is no {CONFIG}): name a finished run or an adapter's folder"
    )


def fingerprint(folder):
    """sha256 (hexadecimal) of the files that `read` reads, one after the other."""
    folder = find(folder)
    names = (FACTORS,) if (folder / FACTORS).is_file() else (CONFIG, TENSORS)
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def read(folder, base):
    """The `Adapter` in a run's folder or an adapter's, for a `base` whose weights say what a start took from them.

    Raises InputError for what does not fit the base, and for numbers that nothing can be computed with.
    """
    folder = find(folder)
    adapter = read_factors(folder, base.spec) if (folder / FACTORS).is_file() else read_peft(folder, base)
    check_strength(adapter, folder)
    return adapter


def read_factors(run, spec):
    """The `Adapter` that `write_factors` wrote. Raises InputError also if `adapter/` changed since."""
    path = run / FACTORS
    tensors, metadata = read_tensors(path), read_metadata(path)
    try:
        record = json.loads(metadata[RECORD])
        slots = {name: Slot(**slot) for name, slot in record["slots"].items()}
        parts = {
            name: Part(slot, *(tensors.pop(f"{name}.{key}", None) for key in PARTS)) for name, slot in slots.items()
        }
        head = {
            leaf: tensors.pop(f"classifier.{leaf}") for leaf in ("weight", "bias") if f"classifier.{leaf}" in tensors
        }
        adapter, written = Adapter(parts, record["variant"], record["dropout"], head), record["adapter"].items()
        if tensors or not parts or adapter.variant not in VARIANTS:
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError):
        raise InputError(
            f"{path} is not as a run writes it: train the run again, or name {run / 'adapter'} itself"
        ) from None
    for name, digest in written:
        file = run / "adapter" / name
        if not file.is_file() or files.sha256(file) != digest:
            raise InputError(
                f"{file} is not what the run wrote: to use it as it is now, name {run / 'adapter'}, "
                "which is read as any PEFT folder; or bring the old file back"
            )
    for name, part in parts.items():
        check_fits(name, part, spec, path)
    return adapter


def check_fits(name, part, spec, path):
    """Raise InputError unless a part has the shapes of its projection in a base."""
    _, layer, target = name.split(".")
    wanted = "none there"
    if int(layer) < len(spec.layers) and target in spec.targets:
        out_features, in_features = spec.shape(target, int(layer))
        wanted = f"A [R, {in_features}] and B [{out_features}, R]"
        if list(part.A.shape) == [part.slot.rank, in_features] and list(part.B.shape) == [out_features, part.slot.rank]:
            return
    raise InputError(
        f"{path} is not an adapter for this {spec.family} base of {len(spec.layers)} layers: {name} has A "
        f"{list(part.A.shape)} and B {list(part.B.shape)}, where the base asks for {wanted}"
    )


def read_peft(folder, base):
    """The `Adapter` in PEFT's folder, as PEFT reads it. Says what of it has no place here."""
    where, family = folder / CONFIG, families.find(base.spec.family)
    config = files.read_json(where)
    peft_config.check(config, where, family.transposed)
    prefix, found, head = sort_tensors(read_tensors(folder / TENSORS), base, config, folder)
    names = {module: prefix + module for module in found}  # in PEFT's model
    slots = {module: peft_config.read_slot(config, name, where) for module, name in names.items()}
    for module, slot in slots.items():
        if slot.rank != len(found[module]["A"]):
            raise InputError(
                f"{where}: {module} has rank {slot.rank}, but its factors have rank {len(found[module]['A'])}"
            )
    for patterns in ("rank_pattern", "alpha_pattern"):
        for key in peft_config.unmatched(config, patterns, names.values(), where):
            console.say(f"adapter    {folder}: {patterns} has {key!r:.80}, which matches none of its modules")
    adapter = split(found, slots, config, base, folder)
    adapter.dropout, adapter.head = config.get("lora_dropout") or 0.0, head
    return adapter


# --- safetensors


def read_tensors(path):
    """Every tensor of a safetensors file. Raises InputError naming it when it is missing or corrupt."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_metadata(path):
    with opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def opened(path):
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: the folder holds no finished adapter") from None
    except (OSError, safetensors.SafetensorError) as error:
        reason = first_words(error)
        raise InputError(f"{path} is not a whole safetensors file ({reason}): fetch or train it again") from None
