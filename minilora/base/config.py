"""From a `config.json` to a `Spec`: value by value, each checked, and refused by name where it is not implemented.

The published files name the same thing in many ways (transformers changed its words with version 5); here is what they
have in common, by Llama's names. Which names, defaults and traits a family has is in `families.py`.
"""

import math

from minilora.base.names import PHI3
from minilora.base.spec import LayerSpec, Rope, Spec
from minilora.errors import InputError, shown

REQUIRED = object()
LARGEST = 2**31  # of any number of a configuration
DEEPEST = 10_000  # layers
# Other names that Hugging Face's configurations have for an activation of `kernels/mlp.py`.
ACTIVATIONS = {"gelu_python": "gelu", "swish": "silu", "gelu_python_tanh": "gelu_pytorch_tanh",
               "gelu_accurate": "gelu_pytorch_tanh"}  # fmt: skip
# The settings that each kind of rotary embedding takes, with their defaults.
ROPES = {
    "default": {},
    "linear": {"factor": REQUIRED},
    "dynamic": {"factor": REQUIRED, "original_max_position_embeddings": None},
    "llama3": {
        "factor": REQUIRED, "low_freq_factor": REQUIRED, "high_freq_factor": REQUIRED,
        "original_max_position_embeddings": REQUIRED,
    },
    "yarn": {
        "factor": REQUIRED, "original_max_position_embeddings": None, "attention_factor": None, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": None, "mscale_all_dim": None, "truncate": True,
    },
    "longrope": {
        "short_factor": REQUIRED, "long_factor": REQUIRED, "factor": None, "original_max_position_embeddings": None,
        "attention_factor": None,
    },
}  # fmt: skip


