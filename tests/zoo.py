"""The zoo: several tiny random checkpoints of every family, each as the hub has them and as transformers writes them.

`FAMILIES[family].cases[case]` holds what a case changes; `build(family, case, folder)` writes the checkpoint and
returns the judge, transformers' own model (for OpenELM: `openelm_reference`). transformers 5 writes configurations
in a way of its own (`rope_parameters`, `layer_types`); what users have are older files, with older keys, a task
model's prefix and tensors that nobody reads. The zoo writes those by default, and the newer with `hub=False`.
Left out: weights of any meaning.
"""

import ast
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import openelm_reference
import torch
import transformers
from conftest import VOCABULARY
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

V = len(VOCABULARY) + 3  # more embeddings than tokens, as many checkpoints have
P = 400  # positions where they cost nothing: beyond every window and every scaling's original length
TRAINED = 350  # nomic_bert's positions without a rotation that depends on the batch

# Keys of config.json's that nearly every published file has; a layout below adds those of its own family.
COMMON = "architectures bos_token_id eos_token_id model_type torch_dtype transformers_version vocab_size"
BERT = (
    "attention_probs_dropout_prob hidden_act hidden_dropout_prob hidden_size initializer_range intermediate_size "
    "layer_norm_eps max_position_embeddings num_attention_heads num_hidden_layers pad_token_id position_embedding_type "
    "type_vocab_size use_cache"
)
LLAMA = (
    "hidden_act hidden_size initializer_range intermediate_size max_position_embeddings num_attention_heads "
    "num_hidden_layers num_key_value_heads rms_norm_eps tie_word_embeddings use_cache"
)
# What published files hold beyond transformers' settings, and means nothing to the base.
INERT = {
    "position_embedding_type": "absolute", "torch_dtype": "float32", "transformers_version": "4.41.2",
    "cache_implementation": "hybrid", "use_mrope": False, "n_ctx": 1024, "gradient_checkpointing": False,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "pretraining_tp": 1,
    "auto_map": {"AutoModel": "modeling.Model"}, "_name_or_path": "somebody/model", "summary_type": "cls_index",
    "max_window_layers": 28, "tie_weights_": True, "output_past": True, "layer_norm_eps": 1e-5,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
ROPE = "rope_scaling rope_theta"


@dataclass(frozen=True)
class Family:
    """How transformers names a family, the layout of its published config.json, and its cases."""

    example: str  # a published checkpoint whose layout this is
    config: str  # transformers' class of the configuration, or "" where it has none
    model: str  # transformers' class of the whole model: for causal language modelling, or as the hub has it
    layout: str  # keys of the published config.json
    defaults: dict  # settings that every case starts from
    cases: dict[str, dict]  # case -> settings of its own; "layout" replaces the layout, "hub" adds to the hub's file
    bare: str = ""  # of encoders: transformers' class without a task

    @property
    def decoder(self):
        return not self.bare


SMALL = dict(vocab_size=V, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=41)
BERTS = SMALL | dict(num_attention_heads=3, max_position_embeddings=37, type_vocab_size=2)
DECODER = SMALL | dict(max_position_embeddings=P, bos_token_id=1, eos_token_id=2, pad_token_id=0)
OTHER = dict(hidden_size=30, num_attention_heads=5, num_hidden_layers=2, intermediate_size=17)

LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 48}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}


def plain(theta, **more):
    return {"rope_type": "default", "rope_theta": theta} | more


def longrope(halves, theta=700.0, **more):
    """Phi-3's scaling: one factor for each of `halves` pairs of features, for short rows and for long ones."""
    short, long = [1.0 + 0.15 * i for i in range(halves)], [1.5 + 0.9 * i for i in range(halves)]
    return {"rope_type": "longrope", "rope_theta": theta, "short_factor": short, "long_factor": long} | more


