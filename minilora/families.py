"""What differs between model families, as data: how to read `config.json`, and which tensor is which.

A family is one row of `FAMILIES`: a reader that turns the checkpoint's configuration into a `Spec`, and a map
from the modules of `model.py` to the modules of the checkpoint. The map serves loading, PEFT's adapter format
and the coverage report, so that a target such as `q` means the same thing everywhere. A configuration value
that the model does not implement is refused by name, never ignored.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from .errors import InputError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"), "all": TARGETS}


@dataclass(frozen=True)
class Spec:
    """The architecture of a base, in one vocabulary for all families."""

    family: str  # config.json's model_type
    vocabulary: int
    width: int  # D, features of a hidden state
    layers: int
    heads: int  # H; each is D / H wide
    inner: int  # F, features inside the MLP
    positions: int  # longest row in tokens
    types: int  # token types (segments)
    activation: str  # a key of model.ACTIVATIONS
    norm_eps: float

    @property
    def targets(self):
        """The projections that a layer of this base has, in canonical order."""
        return ("q", "k", "v", "o", "up", "down")

    def shape(self, target):
        """(out, in) features of a target's weight."""
        return {"up": (self.inner, self.width), "down": (self.width, self.inner)}.get(target, (self.width, self.width))


@dataclass(frozen=True)
class Family:
    read: Callable[[dict, Callable], Spec]
    embeddings: dict[str, str]  # module here -> module in the checkpoint
    layer: str  # prefix of layer {i} in the checkpoint
    modules: dict[str, str]  # module of a layer here -> module of a layer in the checkpoint
    prefixes: tuple[str, ...]  # the checkpoint may hold the base bare, or inside a task model
    unused: tuple[str, ...]  # beginnings of tensor names that the base does not need

    def module(self, name):
        """The checkpoint's name of a module: `layers.3.q` -> `encoder.layer.3.attention.self.query`."""
        if name in self.embeddings:
            return self.embeddings[name]
        _, index, part = name.split(".", 2)
        return self.layer.format(i=index) + self.modules[part]


def read_spec(config):
    """The `Spec` of a `config.json` (a dict). Refuses unknown families and unsupported values by name."""
    family = find(config.get("model_type"))

    def take(key, kind, default=None):
        value = config.get(key, default)
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise InputError(f"config.json: {key} is {value!r}, but must be a {kind.__name__}: mend the checkpoint")
        if kind is int and value < 1:
            raise InputError(f"config.json: {key} is {value}, but must be at least 1: mend the checkpoint")
        return value

    return family.read(config, take)


def find(model_type):
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.0)[0]
    raise InputError(
        f"config.json: model_type {model_type!r} is not a family that minilora reads "
        f"(there are: {', '.join(FAMILIES)}; the nearest is {near}): choose another --model"
    )


def refuse(config, supported):
    """Refuse the first value in `config` that differs from the only one that is implemented."""
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise InputError(
                f"config.json: {key} = {config[key]!r} is not implemented (only {value!r} is): choose another --model"
            )


def _read_bert(config, take):
    refuse(config, {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False})
    spec = Spec(
        family="bert",
        vocabulary=take("vocab_size", int),
        width=take("hidden_size", int),
        layers=take("num_hidden_layers", int),
        heads=take("num_attention_heads", int),
        inner=take("intermediate_size", int),
        positions=take("max_position_embeddings", int),
        types=take("type_vocab_size", int, 2),
        activation=take("hidden_act", str, "gelu"),
        norm_eps=take("layer_norm_eps", float, 1e-12),
    )
    if spec.width % spec.heads:
        raise InputError(
            f"config.json: hidden_size {spec.width} is not a multiple of num_attention_heads {spec.heads}: "
            "mend the checkpoint"
        )
    return spec


FAMILIES = {
    # Devlin et al. 2019 (arXiv 1810.04805); all-MiniLM and Snowflake arctic-embed xs, s, m and l.
    "bert": Family(
        read=_read_bert,
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
        prefixes=("", "bert."),
        unused=("embeddings.position_ids", "pooler.", "cls.", "classifier.", "qa_outputs.", "score."),
    ),
}
