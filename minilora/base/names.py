"""The names of each family's modules: `layers.3.q` here is `encoder.layer.3.attention.self.query` in a BERT."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The checkpoint's names. In `modules`, several targets before one name are the parts of a fused projection,
    in the order of its out rows."""

    embeddings: dict[str, str]  # module here -> module in the checkpoint
    layer: str  # prefix of layer {i} in the checkpoint
    modules: dict[str, str]  # modules of a layer here -> module of a layer in the checkpoint


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
DEBERTA = Layout(
    embeddings=BERT.embeddings | {"relative.table": "encoder.rel_embeddings", "relative.norm": "encoder.LayerNorm"},
    layer="encoder.layer.{i}.",
    modules=BERT.modules
    | {
        "q": "attention.self.query_proj",
        "k": "attention.self.key_proj",
        "v": "attention.self.value_proj",
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
