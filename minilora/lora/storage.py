"""Adapters on disk: save what a run trained, read what is in a folder, put it on a model."""

import hashlib
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from minilora import files
from minilora.base import families
from minilora.base.spec import TARGETS
from minilora.errors import InputError
from minilora.lora import peft_config
from minilora.lora.adapter import Adapter, adapter_of, combine, place_of, put_adapter
from minilora.lora.layer import scale_by
from minilora.lora.peft import PREFIX, is_rslora, recorded, sort_tensors, split, to_peft
from minilora.lora.peft_config import CONFIG, SLOTS, TENSORS
from minilora.lora.targets import ranges

TRAINED, HEAD = "trained.safetensors", "head.json"


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
        adapter, family = adapter_of(model.base), families.find(model.base.spec.family)
        lm = cell.task == "lm"
        prefix = family.prefixes[-1] if lm else ""
        wholes, record = to_peft(adapter, model.base)
        tensors = {PREFIX + name: value for name, value in state.items()}
        for module, whole in wholes.items():
            tensors |= {f"{PREFIX}{prefix}{module}.{key}": value for key, value in whole.tensors().items()}
        rslora = is_rslora(adapter.slots.values())
        slots = {prefix + module: (len(whole.A), whole.alpha(rslora)) for module, whole in wholes.items()}
        config = peft_config.make_config(
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
        put_adapter(combine([(own, weight), *((read(f, model.base), w) for f, w in added)]) if added else own, model.base)
        scale_by(model.base, 1.0 if added else weight)
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
    put_adapter(adapter, base)
    return adapter.head


def begin(base, cell, slots):
    """Attach the adapter that a cell starts from, and return its `fingerprint`.

    Raises InputError unless it has the cell's `slots` {module: Slot}, and magnitudes just if the cell's variant has.
    """
    folder = find(cell.start)
    found = read(folder, base)
    if found.slots != slots or (found.variant == "dora") != (cell.variant == "dora"):
        differing = [
            name for name in sorted(slots | found.slots, key=place_of) if slots.get(name) != found.slots.get(name)
        ]
        differing = f"{differing[0]}, and {len(differing) - 1} more" if differing else "the variant"
        raise InputError(
            f"{folder} is not the cell's adapter (they differ in {differing}): it has {flags_of(found)}; use these flags, "
            "or another --start"
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
    config = files.read_json(folder / CONFIG)
    family = families.find(spec.family)
    peft_config.check(config, folder / CONFIG, family.transposed)
    tensors = read_tensors(folder / TENSORS)
    prefix, found, head = sort_tensors(tensors, spec, config, folder)
    slots = {module: peft_config.read_slot(config, prefix + module, folder / CONFIG) for module in found}
    for module, slot in slots.items():
        if slot.rank != len(found[module]["A"]):
            raise InputError(
                f"{folder / CONFIG}: {module} has rank {slot.rank}, but its factors have rank {len(found[module]['A'])}"
            )
    adapter = split(found, slots, config, base, folder)
    if (folder / SLOTS).is_file():
        adapter = recorded(files.read_json(folder / SLOTS), found, slots, adapter, base, folder)
    adapter.dropout, adapter.head = config.get("lora_dropout") or 0.0, head
    return adapter


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
