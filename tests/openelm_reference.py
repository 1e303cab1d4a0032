"""OpenELM in plain PyTorch, the judge that transformers lacks: written for checking, one head at a time.

Mehta et al. 2024 (arXiv 2404.14619), section 2.1: pre-normalised layers without biases, RMSNorm (also on queries
and keys, where configured), rotary embeddings, grouped queries, SwiGLU, and *layer-wise scaling*: each layer has its
own number of heads and inner width. Names of configuration keys and tensors are those of the published checkpoints.
Left out: caches, dropout, training. Nothing here is shared with `minilora/model.py`.
"""

from types import SimpleNamespace

import torch
from torch import nn

EPS = 1e-6  # no key of the configuration: the published code fixes it


def inner_width(config, layer):
    """Features inside layer `layer`'s MLP: the multiple of the divisor that is nearest to what is asked for."""
    asked, divisor = config["ffn_multipliers"][layer] * config["model_dim"], config["ffn_dim_divisor"]
    nearest = max(divisor, int(asked + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * asked else nearest  # never more than a tenth narrower


def shapes(config):
    """{tensor name: shape} of a checkpoint."""
    D, E = config["model_dim"], config["head_dim"]
    tensors = {"transformer.token_embeddings.weight": (config["vocab_size"], D), "transformer.norm.weight": (D,)}
    for layer in range(config["num_transformer_layers"]):
        H, G, F = config["num_query_heads"][layer], config["num_kv_heads"][layer], inner_width(config, layer)
        tensors |= {
            f"transformer.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (D,),
                "attn.qkv_proj": ((H + G + G) * E, D),
                "attn.out_proj": (D, H * E),
                "ffn_norm": (D,),
                "ffn.proj_1": (2 * F, D),
                "ffn.proj_2": (D, F),
            }.items()
        }
        if config["normalize_qk_projections"]:
            tensors |= {f"transformer.layers.{layer}.attn.{name}_norm.weight": (E,) for name in "qk"}
    if not config["share_input_output_layers"]:
        tensors["lm_head.weight"] = (config["vocab_size"], D)
    return tensors


class OpenELM(nn.Module):
    """`ids` [B, T], padded on the right -> last_hidden_state [B, T, D] after the final norm, and logits [B, T, V]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        for name, shape in shapes(config).items():
            *path, module, _ = name.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            if len(shape) == 1:
                owner.add_module(module, nn.Module())
                owner._modules[module].weight = nn.Parameter(torch.ones(shape))
            elif module == "token_embeddings":
                owner.add_module(module, nn.Embedding(*shape))
            else:  # as modules, so that PEFT can put adapters on them
                owner.add_module(module, nn.Linear(shape[1], shape[0], bias=False))

    def forward(self, input_ids, **_):
        config = self.config

        call = self.get_submodule

        def p(module):
            return self.get_submodule(module).weight

        E = config["head_dim"]
        x = call("transformer.token_embeddings")(input_ids)
        hidden = [x]
        for layer in range(config["num_transformer_layers"]):
            at = f"transformer.layers.{layer}."
            H, G = config["num_query_heads"][layer], config["num_kv_heads"][layer]
            y = rms(x, p(at + "attn_norm"))
            heads = call(at + "attn.qkv_proj")(y).split(E, dim=-1)  # H queries, then G keys, then G values
            queries, keys, values = heads[:H], heads[H : H + G], heads[H + G :]
            if config["normalize_qk_projections"]:
                queries = [rms(q, p(at + "attn.q_norm")) for q in queries]
                keys = [rms(k, p(at + "attn.k_norm")) for k in keys]
            queries, keys = ([rotate(head, config["rope_freq_constant"]) for head in part] for part in (queries, keys))
            attended = [attend(q, keys[h // (H // G)], values[h // (H // G)]) for h, q in enumerate(queries)]
            x = x + call(at + "attn.out_proj")(torch.cat(attended, dim=-1))
            y = rms(x, p(at + "ffn_norm"))
            gate, up = call(at + "ffn.proj_1")(y).chunk(2, dim=-1)
            x = x + call(at + "ffn.proj_2")(gate * torch.sigmoid(gate) * up)
            hidden.append(x)
        x = hidden[-1] = rms(x, p("transformer.norm"))
        shared = config["share_input_output_layers"]
        logits = x @ p("transformer.token_embeddings" if shared else "lm_head").T
        return SimpleNamespace(last_hidden_state=x, logits=logits, hidden_states=tuple(hidden))


def rms(x, weight):
    """x over the root of the mean of its squares, times a weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def rotate(x, theta):
    """Features j and j + E/2 of [B, T, E] as one complex number, turned by position * theta^(-2j/E)."""
    half = x.shape[-1] // 2
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # In float32, as the published code has it: at position 350 that moves the angle by 1e-5.
    frequencies = 1 / theta ** (torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)[:, None] * frequencies
    turned = torch.complex(wide[..., :half], wide[..., half:]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def attend(q, k, v):
    """Causal attention of one head: [B, T, E] each."""
    T = q.shape[1]
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(later, -torch.inf)
    return torch.softmax(wide, dim=-1).to(v.dtype) @ v
