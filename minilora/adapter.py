"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, head included.

`PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), FOLDER)` gives the same hidden states. The head is stored
as PEFT stores a saved module called `classifier`; `head.json` adds what PEFT has no field for (pooling, label names).
A run of another method stores what it trained in `trained.safetensors`. What cannot be represented is refused.
"""

import math
import re
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from . import checkpoint, families, files, lora
from .coverage import SCALES, Slot
from .errors import InputError

CONFIG, TENSORS, TRAINED, HEAD = "adapter_config.json", "adapter_model.safetensors", "trained.safetensors", "head.json"
PREFIX = "base_model.model."
# PEFT's settings that change what an adapter computes, with the only value implemented here.
SUPPORTED = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "lora_bias": False,
    "use_qalora": False, "trainable_token_indices": None, "target_parameters": None, "layer_replication": None,
    "exclude_modules": None, "alora_invocation_tokens": None, "arrow_config": None,
}  # fmt: skip

PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # the other starts move the base's weights


def save(folder, model, cell, label_names):
    """Write what was trained on `model` (a `head.Classifier`) to `folder`, and the head whether trained or not."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = {"classifier." + name: value for name, value in model.classifier.state_dict().items()}
    if cell.method == "lora":
        layers = lora.named_layers(model.base)
        module = families.find(model.base.spec.family).module
        tensors = {PREFIX + name: value for name, value in head.items()}
        for name, layer in layers:
            tensors[f"{PREFIX}{module(name)}.lora_A.weight"] = layer.A
            tensors[f"{PREFIX}{module(name)}.lora_B.weight"] = layer.B
        write_tensors(folder / TENSORS, tensors)
        slots = {module(name): layer.slot for name, layer in layers}
        files.write_json(folder / CONFIG, peft_config(slots, cell))
    else:
        trained = {"base." + name: p for name, p in model.base.named_parameters() if p.requires_grad}
        write_tensors(folder / TRAINED, trained | head)
    files.write_json(folder / HEAD, {"pooling": model.pooling, "label_names": list(label_names)})


def peft_config(slots, cell):
    """PEFT's `LoraConfig` of {module name in the checkpoint: Slot}; exact names, so that it can match no more."""
    rslora = cell.scaling == "rslora"
    first = next(iter(slots.values()))
    # PEFT matches a pattern's key as a regular expression at the end of a module's name.
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": cell.model,
        "revision": cell.revision,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": cell.dropout,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(slots),
        "rank_pattern": {re.escape(n): s.rank for n, s in slots.items() if s.rank != first.rank},
        "alpha_pattern": {re.escape(n): s.alpha for n, s in slots.items() if s.alpha != first.alpha},
        "modules_to_save": ["classifier"],
    }


def load(folder, base):
    """Attach the LoRA adapter in `folder` to `base`, and return its head: {"weight", "bias"}, or {} without one.

    The folder may be PEFT's own. Raises InputError, with nothing attached, for a missing file, a setting that is not
    implemented, and tensors that do not fit this base.
    """
    slots, factors, head, dropout = read(Path(folder), base.spec)
    lora.attach(base, slots, dropout)
    with torch.no_grad():
        for name, layer in lora.named_layers(base):
            layer.A.copy_(factors[name]["A"])
            layer.B.copy_(factors[name]["B"])
    return head


def read(folder, spec):
    """The adapter in `folder`, for a base of this `spec`, as (slots, factors, head, dropout).

    `slots` {module: Slot} and `factors` {module: {"A" [R, in], "B" [out, R]}} go by the modules of model.py.
    """
    config = checkpoint.read_json(folder / CONFIG)
    for key, value in SUPPORTED.items():
        if config.get(key, value) not in (value, {} if value is None else value):
            raise InputError(f"{folder / CONFIG}: {key} = {config[key]!r} is not implemented (only {value!r} is)")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        raise InputError(
            f"{folder / CONFIG}: init_lora_weights = {config['init_lora_weights']!r} changes the base as well: "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    family = families.find(spec.family)
    modules = [f"layers.{layer}.{target}" for layer in range(spec.layers) for target in spec.targets]
    ours = {family.module(module): module for module in modules}
    factors, head, unknown = {}, {}, []
    for key, value in read_tensors(folder / TENSORS).items():
        name = key.removeprefix(PREFIX)
        name = next((name.removeprefix(p) for p in family.prefixes if p and name.startswith(p)), name)
        module, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        if module in ours and factor in ("A", "B"):
            factors.setdefault(ours[module], {})[factor] = value.float()
        elif name in ("classifier.weight", "classifier.bias"):
            head[name.removeprefix("classifier.")] = value.float()
        else:
            unknown.append(key)
    if unknown or not factors:
        raise InputError(
            f"{folder / TENSORS}: {len(unknown)} tensors have no place in a {spec.family} base with "
            f"{spec.layers} layers (first: {(unknown or ['none is a LoRA factor'])[0]}): it is of another base"
        )
    slots = {module: read_slot(folder, config, module, pair, spec) for module, pair in factors.items()}
    return slots, factors, head, config.get("lora_dropout", 0.0)


def read_slot(folder, config, module, pair, spec):
    """The Slot of one module's factors. Raises InputError where they fit neither the base nor the configuration."""
    name = families.find(spec.family).module(module)
    out_features, in_features = spec.shape(module.rpartition(".")[2])
    A, B = pair.get("A"), pair.get("B")
    if A is None or B is None or A.ndim != 2 or A.shape[1] != in_features or B.shape != (out_features, len(A)):
        found = {factor: list(value.shape) for factor, value in pair.items()}
        raise InputError(
            f"{folder / TENSORS}: factors of {name} have shapes {found}, but the base asks for "
            f"A [R, {in_features}] and B [{out_features}, R]: it is of another base"
        )
    rank = matching(config.get("rank_pattern"), name, config.get("r"), folder)
    alpha = matching(config.get("alpha_pattern"), name, config.get("lora_alpha"), folder)
    if rank != len(A):
        raise InputError(f"{folder / CONFIG}: {name} has rank {rank}, but its factors have rank {len(A)}")
    scaling = "rslora" if config.get("use_rslora") else "constant"
    return Slot(rank, float(alpha), SCALES[scaling](alpha, rank))


def matching(pattern, module, default, folder):
    """PEFT's rule: the value of the first key that matches the end of the module's name, as a regular expression."""
    try:
        found = [value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module)]
    except (re.error, AttributeError, TypeError):
        raise InputError(f"{folder / CONFIG}: {pattern!r} does not map patterns of module names to numbers") from None
    value = found[0] if found else default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(f"{folder / CONFIG}: the rank or alpha of {module} is {value!r}, but must be a number")
    return value


def restore(folder, model, method):
    """Put what `save` wrote for `method` onto `model`, a fresh `head.Classifier` of the same base."""
    folder = Path(folder)
    if method == "lora":
        head = load(folder, model.base)
        state = {"classifier." + name: value for name, value in head.items()}
    else:
        state = read_tensors(folder / TRAINED)
    have = dict(model.named_parameters())
    wrong = [name for name, value in state.items() if name not in have or have[name].shape != value.shape]
    absent = [name for name in ("classifier.weight", "classifier.bias") if name not in state]
    if wrong or absent:
        raise InputError(f"{folder}: {(wrong + absent)[0]} is missing or does not fit the base and the labels")
    with torch.no_grad():
        for name, value in state.items():
            have[name].copy_(value)


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
