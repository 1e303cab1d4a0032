"""What a forward pass keeps for the backward: bytes of each block, against what the operators' docstrings derive.

Counted are all storages that came to be in the pass and outlive it, whoever holds them.
"""

import pytest
import torch
from conftest import bert_spec
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.base import families, model
from minilora.lora.layer import attach
from minilora.lora.targets import Slot

B, D, H, E, INNER = 3, 24, 4, 6, 40
G = 2  # of the decoder


def storages(tree):
    return {
        StorageWeakRef(s): s.nbytes() for s in (t.untyped_storage() for t in tree_leaves(tree) if torch.is_tensor(t))
    }


class Born(TorchDispatchMode):
    """The storages that operations make, and not those that they are given."""

    def __enter__(self):
        self.given, self.made = {}, {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.given |= {s: n for s, n in storages((args, kwargs)).items() if s not in self.made}
        result = function(*args, **(kwargs or {}))
        self.made |= {s: n for s, n in storages(result).items() if s not in self.given}
        return result

    def alive(self):
        return sum(size for storage, size in self.made.items() if not storage.expired())


def kept(block, *arguments):
    """Bytes that `block(*arguments)` keeps for its backward, beside its arguments and its result."""
    with Born() as born:
        result = block(*arguments)
    assert result.grad_fn is not None
    return born.alive() - result.untyped_storage().nbytes()


def encoder():
    return bert_spec(vocab_size=50, hidden_size=D, num_attention_heads=H, intermediate_size=INNER,
                     max_position_embeddings=80)  # fmt: skip


def decoder():
    config = dict(model_type="llama", vocab_size=50, hidden_size=D, num_hidden_layers=3, num_attention_heads=H,
                  num_key_value_heads=G, intermediate_size=INNER, max_position_embeddings=80, hidden_act="silu",
                  rms_norm_eps=1e-5, tie_word_embeddings=True)  # fmt: skip
    return families.read_spec(config)


def layer_of(spec, targets, dtype, T):
    """(a layer with adapters on `targets`, x [B, T, D] with a gradient, mask, turn)."""
    base = model.Base(spec)
    torch.manual_seed(0)
    for name, parameter in base.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    base.to(dtype).requires_grad_(False)
    attach(base, {f"layers.1.{target}": Slot(2, 2.0, 1.0) for target in targets})
    lengths = torch.tensor([T, 1, T - 1])
    turn = base.ropes[0](lengths, T, dtype) if base.ropes else None
    mask = base.mask(torch.zeros(B, T, dtype=torch.int64), lengths, None, dtype)
    return base.layers[1], torch.randn(B, T, D, dtype=dtype, requires_grad=True), mask, turn


CASES = [
    (spec, targets, dtype, T)
    for spec in (encoder, decoder)
    for targets in (("q", "k", "v"), ("q", "k", "v", "o", "up", "down"))
    for dtype, lengths in ((torch.float32, (17, 48, 60)), (torch.bfloat16, (17, 60)))
    for T in lengths
]


def attention_numbers(groups, T, dtype, adapts_o):
    """Numbers a token of attention: q, k and v, then p, or torch's own's output and a statistic of each head; and o's
    input if that has an adapter, which is torch's output where that has tokens before heads, as without rotation."""
    own = dtype == torch.float32 and T > 48
    o_input = D * (adapts_o and not (own and groups == H))
    return (H + 2 * groups) * E + (D + H if own else H * T) + o_input


@pytest.mark.parametrize("spec,targets,dtype,T", CASES)
def test_blocks_keep_what_is_derived(spec, targets, dtype, T):
    layer, x, mask, turn = layer_of(spec(), targets, dtype, T)
    size = dtype.itemsize
    grouped = spec is decoder
    found = kept(layer.attend, x, mask, turn)
    wanted = B * T * size * attention_numbers(G if grouped else H, T, dtype, "o" in targets)
    assert found == wanted, ("attention", found / B / T / size, wanted / B / T / size)
    found = kept(layer.mlp, x)
    wanted = B * T * size * INNER * (2 if grouped else 1)  # the pre-activations, whatever has an adapter
    assert found == wanted, ("mlp", found / B / T / size, wanted / B / T / size)
    found = kept(layer.mlp_norm, x)
    # One float32; in bfloat16 torch's own LayerNorm, with mean and deviation.
    wanted = B * T * (4 if grouped or dtype == torch.float32 else 2 * size)
    assert found == wanted, ("norm", found / B / T, wanted / B / T)


def test_cases():
    assert len(CASES) == 20


@pytest.mark.parametrize("spec", [encoder, decoder])
def test_a_layer_keeps_the_sum_of_its_blocks(spec):
    T = 17
    layer, x, mask, turn = layer_of(spec(), ("q", "k", "v"), torch.float32, T)
    found = kept(layer, x, mask, turn)
    if spec is encoder:  # and what its first norm gives
        numbers = attention_numbers(H, T, torch.float32, False) + INNER + D + 2 * 1
    else:  # and q's input, and the sum that the second norm is given
        numbers = attention_numbers(G, T, torch.float32, False) + 2 * INNER + D + D + 2 * 1
    assert found == B * T * 4 * numbers
