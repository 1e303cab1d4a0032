"""The base: one transformer for encoders and decoders that reads Hugging Face checkpoints and knows nothing of LoRA.

What differs between families is in its `Spec`. Every projection is a module of its own, named by its canonical target
(`layers.3.q`), whatever the checkpoint fuses; `lora.attach` replaces some of them. Left out: the base's own dropout (a
confound of the study: it is off in training too), pooling and heads (`head.py`), token types other than 0, and caches.

Letters: B rows, T tokens (padded on the right), D width, H heads, E features of a head, F inner width, V vocabulary.
"""

from functools import partial

import torch
from torch import nn

from minilora.base import checkpoint, deberta, families, places, rope
from minilora.errors import InputError, shown
from minilora.kernels.attention import attention, weights
from minilora.kernels.linear import linear
from minilora.kernels.mlp import ACTIVATIONS, formed_again, gated, plain
from minilora.kernels.norms import layer_norm, rms_norm
from minilora.kernels.rotary import rotate

# Which norms a layer has: before (x_norm) and after (x_output_norm) attention and MLP. In `post` and `output` the sum
# runs through no norm or every norm: see `Layer.forward`.
PLACEMENTS = {
    "post": ("attention_norm", "mlp_norm"),  # norm(x + f(x))
    "pre": ("attention_norm", "mlp_norm"),  # x + f(norm(x))
    "output": ("attention_output_norm", "mlp_output_norm"),  # x + norm(f(x))
    "both": ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm"),  # x + norm(f(norm(x)))
    "parallel": ("attention_norm", "mlp_norm"),  # x + f(norm(x)) + g(other norm(x))
    "shared": ("attention_norm",),  # x + f(norm(x)) + g(the same norm(x))
}


class RMSNorm(nn.Module):
    """RMSNorm, times its weight in a dtype of the base's, or times 1 + weight in float32 or wider as Gemma has it."""

    def __init__(self, width, eps, offset):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x):
        weight = self.weight
        if self.offset:
            weight = self.offset + weight.to(torch.promote_types(weight.dtype, torch.float32))
        return rms_norm(x, weight, self.eps)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


def make_norm(spec, width):
    if spec.norm == "layer":
        return LayerNorm(width, spec.norm_eps, bias=spec.norm_bias)
    return RMSNorm(width, spec.norm_eps, offset={"rms": 0, "rms1": 1}[spec.norm])


