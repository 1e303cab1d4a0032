"""What a family's `Spec` has beyond the fields that all have: functions from a `config.Take` to further fields, or to
the targets that have a bias."""

from minilora.base.config import LARGEST
from minilora.base.spec import Relative
from minilora.errors import InputError

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")


def bert(take):
    types = take("type_vocab_size", int, 2)
    return dict(position_offset=0, types=types, embed_norm=True, final_norm=False)


def roberta(take):
    """Positions start behind that of the padding token."""
    offset = take("pad_token_id", int, 1, least=0) + 1
    positions = take("max_position_embeddings", int) - offset
    if positions < 1:
        raise InputError(f"config.json: max_position_embeddings leaves no position after {offset} unused ones")
    return bert(take) | dict(position_offset=offset, positions=positions)


def deberta(take):
    """Embeddings without positions (v3), and attention that sees distances."""
    kinds, normed = take.get("pos_att_type") or [], take("norm_rel_ebd", str, "none").lower().split("|")
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or any(kind not in ("c2p", "p2c") for kind in kinds):
        raise InputError(f"config.json: pos_att_type {kinds!r:.80} is not implemented (only c2p and p2c are)")
    if odd := {name.strip() for name in normed} - {"none", "layer_norm"}:
        raise InputError(f"config.json: norm_rel_ebd {min(odd)!r:.80} is not implemented: choose another --model")
    relative, positions = None, take("max_position_embeddings", int)
    if take("relative_attention", bool, False):
        if not kinds or not take("share_att_key", bool, False):
            raise InputError("config.json: relative_attention is only implemented with pos_att_type and share_att_key")
        longest = take("max_relative_positions", int, -1, least=-LARGEST)
        longest = longest if longest > 0 else positions
        buckets = max(0, take("position_buckets", int, -1, least=-LARGEST))
        if buckets and not 4 <= buckets < 2 * (longest - 1):
            raise InputError(f"config.json: position_buckets is {buckets}, but must be from 4 to {2 * longest - 3}")
        if positions > 1 << 16:
            raise InputError(f"config.json: max_position_embeddings is {positions:,}, but must be at most 65,536")
        normed = "layer_norm" in (name.strip() for name in normed)
        relative = Relative(buckets or longest, buckets, longest, "c2p" in kinds, "p2c" in kinds, normed)
    width = take.divide("hidden_size", "num_attention_heads")
    return dict(
        position_offset=0 if take("position_biased_input", bool, True) else None,
        types=take("type_vocab_size", int, 0, least=0),
        embed_norm=True,
        final_norm=False,
        relative=relative,
        attention_scale=(width * (1 + len(set(kinds)))) ** -0.5,
    )


def nomic(take):
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


def attention_bias(take):
    return ATTENTION if take("attention_bias", bool, False) else ()


def llama_biases(take):
    return attention_bias(take) + (MLP if take("mlp_bias", bool, False) else ())


def gemma(take):
    """Scaled embeddings; from the second generation on also scores of their own scale, and soft-caps."""
    traits = dict(embed_scale=take("hidden_size", int) ** 0.5)
    positive = {"query_pre_attn_scalar": None, "attn_logit_softcapping": "attention_cap",
                "final_logit_softcapping": "final_cap"}  # fmt: skip
    for key, name in positive.items():
        value = take(key, float, None)
        if value is not None and value <= 0:
            raise InputError(f"config.json: {key} is {value}, but must be positive: fix the checkpoint")
        if value is not None:
            traits |= {name: value} if name else {"attention_scale": value**-0.5}
    return traits


def gemma1(take):
    # The first configurations say gelu and mean its approximation by tanh.
    activation = take.config.get("hidden_activation") or take("hidden_act", str)
    return gemma(take) | dict(activation="gelu_pytorch_tanh" if activation == "gelu" else activation)


def modernbert(take):
    return dict(norm_bias=take("norm_bias", bool, False), embed_norm=True)


def phi3(take):
    bias = take("lm_head_bias", bool, False)
    if bias and take("tie_word_embeddings", bool, False):
        raise InputError(
            "config.json: lm_head_bias with tie_word_embeddings is not implemented: choose another --model"
        )
    return dict(unembed_bias=bias)


def neox(take):
    return dict(placement="parallel" if take("use_parallel_residual", bool, True) else "pre")
