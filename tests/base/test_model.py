"""The BERT family against transformers, in every hidden state; padding invariance; refused checkpoints."""

import json
import math

import pytest
import torch
import transformers
from conftest import random_batch, tiny_bert
from safetensors.torch import load_file, save_file

from minilora.base import checkpoint, families, model, places
from minilora.errors import InputError

TINY = [  # odd sizes, one head and many, every activation, long positions
    dict(),
    dict(hidden_size=21, num_attention_heads=7, intermediate_size=13, num_hidden_layers=1),
    dict(hidden_size=8, num_attention_heads=1, intermediate_size=31, hidden_act="gelu_new", type_vocab_size=1),
    dict(hidden_size=30, num_attention_heads=5, hidden_act="relu", max_position_embeddings=300, layer_norm_eps=1e-5),
    dict(hidden_size=10, num_attention_heads=2, hidden_act="silu", num_hidden_layers=5),
    dict(hidden_size=18, num_attention_heads=9, hidden_act="gelu_pytorch_tanh", vocab_size=131),
]


def hidden_states(base, ids, lengths):
    """Ours, at the embeddings and after every layer, as transformers lists them."""
    states = []
    hooks = [base.embed.register_forward_hook(lambda *a: states.append(a[2]))]
    hooks += [layer.register_forward_hook(lambda *a: states.append(a[2])) for layer in base.layers]
    with torch.inference_mode():
        final = base(ids, lengths)
    for hook in hooks:
        hook.remove()
    assert final is states[-1]
    return states


def check_parity(reference, base, ids, lengths, tolerance=2e-5):
    device = next(base.parameters()).device
    reference, ids, lengths = reference.to(device), ids.to(device), lengths.to(device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    with torch.inference_mode():
        wanted = reference(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    found = hidden_states(base, ids, lengths)
    assert len(found) == len(wanted) == len(base.spec.layers) + 1
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        difference = (ours.float() - theirs.float())[mask].abs().max().item()
        assert difference <= tolerance, difference


def test_tiny_models_match_transformers(tmp_path, device):
    cases = 0
    for number, changes in enumerate(TINY):
        folder = tmp_path / str(number)
        reference = tiny_bert(folder, seed=number, **changes)
        base = model.load(folder, device=device)
        longest = min(base.spec.positions, 61)
        for lengths in ([1], [longest], [5, 5, 5], [longest, 1, 7, 2]):
            check_parity(reference, base, *random_batch(base.spec.vocabulary, lengths, number))
            cases += 1
    assert cases == 24


def test_real_checkpoint_matches_transformers(base_folder):
    from minilora.base import tokenizer
    from minilora.data.rows import load_rows

    reference = transformers.AutoModel.from_pretrained(base_folder, attn_implementation="eager").eval()
    base = model.load(base_folder)
    texts = load_rows("movie-snippets").texts[5:400:13]
    encoded = tokenizer.load(base_folder).encode(texts, 128)
    rows = [torch.from_numpy(encoded.ids[a:b]).long() for a, b in zip(encoded.offsets, encoded.offsets[1:])]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    assert len(rows) == 31 and lengths.min() < lengths.max()
    check_parity(reference, base, ids, lengths)
    check_parity(reference, base, *random_batch(30522, [512, 3]))


def test_a_checkpoint_inside_a_task_model_is_the_same_base(tmp_path):
    reference = tiny_bert(tmp_path / "bare")
    tensors = {"bert." + name: value for name, value in load_file(tmp_path / "bare" / "model.safetensors").items()}
    tensors |= {"classifier.weight": torch.zeros(2, 24), "cls.predictions.bias": torch.zeros(5)}
    save_file(tensors, tmp_path / "bare" / "model.safetensors")
    check_parity(reference, model.load(tmp_path / "bare"), *random_batch(90, [9, 4]))


def test_bfloat16(tmp_path):
    reference = tiny_bert(tmp_path).to(torch.bfloat16)
    base = model.load(tmp_path, torch.bfloat16)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    # Rounding differs with the order of sums: the states are of size 1 and the steps there 2^-8.
    check_parity(reference, base, *random_batch(90, [9, 4]), tolerance=0.1)


def test_rows_depend_neither_on_mates_nor_on_padding(tmp_path):
    tiny_bert(tmp_path)
    base = model.load(tmp_path).double()
    ids, lengths = random_batch(90, [30, 1, 12, 7])
    with torch.inference_mode():
        together = base(ids, lengths)
        cases = 0
        for row, length in enumerate(lengths.tolist()):
            alone = base(ids[row : row + 1, :length], lengths[row : row + 1])
            torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-13)
            other = ids[row : row + 1].clone()
            other[0, length:] = 17  # what stands in the padding does not matter
            torch.testing.assert_close(base(other, lengths[row : row + 1])[0, :length], alone[0], rtol=0, atol=1e-13)
            cases += 1
    assert cases == 4


def test_the_base_is_frozen_and_whole(tiny_folder):
    base = model.load(tiny_folder)
    assert not any(p.requires_grad for p in base.parameters())
    stored = load_file(tiny_folder / "model.safetensors")
    sources = places.tensor_places(base, stored)
    assert len(sources) == 5 + 3 * 16 == len({source for source, *_ in sources.values()})
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, stored[sources[name][0]])


