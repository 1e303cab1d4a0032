"""The architecture of a base in one vocabulary for all families: what `families.py` reads and `model.py` builds.

Everything in which the families differ is a field here. Left out: tensor names (`families.py`), and what no result
depends on here (dropout of the base, initialisation, caches).
"""

from dataclasses import dataclass

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"), "all": TARGETS}


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding (Su et al. 2021, arXiv 2104.09864); see `rope.py` for the kinds."""

    theta: float
    width: int  # features of a head that are rotated, the first ones
    kind: str = "default"  # a key of config.ROPES
    settings: tuple[tuple[str, object], ...] = ()  # what that kind takes, as (name, value)


@dataclass(frozen=True)
class Relative:
    """How DeBERTa's scores depend on the tokens' distance; see `deberta.py`."""

    span: int  # half the rows of the table of distances
    buckets: int  # rows for distances that are counted by their logarithm; 0: none are
    longest: int  # the distance at which the last of them ends
    queries: bool  # whether a query meets the key of the distance (c2p)
    keys: bool  # whether a key meets the query of the distance (p2c)
    normed: bool  # whether the table is normalised


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer."""

    heads: int  # H
    kv_heads: int  # heads of k and v, each shared by H / kv_heads heads of q (Ainslie et al. 2023, arXiv 2305.13245)
    inner: int  # F, features inside the MLP
    window: int | None = None  # a token attends to those less than so many places away; None: to all
    rope: int | None = None  # which of spec.ropes; None: no rotation
    normed: bool = True  # whether attention's input is normalised (not in ModernBERT's first layer)


@dataclass(frozen=True)
class Spec:
    """The architecture of a base. `causal` ones are decoders."""

    family: str  # config.json's model_type
    vocabulary: int
    width: int  # D, features of a hidden state
    head_width: int  # E, features of a head
    layers: tuple[LayerSpec, ...]
    positions: int  # longest row in tokens
    causal: bool
    norm: str  # layer (LayerNorm), rms (RMSNorm) or rms1 (RMSNorm that multiplies by 1 + weight)
    norm_eps: float
    placement: str  # of the norms: a key of model.PLACEMENTS
    activation: str  # a key of model.ACTIVATIONS
    gated: bool  # down(act(gate x) * up x) instead of down(act(up x))
    biases: frozenset[str]  # the targets that have one
    norm_bias: bool = True  # of LayerNorms
    qk_norm: str | None = None  # of q and k before the rotation: each head's E features, or the whole width
    ropes: tuple[Rope, ...] = ()
    position_offset: int | None = None  # first used row of a table of learned positions; None: no such table
    relative: Relative | None = None
    types: int = 0  # token types (segments), of which only the first is used
    embed_norm: bool = False
    embed_scale: float = 1.0
    final_norm: bool = True
    attention_scale: float = 1.0
    attention_cap: float | None = None  # c of the soft-cap c tanh(x / c) of scores
    final_cap: float | None = None  # the same of logits
    tied: bool = False  # the unembedding is the token embedding
    unembed_bias: bool = False

    @property
    def targets(self):
        """The projections that a layer of this base has, in canonical order."""
        return TARGETS if self.gated else tuple(target for target in TARGETS if target != "gate")

    def shape(self, target, layer):
        """(out, in) features of a target's weight in layer number `layer`."""
        here = self.layers[layer]
        attended, inner = here.heads * self.head_width, here.inner
        return {
            "q": (attended, self.width),
            "k": (here.kv_heads * self.head_width, self.width),
            "v": (here.kv_heads * self.head_width, self.width),
            "o": (self.width, attended),
            "gate": (inner, self.width),
            "up": (inner, self.width),
            "down": (self.width, inner),
        }[target]