def table(rows, width):
    """An embedding table without the random start, which on the meta device would import much of torch's compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width))


class Embed(nn.Module):
    """Token embeddings, plus those of learned positions and of token type 0, scaled and normalised where the family
    has that."""

    def __init__(self, spec):
        super().__init__()
        # Rounded as the states are, and no tensor: CUDA graphs have no numbers of the host.
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        self.scales = {dtype: torch.tensor(spec.embed_scale, dtype=dtype, device="cpu").item() for dtype in dtypes}
        self.offset = spec.position_offset
        self.tokens = table(spec.vocabulary, spec.width)
        if self.offset is not None:
            self.positions = table(self.offset + spec.positions, spec.width)
        self.types = table(spec.types, spec.width) if spec.types else None
        self.norm = make_norm(spec, spec.width) if spec.embed_norm else nn.Identity()

    def forward(self, ids):
        x = self.tokens(ids)
        if self.scales[x.dtype] != 1.0:
            x = x * self.scales[x.dtype]
        if self.offset is not None or self.types is not None:
            # Summed apart from x, which is [B, T, D]: these are [T, D] and [D].
            added = self.positions.weight[self.offset : self.offset + ids.shape[1]] if self.offset is not None else 0
            x = x + (added + self.types.weight[0] if self.types is not None else added)
        return self.norm(x)


class Layer(nn.Module):
    """Self-attention (Vaswani et al. 2017, section 3.2) and MLP, each added to what it is given.

    `watch`: None, or a function that is called with the attention weights, float32 [B, H, T, T], and the mask.
    """

    watch = None

    def __init__(self, spec, number):
        super().__init__()
        self.spec, self.here = spec, spec.layers[number]
        self.activation = ACTIVATIONS[spec.activation]
        # Numbers of a module are constants to torch.compile, those of other objects inputs.
        self.scale, self.cap = spec.attention_scale, spec.attention_cap
        for target in spec.targets:
            out_features, in_features = spec.shape(target, number)
            setattr(self, target, Linear(in_features, out_features, bias=target in spec.biases))
        for name in ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm"):
            normed = name in PLACEMENTS[spec.placement] and (self.here.normed or name != "attention_norm")
            setattr(self, name, make_norm(spec, spec.width) if normed else nn.Identity())
        if spec.qk_norm:
            for name, target in (("q_norm", "q"), ("k_norm", "k")):
                width = spec.head_width if spec.qk_norm == "head" else spec.shape(target, number)[0]
                setattr(self, name, make_norm(spec, width))

    def attend(self, x, mask, turn):
        B, T, _ = x.shape
        E, by_head = self.spec.head_width, self.spec.qk_norm == "head"
        q, k, v = project(x, self.q, self.k, self.v)
        if self.spec.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        # [B, T, H E] -> [B, H, T, E]; k and v have fewer heads where these are grouped
        q, k, v = (p.view(B, T, -1, E).transpose(1, 2) for p in (q, k, v))
        if by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.relative:
            attended = self.disentangled(q, k, v, mask, turn)
            return self.o(attended.transpose(1, 2).reshape(B, T, -1))
        if turn is not None:
            # As a view v would keep the unturned q and k too, where the three come of one product.
            q, k, v = rotate(q, *turn), rotate(k, *turn), v.contiguous()
        if self.watch is not None:
            self.watch(weights(q, k, mask, self.scale, self.cap), mask)
        attended = attention(q, k, v, mask, self.scale, self.cap)
        return self.o(attended.transpose(1, 2).reshape(B, T, -1))  # [B, H, T, E] -> [B, T, H E]

    def disentangled(self, q, k, v, mask, relative):
        """DeBERTa's attention; `relative` is what `deberta.Distances` gives."""
        q_of, k_of = project(relative[0], self.q, self.k)
        terms = self.spec.relative
        q_of, k_of = q_of if terms.keys else None, k_of if terms.queries else None
        if self.watch is not None:  # each token's own value is a place, so that the weights come out
            places = torch.eye(q.shape[2], dtype=torch.float32, device=q.device).expand(*q.shape[:3], -1)
            self.watch(deberta.attend(q, k, places, mask, self.scale, relative, q_of, k_of), mask)
        return deberta.attend(q, k, v, mask, self.scale, relative, q_of, k_of)

    def mlp(self, x):
        if self.spec.gated:
            gate, up = project(x, self.gate, self.up)
            form = partial(gated, gate, up, self.activation)
        else:
            form = partial(plain, self.up(x), self.activation)
        inner = form()
        with formed_again(inner, form):
            return self.down(inner)

    def forward(self, x, mask, turn):
        if self.spec.placement == "post":
            x = self.attention_norm(x + self.attend(x, mask, turn))
            return self.mlp_norm(x + self.mlp(x))
        normed = self.attention_norm(x)
        attended = self.attention_output_norm(self.attend(normed, mask, turn))
        if self.spec.placement == "shared":
            return x + attended + self.mlp(normed)
        if self.spec.placement == "parallel":
            return x + attended + self.mlp(self.mlp_norm(x))
        x = x + attended
        return x + self.mlp_output_norm(self.mlp(self.mlp_norm(x)))


def project(x, *linears):
    """The outputs of `linears` for one x. What stands in the place of a linear may take them all in one (`joint`)."""
    joint = next((linear.joint for linear in linears if hasattr(linear, "joint")), None)
    return joint(x, linears) if joint else [linear(x) for linear in linears]