def test_shapes_of_the_spec_are_those_of_the_modules(tiny_folder):
    base = model.load(tiny_folder)
    for number, layer in enumerate(base.layers):
        for target in base.spec.targets:
            assert tuple(getattr(layer, target).weight.shape) == base.spec.shape(target, number)


def refused(folder):
    with pytest.raises(InputError) as caught:
        model.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_config_values_are_refused_by_name(tiny_folder):
    original = json.loads((tiny_folder / "config.json").read_text())
    cases = 0
    for change, words in [
        (dict(model_type="berd"), ["berd", "bert"]),
        (dict(position_embedding_type="relative_key"), ["position_embedding_type", "relative_key"]),
        (dict(is_decoder=True), ["is_decoder"]),
        (dict(hidden_act="mish"), ["mish", "gelu"]),
        (dict(hidden_size=None), ["hidden_size"]),
        (dict(hidden_size="24"), ["hidden_size"]),
        (dict(num_attention_heads=5), ["num_attention_heads", "5"]),
        (dict(num_hidden_layers=0), ["num_hidden_layers"]),
        (dict(layer_norm_eps="x"), ["layer_norm_eps"]),
    ]:
        (tiny_folder / "config.json").write_text(json.dumps(original | change))
        message = refused(tiny_folder)
        assert all(word in message for word in words), message
        cases += 1
    assert cases == 9


def test_tensors_that_do_not_fit_are_refused_by_name(tiny_folder):
    path = tiny_folder / "model.safetensors"
    original = load_file(path)
    name = "encoder.layer.1.attention.self.key.weight"

    save_file({key: value for key, value in original.items() if key != name}, path)
    assert name in refused(tiny_folder)
    save_file(original | {"encoder.layer.3.output.dense.bias": torch.zeros(24)}, path)
    assert "encoder.layer.3.output.dense.bias" in refused(tiny_folder)
    save_file(original | {name: torch.zeros(24, 23)}, path)
    message = refused(tiny_folder)
    assert name in message and "[24, 23]" in message and "[24, 24]" in message


def test_length_must_fit(tiny_folder):
    spec = families.read_spec(checkpoint.read_config(tiny_folder))
    model.check_fits(spec, 37)
    with pytest.raises(InputError, match="37 positions"):
        model.check_fits(spec, 38)


def test_attention_scale_is_that_of_the_head_width(tiny_folder):
    # One layer, by hand, from the stored tensors: the equation of Vaswani et al. 2017, section 3.2.
    base = model.load(tiny_folder).double()
    layer, x = base.layers[0], torch.randn(1, 6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads = [part(x[0]).split(8, dim=1) for part in (layer.q, layer.k, layer.v)]
    attended = torch.cat([torch.softmax(q @ k.T / math.sqrt(8), 1) @ v for q, k, v in zip(*heads, strict=True)], 1)
    middle = layer.attention_norm(x[0] + layer.o(attended))
    wanted = layer.mlp_norm(middle + layer.down(torch.nn.functional.gelu(layer.up(middle))))
    found = layer(x, torch.zeros(1, 1, 1, 6, dtype=torch.float64), None)
    torch.testing.assert_close(found[0], wanted)
