"""What differs between model families, as data: how to read `config.json`, and which tensor is which.

A family is one row of `FAMILIES`: the traits of its architecture, the keys and defaults of its `config.json`
(`config.py` reads it), and a map from the modules of `model.py` to those of the checkpoint (`layouts.py`). The map
serves loading, PEFT's adapter format and the coverage report, so that a target such as `q` means the same thing
everywhere, also where a checkpoint fuses several projections into one tensor.

Adding a family is a row here, a layout, and a row of tiny models in `tests/zoo.py`.
"""

import difflib

from minilora.base import names, traits
from minilora.base.config import Take, read, read_openelm
from minilora.base.family import Family
from minilora.base.spec import TARGETS
from minilora.errors import InputError

TASK_HEADS = r"pooler\.|cls\.|classifier\.|qa_outputs\.|score\.|lm_head\."

BERT_LIKE = dict(
    layout=names.BERT,
    unused=TASK_HEADS + r"|embeddings\.position_ids$",
    traits=traits.bert,
    defaults={"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    only={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
)  # fmt: skip
ROBERTA_LIKE = BERT_LIKE | dict(prefixes=("", "roberta."), traits=traits.roberta)
LLAMA_LIKE = dict(
    layout=names.LLAMA,
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
    biases=traits.attention_bias,
    defaults={"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6},
    absent={"head_dim": 256},
    only={"use_bidirectional_attention": False},
)
GEMMA2_ABSENT = {"head_dim": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
GEMMA3_PREFIXES = ("", "language_model.model.", "model.language_model.", "model.")  # also inside the one with vision
FAMILIES = {
    # Devlin et al. 2019 (arXiv 1810.04805); all-MiniLM and Snowflake arctic-embed xs, s, m and l.
    "bert": Family(**BERT_LIKE, prefixes=("", "bert.")),
    "roberta": Family(**ROBERTA_LIKE),  # Liu et al. 2019 (arXiv 1907.11692)
    "xlm-roberta": Family(**ROBERTA_LIKE),  # Conneau et al. 2020 (arXiv 1911.02116)
    # Sanh et al. 2019 (arXiv 1910.01108).
    "distilbert": Family(
        layout=names.DISTILBERT,
        prefixes=("", "distilbert."),
        unused=TASK_HEADS + r"|vocab_|pre_classifier\.|embeddings\.position_ids$",
        traits=lambda take: dict(position_offset=0, embed_norm=True, final_norm=False),
        keys={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
        defaults={"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    ),
    # He et al. 2021 (arXiv 2111.09543): DeBERTa-v3, and v2 without its convolution.
    "deberta-v2": Family(
        layout=names.DEBERTA,
        prefixes=("", "deberta."),
        unused=TASK_HEADS + r"|lm_predictions\.|mask_predictions\.|embeddings\.position_(ids$|embeddings\.)",
        traits=traits.deberta,
        defaults={"layer_norm_eps": 1e-7, "hidden_act": "gelu"},
        only={"conv_kernel_size": 0, "embedding_size": None, "attention_head_size": None, "head_dim": None},
    ),
    # Warner et al. 2024 (arXiv 2412.13663).
    "modernbert": Family(
        layout=names.MODERNBERT,
        prefixes=("", "model."),
        unused=TASK_HEADS + r"|head\.|decoder\.",
        placement="pre",
        first_normed=False,  # the embeddings are normalised already
        gated=True,
        biases=traits.llama_biases,
        window="global_every",
        ropes={"full": ("global_rope_theta", 160_000.0), "local": ("local_rope_theta", 10_000.0)},
        traits=traits.modernbert,
        keys={"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps"},
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "local_attention": 128},
    ),
    # Nussbaum et al. 2024 (arXiv 2402.01613); arctic-embed m-long. Older configurations have GPT-2's keys.
    "nomic_bert": Family(
        layout=names.NOMIC,
        peft=names.NOMIC_IN_TRANSFORMERS,
        prefixes=("", "bert.", "nomic_bert."),
        unused=TASK_HEADS,
        gated=True,
        biases=lambda take: (),
        ropes={"full": ("rotary_emb_base", 1000.0)},
        traits=traits.nomic,
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
    "llama": Family(**LLAMA_LIKE | dict(biases=traits.llama_biases)),
    "mistral": Family(
        **LLAMA_LIKE | dict(window="all", absent={"sliding_window": 4096, "num_key_value_heads": 8})
    ),  # Jiang et al. 2023 (arXiv 2310.06825)
    # Yang et al. 2024 (arXiv 2407.10671).
    "qwen2": Family(
        **LLAMA_LIKE | dict(biases=lambda take: ("q", "k", "v"), window="late", absent={"num_key_value_heads": 32})
    ),
    # Yang et al. 2025 (arXiv 2505.09388).
    "qwen3": Family(
        **LLAMA_LIKE
        | dict(
            biases=traits.attention_bias,
            window="late",
            qk_norm=lambda take: "head",
            absent={"num_key_value_heads": 32, "head_dim": 128},
        )
    ),
    # Gemma Team 2024 (arXiv 2403.08295).
    "gemma": Family(**GEMMA_LIKE | dict(traits=traits.gemma1, absent={"head_dim": 256, "num_key_value_heads": 16})),
    # Gemma Team 2024 (arXiv 2408.00118).
    "gemma2": Family(
        **GEMMA_LIKE
        | dict(
            layout=names.GEMMA2,
            placement="both",
            window="even",
            traits=traits.gemma,
            absent=GEMMA2_ABSENT | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            keys={"hidden_act": "hidden_activation"},
        )
    ),
    # Gemma Team 2025 (arXiv 2503.19786).
    "gemma3_text": Family(
        **GEMMA_LIKE
        | dict(
            layout=names.GEMMA2,
            placement="both",
            window="pattern",
            qk_norm=lambda take: "head",
            ropes={"full": ("rope_theta", 1_000_000.0), "local": ("rope_local_base_freq", 10_000.0)},
            absent=GEMMA2_ABSENT,
            prefixes=GEMMA3_PREFIXES,
            unused=LLAMA_LIKE["unused"]
            + r"|(model\.)?(vision_tower|multi_modal_projector)\.|language_model\.lm_head\.",
            traits=traits.gemma,
            keys={"hidden_act": "hidden_activation"},
            only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        )
    ),
    # Javaheripi et al. 2023, Phi-2: attention and MLP see the same normalised input and are added together.
    "phi": Family(
        layout=names.PHI,
        prefixes=("", "model."),
        unused=TASK_HEADS + r"|layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",
        causal=True,
        placement="shared",
        qk_norm=lambda take: "head" if take("qk_layernorm", bool, False) else None,
        ropes={"full": ("rope_theta", 10_000.0)},
        partial=("partial_rotary_factor", 0.5),
        traits=lambda take: dict(unembed_bias=True),
        only={"tie_word_embeddings": False},
        defaults={"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    # Abdin et al. 2024 (arXiv 2404.14219).
    "phi3": Family(
        **LLAMA_LIKE
        | dict(
            layout=names.PHI3,
            window="all",
            partial=("partial_rotary_factor", 1.0),
            traits=traits.phi3,
            defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5},
        )
    ),
    # Radford et al. 2019.
    "gpt2": Family(
        layout=names.GPT2,
        prefixes=("", "transformer."),
        unused=TASK_HEADS + r"|multiple_choice_head\.|h\.\d+\.attn\.(masked_)?bias$",
        causal=True,
        placement="pre",
        transposed=True,
        inner=4,
        traits=lambda take: dict(position_offset=0),
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
        layout=names.GPT_NEOX,
        prefixes=("", "gpt_neox."),
        unused=TASK_HEADS + r"|embed_out\.|layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$",
        causal=True,
        placement="parallel",
        biases=lambda take: TARGETS if take("attention_bias", bool, True) else traits.MLP,
        ropes={"full": ("rotary_emb_base", 10_000.0)},
        partial=("rotary_pct", 0.25),
        by_head=True,
        traits=traits.neox,
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False},
        unembed="embed_out",
    ),
    # OLMo Team 2024 (arXiv 2501.00656).
    "olmo2": Family(
        **LLAMA_LIKE
        | dict(
            layout=names.OLMO2,
            placement="output",
            biases=traits.attention_bias,
            qk_norm=lambda take: "width",
            defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5},
        )
    ),
    # OLMo Team 2025 (arXiv 2512.13961): three layers of four see a window, and only the fourth has a scaled rotation.
    "olmo3": Family(
        **LLAMA_LIKE
        | dict(
            layout=names.OLMO2,
            placement="output",
            biases=traits.attention_bias,
            qk_norm=lambda take: "width",
            window="every_4",
            ropes={"full": ("rope_theta", 500_000.0), "local": ("rope_theta", 500_000.0)},
            absent={"sliding_window": 4096},
            defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5},
        )
    ),
    # Bakouch et al. 2025: every fourth layer has no rotation (Yang et al. 2025, arXiv 2501.18795).
    "smollm3": Family(
        **LLAMA_LIKE
        | dict(
            biases=traits.llama_biases,
            window="unturned",
            skips_ropes=True,
            ropes={"full": ("rope_theta", 2_000_000.0)},
            absent={"num_key_value_heads": 4},
            defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        )
    ),
    # Mehta et al. 2024 (arXiv 2404.14619).
    "openelm": Family(
        layout=names.OPENELM,
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
# Of some families that are not here, the one here whose architecture is nearest: their names do not say so.
KIN = {
    "camembert": "roberta", "data2vec-text": "roberta", "ernie": "bert", "electra": "bert", "mpnet": "bert",
    "albert": "bert", "xlm-roberta-xl": "xlm-roberta", "xmod": "xlm-roberta", "deberta": "deberta-v2",
    "mixtral": "mistral", "ministral": "mistral", "granite": "llama", "cohere": "llama", "olmo": "olmo2",
    "gptj": "gpt_neox", "gpt_neo": "gpt2", "gpt_bigcode": "gpt2", "codegen": "gpt_neox", "stablelm": "gpt_neox",
    "gemma3n_text": "gemma3_text", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3",
}  # fmt: skip


def read_spec(config):
    """The `Spec` of a `config.json` (a dict). Refuses unknown families and unsupported values by name."""
    config = text_config(config)
    family = find(config.get("model_type"))
    take = Take(config, family)
    for key, value in family.only.items():
        take.only(key, value)
    if config.get("quantization_config") is not None:
        raise InputError("config.json: quantization_config: the weights are quantised: choose the unquantised base")
    return (family.read or read)(config["model_type"], family, take)


def text_config(config):
    """The configuration of the text model inside one that sees pictures too (only Gemma 3's), else `config`."""
    if config.get("model_type") != "gemma3":
        return config
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        raise InputError(f"config.json: text_config is {inner!r:.80}, but must be an object: fetch it again")
    shared = {key: config[key] for key in ("quantization_config", "tie_word_embeddings") if config.get(key) is not None}
    return inner | shared | {"model_type": "gemma3_text"}


def find(model_type):
    """The `Family` of a config.json's model_type. Raises InputError with those that exist, and the nearest."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    name = f"{model_type:.80}" if isinstance(model_type, str) else ""
    near = KIN.get(name) or (difflib.get_close_matches(name, FAMILIES, 1, 0.0) or ["bert"])[0]
    raise InputError(
        f"config.json: model_type {model_type!r:.80} is not a family that minilora reads "
        f"(there are: {', '.join(FAMILIES)}; the nearest is {near}): choose another --model"
    )
