"""The mask against the hash written out in Python's integers, its statistics, and what it must not depend on."""

import pytest
import torch

from minilora.kernels import dropout as op


def mask(shape, p, keys, salt):
    """`op.mask` for shares: a number, or a tensor [K]."""
    least = torch.tensor([op.least_kept(one) for one in p.tolist()], dtype=torch.int32) if torch.is_tensor(p) else None
    return op.mask(shape, op.least_kept(p) if least is None else least.to(keys.device), keys, salt)


def hashed(h):
    """lowbias32 of one number modulo 2^32."""
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * multiplier) % 2**32
    return h ^ (h >> 16)


def test_mask_is_the_hash():
    keys, salt, shape, p = torch.tensor([7, -3], dtype=torch.int32), 123456789, (6, 5, 4), torch.tensor([0.3, 0.6])
    found = mask(shape, p, keys, salt)
    golden, compared = 0x9E3779B1, 0
    for row in range(6):
        member, place = divmod(row, 3)
        for token in range(5):
            for feature in range(4):
                h = (keys[member].item() + salt + place * golden) % 2**32
                for number in (token, feature):
                    h = (hashed(h) + number * golden) % 2**32
                signed = (hashed(h) + 2**31) % 2**32 - 2**31
                assert found[row, token, feature] == (signed >= int(float(p[member]) * 2**32) - 2**31)
                compared += 1
    assert compared == 120 and found.any() and not found.all()


def test_shares_and_independence():
    key = torch.tensor([11], dtype=torch.int32)
    for p in (0.05, 0.5, 0.9):
        kept = mask((64, 32, 96), p, key, 5).double()
        error = (p * (1 - p)) ** 0.5
        assert abs(kept.mean() - (1 - p)) < 4 * error / kept.numel() ** 0.5
        for dims in ((0, 1), (1, 2), (0, 2)):
            part = kept.mean(dims)
            assert part.std() == pytest.approx(error / (kept.numel() / len(part)) ** 0.5, rel=0.6)
        for other in (mask((64, 32, 96), p, key + 1, 5), mask((64, 32, 96), p, key, 6), kept.roll(1, 2)):
            agreement = (kept.bool() == other.bool()).double().mean()
            assert abs(agreement - (p**2 + (1 - p) ** 2)) < 5 / kept.numel() ** 0.5


def test_neither_padding_nor_neighbours_nor_device_matter(device):
    keys = torch.tensor([3, 4], dtype=torch.int32)
    both = mask((10, 9, 7), torch.tensor([0.2, 0.5]), keys, 8)
    assert torch.equal(mask((5, 6, 7), 0.5, keys[1:], 8), both[5:, :6])
    assert torch.equal(mask((5, 6, 7), torch.tensor([0.2]), keys[:1], 8), both[:5, :6])
    assert torch.equal(mask((5, 6, 7), 0.5, keys[1:].to(device), 8).cpu(), both[5:, :6])


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 5)])
def test_values_and_gradients(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keys, p = torch.tensor([3, 9], dtype=torch.int32), torch.tensor([0.25, 0.5])
    kept = mask((4, 3 if len(shape) == 3 else 1, 5), p, keys, 1).view(shape)
    share = p.double().repeat_interleave(2).view(4, *[1] * (len(shape) - 1))
    found = op.dropout(x, p, keys, 1, torch.tensor([op.least_kept(one) for one in p.tolist()], dtype=torch.int32))
    torch.testing.assert_close(found, torch.where(kept, x / (1 - share), 0.0))
    keys.add_(1)  # a later step's keys do not reach an earlier step's backward
    [gradient] = torch.autograd.grad(found, x, torch.ones_like(x))
    torch.testing.assert_close(gradient, kept / (1 - share))
    low = op.dropout(x.detach().bfloat16(), 0.25, keys[:1], 1)
    assert low.dtype == torch.bfloat16 and 0 < (low == 0).sum() < low.numel()


def test_compiles_without_graph_breaks():
    keys, x = torch.tensor([3], dtype=torch.int32), torch.randn(4, 3, 5)
    compiled = torch.compile(op.dropout, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 0.25, keys, 2), op.dropout(x, 0.25, keys, 2))


def test_modules_of_one_input_drop_what_each_would():
    """Values and gradients bit for bit; the hashes follow the keys' content, and are made once for it."""
    keys, salts, share = torch.tensor([3, 9], dtype=torch.int32), [7, 123456789, 5], 0.25
    hashes = op.Hashes(keys, salts)
    draw = torch.Generator().manual_seed(0)
    for shape in ((4, 3, 6), (4, 6)):
        for _ in range(2):
            x = torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
            given = hashes.of([5, 7], *op.size_of(x, keys))
            assert hashes.of([7], *op.size_of(x, keys))[0].equal(given[0][1:]) and len(hashes.made) == 1
            found = op.dropouts(x, share, *given)
            wanted = [op.dropout(x, share, keys, salt) for salt in (5, 7)]
            assert len(found) == 2 and all(map(torch.equal, found, wanted)) and not torch.equal(*found)
            together = op.drop(x[None], share, op.least_kept(share), *given)  # as on an accelerator
            assert all(map(torch.equal, together, wanted))
            weights = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2)]
            gradients = [torch.autograd.grad(ys, x, weights)[0] for ys in (found, wanted)]
            torch.testing.assert_close(*gradients)
            keys += 1


def test_halves_are_folded_as_whole_numbers():
    h = torch.randint(-(2**31), 2**31, (5, 100), dtype=torch.int32)
    halves = h.clone().view(torch.int16).unflatten(-1, (-1, 2))
    halves[..., 0].bitwise_xor_(halves[..., 1])
    assert torch.equal(halves.flatten(-2).contiguous().view(torch.int32), op.fold(h.clone()))
