"""What may differ between adapters: the map that they add to the base (`VARIANTS`), and where it starts (`STARTS`).

A variant is an object with `trains`, `init`, `forward` and `merge`. A start is a function that returns A [R, in] and
B [out, R], float32. All act on a `layer.LoRALinear`. Pairs that mean nothing are refused by `targets.check_variant`,
before any weight is read. Rank-stabilised LoRA is a scale (`targets.SCALES`) and LoRA+ a learning rate
(`training/optimizers.py`), so both combine with all of these.

Some starts are a part of W (`targets.MOVING`): the papers then train B A beside the residual W - s B0 A0. Here the
base stays as it is; the start B0 A0 is kept, frozen, and the adapter subtracts it:

    (W - s B0 A0) + s B A  =  W + s [B, -B0] [A; A0]

The two are the same map, but this one needs no second copy of W, rounds nothing in bfloat16, and is always a plain
adapter of rank 2R on the original base. It costs a second low-rank product.
"""

import torch
from torch import nn

from minilora import parallel
from minilora.console import say_once
from minilora.errors import InputError
from minilora.kernels.dora_linear import dora_linear
from minilora.kernels.lora_linear import lora_linear
from minilora.lora import targets


def plain_factors(adapted):
    """A [R', in] and B [out, R'] of the plain adapter on the original base, for the slot's scale s (with a magnitude:
    of the direction). R' is R, or 2R where the start is a part of W. `adapted`: a `LoRALinear`, or an `adapter.Part`.
    """
    if adapted.A0 is None:
        return adapted.A, adapted.B
    return torch.cat([adapted.A, adapted.A0]), torch.cat([adapted.B, -adapted.B0], 1)


class LoRA:
    """W' = W + s B A; A and B are trained. Hu et al. 2021 (arXiv 2106.09685), section 4.1."""

    trains = ("A", "B")

    def init(self, layer):
        """Give `layer` what the variant has besides A and B: here nothing."""

    def projection(self, layer):
        """What `kernels/lora_linear.py` takes: (W, b, A, B, s)."""
        return layer.original, layer.linear.bias, *plain_factors(layer), layer.factor * layer.slot.scale

    def forward(self, layer, x, seen):
        """x [..., in] -> x W'^T + b [..., out]; `seen` is what dropout left of x for the adapter, or None."""
        return lora_linear(x, *self.projection(layer), seen, layer.form)

    def merge(self, layer, dtype):
        """W + f (W' - W) [out, in] in `dtype`, f the layer's factor."""
        A, B = (factor.to(dtype) for factor in plain_factors(layer))
        return layer.original.to(dtype) + layer.factor * layer.slot.scale * (B @ A)


class DoRA(LoRA):
    """W' = m (W + s B A) / |W + s B A|, norms by row; A, B and the magnitude m [out] are trained, and m starts at |W|.

    Liu et al. 2024 (arXiv 2402.09353), section 4.1; `kernels/dora_linear.py` has the gradient and the cost.
    """

    trains = ("A", "B", "magnitude")
    projection = None  # it needs norms before it can multiply, so it is not one of several in a product

    def init(self, layer):
        """Raises InputError for a row of W that is 0: it has no direction."""
        squares = widened(layer.original).square().sum(1)
        if (squares == 0).any():
            raise InputError(
                f"row {int(squares.argmin())} of the base's weight is 0, so variant = 'dora' finds no direction to "
                "keep: use another variant, or leave this projection out"
            )
        layer.register_buffer("squares", squares)  # of the norms of W's rows, [out]
        layer.magnitude = nn.Parameter(squares.sqrt())

    def forward(self, layer, x, seen):
        A, B = plain_factors(layer)
        return dora_linear(
            x, layer.original, layer.linear.bias, A, B, layer.magnitude, layer.squares, layer.slot.scale, seen,
            layer.factor, layer.form,
        )  # fmt: skip

    def merge(self, layer, dtype):
        A, B = (factor.to(dtype) for factor in plain_factors(layer))
        weight = layer.original.to(dtype)
        direction = weight + layer.slot.scale * (B @ A)
        turned = (layer.magnitude.to(dtype) / direction.norm(dim=1))[:, None] * direction
        return torch.lerp(weight, turned, layer.factor)


class LoRAFA(LoRA):
    """W' = W + s B A; A stays at its start and B is trained. Zhang et al. 2023 (arXiv 2308.03303v1), section 3.

    The gradient of B needs x A^T [N, R] and not x [N, in]: keeping no x is what the paper is for. The correction of
    B's gradient that the paper's second version added is left out (PEFT's `create_lorafa_optimizer` applies it).
    """

    trains = ("B",)


def widened(weight):
    """In float32, or wider if the weight is; whole, if the base is sharded. Raises InputError for NaN or infinity."""
    wide = parallel.gathered(weight.detach()).to(torch.promote_types(weight.dtype, torch.float32))
    if not wide.isfinite().all():
        raise InputError("the base's weight has NaN or infinity: fetch the base again, or use another")
    return wide


