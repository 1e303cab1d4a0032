"""What PEFT's `adapter_config.json` says, and whether it can be represented here.

Every field of PEFT's LoraConfig is in one of three tables: it is followed (`FOLLOWED`), it changes nothing that the
adapter computes (`INERT`), or every value except PEFT's default is refused by name (`REFUSED`). A field that is in none
of them, as a newer PEFT may have, is refused unless it is empty. Tensors are in `peft.py`.
"""

import re

from minilora.errors import InputError
from minilora.lora.targets import LARGEST, SCALES, Slot

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FOLLOWED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "init_lora_weights",
}  # fmt: skip
# Who made it and how it was trained; settings of starts and variants that `init_lora_weights` or a field below names;
# and the tying of embeddings, which no adapter here trains.
INERT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
REFUSED = {
    "peft_type": "LORA", "bias": "none", "lora_bias": False, "use_qalora": False, "megatron_config": None,
    "trainable_token_indices": None, "target_parameters": None, "layer_replication": None, "use_bdlora": None,
    "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None, "monteclora_config": None,
}  # fmt: skip
EMPTY = (None, False, "", [], {})
# Values of init_lora_weights: those that leave the base as it is, those that subtract a part from the base that can be
# computed again, and why the others are refused.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
MOVING_STARTS = ("pissa", "olora")
OTHER_STARTS = {
    "pissa_niter_": "it subtracted an approximate part from the base, of a random start that is not in the file",
    "corda": "it subtracted a part from the base that depends on data",
    "lora_ga": "it subtracted a part from the base that depends on a gradient",
    "loftq": "it was trained on a quantised base",
}
HEADS = ("classifier", "score")  # PEFT names both for sequence classification, though a model has only one


def check(config, where, transposed):
    """Raise InputError, naming the field of the file `where`, for what cannot be represented here."""
    for key, value in config.items():
        default = REFUSED.get(key)
        if key not in FOLLOWED | INERT and value != default and value not in EMPTY:
            known = f"only {default!r} is" if key in REFUSED else "minilora does not know it"
            raise InputError(f"{where}: {key} = {value!r:.80} is not implemented ({known})")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type is {config.get('peft_type')!r:.80}, but must be 'LORA'")
    if config.get("fan_in_fan_out") and not transposed:
        raise InputError(f"{where}: fan_in_fan_out is true, but this family's weights are not stored so: make it false")
    start = start_of(config)
    if start not in PLAIN_STARTS + MOVING_STARTS:
        known = [reason for name, reason in OTHER_STARTS.items() if str(start).startswith(name)]
        raise InputError(
            f"{where}: init_lora_weights = {start!r:.80}: {(known or ['minilora does not know it'])[0]}: convert the "
            "adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if start == "olora" and transposed:
        raise InputError(
            f"{where}: init_lora_weights = 'olora' on transposed weights (PEFT subtracts the transpose of the start): "
            "convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key in ("r", "lora_alpha"):
        check_number(config.get(key), key, where)
    dropout = config.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise InputError(f"{where}: lora_dropout is {dropout!r:.80}, but must be at least 0 and below 1")
    if config.get("target_modules") is None:
        raise InputError(f"{where}: target_modules is not given: name the modules that carry the adapter")
    if isinstance(config["target_modules"], str) and not (
        config.get("layers_to_transform") is None and not config.get("layers_pattern")
    ):
        raise InputError(f"{where}: layers_to_transform and layers_pattern need a list of target_modules")
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        raise InputError(f"{where}: layers_pattern needs layers_to_transform")


def start_of(config):
    start = config.get("init_lora_weights")
    return start.lower() if isinstance(start, str) else start


def as_list(value, key, where):
    """A list of strings, one or many or None in the file."""
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise InputError(f"{where}: {key} is {value!r:.80}, but must be a list of strings")
    return values


def is_targeted(config, module, where):
    """Whether PEFT puts an adapter on the linear map named `module` in its model: `check_target_module_exists`."""
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    try:
        if isinstance(excluded, str) and excluded:
            if re.fullmatch(excluded, module):
                return False
        elif named(as_list(excluded, "exclude_modules", where), module):
            return False
        if isinstance(targets, str):
            return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
        if module in as_list(targets, "target_modules", where):
            return True
        layers = config.get("layers_to_transform")
        if not named(targets, module) or layers is None or layers == []:
            return named(targets, module)
        patterns = as_list(config.get("layers_pattern") or None, "layers_pattern", where)
        starts = [rf"(?:^|.*?\.){pattern}\." for pattern in patterns] or [r".*?\.[^.]*\."]
        found = next(filter(None, (re.match(rf"{start}(?P<layer>\d+)\.", module) for start in starts)), None)
    except re.error as error:
        raise InputError(f"{where}: a pattern of modules is no regular expression ({error})") from None
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise InputError(f"{where}: layers_to_transform is {layers!r:.80}, but must be layer numbers")
    return found is not None and int(found["layer"]) in layers


def named(names, module):
    return any(module == name or module.endswith("." + name) for name in names)


def read_slot(config, module, where):
    """The Slot of the linear map named `module` in PEFT's model."""
    rank = matching(config, "rank_pattern", "r", module, where)
    alpha = matching(config, "alpha_pattern", "lora_alpha", module, where)
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"{where}: the rank of {module} is {rank!r:.80}, but must be a whole number above 0")
    return Slot(rank, float(alpha), SCALES["rslora" if config.get("use_rslora") else "constant"](alpha, rank))


def matching(config, patterns, default, module, where):
    """PEFT's rule: the value of the first key that matches the end of the module's name, as a regular expression."""
    found = [value for key, value in table_of(config, patterns, where) if matches(key, module, patterns, where)]
    return check_number(found[0], f"{patterns} of {module}", where) if found else config[default]


def unmatched(config, patterns, modules, where):
    """The keys of a table of patterns that match none of `modules`."""
    keys = [key for key, _ in table_of(config, patterns, where)]
    return [key for key in keys if not any(matches(key, module, patterns, where) for module in modules)]


def table_of(config, patterns, where):
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise InputError(f"{where}: {patterns} does not map patterns of module names to numbers")
    return table.items()


def matches(key, module, patterns, where):
    try:
        return re.fullmatch(rf"(.*\.)?({key})", module)
    except re.error as error:
        raise InputError(f"{where}: {patterns} has {key!r:.80}, which is no regular expression ({error})") from None


def check_number(value, name, where):
    """`value`, a number from 0 to `LARGEST`, which infinity and NaN are not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST:
        raise InputError(f"{where}: {name} is {value!r:.80}, but must be a number from 0 to {LARGEST:.0e}")
    return value


def make_config(slots, rslora, dora, transposed, dropout, task_type, model, revision, head):
    """PEFT's LoraConfig of {module name: (rank, alpha)}; exact names, so that it can match no more."""
    (first_rank, first_alpha), *_ = slots.values()
    # PEFT matches a pattern's key as a regular expression at the end of a module's name.
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": model,
        "revision": revision,
        "inference_mode": True,
        "r": first_rank,
        "lora_alpha": first_alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": list(slots),
        "rank_pattern": {re.escape(name): rank for name, (rank, _) in slots.items() if rank != first_rank},
        "alpha_pattern": {re.escape(name): alpha for name, (_, alpha) in slots.items() if alpha != first_alpha},
        "modules_to_save": ["classifier"] if head else None,
    }
