"""What differs between model families, as data: how to read `config.json`, and which tensor is which.

A family is one row of `FAMILIES`: the traits of its architecture, the keys and defaults of its `config.json`, and a map
from the modules of `model.py` to those of the checkpoint. The map serves loading, PEFT's adapter format and the
coverage report, so that a target such as `q` means the same thing everywhere, also where a checkpoint fuses several
projections into one tensor. A configuration value that the model does not implement is refused by name, never ignored.

Adding a family is a row here and a row of tiny models in `tests/zoo.py`.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import InputError
from .spec import TARGETS, LayerSpec, Rope, Spec

REQUIRED = object()
LARGEST = 2**31  # of any number of a configuration
DEEPEST = 10_000  # layers

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


class Place(NamedTuple):
    """Where a projection lies in the checkpoint: the out rows `rows` (a slice or an int64 tensor) of `module`."""

    module: str
    rows: object = slice(None)


@dataclass(frozen=True)
class Layout:
    """The checkpoint's names. In `modules`, several targets before one name are the parts of a fused projection,
    in the order of its out rows."""

    embeddings: dict[str, str]  # module here -> module in the checkpoint
    layer: str  # prefix of layer {i} in the checkpoint
    modules: dict[str, str]  # modules of a layer here -> module of a layer in the checkpoint


@dataclass(frozen=True)
class Family:
    layout: Layout
    prefixes: tuple[str, ...]  # the checkpoint may hold the base bare, or under the last of these in a task model
    causal: bool = False
    norm: str = "layer"
    placement: str = "post"
    gated: bool = False
    biases: Callable = lambda take: TARGETS  # the targets that have a bias
    qk_norm: Callable = lambda take: None
    window: str | None = None  # a key of WINDOWS
    ropes: dict[str, tuple[str, float]] = field(default_factory=dict)  # full, local -> key of theta, its default
    partial: tuple[str, float] | None = None  # key and default of the part of a head that is rotated
    keys: dict[str, str] = field(default_factory=dict)  # Llama's key -> this family's
    defaults: dict[str, object] = field(default_factory=dict)  # by Llama's keys
    only: dict[str, object] = field(default_factory=dict)  # the only value of a key that is implemented
    traits: Callable = lambda take: {}  # further fields of the Spec
    inner: int | None = None  # F / D where the configuration does not say
    unembed: str = "lm_head"
    unused: str = r""  # a regular expression for the tensors, without prefix, that the base does not need
    transposed: bool = False  # projections are stored [in, out]
    by_head: bool = False  # a fused projection has head by head each part's rows, not part by part all heads'
    first_normed: bool = True  # whether attention's input is normalised in the first layer too
    peft: Layout | None = None  # transformers' own names, where they differ from the checkpoint's
    read: Callable | None = None  # of a configuration unlike Llama's

    def place(self, name, spec, layout=None):
        """The `Place` of a module in `layout` (default: the checkpoint's):
        `layers.3.q` -> encoder.layer.3.attention.self.query, whole."""
        layout = layout or self.layout
        if name == "unembedding":
            return Place(self.unembed)
        if name in layout.embeddings:
            return Place(layout.embeddings[name])
        _, index, part = name.split(".", 2)
        parts, module = next((k.split(), v) for k, v in layout.modules.items() if part in k.split())
        module = layout.layer.format(i=index) + module
        if len(parts) == 1:
            return Place(module)
        sizes = [spec.shape(target, int(index))[0] for target in parts]
        first = sum(sizes[: parts.index(part)])
        if not self.by_head:
            return Place(module, slice(first, first + spec.shape(part, int(index))[0]))
        import torch  # the rest of this module, and with it --help and the coverage report, does without

        heads = spec.layers[int(index)].heads
        rows = torch.arange(sum(sizes)).view(heads, len(parts), -1)[:, parts.index(part)]
        return Place(module, rows.reshape(-1))

    def fused(self, name, spec, layout=None):
        """The modules of the same layer that share the checkpoint's module with `name`, itself included, in order."""
        _, index, part = name.split(".", 2)
        parts = next(k.split() for k in (layout or self.layout).modules if part in k.split())
        return [f"layers.{index}.{target}" for target in parts]


class Take:
    """`take(key, kind, default)` gives a checked value of a `config.json` by Llama's name for it."""

    def __init__(self, config, family):
        self.config, self.family = config, family

    def name(self, key):
        """What the configuration calls it: some have the family's name, some Llama's."""
        own = self.family.keys.get(key, key)
        return own if self.config.get(own) is not None or self.config.get(key) is None else key

    def get(self, key):
        value = self.config.get(self.name(key))
        return self.family.defaults.get(key) if value is None else value

    def __call__(self, key, kind, default=REQUIRED, least=1):
        value = self.get(key)
        if value is None and default is not REQUIRED:
            return default
        return check(self.name(key), value, kind, least)

    def only(self, key, value):
        """Refuse any value of `key` but the one that is implemented."""
        found = self.config.get(key)
        if found not in (None, value):
            raise InputError(
                f"config.json: {key} = {found!r} is not implemented (only {value!r} is): choose another --model"
            )

    def divide(self, key, by):
        whole, part = self(key, int), self(by, int)
        if whole % part:
            raise InputError(
                f"config.json: {self.name(key)} {whole} is not a multiple of {self.name(by)} {part}: "
                "mend the checkpoint"
            )
        return whole // part


def check(name, value, kind, least=1):
    """`value`, if it is of the type `kind` and within bounds: an int is at least `least`."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise InputError(f"config.json: {name} is {value!r:.80}, but must be a {kind.__name__}: mend the checkpoint")
    if kind is int and not least <= value < LARGEST:
        raise InputError(f"config.json: {name} is {value!s:.20}, but must be at least {least} and below 2^31")
    if kind is float and not math.isfinite(value):
        raise InputError(f"config.json: {name} is {value}, but must be finite: mend the checkpoint")
    return value


def read_spec(config):
    """The `Spec` of a `config.json` (a dict). Refuses unknown families and unsupported values by name."""
    family = find(config.get("model_type"))
    take = Take(config, family)
    for key, value in family.only.items():
        take.only(key, value)
    if "quantization_config" in config:
        raise InputError("config.json: quantization_config: the weights are quantised: choose the unquantised base")
    return (family.read or read)(config["model_type"], family, take)


def find(model_type):
    """The `Family` of a config.json's model_type. Raises InputError with those that exist, and the nearest."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(f"{model_type:.80}" if isinstance(model_type, str) else "", FAMILIES, 1, 0.0)
    raise InputError(
        f"config.json: model_type {model_type!r:.80} is not a family that minilora reads "
        f"(there are: {', '.join(FAMILIES)}; the nearest is {(near or ['bert'])[0]}): choose another --model"
    )


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
    windows, local = read_windows(family, take, count)
    layers = tuple(
        LayerSpec(heads, kv_heads, inner, window, int(slides) % len(ropes) if ropes else None, normed)
        for window, slides, normed in zip(windows, local, [family.first_normed] + [True] * (count - 1), strict=True)
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
        tied=family.causal and take("tie_word_embeddings", bool, True),
    )
    return Spec(**traits | family.traits(take))


def read_ropes(family, take, head_width, positions):
    """(the family's `Rope`s, full then local, and the number of positions that they serve)."""
    ropes = []
    new = take.config.get("rope_parameters")  # transformers 5; before: rope_theta, rope_scaling, ...
    if new is not None and not isinstance(new, dict):
        raise InputError(f"config.json: rope_parameters is {new!r:.80}, but must be an object: mend the checkpoint")
    if new and len(family.ropes) > 1 and (odd := sorted(set(new) - {"full_attention", "sliding_attention"}, key=str)):
        raise InputError(f"config.json: rope_parameters: {odd[0]!r:.80} is not implemented: choose another --model")
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
            raise InputError(f"config.json: {source} is {settings!r:.80}, but must be an object: mend the checkpoint")
        rope, positions = read_rope(family, take, dict(settings), source, (key, theta), head_width, positions)
        ropes.append(rope)
    return tuple(ropes), positions


def read_rope(family, take, settings, source, theta, head_width, positions):
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
    value = take.config.get(theta[0]) if value is None else value
    value = check(theta[0], theta[1] if value is None else value, float)
    if value <= 0:
        raise InputError(f"config.json: {theta[0]} is {value}, but must be positive: mend the checkpoint")

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
                raise InputError(f"config.json: {source}: {k} is {v}, but must be positive: mend the checkpoint")
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        raise InputError(f"config.json: {source}: high_freq_factor must be above low_freq_factor: mend the checkpoint")
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
}