def kaiming(weight, slot, generator):
    """A uniform in +-1/sqrt(in), B = 0: the range of the code that Hu et al. 2021 published.

    A smaller rank's A is the first rows of a larger one's.
    """
    bound = weight.shape[1] ** -0.5
    A = torch.empty(slot.rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(len(weight), slot.rank)


def gaussian(weight, slot, generator):
    """A normal, B = 0 (Hu et al. 2021, section 4.1); the standard deviation 1/R is PEFT's.

    Drawn row by row, so that R A is the first rows of a larger rank's.
    """
    rows = [torch.randn(weight.shape[1], generator=generator) for _ in range(slot.rank)]
    return torch.stack(rows) / slot.rank, torch.zeros(len(weight), slot.rank)


def orthogonal(weight, slot, generator):
    """A = Q1^T X / 10 and B = Y Q2 / 10 with Q1, Q2 [R/2, R] the odd and the even rows of a random orthogonal matrix
    and X [R/2, in], Y [out, R/2] normal: neither is 0, but B A = Y Q2 Q1^T X / 100 is.

    After Datta Nimmaturi, "Rethinking LoRA initialisation" (datta0.github.io/posts/rethink-lora-init), as PEFT has
    it. A has rank R/2. R is even.
    """
    out_features, in_features = weight.shape
    Q, _ = torch.linalg.qr(torch.randn(slot.rank, slot.rank, generator=generator))
    X = torch.randn(in_features, slot.rank // 2, generator=generator).T
    Y = torch.randn(slot.rank // 2, out_features, generator=generator).T
    return Q[0::2].T @ X / 10, Y @ Q[1::2] / 10


def pissa(weight, slot, generator):
    """s B0 A0 is the best approximation of W of rank R: with W = U S V^T, B0 = U_R sqrt(S_R / s) and
    A0 = sqrt(S_R / s) V_R^T. Meng et al. 2024 (arXiv 2404.02948), section 3; that s is divided out is PEFT's.

    Each singular vector of U has its largest entry positive. Takes about out in min(out, in) operations, on the
    weight's device; other hardware may round differently, and so give other factors. Draws nothing.
    """
    fits(weight, slot)
    U, S, Vh = torch.linalg.svd(widened(weight), full_matrices=False)
    U, Vh, root = U[:, : slot.rank], Vh[: slot.rank], (S[: slot.rank] / slot.scale).sqrt()
    sign = signs(U.gather(0, U.abs().argmax(0, keepdim=True))[0])  # [R]
    return (sign * root)[:, None] * Vh, U * (sign * root)


def olora(weight, slot, generator):
    """With W = Q R, B0 is the first columns of Q and A0 the first rows of R. Büyükakyüz 2024 (arXiv 2406.01775),
    section 3; that the base keeps W - s B0 A0, with s, is PEFT's.

    R's diagonal is not negative. A smaller rank's factors are a part of a larger one's. Draws nothing.
    """
    fits(weight, slot)
    Q, R = torch.linalg.qr(widened(weight))
    sign = signs(R.diagonal()[: slot.rank])
    return sign[:, None] * R[: slot.rank], Q[:, : slot.rank] * sign


def fits(weight, slot):
    out_features, in_features = weight.shape
    if slot.rank > min(weight.shape):
        raise InputError(
            f"rank {slot.rank} is larger than the matrix that the start is a part of ({out_features} x {in_features}): "
            f"use at most {min(weight.shape)}"
        )


def signs(values):
    """1 or -1 for each value; 0 counts as positive."""
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)


VARIANTS = {"lora": LoRA(), "dora": DoRA(), "lora-fa": LoRAFA()}
STARTS = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal, "pissa": pissa, "olora": olora}


def add_variant(name, variant):
    """Make `--variant NAME` of an object with `trains`, `init`, `forward` and `merge`, such as a subclass of `LoRA`."""
    VARIANTS[name] = variant
    if name not in targets.VARIANTS:
        targets.VARIANTS.append(name)


def add_start(name, start):
    """Make `--init NAME` of a function (weight [out, in], slot, generator) -> (A [R, in], B [out, R]), float32."""
    STARTS[name] = start
    if name not in targets.STARTS:
        targets.STARTS.append(name)


def check_written(layer, name):
    """Refuse what a file of an adapter has no place for, before it is trained. `name`: of the layer's variant.

    Raises InputError for a parameter other than A and B (DoRA has its magnitude too). A line says where PEFT, whose
    format knows two maps only, would compute another one.
    """
    places = ("A", "B", "magnitude") if name == "dora" else ("A", "B")
    own = [key for key, _ in layer.named_parameters() if not key.startswith("linear.")]
    lost = sorted({*own, *layer.variant.trains} - {*places})
    if lost:
        raise InputError(
            f"variant {name!r} has a parameter {lost[0]!r}, and an adapter's files hold only {', '.join(places)}: it "
            "would be trained and then lost; fold it into A and B, or keep it fixed"
        )
    if type(layer.variant).merge not in (LoRA.merge, DoRA.merge):
        say_once(
            f"warning    PEFT has no form of variant {name!r}: it reads the run's adapter/ as W + s B A; minilora does "
            "not, where the variant is added"
        )