FAMILIES = {
    "bert": Family(
        "google-bert/bert-base-uncased", "BertConfig", "BertForPreTraining", f"{COMMON} {BERT} gradient_checkpointing",
        BERTS,
        {"gelu": {"hub": "gamma"}, "gelu_new, other sizes": OTHER | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
         "relu, one type": {"hidden_act": "relu", "type_vocab_size": 1}},
        bare="BertModel",
    ),
    "roberta": Family(
        "FacebookAI/roberta-base", "RobertaConfig", "RobertaForMaskedLM", f"{COMMON} {BERT}",
        BERTS | dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1, layer_norm_eps=1e-5),
        {"gelu": {}, "other sizes": OTHER | {"hidden_act": "gelu_new", "type_vocab_size": 2}},
        bare="RobertaModel",
    ),
    "xlm-roberta": Family(
        "FacebookAI/xlm-roberta-base", "XLMRobertaConfig", "XLMRobertaForMaskedLM", f"{COMMON} {BERT} output_past",
        BERTS | dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1, layer_norm_eps=1e-5),
        {"padding is 1": {}, "padding is 3": OTHER | {"pad_token_id": 3}},
        bare="XLMRobertaModel",
    ),
    "distilbert": Family(
        "distilbert/distilbert-base-uncased", "DistilBertConfig", "DistilBertForMaskedLM",
        "activation architectures attention_dropout dim dropout hidden_dim initializer_range max_position_embeddings "
        "model_type n_heads n_layers pad_token_id qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_weights_ "
        "transformers_version vocab_size",
        dict(vocab_size=V, dim=24, n_layers=3, n_heads=3, hidden_dim=41, max_position_embeddings=37),
        {"gelu": {}, "relu, sinusoidal": {"dim": 30, "n_heads": 5, "activation": "relu", "sinusoidal_pos_embds": True}},
        bare="DistilBertModel",
    ),
    "deberta-v2": Family(
        "microsoft/deberta-v3-base", "DebertaV2Config", "DebertaV2ForMaskedLM",
        "model_type attention_probs_dropout_prob hidden_act hidden_dropout_prob hidden_size initializer_range "
        "intermediate_size max_position_embeddings relative_attention position_buckets norm_rel_ebd share_att_key "
        "pos_att_type layer_norm_eps max_relative_positions position_biased_input num_attention_heads "
        "num_hidden_layers type_vocab_size vocab_size",
        BERTS | dict(type_vocab_size=0, relative_attention=True, share_att_key=True, pos_att_type="p2c|c2p",
                     position_biased_input=False, max_position_embeddings=P),
        {"v3: buckets": dict(position_buckets=8, norm_rel_ebd="layer_norm"),
         "c2p, whole span, positions and types": OTHER | dict(
             pos_att_type=["c2p"], position_biased_input=True, type_vocab_size=2, max_relative_positions=17,
             position_buckets=-1, norm_rel_ebd="none"),
         "p2c, odd buckets": dict(pos_att_type=["p2c"], position_buckets=7, max_relative_positions=30,
                                  norm_rel_ebd="none", hidden_act="gelu_python"),
         "no distances": dict(relative_attention=False, pos_att_type=None, position_biased_input=True,
                              position_buckets=-1, norm_rel_ebd="none", max_position_embeddings=37)},
        bare="DebertaV2Model",
    ),
    "modernbert": Family(
        "answerdotai/ModernBERT-base", "ModernBertConfig", "ModernBertForMaskedLM",
        f"{COMMON} attention_bias attention_dropout classifier_activation classifier_bias classifier_dropout "
        "classifier_pooling cls_token_id decoder_bias deterministic_flash_attn embedding_dropout "
        "global_attn_every_n_layers global_rope_theta gradient_checkpointing hidden_activation hidden_size "
        "initializer_cutoff_factor initializer_range intermediate_size layer_norm_eps local_attention local_rope_theta "
        "max_position_embeddings mlp_bias mlp_dropout norm_bias norm_eps num_attention_heads num_hidden_layers "
        "pad_token_id position_embedding_type sep_token_id tie_word_embeddings",
        SMALL | dict(num_hidden_layers=5, num_attention_heads=3, max_position_embeddings=P, local_attention=6,
                     pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        {"local and global": {},
         "biases": dict(num_hidden_layers=4, global_attn_every_n_layers=2, local_attention=9, norm_bias=True,
                        attention_bias=True, mlp_bias=True, norm_eps=1e-3, hidden_activation="silu",
                        rope_parameters={"full_attention": plain(900.0), "sliding_attention": plain(40.0)})},
        bare="ModernBertModel",
    ),
    "nomic_bert": Family(
        "Snowflake/snowflake-arctic-embed-m-long", "NomicBertConfig", "NomicBertModel", "",  # see `nomic_hub`
        SMALL | dict(num_attention_heads=3, max_position_embeddings=P, pad_token_id=0),
        {"swiglu": {}, "geglu, other theta": OTHER | dict(hidden_act="gelu", layer_norm_eps=1e-4, type_vocab_size=3,
                                                          hub="bert.", rope_parameters=plain(77.0))},
        bare="NomicBertModel",
    ),
    "llama": Family(
        "meta-llama/Llama-3.2-1B", "LlamaConfig", "LlamaForCausalLM",
        f"{COMMON} {LLAMA} {ROPE} attention_bias attention_dropout head_dim mlp_bias pretraining_tp",
        DECODER,
        {"3.2: scaled, tied, some heads": dict(num_key_value_heads=2, head_dim=10, tie_word_embeddings=True,
                                               rope_parameters=LLAMA3, rms_norm_eps=1e-5),
         "2: untied, all heads": OTHER | dict(hub="inv_freq", layout=f"{COMMON} {LLAMA} rope_scaling pretraining_tp",
                                              rms_norm_eps=1e-3),
         "biases, one head, linear": dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, hidden_act="gelu",
                                          rope_parameters=plain(10000.0) | {"rope_type": "linear", "factor": 3.0}),
         "tied, with the head all the same": dict(tie_word_embeddings=True, hub="head"),
         "yarn": dict(num_key_value_heads=2, rope_parameters=YARN),
         "dynamic": dict(max_position_embeddings=16,
                         rope_parameters=plain(10000.0) | {"rope_type": "dynamic", "factor": 2.0})},
    ),
    "mistral": Family(
        "mistralai/Mistral-7B-v0.1", "MistralConfig", "MistralForCausalLM",
        f"{COMMON} {LLAMA} rope_theta sliding_window", DECODER,
        {"window": dict(num_key_value_heads=2, sliding_window=5),
         "no window, wide heads": OTHER | dict(num_key_value_heads=1, head_dim=8, sliding_window=None,
                                               rope_parameters=plain(1e6), tie_word_embeddings=True)},
    ),
    "qwen2": Family(
        "Qwen/Qwen2.5-0.5B", "Qwen2Config", "Qwen2ForCausalLM",
        f"{COMMON} {LLAMA} rope_theta attention_dropout max_window_layers sliding_window use_mrope use_sliding_window",
        DECODER,
        {"tied, window unused": dict(num_key_value_heads=1, tie_word_embeddings=True, hub={"sliding_window": 7},
                                     rope_parameters=plain(1e6)),
         "window above a layer": OTHER | dict(num_key_value_heads=5, use_sliding_window=True, sliding_window=6,
                                              max_window_layers=1),
         "yarn": dict(num_key_value_heads=2, rope_parameters=YARN)},
    ),
    "qwen3": Family(
        "Qwen/Qwen3-0.6B", "Qwen3Config", "Qwen3ForCausalLM",
        f"{COMMON} {LLAMA} {ROPE} attention_bias attention_dropout head_dim max_window_layers sliding_window "
        "use_sliding_window",
        DECODER,
        {"tied, wide heads": dict(num_key_value_heads=2, head_dim=14, tie_word_embeddings=True,
                                  rope_parameters=plain(1e6)),
         "biases, window": OTHER | dict(num_key_value_heads=1, head_dim=6, attention_bias=True, rms_norm_eps=1e-3,
                                        use_sliding_window=True, sliding_window=5, max_window_layers=1)},
    ),
    "gemma": Family(
        "google/gemma-2b", "GemmaConfig", "GemmaForCausalLM",
        f"{COMMON} hidden_act hidden_size initializer_range intermediate_size max_position_embeddings "
        "num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps use_cache rope_scaling rope_theta "
        "attention_bias attention_dropout head_dim pad_token_id",
        DECODER,
        {"one head": dict(num_key_value_heads=1, head_dim=16),
         "gelu means its tanh form": OTHER | dict(num_key_value_heads=5, head_dim=6, hub={"hidden_act": "gelu"},
                                                  rope_parameters=plain(500.0))},
    ),
    "gemma2": Family(
        "google/gemma-2-2b", "Gemma2Config", "Gemma2ForCausalLM",
        f"{COMMON} attention_bias attention_dropout attn_logit_softcapping cache_implementation "
        "final_logit_softcapping head_dim hidden_act hidden_activation hidden_size initializer_range "
        "intermediate_size max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads "
        "pad_token_id query_pre_attn_scalar rms_norm_eps rope_theta sliding_window use_cache",
        DECODER | dict(num_key_value_heads=2, head_dim=10),
        {"caps, windows": dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.5, query_pre_attn_scalar=3,
                               sliding_window=5, num_hidden_layers=4),
         "no caps": dict(attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=10,
                         sliding_window=4, num_key_value_heads=1)},
    ),
    "gemma3_text": Family(
        "google/gemma-3-1b-it", "Gemma3TextConfig", "Gemma3ForCausalLM",
        f"{COMMON} {ROPE} attention_bias attention_dropout attn_logit_softcapping cache_implementation "
        "final_logit_softcapping head_dim hidden_activation hidden_size initializer_range intermediate_size "
        "max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads pad_token_id "
        "query_pre_attn_scalar rms_norm_eps rope_local_base_freq sliding_window sliding_window_pattern use_cache",
        DECODER | dict(num_key_value_heads=1, head_dim=10, query_pre_attn_scalar=10, sliding_window=5),
        {"local and global": dict(num_hidden_layers=7,
                                  rope_parameters={"full_attention": plain(1e6), "sliding_attention": plain(1e4)}),
         "scaled global, other pattern": dict(
             num_hidden_layers=5, sliding_window_pattern=2, query_pre_attn_scalar=4, num_key_value_heads=4,
             rope_parameters={"full_attention": plain(800.0) | {"rope_type": "linear", "factor": 8.0},
                              "sliding_attention": plain(60.0)}),
         "inside the one that sees pictures": dict(hub="wrapper", num_key_value_heads=2),
         "final cap": dict(final_logit_softcapping=2.0, sliding_window_pattern=3, num_key_value_heads=2)},
    ),
    "phi": Family(
        "microsoft/phi-2", "PhiConfig", "PhiForCausalLM",
        f"{COMMON} {ROPE} attention_dropout embd_pdrop hidden_act hidden_size initializer_range intermediate_size "
        "layer_norm_eps max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads "
        "partial_rotary_factor qk_layernorm resid_pdrop tie_word_embeddings use_cache",
        DECODER,
        {"rotary 0.4": OTHER | dict(hidden_size=50, rope_parameters=plain(1e4, partial_rotary_factor=0.4)),
         "norms of queries, some heads": dict(hidden_size=32, num_key_value_heads=2, qk_layernorm=True,
                                              rope_parameters=plain(500.0, partial_rotary_factor=0.5))},
    ),
    "phi3": Family(
        "microsoft/Phi-3-mini-4k-instruct", "Phi3Config", "Phi3ForCausalLM",
        f"{COMMON} {LLAMA} {ROPE} _name_or_path attention_dropout auto_map embd_pdrop "
        "original_max_position_embeddings pad_token_id resid_pdrop sliding_window",
        DECODER | dict(original_max_position_embeddings=P),
        {"4k: window": dict(num_key_value_heads=4, sliding_window=7),
         "128k: long factors": dict(num_key_value_heads=2, original_max_position_embeddings=9,
                                    rope_parameters=longrope(3), hub="su"),
         "4-mini: partial, tied": dict(hidden_size=32, num_key_value_heads=1, tie_word_embeddings=True,
                                       original_max_position_embeddings=9,
                                       rope_parameters=longrope(3, partial_rotary_factor=0.75, factor=4.0)),
         "short factors": dict(num_key_value_heads=2, original_max_position_embeddings=350,
                               rope_parameters=longrope(3))},
    ),
    "gpt2": Family(
        "openai-community/gpt2", "GPT2Config", "GPT2LMHeadModel",
        f"{COMMON} activation_function attn_pdrop embd_pdrop initializer_range layer_norm_epsilon n_ctx n_embd n_head "
        "n_layer n_positions resid_pdrop summary_type task_specific_params",
        dict(vocab_size=V, n_embd=24, n_layer=3, n_head=3, n_positions=41, bos_token_id=1, eos_token_id=2),
        {"tied": {},
         "inner width, untied": dict(n_embd=30, n_head=5, n_inner=41, tie_word_embeddings=False,
                                     activation_function="gelu", layer_norm_epsilon=1e-3),
         "relu": dict(activation_function="relu", n_layer=1)},
    ),
    "gpt_neox": Family(
        "EleutherAI/pythia-70m", "GPTNeoXConfig", "GPTNeoXForCausalLM",
        f"{COMMON} hidden_act hidden_size initializer_range intermediate_size layer_norm_eps max_position_embeddings "
        "num_attention_heads num_hidden_layers rotary_emb_base rotary_pct tie_word_embeddings use_cache "
        "use_parallel_residual",
        DECODER | dict(hidden_size=48, num_attention_heads=3),
        {"parallel, quarter": {},
         "sequential, whole, other sizes": OTHER | dict(use_parallel_residual=False, hidden_act="gelu_fast",
                                                        rope_parameters=plain(300.0, partial_rotary_factor=1.0)),
         "no biases, tied": dict(attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new")},
    ),
    "olmo2": Family(
        "allenai/OLMo-2-1124-7B", "Olmo2Config", "Olmo2ForCausalLM",
        f"{COMMON} {LLAMA} {ROPE} attention_bias attention_dropout pad_token_id", DECODER,
        {"all heads": dict(rope_parameters=plain(5e5), rms_norm_eps=1e-6),
         "some heads, biases, tied": dict(num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True,
                                          rms_norm_eps=1e-3)},
    ),
    "olmo3": Family(
        "allenai/Olmo-3-7B-Base", "Olmo3Config", "Olmo3ForCausalLM",
        f"{COMMON} {LLAMA} {ROPE} attention_bias attention_dropout layer_types pad_token_id sliding_window", DECODER,
        {"scaled where whole": dict(
            num_hidden_layers=4, sliding_window=6, num_key_value_heads=2,
            rope_parameters={"full_attention": YARN | {"rope_theta": 5e5}, "sliding_attention": plain(5e5)}),
         "other pattern": OTHER | dict(sliding_window=4, attention_bias=True, tie_word_embeddings=True,
                                       layer_types=["full_attention", "sliding_attention"], rms_norm_eps=1e-3)},
    ),
    "smollm3": Family(
        "HuggingFaceTB/SmolLM3-3B", "SmolLM3Config", "SmolLM3ForCausalLM",
        f"{COMMON} {LLAMA} {ROPE} attention_bias attention_dropout layer_types max_window_layers mlp_bias "
        "no_rope_layer_interval no_rope_layers pad_token_id pretraining_tp sliding_window use_sliding_window",
        DECODER | dict(num_key_value_heads=2),
        {"every fourth without": dict(num_hidden_layers=5, rope_parameters=plain(2e6)),
         "windows, listed, untied": OTHER | dict(
             num_hidden_layers=4, no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=5,
             attention_bias=True, mlp_bias=True, num_key_value_heads=5, tie_word_embeddings=False,
             rope_parameters=plain(300.0))},
    ),
    "openelm": Family(
        "apple/OpenELM-270M", "", "OpenELM", "",
        dict(
            activation_fn_name="swish", architectures=["OpenELMForCausalLM"], bos_token_id=1, eos_token_id=2,
            auto_map={"AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"}, ffn_dim_divisor=8,
            ffn_multipliers=[0.5, 1.3, 2.2], ffn_with_glu=True, head_dim=8, initializer_range=0.02,
            max_context_length=350, model_dim=24, model_type="openelm", normalization_layer_name="rms_norm",
            normalize_qk_projections=True, num_gqa_groups=2, num_kv_heads=[1, 2, 3], num_query_heads=[2, 4, 6],
            num_transformer_layers=3, qkv_multipliers=[0.5, 1.0], rope_freq_constant=10000, rope_max_length=P,
            share_input_output_layers=True, torch_dtype="float32", transformers_version="4.39.3", use_cache=True,
            vocab_size=V,
        ),
        {"shared, widening": {},
         "untied, no norms of queries": dict(
             normalize_qk_projections=False, share_input_output_layers=False, num_gqa_groups=4, num_kv_heads=[2, 1],
             num_query_heads=[8, 4], num_transformer_layers=2, ffn_multipliers=[2.0, 0.73], ffn_dim_divisor=16,
             head_dim=10, model_dim=30, rope_freq_constant=500)},
    ),
}  # fmt: skip
CASES = [(family, case) for family, entry in FAMILIES.items() for case in entry.cases]


@dataclass
class Judge:
    """A reference model and what the tests ask of it. Nothing is cached between calls; the model is in eval mode."""

    family: str
    case: str
    model: torch.nn.Module
    config: dict  # of the checkpoint, as config.json has it
    settings: dict  # of the case, in transformers' (for OpenELM: Apple's) words

    @property
    def decoder(self):
        return FAMILIES[self.family].decoder

    @property
    def base(self):
        """The model without its task; its names are those of a bare checkpoint, for every family but OpenELM."""
        return getattr(self.model, "base_model", self.model)

    @property
    def pad(self):
        return self.settings.get("pad_token_id") or 0

    @property
    def longest(self):
        """The longest row in tokens."""
        settings = self.settings
        if self.family in ("roberta", "xlm-roberta"):  # positions start behind that of padding
            return settings["max_position_embeddings"] - settings["pad_token_id"] - 1
        if self.family == "nomic_bert":
            return TRAINED
        if self.family == "openelm":
            return settings["max_context_length"]
        return settings.get("max_position_embeddings") or settings["n_positions"]

    @property
    def by_row(self):
        """Whether transformers lets the longest row of a batch decide for all: then rows are judged one by one."""
        return self.settings.get("rope_parameters", {}).get("rope_type") in ("longrope", "dynamic")

    def to(self, dtype):
        """Cast the parameters in place; buffers (rotary frequencies) stay float32, as `from_pretrained` keeps them."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def __call__(self, ids, lengths, replaced=None, by_row=False):
        """What transformers computes for `ids` [B, T] of these lengths, as a namespace of `hidden` [B, T, D],
        `logits` [B, T, V] (None for encoders) and `states` (the layers' inputs, then `hidden`).

        `replaced` {name: tensor} stands in for the model's own tensors. What stands on padding is set to 0. `by_row`
        runs each row alone, without padding: in float64, transformers' masks make padding beyond a window not a number.
        """
        if (by_row or self.by_row) and len(ids) > 1:
            rows = [self(ids[i : i + 1, :n], lengths[i : i + 1], replaced) for i, n in enumerate(lengths)]
            parts = [[row.hidden, row.logits, *row.states] for row in rows]
            hidden, logits, *states = (pad_rows(part, ids.shape[1]) for part in zip(*parts))
            return SimpleNamespace(hidden=hidden, logits=logits, states=states)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        arguments = {"attention_mask": real.long(), "output_hidden_states": True}
        if self.decoder and self.family != "openelm":
            arguments["use_cache"] = False
        model = self.model if self.decoder else self.base
        inputs = (ids.masked_fill(~real, self.pad),)
        if replaced:
            out = torch.func.functional_call(model, replaced, inputs, arguments, tie_weights=True)
        else:
            out = model(*inputs, **arguments)
        states = [state * real[..., None] for state in out.hidden_states]
        hidden = states[-1] if self.decoder else out.last_hidden_state * real[..., None]
        logits = out.logits * real[..., None] if self.decoder else None
        return SimpleNamespace(hidden=hidden, logits=logits, states=states)


def pad_rows(rows, length):
    """Rows [1, n, D] of several lengths, or None each, -> [B, length, D]."""
    if rows[0] is None:
        return None
    return torch.cat([torch.nn.functional.pad(row, (0, 0, 0, length - row.shape[1])) for row in rows])


def build(family, case, folder, seed=0, hub=True, calm=False):
    """Write the checkpoint of a case to `folder`, as the hub has it or as transformers 5 writes it; returns the Judge.

    Every matrix is drawn with deviation 0.2, and every vector moved from where it starts (0 or 1) by as much, so
    that states and attention scores are of the order of 1 and that misplaced norms and biases show. In a `calm` one
    embeddings are large and layers add little, as in trained models: roundings do not grow from layer to layer.
    """
    import transformers

    entry, folder = FAMILIES[family], Path(folder)
    settings = entry.defaults | entry.cases[case]
    layout, extra = settings.pop("layout", entry.layout), settings.pop("hub", None)
    folder.mkdir(parents=True, exist_ok=True)
    if family == "openelm":
        model = openelm_reference.OpenELM(settings)
    else:
        own = {} if "pad_token_id" in settings else {"pad_token_id": 0}
        config = getattr(transformers, entry.config)(**json.loads(json.dumps(settings | own)))
        name = entry.model if hub or not entry.bare else entry.bare
        model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    inside = {id(parameter): name for name, parameter in getattr(model, "base_model", model).named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # By the name in the base, so that the checkpoint without a task holds the same numbers.
            draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{inside.get(id(parameter), name)}".encode()))
            noise = 0.2 * torch.randn(parameter.shape, generator=draw)
            if calm and parameter.ndim > 1:
                noise *= 5 if re.search("embed|wte|wpe", name) else 0.5
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    model.eval()
    if family == "openelm":
        save_file({k: v.detach().clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        written = settings
    else:
        model.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        if hub:
            written = nomic_hub(config) if family == "nomic_bert" else hub_config(config, layout, extra)
            written["architectures"] = [entry.model]
            tensors = hub_tensors(family, model, load_file(folder / "model.safetensors"), extra)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    return Judge(family, case, model, written, settings)


# The module of each target in a layer, in the words of the judge's model (of nomic_bert transformers has it unfused).
LLAMA_NAMES = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
)
PARTS = {
    "bert": ("encoder.layer", "attention.self.query attention.self.key attention.self.value attention.output.dense "
                              "- intermediate.dense output.dense"),
    "deberta-v2": ("encoder.layer", "attention.self.query_proj attention.self.key_proj attention.self.value_proj "
                                    "attention.output.dense - intermediate.dense output.dense"),
    "distilbert": ("transformer.layer", "attention.q_lin attention.k_lin attention.v_lin attention.out_lin "
                                        "- ffn.lin1 ffn.lin2"),
    "modernbert": ("layers", "attn.Wqkv attn.Wqkv attn.Wqkv attn.Wo mlp.Wi mlp.Wi mlp.Wo"),
    "phi": ("layers", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense - mlp.fc1 mlp.fc2"),
    "phi3": ("layers", "self_attn.qkv_proj self_attn.qkv_proj self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj "
                       "mlp.gate_up_proj mlp.down_proj"),
    "gpt2": ("h", "attn.c_attn attn.c_attn attn.c_attn attn.c_proj - mlp.c_fc mlp.c_proj"),
    "gpt_neox": ("layers", "attention.query_key_value attention.query_key_value attention.query_key_value "
                           "attention.dense - mlp.dense_h_to_4h mlp.dense_4h_to_h"),
    "openelm": ("transformer.layers", "attn.qkv_proj attn.qkv_proj attn.qkv_proj attn.out_proj ffn.proj_1 ffn.proj_1 "
                                      "ffn.proj_2"),
}  # fmt: skip
PARTS |= {"roberta": PARTS["bert"], "xlm-roberta": PARTS["bert"]}


def slices(judge, target, layer):
    """(module of the judge's base, its out rows that are `target` in layer number `layer`), or None without such.

    The rows are an int64 tensor where the module is fused, else None. Written from how transformers cuts the outputs
    up, and apart from `minilora/families.py`, which it judges.
    """
    stem, names = PARTS.get(judge.family, ("layers", LLAMA_NAMES))
    part = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), names.split()))[target]
    if part == "-":
        return None
    module, config = f"{stem}.{layer}.{part}", judge.settings
    if names.split().count(part) == 1:
        return module, None
    total = judge.base.get_submodule(module).weight.shape[1 if judge.family == "gpt2" else 0]
    if target in ("gate", "up"):  # halves; ModernBERT too acts on the first
        return module, torch.arange(total // 2) + (total // 2) * (target == "up")
    if judge.family == "gpt_neox":  # [head, (q, k, v), feature]
        rows = torch.arange(total).reshape(config["num_attention_heads"], 3, -1)
        return module, rows[:, "qkv".index(target)].reshape(-1)
    if judge.family == "phi3":
        heads, grouped = config["num_attention_heads"], config["num_key_value_heads"]
    elif judge.family == "openelm":
        heads, grouped = config["num_query_heads"][layer], config["num_kv_heads"][layer]
    else:
        heads = grouped = 1  # thirds
    head = total // (heads + 2 * grouped)
    first = {"q": 0, "k": heads * head, "v": (heads + grouped) * head}[target]
    return module, torch.arange(first, first + (heads if target == "q" else grouped) * head)


NEWER = ("rope_parameters", "layer_types", "dtype", "_sliding_window_pattern", "sliding_window_pattern")


def older(settings):
    """transformers' settings of today in the words that published files use."""
    listed = ("layer_types",) if settings["model_type"] in ("olmo3", "smollm3") else ()  # published with these
    old = {key: value for key, value in settings.items() if key not in NEWER or key in listed}
    kind, rope = settings["model_type"], settings.get("rope_parameters")
    if kind in ("gemma3_text", "modernbert", "olmo3"):
        whole, near = rope["full_attention"], rope["sliding_attention"]
        if kind == "modernbert":
            old["global_rope_theta"], old["local_rope_theta"] = whole["rope_theta"], near["rope_theta"]
            old["global_attn_every_n_layers"] = settings.get("global_attn_every_n_layers", 3)
            return old
        if kind == "gemma3_text":
            old["sliding_window_pattern"] = settings.get("sliding_window_pattern", 6)
            old["rope_local_base_freq"] = near["rope_theta"]
        rope = whole
    if rope is None:
        return old
    rope = dict(rope)
    names = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}.get(kind, ("rope_theta", "partial_rotary_factor"))
    old[names[0]] = rope.pop("rope_theta")
    old[names[1]] = rope.pop("partial_rotary_factor", 1.0)
    scaling = rope.pop("rope_type")
    if kind == "phi3":
        rope.pop("original_max_position_embeddings", None)  # stands at the top level
    key = "rope_type" if scaling == "llama3" or kind in ("gemma3_text", "olmo3") else "type"  # the older is `type`
    old["rope_scaling"] = None if scaling == "default" else {key: scaling} | rope
    return old


def hub_config(config, layout, extra):
    """The published file: the keys of the layout, and those that differ from transformers' default."""
    now, fresh = older(config.to_dict()), older(type(config)().to_dict())
    if "head_dim" not in layout.split() and now.get("head_dim") == config.hidden_size // config.num_attention_heads:
        now.pop("head_dim", None)  # what readers take it to be anyway
    keys = set(layout.split()) | {key for key in now if now[key] != fresh.get(key)}
    written = {key: value for key, value in (INERT | now).items() if key in keys}
    assert set(layout.split()) <= set(written), sorted(set(layout.split()) - set(written))
    if isinstance(extra, dict):
        written |= extra
    if extra == "su":
        written["rope_scaling"]["type"] = "su"
    if extra == "wrapper":  # google/gemma-3-4b-it
        vision = {"model_type": "siglip_vision_model"}
        written = {"model_type": "gemma3", "text_config": written, "vision_config": vision,
                   "mm_tokens_per_image": 256, "torch_dtype": "bfloat16"}  # fmt: skip
    return written


def nomic_hub(config):
    """The configuration that nomic's remote code reads, in the words of GPT-2 and flash-attention."""
    inert = (
        "causal=False dense_seq_output=True fused_bias_fc=True fused_dropout_add_ln=True pad_vocab_size_multiple=1 "
        "parallel_block=False parallel_block_tied_norm=False prenorm=False qkv_proj_bias=False mlp_fc1_bias=False "
        "mlp_fc2_bias=False reorder_and_upcast_attn=False rotary_emb_fraction=1.0 rotary_emb_interleaved=False "
        "rotary_emb_scale_base=None rotary_scaling_factor=None scale_attn_by_inverse_layer_idx=False "
        "scale_attn_weights=True summary_use_proj=True use_cache=True use_flash_attn=True use_rms_norm=False "
        "use_xentropy=True attn_pdrop=0.0 embd_pdrop=0.1 resid_pdrop=0.0 initializer_range=0.02 "
        f"max_trained_positions={TRAINED}"
    )
    return {name: ast.literal_eval(value) for name, value in (pair.split("=") for pair in inert.split())} | {
        "model_type": "nomic_bert",
        "activation_function": {"silu": "swiglu", "gelu": "geglu"}[config.hidden_act],
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_epsilon": config.layer_norm_eps,
        "rotary_emb_base": config.rope_parameters["rope_theta"],
        "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
    }


def hub_tensors(family, model, tensors, extra):
    """The tensors as published files name them, with those that no base needs."""
    config = model.config
    layers = range(config.num_hidden_layers)
    if family in ("bert", "roberta", "xlm-roberta"):
        prefix = model.base_model_prefix
        tensors[f"{prefix}.embeddings.position_ids"] = torch.arange(config.max_position_embeddings)[None]
    if extra == "gamma":  # google-bert/bert-base-uncased itself
        for old, new in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
    if extra == "wrapper":
        tensors = {f"language_model.{name}": value for name, value in tensors.items()}
        tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.rand(3, 3)
        tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.rand(3)
    if family == "deberta-v2":
        tensors["deberta.embeddings.position_ids"] = torch.arange(config.max_position_embeddings)[None]
        tensors["mask_predictions.dense.weight"] = torch.rand(3, 3)
    if extra == "bert.":  # nomic-ai/nomic-bert-2048
        tensors = {extra + name: value for name, value in tensors.items()}
    if extra == "head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if extra == "inv_freq":  # Llama 2, as converted in 2023
        for i in layers:
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.rand(3)
    if family == "gpt2":
        if config.tie_word_embeddings:
            tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        prefix = "" if config.tie_word_embeddings else "transformer."
        causal = torch.ones(1, 1, config.n_positions, config.n_positions).tril()
        tensors |= {f"{prefix}h.{i}.attn.bias": causal.clone() for i in layers}
    if family == "gpt_neox":
        causal = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        for i in layers:
            tensors[f"gpt_neox.layers.{i}.attention.bias"] = causal.clone()
            tensors[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
            tensors[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.rand(2)
    return tensors


def write_tokenizer(folder):
    """A `tokenizer.json` beside the checkpoint: one token a word of conftest's vocabulary, ids below every base's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "unk_token": "[UNK]"}))


DECODER_TEXT = ["the film was good and warm", "the plot is dull, bad and cold.",
        "a great story of a man in time 0123456789-",
        "very slow scenes with a bright woman: positive negative yes no"]  # fmt: skip


def tiny_decoder(folder, family="gpt2"):
    """A random decoder with a tokenizer of its own: GPT-2 with bytes and no special token before a text, or Llama
    with SentencePiece's way of spaces and one. Returns transformers' model."""
    import transformers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if family == "gpt2":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            DECODER_TEXT * 3, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
        )
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = ["\n", ":"]
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, initial_alphabet=alphabet)
        made.train_from_iterator(DECODER_TEXT * 3, trainer)
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "</s>"}))
    torch.manual_seed(5)
    V = made.get_vocab_size() + 2
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=V, n_embd=24, n_layer=2, n_head=3, n_positions=60, initializer_range=0.3, **ends
        )
        judge = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=60, initializer_range=0.3, tie_word_embeddings=False, **ends,
        )  # fmt: skip
        judge = transformers.LlamaForCausalLM(config)
    judge.save_pretrained(folder)
    return judge.eval()


class HeadJudge(transformers.BertModel):
    """transformers' base with mean pooling and a linear head under the name that PEFT's file has."""

    def __init__(self, config):
        super().__init__(config, add_pooling_layer=False)
        self.classifier = torch.nn.Linear(config.hidden_size, 3)

    def forward(self, input_ids, attention_mask):
        hidden = super().forward(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))
