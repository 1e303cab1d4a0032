"""The operator against each member's equation, in values and in every gradient."""

import pytest
import torch

from minilora.kernels import lora_groups as op

RANKS = [(1, 3), (17, 5, 17), (2,)]  # of the members of three groups


def made(outs, in_features=7, rows=4, lacking=(), seed=0):
    """x [K rows, 1, in], and for each of `outs` (W, b, the A of each member, the B); a pair (projection, group) of
    `lacking` has none."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    projections = []
    for p, out in enumerate(outs):
        As = [[normal(r + p, in_features).requires_grad_() for r in own] if (p, g) not in lacking else None
              for g, own in enumerate(RANKS)]  # fmt: skip
        Bs = [own and [normal(out, len(A)).requires_grad_() for A in own] for own in As]
        projections.append((normal(out, in_features), normal(out) if p != 1 else None, As, Bs))
    K = sum(map(len, RANKS))
    return normal(K * rows, 1, in_features).requires_grad_(), projections


def padded(matrices):
    """[K_g, ...]: each padded with zeros to the largest."""
    if matrices is None:
        return None
    shape = [max(sizes) for sizes in zip(*(m.shape for m in matrices), strict=True)]
    grow = [(0, shape[1] - m.shape[1], 0, shape[0] - m.shape[0]) for m in matrices]
    return torch.stack([torch.nn.functional.pad(m, pair) for m, pair in zip(matrices, grow, strict=True)])


def one_by_one(x, projections, seen=None):
    ys, K = [], sum(map(len, RANKS))
    for weight, bias, As, Bs in projections:
        parts = []
        for own_x, own_seen, (A, B) in zip(
            x.chunk(K), (x if seen is None else seen).chunk(K),
            [(A and A[i], B and B[i]) for A, B, own in zip(As, Bs, RANKS, strict=True) for i in range(len(own))],
            strict=True,
        ):  # fmt: skip
            y = torch.nn.functional.linear(own_x, weight, bias)
            parts.append(y if A is None else y + own_seen @ A.T @ B.T)
        ys.append(torch.cat(parts))
    return ys


CASES = [
    ((5,), (), False), ((5,), (), True), ((5, 4, 3), (), False), ((5, 4), ((0, 1),), False),
    ((5, 4, 3), ((0, 0), (1, 0), (2, 0), (1, 2)), False), ((6,), ((0, 2),), True), ((3, 3), ((1, 0), (1, 1), (1, 2)),
    False),
]  # fmt: skip


@pytest.mark.parametrize("outs, lacking, apart", CASES, ids=str)
def test_values_and_gradients(outs, lacking, apart):
    x, projections = made(outs, lacking=lacking)
    seen = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x).requires_grad_() if apart else None
    leaves = [x, *([seen] if apart else [])]
    leaves += [m for *_, As, Bs in projections for own in (*As, *Bs) if own is not None for m in own]
    grouped = [(w, b, list(map(padded, As)), list(map(padded, Bs))) for w, b, As, Bs in projections]
    found = op.lora_groups(x, grouped, list(map(len, RANKS)), seen)
    wanted = one_by_one(x, projections, seen)
    torch.testing.assert_close(list(found), wanted)
    cotangents = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y) for y in wanted]
    gradients = torch.autograd.grad(found, leaves, cotangents)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, leaves, cotangents))
    adapted = 3 * len(outs) - len(lacking)
    assert len(found) == len(outs) and len(gradients) > 2 * adapted and all(g.abs().sum() > 0 for g in gradients)


def test_the_reference():
    x, [(weight, bias, As, Bs)] = made((5,))
    every_A, every_B = ([m for own in factors for m in own] for factors in (As, Bs))
    [wanted] = one_by_one(x, [(weight, bias, As, Bs)])
    torch.testing.assert_close(op.reference(x, weight, bias, every_A, every_B), wanted)
    assert len(every_A) == 6


def test_one_output_without_a_gradient_and_frozen_rows():
    x, projections = made((5, 4))
    grouped = [(w, b, list(map(padded, As)), list(map(padded, Bs))) for w, b, As, Bs in projections]
    y, _ = op.lora_groups(x.detach(), grouped, list(map(len, RANKS)))
    A = projections[0][2][1][0]
    wanted, _ = one_by_one(x.detach(), projections)
    [found], [right] = (torch.autograd.grad(one.square().sum(), [A]) for one in (y, wanted))
    torch.testing.assert_close(found, right)


def test_bfloat16_rows_and_float32_factors():
    x, projections = made((5, 4, 3))
    single = [(w.bfloat16(), None, [padded(A).float() for A in As], [padded(B).float() for B in Bs])
              for w, b, As, Bs in projections]  # fmt: skip
    ys = op.lora_groups(x.bfloat16(), single, list(map(len, RANKS)))
    wanted = one_by_one(x, [(w, None, As, Bs) for w, _, As, Bs in projections])
    for y, right in zip(ys, wanted, strict=True):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), right, rtol=0.03, atol=0.03 * right.abs().max().item())


def test_a_padded_rank_stays_zero():
    x, projections = made((5,))
    [(weight, bias, As, Bs)] = [(w, b, list(map(padded, As)), list(map(padded, Bs))) for w, b, As, Bs in projections]
    [y] = op.lora_groups(x, [(weight, bias, As, Bs)], list(map(len, RANKS)))
    dA, dB = torch.autograd.grad(y.square().sum(), [As[1], Bs[1]])
    assert dA.shape == (3, 17, 7) and (dA[1, 5:] == 0).all() and (dB[1, :, 5:] == 0).all() and (dA[1, :5] != 0).all()
