"""AdamW over the flat state of all members of a population in one step.

    m = b1 m + (1 - b1) g              v = b2 v + (1 - b2) g^2
    p = p - r w p - r m' / (sqrt(v') + e)          m' = m / (1 - b1^t),  v' = v / (1 - b2^t)

Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2, with the decay w times the rate r, as torch has it. p, g, m
and v are [K, P], a row for each member, whose own are t, r and w; `ratios` multiply the rate of single parameters
(LoRA+). A member whose rate is 0 stays as it is. On a CPU the state goes through in pieces that fit into a cache, so
that memory is read and written once, however many passes a piece takes. Elsewhere it is one piece: there a pass is a
launch.
"""

PIECE = 1 << 18  # numbers of each of p, g, m and v, on a CPU


def reference(p, g, m, v, t, r, w, b1=0.9, b2=0.999, e=1e-8):
    """The equations: the new (p, m, v), for step t counted from 1."""
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    return p - r * w * p - r * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + e), m, v


def adamw(values, grads, m, v, steps, rates, decays, ratios=None, betas=(0.9, 0.999), eps=1e-8):
    """The equations in place. values, grads, m, v [K, P]; steps (from 1), rates, decays [K]; ratios [K, P] or None."""
    first, second = betas
    steps, rates, decays = steps[:, None], rates[:, None], decays[:, None]
    bias, root = 1 - first**steps, (1 - second**steps).sqrt()
    size = max(1, PIECE // len(values) if values.device.type == "cpu" else values.shape[1])
    pieces = [tensor.split(size, 1) for tensor in (values, grads, m, v)]
    pieces.append([1.0] * len(pieces[0]) if ratios is None else ratios.split(size, 1))
    for p, g, mean, square, ratio in zip(*pieces, strict=True):
        mean.lerp_(g, 1 - first)
        square.mul_(second).addcmul_(g, g, value=1 - second)
        change = mean / (square.sqrt() / root).add_(eps)
        rate = rates * ratio
        p.mul_(1 - rate * decays).addcmul_(change, rate / bias, value=-1)
