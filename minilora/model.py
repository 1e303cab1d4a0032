"""The base: a transformer base that reads Hugging Face checkpoints and knows nothing of LoRA.

Every projection is a module of its own, named by its canonical target (`layers.3.q`), whatever the checkpoint
fuses; `lora.attach` replaces some of them. Left out: the base's own dropout (a confound of the study: it is off
in training too), pooling and heads (`head.py`), and token types other than 0.

Letters: B rows, T tokens (padded on the right), D width, H heads, E = D / H, F inner width.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from . import checkpoint, families
from .errors import InputError

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Embed(nn.Module):
    """Sum of token, position and type embeddings, normalised (Devlin et al. 2019, Figure 2)."""

    def __init__(self, spec):
        super().__init__()
        self.tokens = nn.Embedding(spec.vocabulary, spec.width)
        self.positions = nn.Embedding(spec.positions, spec.width)
        self.types = nn.Embedding(spec.types, spec.width)
        self.norm = nn.LayerNorm(spec.width, spec.norm_eps)

    def forward(self, ids):
        length = ids.shape[1]
        return self.norm(self.tokens(ids) + (self.positions.weight[:length] + self.types.weight[0]))


class Layer(nn.Module):
    """Self-attention and MLP, each added to its input and then normalised (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, spec):
        super().__init__()
        self.heads = spec.heads
        self.activation = ACTIVATIONS[spec.activation]
        for target in spec.targets:
            out_features, in_features = spec.shape(target)
            setattr(self, target, nn.Linear(in_features, out_features))
        self.attention_norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.mlp_norm = nn.LayerNorm(spec.width, spec.norm_eps)

    def forward(self, x, mask):
        B, T, D = x.shape
        # [B, T, D] -> [B, H, T, E]
        q, k, v = (p(x).view(B, T, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended = attended.transpose(1, 2).reshape(B, T, D)
        x = self.attention_norm(x + self.o(attended))
        return self.mlp_norm(x + self.down(self.activation(self.up(x))))


class Base(nn.Module):
    """`ids` [B, T] and the rows' `lengths` [B] in tokens -> hidden states [B, T, D].

    A row's hidden states do not depend on the other rows or on the padding; those of padding are meaningless.
    """

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.embed = Embed(spec)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))

    def forward(self, ids, lengths):
        x = self.embed(ids)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # [B, T]
        # An additive mask in the model's dtype: attention's fast CPU path takes no boolean one.
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return x


def load(folder, dtype=torch.float32, device="cpu"):
    """The `Base` in a checkpoint folder, its parameters frozen.

    The tensors go one by one from the memory-mapped file to `dtype` and `device`.
    Raises InputError for an unsupported configuration and for missing, unknown or misshapen tensors.
    """
    spec = families.read_spec(checkpoint.read_config(folder))
    if spec.activation not in ACTIVATIONS:
        raise InputError(
            f"config.json: activation {spec.activation!r} is not implemented "
            f"(there are: {', '.join(ACTIVATIONS)}): choose another --model"
        )
    with torch.device("meta"):
        model = Base(spec).requires_grad_(False)
    tensors = checkpoint.Tensors(folder)
    sources = tensor_names(model, tensors.keys())
    for name, parameter in list(model.named_parameters()):
        shape = tuple(tensors.shape(sources[name]))
        if shape != tuple(parameter.shape):
            raise InputError(
                f"{folder}: tensor {sources[name]} has shape {list(shape)}, but config.json asks for "
                f"{list(parameter.shape)}: the files do not belong together, fetch the checkpoint again"
            )
        owner, _, leaf = name.rpartition(".")
        value = tensors[sources[name]].to(device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return model


def check_fits(spec, tokenizer, max_length):
    """Raise InputError unless every token and every position has an embedding."""
    if tokenizer.vocab_size > spec.vocabulary:
        raise InputError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the base embeds {spec.vocabulary} tokens: "
            "they do not belong together"
        )
    if max_length > spec.positions:
        raise InputError(f"max_length is {max_length}, but the base has {spec.positions} positions: use at most these")


def tensor_names(model, present):
    """Map each parameter of `model` to the name of its tensor among those `present` in the checkpoint.

    Raises InputError when a tensor is missing, or when there is one that the family does not know.
    """
    family = families.find(model.spec.family)
    wanted = {}
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        wanted[name] = f"{family.module(module)}.{leaf}"
    present = set(present)
    prefix = max(family.prefixes, key=lambda p: len({p + source for source in wanted.values()} & present))
    sources = {name: prefix + source for name, source in wanted.items()}
    missing = sorted(set(sources.values()) - present)
    if missing:
        raise InputError(
            f"the checkpoint lacks {len(missing)} tensors that its config.json asks for (first: {missing[0]}): "
            "fetch it again, or mend the number of layers"
        )
    extra = sorted(
        name for name in present - set(sources.values()) if not name.removeprefix(prefix).startswith(family.unused)
    )
    if extra:
        raise InputError(
            f"the checkpoint has {len(extra)} tensors that a {model.spec.family} model of its config.json does not "
            f"have (first: {extra[0]}): config.json and weights do not belong together"
        )
    return sources