class Take:
    """`take(key, kind, default)` gives a checked value of a `config.json` by Llama's name for it."""

    def __init__(self, config, family):
        self.config, self.family = config, family

    def name(self, key):
        """What the configuration calls it: some have the family's name, some Llama's."""
        own = self.family.keys.get(key, key)
        return own if self.config.get(own) is not None or self.config.get(key) is None else key

    def has(self, key):
        """Whether the file has the key, be it null."""
        return key in self.config or self.family.keys.get(key, key) in self.config

    def get(self, key):
        """The value; null is as if left out, but for keys whose null has a meaning of its own (`Family.absent`)."""
        value = self.config.get(self.name(key))
        if value is None and not self.has(key):
            value = self.family.absent.get(key)
        return self.family.defaults.get(key) if value is None else value

    def __call__(self, key, kind, default=REQUIRED, least=1):
        value = self.get(key)
        if value is None and default is not REQUIRED:
            return default
        return check(self.name(key), value, kind, least)

    def theta(self, key):
        """The value of a rotation's base, under this key or ModernBERT's other name for it; None without."""
        other = {"local_rope_theta": "local_attention_rope_theta"}.get(key, key)
        values = [self.config[k] for k in (key, other) if self.config.get(k) is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise InputError(f"config.json: {key} is {values[0]!r:.80}, but {other} is {values[1]!r:.80}: correct one")
        return values[0] if values else None

    def only(self, key, value):
        """Refuse any value of `key` but the one that is implemented."""
        found = self.config.get(key)
        if found not in (None, value):
            raise InputError(
                f"config.json: {key} = {shown(found)} is not implemented (only {value!r} is): choose another --model"
            )

    def divide(self, key, by):
        whole, part = self(key, int), self(by, int)
        if whole % part:
            raise InputError(
                f"config.json: {self.name(key)} {whole} is not a multiple of {self.name(by)} {part}: fix the checkpoint"
            )
        return whole // part


def check(name, value, kind, least=1):
    """`value`, if it is of the type `kind` and within bounds: an int is at least `least`."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise InputError(f"config.json: {name} is {value!r:.80}, but must be a {kind.__name__}: fix the checkpoint")
    if kind is int and not least <= value < LARGEST:
        raise InputError(f"config.json: {name} is {value!s:.20}, but must be at least {least} and below 2^31")
    if kind is float and not math.isfinite(value):
        raise InputError(f"config.json: {name} is {value}, but must be finite: fix the checkpoint")
    return value


def read(name, family, take):
    """The `Spec` of a configuration with Llama's keys, or the family's names for them."""
    width, count, heads = (take(k, int) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if count > DEEPEST:
        raise InputError(f"config.json: {take.name('num_hidden_layers')} is {count:,}, but must be at most {DEEPEST:,}")
    head_width = take("head_dim", int, None) or take.divide("hidden_size", "num_attention_heads")
    kv_heads = take("num_key_value_heads", int, heads)
    if heads % kv_heads:
        take.divide("num_attention_heads", "num_key_value_heads")
    inner = take("intermediate_size", int, REQUIRED if family.inner is None else family.inner * width)
    positions = take("max_position_embeddings", int)
    ropes, positions = read_ropes(family, take, head_width, positions)
    turned = read_turned(family, take, count)
    windows, local = read_windows(family, take, count, turned)
    normed = [family.first_normed] + [True] * (count - 1)
    layers = tuple(
        LayerSpec(heads, kv_heads, inner, window, int(slides) % len(ropes) if ropes and turns else None, norms)
        for window, slides, turns, norms in zip(windows, local, turned, normed, strict=True)
    )
    traits = dict(
        family=name,
        vocabulary=take("vocab_size", int),
        width=width,
        head_width=head_width,
        layers=layers,
        positions=positions,
        causal=family.causal,
        norm=family.norm,
        norm_eps=take("layer_norm_eps" if family.norm == "layer" else "rms_norm_eps", float),
        placement=family.placement,
        activation=take("hidden_act", str),
        gated=family.gated,
        biases=frozenset(family.biases(take)),
        qk_norm=family.qk_norm(take),
        ropes=ropes,
        attention_scale=head_width**-0.5,
        tied=family.causal and take("tie_word_embeddings", bool, False),
    )
    traits |= family.traits(take)
    traits["activation"] = ACTIVATIONS.get(traits["activation"], traits["activation"])
    return Spec(**traits)


def read_ropes(family, take, head_width, positions):
    """(the family's `Rope`s, full then local, and the number of positions that they serve)."""
    ropes = []
    new = take.config.get("rope_parameters")  # transformers 5; before: rope_theta, rope_scaling, ...
    if new is not None and not isinstance(new, dict):
        raise InputError(f"config.json: rope_parameters is {new!r:.80}, but must be an object: fix the checkpoint")
    if new and len(family.ropes) > 1:  # a section for each kind of layer; published files have leftovers beside them
        kinds = {"full_attention", "sliding_attention"}
        beside = {key: value for key, value in new.items() if value is not None and key not in kinds}
        if odd := sorted(beside.keys() - {"rope_type", "type"}, key=str) or set(beside.values()) - {"default"}:
            raise InputError(
                f"config.json: rope_parameters: {min(odd, key=str)!r:.80} is not implemented: choose another --model"
            )
    for kind, (key, theta) in family.ropes.items():
        named = {"full": "full_attention", "local": "sliding_attention"}[kind]
        if new is not None:
            settings = new.get(named) if named in new or len(family.ropes) > 1 else new
            source = "rope_parameters"
        else:
            settings = take.config.get("rope_scaling") if kind == "full" or family.norm == "layer" else None
            source = "rope_scaling"
        settings = {} if settings is None else settings
        if not isinstance(settings, dict):
            raise InputError(f"config.json: {source} is {settings!r:.80}, but must be an object: fix the checkpoint")
        rope, positions = read_rope(family, take, dict(settings), source, (key, theta), head_width, positions)
        ropes.append(rope)
    return tuple(ropes), positions


def read_rope(family, take, settings, source, theta, head_width, positions):
    """(one `Rope` from a section of config.json, the number of positions that it serves)."""
    settings = {key: value for key, value in settings.items() if value is not None}
    older = settings.pop("type", None)
    kind = settings.pop("rope_type", None) or older or "default"
    if family.layout is PHI3 and kind in ("su", "yarn"):  # names that Phi-3 had for it
        kind = "longrope"
    if not isinstance(kind, str) or kind not in ROPES:
        raise InputError(
            f"config.json: {source} of type {kind!r:.80} is not implemented (there are: {', '.join(ROPES)}): "
            "choose another --model"
        )
    key, default = family.partial or ("partial_rotary_factor", 1.0)
    part = settings.pop("partial_rotary_factor", None)
    part = check(key, next(v for v in (part, take.config.get(key), default) if v is not None), float)
    if not 0 < part <= 1 or (family.partial is None and part != 1):
        raise InputError(f"config.json: {key} = {part} is not implemented for this family: choose another --model")
    width = int(head_width * part)
    if width < 2 or width % 2:
        raise InputError(f"config.json: {width} features of each head are to be rotated, but this must be even")
    value = settings.pop("rope_theta", None)
    value = take.theta(theta[0]) if value is None else value
    value = check(theta[0], theta[1] if value is None else value, float)
    if value <= 0:
        raise InputError(f"config.json: {theta[0]} is {value}, but must be positive: fix the checkpoint")

    allowed = ROPES[kind]
    original = settings.get("original_max_position_embeddings") or take.config.get("original_max_position_embeddings")
    if kind != "default" and original is not None:
        settings["original_max_position_embeddings"] = original
    if kind == "default":
        settings.pop("original_max_position_embeddings", None)
    unknown = sorted(set(settings) - set(allowed), key=str)
    missing = [k for k, v in allowed.items() if v is REQUIRED and settings.get(k) is None]
    if kind == "linear":
        unknown = [k for k in unknown if k != "original_max_position_embeddings"]
    if unknown or missing:
        what = f"{unknown[0]!r:.80} is not implemented" if unknown else f"lacks {missing[0]}"
        raise InputError(f"config.json: {source} of type {kind}: {what}: choose another --model")
    given = {k: allowed[k] if settings.get(k) is None else settings[k] for k in allowed}
    if "original_max_position_embeddings" in given:
        original = given.pop("original_max_position_embeddings")
        original = check("original_max_position_embeddings", positions if original is None else original, int, least=2)
        given["original"] = original
    if kind == "longrope" and given["factor"] is None:
        given["factor"] = positions / original
    for k, v in given.items():
        if k in ("short_factor", "long_factor"):
            if not isinstance(v, list) or len(v) != width // 2:
                raise InputError(f"config.json: {source}: {k} must be a list of {width // 2} numbers")
            given[k] = tuple(check(f"{source}: {k}", x, float) for x in v)
            if min(given[k]) <= 0:
                raise InputError(f"config.json: {source}: {k} holds {min(given[k])}, but must be positive")
        elif k not in ("original", "truncate") and v is not None:
            given[k] = check(f"{source}: {k}", v, float)
            if given[k] <= 0:
                raise InputError(f"config.json: {source}: {k} is {v}, but must be positive: fix the checkpoint")
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        raise InputError(f"config.json: {source}: high_freq_factor must be above low_freq_factor: fix the checkpoint")
    if kind == "dynamic":
        positions = min(positions, original)
    if kind in ("default", "dynamic"):
        given = {}
    return Rope(value, width, kind, tuple(given.items())), positions


# Which layers slide, from (take, layer).
WINDOWS = {
    "all": lambda take, i: True,  # Mistral
    "late": lambda take, i: (  # Qwen
        take("use_sliding_window", bool, False) and i >= take("max_window_layers", int, 28, least=0)
    ),
    "even": lambda take, i: i % 2 == 0,  # Gemma 2
    "pattern": lambda take, i: (i + 1) % take("sliding_window_pattern", int, 6) != 0,  # Gemma 3
    "global_every": lambda take, i: i % take("global_attn_every_n_layers", int, 3) != 0,  # ModernBERT
    "every_4": lambda take, i: (i + 1) % 4 != 0,  # OLMo 3
}


def read_turned(family, take, count):
    """Whether the queries and keys of each layer are rotated: in SmolLM3 not in every layer."""
    if not family.skips_ropes:
        return [True] * count
    listed = take.config.get("no_rope_layers")  # in spite of its name: 1 where a layer has a rotation
    if listed is None:
        every = take("no_rope_layer_interval", int, 4)
        return [(i + 1) % every != 0 for i in range(count)]
    if not isinstance(listed, list) or len(listed) != count or any(value not in (0, 1) for value in listed):
        raise InputError(f"config.json: no_rope_layers must be a list of {count} times 0 or 1: correct it")
    return [bool(value) for value in listed]


def read_windows(family, take, count, turned):
    """(window of each layer or None, whether each layer is a local one)."""
    types = take.config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != count:
            raise InputError(f"config.json: layer_types must be a list of {count} names: fix the checkpoint")
        if unknown := [t for t in types if t not in ("full_attention", "sliding_attention")]:
            raise InputError(f"config.json: layer_types {unknown[0]!r:.80} is not implemented: choose another --model")
        local = [t == "sliding_attention" for t in types]
    elif family.window == "unturned":  # SmolLM3
        used = take("use_sliding_window", bool, False) and take.get("sliding_window") is not None
        local = [used and not turns for turns in turned]
    else:
        local = [bool(family.window) and WINDOWS[family.window](take, i) for i in range(count)]
    if family.window in (None, "all") and any(value is not bool(family.window) for value in local):
        raise InputError("config.json: layer_types is not implemented for this family: choose another --model")
    if not any(local):
        return [None] * count, local
    if family.window == "global_every":  # so many places in all, to both sides
        size = take("local_attention", int) // 2 + 1
    else:
        size = take("sliding_window", int, None)
    if family.window == "late" and not take("use_sliding_window", bool, False):
        size = None
    return [size if slides else None for slides in local], local


def read_openelm(name, family, take):
    """OpenELM (Mehta et al. 2024, arXiv 2404.14619, section 2.1): heads and inner widths differ from layer to layer."""
    count, width, head_width = (take(k, int) for k in ("num_transformer_layers", "model_dim", "head_dim"))

    def each(key):
        values = take.config.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise InputError(f"config.json: {key} must be a list of {count} values: fix the checkpoint")
        return values

    heads, kv_heads = ([check(k, v, int) for v in each(k)] for k in ("num_query_heads", "num_kv_heads"))
    if wrong := [(h, kv) for h, kv in zip(heads, kv_heads) if h % kv]:
        raise InputError(f"config.json: num_query_heads {wrong[0][0]} is not a multiple of num_kv_heads {wrong[0][1]}")
    multipliers = [check("ffn_multipliers", v, float) for v in each("ffn_multipliers")]
    divisor = take("ffn_dim_divisor", int, 256)
    # Rounded to the nearest multiple of the divisor, but never down by more than a tenth.
    inner = []
    for multiplier in multipliers:
        exact = multiplier * width
        if not 0 < exact < LARGEST:
            raise InputError(f"config.json: ffn_multipliers holds {multiplier}, but must be positive and not as large")
        rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
        inner.append(rounded + divisor if rounded < 0.9 * exact else rounded)
    positions = take("max_context_length", int)
    rope, positions = read_rope(family, take, {}, "rope", ("rope_freq_constant", 10_000.0), head_width, positions)
    return Spec(
        family=name,
        vocabulary=take("vocab_size", int),
        width=width,
        head_width=head_width,
        layers=tuple(LayerSpec(h, kv, i, None, 0) for h, kv, i in zip(heads, kv_heads, inner)),
        positions=min(positions, take("rope_max_length", int, positions)),
        causal=True,
        norm="rms",
        norm_eps=1e-6,
        placement="pre",
        activation="silu",  # called swish there; `only` refuses others
        gated=True,
        biases=frozenset(),
        qk_norm="head" if take("normalize_qk_projections", bool, False) else None,
        ropes=(rope,),
        attention_scale=head_width**-0.5,
        tied=take("share_input_output_layers", bool, False),
    )