def read_windows(family, take, count):
    """(window of each layer or None, whether each layer is a local one)."""
    types = take.config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != count:
            raise InputError(f"config.json: layer_types must be a list of {count} names: mend the checkpoint")
        if unknown := [t for t in types if t not in ("full_attention", "sliding_attention")]:
            raise InputError(f"config.json: layer_types {unknown[0]!r:.80} is not implemented: choose another --model")
        local = [t == "sliding_attention" for t in types]
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
            raise InputError(f"config.json: {key} must be a list of {count} values: mend the checkpoint")
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
        qk_norm="head" if take("normalize_qk_projections", bool, True) else None,
        ropes=(rope,),
        attention_scale=head_width**-0.5,
        tied=take("share_input_output_layers", bool, True),
    )


# --- layouts

BERT = Layout(
    embeddings={
        "embed.tokens": "embeddings.word_embeddings",
        "embed.positions": "embeddings.position_embeddings",
        "embed.types": "embeddings.token_type_embeddings",
        "embed.norm": "embeddings.LayerNorm",
    },
    layer="encoder.layer.{i}.",
    modules={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    },
)
DISTILBERT = Layout(
    embeddings={name: module for name, module in BERT.embeddings.items() if name != "embed.types"},
    layer="transformer.layer.{i}.",
    modules={
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "mlp_norm": "output_layer_norm",
    },
)
MODERNBERT = Layout(
    embeddings={"embed.tokens": "embeddings.tok_embeddings", "embed.norm": "embeddings.norm", "norm": "final_norm"},
    layer="layers.{i}.",
    modules={
        "q k v": "attn.Wqkv",
        "o": "attn.Wo",
        "gate up": "mlp.Wi",
        "down": "mlp.Wo",
        "attention_norm": "attn_norm",
        "mlp_norm": "mlp_norm",
    },
)
NOMIC = Layout(
    embeddings={
        "embed.tokens": "embeddings.word_embeddings",
        "embed.types": "embeddings.token_type_embeddings",
        "embed.norm": "emb_ln",
    },
    layer="encoder.layers.{i}.",
    modules={
        "q k v": "attn.Wqkv",
        "o": "attn.out_proj",
        "gate": "mlp.fc12",
        "up": "mlp.fc11",
        "down": "mlp.fc2",
        "attention_norm": "norm1",
        "mlp_norm": "norm2",
    },
)
LLAMA_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NOMIC_IN_TRANSFORMERS = Layout({}, "layers.{i}.", LLAMA_MODULES)
LLAMA_EMBEDDINGS = {"embed.tokens": "embed_tokens", "norm": "norm"}
LLAMA = Layout(
    embeddings=LLAMA_EMBEDDINGS,
    layer="layers.{i}.",
    modules=LLAMA_MODULES
    | {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    },
)
GEMMA2 = Layout(
    embeddings=LLAMA_EMBEDDINGS,
    layer="layers.{i}.",
    modules=LLAMA.modules
    | {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
)
OLMO2 = Layout(
    embeddings=LLAMA_EMBEDDINGS,
    layer="layers.{i}.",
    modules=LLAMA_MODULES
    | {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    },
)
PHI = Layout(
    embeddings={"embed.tokens": "embed_tokens", "norm": "final_layernorm"},
    layer="layers.{i}.",
    modules={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.dense",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "attention_norm": "input_layernorm",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
    },
)
PHI3 = Layout(
    embeddings=LLAMA_EMBEDDINGS,
    layer="layers.{i}.",
    modules={
        "q k v": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
        "gate up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
)
GPT2 = Layout(
    embeddings={"embed.tokens": "wte", "embed.positions": "wpe", "norm": "ln_f"},
    layer="h.{i}.",
    modules={
        "q k v": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
    },
)
GPT_NEOX = Layout(
    embeddings={"embed.tokens": "embed_in", "norm": "final_layer_norm"},
    layer="layers.{i}.",
    modules={
        "q k v": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
)
OPENELM = Layout(
    embeddings={"embed.tokens": "token_embeddings", "norm": "norm"},
    layer="layers.{i}.",
    modules={
        "q k v": "attn.qkv_proj",
        "o": "attn.out_proj",
        "gate up": "ffn.proj_1",
        "down": "ffn.proj_2",
        "attention_norm": "attn_norm",
        "mlp_norm": "ffn_norm",
        "q_norm": "attn.q_norm",
        "k_norm": "attn.k_norm",
    },
)


# --- families

TASK_HEADS = r"pooler\.|cls\.|classifier\.|qa_outputs\.|score\.|lm_head\."
ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")


def _bert_traits(take):
    types = take("type_vocab_size", int, 2)
    return dict(position_offset=0, types=types, embed_norm=True, final_norm=False)


def _roberta_traits(take):
    """Positions start behind that of the padding token."""
    offset = take("pad_token_id", int, 1, least=0) + 1
    positions = take("max_position_embeddings", int) - offset
    if positions < 1:
        raise InputError(f"config.json: max_position_embeddings leaves no position after {offset} unused ones")
    return _bert_traits(take) | dict(position_offset=offset, positions=positions)


def _distilbert_traits(take):
    return dict(position_offset=0, embed_norm=True, final_norm=False)


def _modernbert_traits(take):
    return dict(norm_bias=take("norm_bias", bool, False), embed_norm=True)


def _modernbert_biases(take):
    return _attention_bias(take) + (MLP if take("mlp_bias", bool, False) else ())


def _nomic_traits(take):
    # The older configurations call a gated MLP by its activation.
    older = {"swiglu": "silu", "geglu": "gelu"}
    activation = take("hidden_act", str)
    trained = take("max_trained_positions", int, LARGEST - 1)  # beyond, rotations would depend on the batch
    return dict(
        activation=older.get(activation, activation),
        positions=min(take("max_position_embeddings", int), trained),
        types=take("type_vocab_size", int, 2),
        embed_norm=True,
        final_norm=False,
    )


def _attention_bias(take):
    return ATTENTION if take("attention_bias", bool, False) else ()


def _llama_biases(take):
    return _attention_bias(take) + (MLP if take("mlp_bias", bool, False) else ())


def _gemma_traits(take):
    """Scaled embeddings; from the second generation on also scores of their own scale, and soft-caps."""
    traits = dict(embed_scale=take("hidden_size", int) ** 0.5)
    positive = {"query_pre_attn_scalar": None, "attn_logit_softcapping": "attention_cap",
                "final_logit_softcapping": "final_cap"}  # fmt: skip
    for key, name in positive.items():
        value = take(key, float, None)
        if value is not None and value <= 0:
            raise InputError(f"config.json: {key} is {value}, but must be positive: mend the checkpoint")
        if value is not None:
            traits |= {name: value} if name else {"attention_scale": value**-0.5}
    return traits


def _gemma1_traits(take):
    # The first configurations say gelu and mean its approximation by tanh.
    activation = take.config.get("hidden_activation") or take("hidden_act", str)
    return _gemma_traits(take) | dict(activation="gelu_pytorch_tanh" if activation == "gelu" else activation)


def _phi_traits(take):
    return dict(unembed_bias=True)


def _gpt2_traits(take):
    return dict(position_offset=0)


def _neox_traits(take):
    return dict(placement="parallel" if take("use_parallel_residual", bool, True) else "pre")


BERT_LIKE = dict(
    layout=BERT,
    unused=TASK_HEADS + r"|embeddings\.position_ids$",
    traits=_bert_traits,
    defaults={"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    only={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
)  # fmt: skip
ROBERTA_LIKE = BERT_LIKE | dict(prefixes=("", "roberta."), traits=_roberta_traits)
LLAMA_LIKE = dict(
    layout=LLAMA,
    prefixes=("", "model."),
    unused=TASK_HEADS + r"|layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",
    causal=True,
    norm="rms",
    placement="pre",
    gated=True,
    biases=lambda take: (),
    ropes={"full": ("rope_theta", 10_000.0)},
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6},
)
GEMMA_LIKE = LLAMA_LIKE | dict(
    norm="rms1",
    biases=_attention_bias,
    defaults={"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6},
    only={"use_bidirectional_attention": False},
)

FAMILIES = {
    # Devlin et al. 2019 (arXiv 1810.04805); all-MiniLM and Snowflake arctic-embed xs, s, m and l.
    "bert": Family(**BERT_LIKE, prefixes=("", "bert.")),
    "roberta": Family(**ROBERTA_LIKE),  # Liu et al. 2019 (arXiv 1907.11692)
    "xlm-roberta": Family(**ROBERTA_LIKE),  # Conneau et al. 2020 (arXiv 1911.02116)
    # Sanh et al. 2019 (arXiv 1910.01108).
    "distilbert": Family(
        layout=DISTILBERT,
        prefixes=("", "distilbert."),
        unused=TASK_HEADS + r"|vocab_|pre_classifier\.|embeddings\.position_ids$",
        traits=_distilbert_traits,
        keys={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
        defaults={"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    ),
    # Warner et al. 2024 (arXiv 2412.13663).
    "modernbert": Family(
        layout=MODERNBERT,
        prefixes=("", "model."),
        unused=TASK_HEADS + r"|head\.|decoder\.",
        placement="pre",
        first_normed=False,  # the embeddings are normalised already
        gated=True,
        biases=_modernbert_biases,
        window="global_every",
        ropes={"full": ("global_rope_theta", 160_000.0), "local": ("local_rope_theta", 10_000.0)},
        traits=_modernbert_traits,
        keys={"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps"},
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "local_attention": 128},
    ),
    # Nussbaum et al. 2024 (arXiv 2402.01613); arctic-embed m-long. Older configurations have GPT-2's keys.
    "nomic_bert": Family(
        layout=NOMIC,
        peft=NOMIC_IN_TRANSFORMERS,
        prefixes=("", "bert.", "nomic_bert."),
        unused=TASK_HEADS,
        gated=True,
        biases=lambda take: (),
        ropes={"full": ("rotary_emb_base", 1000.0)},
        traits=_nomic_traits,
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "layer_norm_eps": "layer_norm_epsilon",
        },
        defaults={"layer_norm_eps": 1e-12, "hidden_act": "silu"},
        only={
            "qkv_proj_bias": False,
            "mlp_fc1_bias": False,
            "mlp_fc2_bias": False,
            "rotary_emb_fraction": 1.0,
            "causal": False,
            "prenorm": False,
            "parallel_block": False,
            "use_rms_norm": False,
            "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "num_experts": 0,
            "moe_every_n_layers": 0,
        },
    ),
    # Touvron et al. 2023 (arXiv 2307.09288), Llama 3 (arXiv 2407.21783), SmolLM2 (arXiv 2502.02737).
    "llama": Family(**LLAMA_LIKE | dict(biases=_llama_biases)),
    "mistral": Family(**LLAMA_LIKE | dict(window="all")),  # Jiang et al. 2023 (arXiv 2310.06825)
    # Yang et al. 2024 (arXiv 2407.10671).
    "qwen2": Family(**LLAMA_LIKE | dict(biases=lambda take: ("q", "k", "v"), window="late")),
    # Yang et al. 2025 (arXiv 2505.09388).
    "qwen3": Family(**LLAMA_LIKE | dict(biases=_attention_bias, window="late", qk_norm=lambda take: "head")),
    "gemma": Family(**GEMMA_LIKE | dict(traits=_gemma1_traits)),  # Gemma Team 2024 (arXiv 2403.08295)
    # Gemma Team 2024 (arXiv 2408.00118).
    "gemma2": Family(
        **GEMMA_LIKE
        | dict(
            layout=GEMMA2,
            placement="both",
            window="even",
            traits=_gemma_traits,
            keys={"hidden_act": "hidden_activation"},
        )
    ),
    # Gemma Team 2025 (arXiv 2503.19786).
    "gemma3_text": Family(
        **GEMMA_LIKE
        | dict(
            layout=GEMMA2,
            placement="both",
            window="pattern",
            qk_norm=lambda take: "head",
            ropes={"full": ("rope_theta", 1_000_000.0), "local": ("rope_local_base_freq", 10_000.0)},
            traits=_gemma_traits,
            keys={"hidden_act": "hidden_activation"},
            only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        )
    ),
    # Javaheripi et al. 2023, Phi-2: attention and MLP see the same normalised input and are added together.
    "phi": Family(
        layout=PHI,
        prefixes=("", "model."),
        unused=TASK_HEADS + r"|layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",
        causal=True,
        placement="shared",
        qk_norm=lambda take: "head" if take("qk_layernorm", bool, False) else None,
        ropes={"full": ("rope_theta", 10_000.0)},
        partial=("partial_rotary_factor", 0.5),
        traits=_phi_traits,
        only={"tie_word_embeddings": False},
        defaults={"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    # Abdin et al. 2024 (arXiv 2404.14219).
    "phi3": Family(
        **LLAMA_LIKE
        | dict(
            layout=PHI3,
            window="all",
            partial=("partial_rotary_factor", 1.0),
            defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5},
        )
    ),
    # Radford et al. 2019.
    "gpt2": Family(
        layout=GPT2,
        prefixes=("", "transformer."),
        unused=TASK_HEADS + r"|multiple_choice_head\.|h\.\d+\.attn\.(masked_)?bias$",
        causal=True,
        placement="pre",
        transposed=True,
        inner=4,
        traits=_gpt2_traits,
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "layer_norm_eps": "layer_norm_epsilon",
        },
        defaults={"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "tie_word_embeddings": True},
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
    # Black et al. 2022 (arXiv 2204.06745); Pythia (arXiv 2304.01373).
    "gpt_neox": Family(
        layout=GPT_NEOX,
        prefixes=("", "gpt_neox."),
        unused=TASK_HEADS + r"|embed_out\.|layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$",
        causal=True,
        placement="parallel",
        biases=lambda take: TARGETS if take("attention_bias", bool, True) else MLP,
        ropes={"full": ("rotary_emb_base", 10_000.0)},
        partial=("rotary_pct", 0.25),
        by_head=True,
        traits=_neox_traits,
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False},
        unembed="embed_out",
    ),
    # OLMo Team 2024 (arXiv 2501.00656).
    "olmo2": Family(
        **LLAMA_LIKE
        | dict(
            layout=OLMO2,
            placement="output",
            biases=_attention_bias,
            qk_norm=lambda take: "width",
            defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5},
        )
    ),
    # Mehta et al. 2024 (arXiv 2404.14619).
    "openelm": Family(
        layout=OPENELM,
        prefixes=("", "transformer."),
        unused=TASK_HEADS,
        causal=True,
        norm="rms",
        placement="pre",
        gated=True,
        read=read_openelm,
        only={"activation_fn_name": "swish", "normalization_layer_name": "rms_norm", "ffn_with_glu": True},
    ),
}