class Base(nn.Module):
    """`ids` [B, T] and the rows' `lengths` [B] in tokens -> hidden states [B, T, D], after the last norm.

    A row's hidden states do not depend on the other rows or on the padding; those of padding are meaningless.
    """

    def __init__(self, spec, unembedding=False):
        super().__init__()
        self.spec = spec
        self.embed = Embed(spec)
        self.layers = nn.ModuleList(Layer(spec, number) for number in range(len(spec.layers)))
        self.norm = make_norm(spec, spec.width) if spec.final_norm else nn.Identity()
        self.ropes = nn.ModuleList(rope.Rotary(r) for r in spec.ropes)
        self.relative = deberta.Distances(spec, make_norm) if spec.relative else None
        self.has_unembedding, self.products = unembedding, None
        if unembedding and not spec.tied:
            self.unembedding = Linear(spec.width, spec.vocabulary, bias=spec.unembed_bias)

    def forward(self, ids, lengths, copies=1, prefix=0, members=1):
        """With `copies` K the rows are gone through K times, one pass after the other, but the first `prefix` layers
        once for all: for a population, which has no adapter there. -> [K B, T, D].

        members  how many a population has, whose rows follow one another: DeBERTa's distances go through each one's
                 adapters
        """
        x = self.through(self.embed(ids), ids, lengths, 0, prefix, members)
        if copies > 1:
            x, ids, lengths = x.repeat(copies, 1, 1), ids.repeat(copies, 1), lengths.repeat(copies)
        return self.norm(self.through(x, ids, lengths, prefix, len(self.layers), copies * members))

    def through(self, x, ids, lengths, start, stop, members=1):
        """The states x [B, T, D] below layer `start` -> those below layer `stop`."""
        if start == stop:
            return x
        turns = [turn(lengths, ids.shape[1], x.dtype) for turn in self.ropes]
        masks = {window: self.mask(ids, lengths, window, x.dtype) for window in {s.window for s in self.spec.layers}}
        relative = self.relative(ids.shape[1], members) if self.relative else None
        for layer, here in zip(self.layers[start:stop], self.spec.layers[start:stop], strict=True):
            x = layer(x, masks[here.window], relative if here.rope is None else turns[here.rope])
        return x

    def mask(self, ids, lengths, window, dtype):
        """What a token may attend to, additive: [B or 1, 1, T or 1, T]; None if that is every earlier one and itself.

        A decoder's tokens never see the padding on their right. Every token may see itself, so that no row of
        scores is empty. Additive, in the model's dtype: attention's fast CPU path takes no boolean mask.
        """
        T = ids.shape[1]
        window = window if window is not None and window < T else None
        if self.spec.causal and window is None:
            return None
        places = torch.arange(T, device=ids.device)
        if not self.spec.causal:
            unseen = (places >= lengths[:, None])[:, None, None]  # [B, 1, 1, T]
        if window is not None:
            away = places[:, None] - places  # [T, T]
            if self.spec.causal:
                unseen = ((away < 0) | (away >= window))[None, None]
            else:
                unseen = (unseen | (away.abs() >= window)) & (away != 0)
        return torch.zeros(unseen.shape, dtype=dtype, device=ids.device).masked_fill_(unseen, -torch.inf)

    @property
    def unembedder(self):
        """The module that has the weights of the unembedding."""
        return self.embed if self.spec.tied else self.unembedding

    def unembedding_weights(self):
        """The weight [V, D] and the bias [V] or None that make logits of hidden states."""
        if not self.has_unembedding:
            raise ValueError("the base was loaded without its unembedding")
        if not self.spec.tied:
            return self.unembedding.weight, self.unembedding.bias
        table = self.embed.tokens.weight
        return table.to(self.products or table.dtype), None

    def unembed(self, hidden):
        """Logits float32 [..., V] of the next token from hidden states [..., D] of a decoder that was loaded with its
        unembedding."""
        logits = linear(hidden, *self.unembedding_weights()).float()
        cap = self.spec.final_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def load(folder, dtype=torch.float32, device="cpu", unembedding=False, then=None, products=None):
    """The `Base` in a checkpoint folder, its parameters frozen; a decoder with its `unembedding` if asked for.

    The tensors go one by one from the memory-mapped file to `dtype` and `device`. Where `then` is given, it is called
    with each part of the base (embedding, layers, unembedding, and last the whole) as soon as that has its parameters:
    for what is to be done with a part before the next takes memory. `products` is the dtype that the matrices of all
    linear maps are rounded to (default: `dtype`), in which their products are then computed; the rest stays in `dtype`.
    Raises InputError for an unsupported configuration and for missing, unknown or misshapen tensors.
    """
    spec = families.read_spec(checkpoint.read_config(folder))
    if spec.activation not in ACTIVATIONS:
        raise InputError(
            f"config.json: activation {shown(spec.activation)} is not implemented "
            f"(there are: {', '.join(ACTIVATIONS)}): choose another --model"
        )
    if unembedding and not spec.causal:
        raise InputError(f"a {spec.family} base is an encoder and predicts no next token: choose a decoder's --model")
    tensors = checkpoint.Tensors(folder)
    spec = places.own_head(spec, tensors)
    if len(tensors) < len(spec.layers):
        raise InputError(
            f"config.json asks for {len(spec.layers):,} layers, but the checkpoint has {len(tensors):,} tensors: "
            "the files do not belong together, fetch the checkpoint again"
        )
    with torch.device("meta"):
        model = Base(spec, unembedding).requires_grad_(False)
    found = places.tensor_places(model, tensors.keys())
    places.check_shapes(model, found, tensors, folder)
    places.say_unused(found, tensors.keys(), families.find(spec.family))
    model.products = products
    model.ropes.to(device)
    for name, buffer in model.relative.named_buffers() if model.relative else ():
        setattr(model.relative, name, buffer.to(device))
    names = {part: name for name, part in model.named_modules()}
    for part in (model.embed, *model.layers, *([model.unembedder] if unembedding and not spec.tied else []), model):
        for name, parameter in list(part.named_parameters(prefix=names[part])):
            if not parameter.is_meta:
                continue
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            kind = products if products and leaf == "weight" and isinstance(module, Linear) else dtype
            value = nn.Parameter(torch.empty(parameter.shape, dtype=kind, device=device), requires_grad=False)
            tensors.copy_to(value, *found[name])
            setattr(module, leaf, value)
        if then is not None:
            then(part)
    return model


def check_fits(spec, max_length):
    """Raise InputError unless every position has an embedding."""
    if max_length > spec.positions:
        raise InputError(f"max_length is {max_length}, but the base has {spec.positions} positions: use at most these")
