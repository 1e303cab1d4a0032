"""Variants, starts and LoRA+: against PEFT where PEFT has them, else against restatements in float64."""

import copy
import warnings
from itertools import product

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from minilora.base import model
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.kernels import dora_linear, dropout
from minilora.lora import targets, variants
from minilora.lora.layer import attach, detach, merge, named_layers, scale_by, unmerge
from minilora.lora.targets import MOVING, SCALES, Slot, plan_slots
from minilora.lora.variants import STARTS, VARIANTS, plain_factors
from minilora.seeds import generator
from minilora.tasks.classification import Classifier
from minilora.training import optimizers
from minilora.training.member import trained_parameters
from minilora.training.state import Flat, load_state, save_state

METERS = {"step": 3, "seconds": 1.5, "tokens": 70, "inputs": {"base": "a"}, "choices": {"products": "mkl"}}
ALPHA = {"q": 5.0, "v": 8.0, "down": 3.0}
RANK = {"q": 4, "v": 2, "down": 6}
TARGETS = tuple(RANK)
PAIRS = [pair for pair in product(VARIANTS, STARTS) if pair != ("lora-fa", "orthogonal")]


class Net(nn.Module):
    """Three maps of odd shapes, tall and wide, with a bias and without."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.v, self.down = nn.Linear(13, 17), nn.Linear(17, 9, bias=False), nn.Linear(9, 11)

    def forward(self, x):
        return self.down(torch.tanh(self.v(torch.tanh(self.q(x)))))


def slots_of(scaling="constant"):
    return {name: Slot(RANK[name], ALPHA[name], SCALES[scaling](ALPHA[name], RANK[name])) for name in TARGETS}


def adapted(variant="lora", init="kaiming", scaling="constant", dtype=torch.float32, dropout=0.0, seed=3, device="cpu"):
    net = attach(Net().to(device, dtype), slots_of(scaling), dropout, seed, variant, init)
    return net.double() if dtype == torch.float64 else net


def theirs_of(variant, init="kaiming", scaling="constant", dtype=torch.float32, dropout=0.0):
    """PEFT's adapter on the same net, from its own start."""
    config = peft.LoraConfig(
        r=4, lora_alpha=5, target_modules=list(TARGETS), rank_pattern=RANK, alpha_pattern=ALPHA, lora_dropout=dropout,
        use_rslora=scaling == "rslora", use_dora=variant == "dora",
        init_lora_weights=True if init == "kaiming" else init,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a conversion that is not asked for
        net = peft.get_peft_model(Net().to(dtype), config)
    for name, parameter in net.named_parameters():
        if variant == "lora-fa" and "lora_A" in name:
            parameter.requires_grad_(False)
    return net


def trained(net):
    """{name: parameter} of what the adapter trains, PEFT's or ours, by our names."""
    found = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
            name = name.replace("lora_A", "A").replace("lora_B", "B").replace("lora_magnitude_vector", "magnitude")
            found[name] = parameter
    return found


def move(net, seed=7):
    """Give `net` what training might: factors away from the start and, where there are any, other magnitudes."""
    draw = torch.Generator().manual_seed(seed)

    def noise(parameter):
        return torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter)

    with torch.no_grad():
        for _, layer in named_layers(net):
            if "A" in layer.variant.trains:
                layer.A.add_(0.2 * noise(layer.A))
            layer.B.add_(0.2 * noise(layer.B))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.2 * noise(layer.magnitude))
    return net


def copy_to_theirs(net, theirs):
    """Our factors and magnitudes, frozen ones too, into PEFT's modules."""
    with torch.no_grad():
        for name, layer in named_layers(net):
            module = theirs.base_model.model.get_submodule(name)
            module.lora_A.default.weight.copy_(layer.A)
            module.lora_B.default.weight.copy_(layer.B)
            if layer.magnitude is not None:
                module.lora_magnitude_vector.default.weight.copy_(layer.magnitude)


class SameDropout(nn.Module):
    """In the place of PEFT's dropout one that drops what ours drops."""

    def __init__(self, layer):
        super().__init__()
        self.share, self.keys, self.salt = layer.dropout, layer.keys, layer.salt

    def forward(self, x):
        kept = dropout.mask(x.shape, dropout.least_kept(self.share), self.keys, self.salt)
        return x * kept / (1 - self.share)


def some_x(rows=3, dtype=torch.float32):
    return torch.randn(rows, 5, 13, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)


def run(net, x):
    """The output, and the gradients of x and of all that is trained, for a fixed and uneven cotangent."""
    x = x.clone().requires_grad_()
    y = net(x)
    cotangent = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    parameters = trained(net)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], cotangent)
    return {"y": y.detach(), "x": gradients[0]} | dict(zip(parameters, gradients[1:]))


def compare(found, wanted, tolerance):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        size = value.abs().max().item()
        assert size > 1e-3, name  # else equal to anything small
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * max(1, size))


def exact_weight(layer, weight, factor=1.0):
    """W + f (W' - W), restated in float64 from the trained tensors and the start; `weight` is the original W."""
    W, A, B = weight.double(), layer.A.double(), layer.B.double()
    change = B @ A if layer.A0 is None else B @ A - layer.B0.double() @ layer.A0.double()
    new = W + layer.slot.scale * change
    if layer.magnitude is not None:
        new = layer.magnitude.double()[:, None] * new / new.pow(2).sum(1, keepdim=True).sqrt()
    return (W + factor * (new - W)).detach()


# --- against PEFT

WITH_PEFT = [
    (variant, init, scaling, dtype)
    for variant, init in PAIRS
    for scaling in ("constant", "rslora")
    for dtype in (torch.float32, torch.float64)
    if not (init in MOVING and dtype == torch.float64)  # which PEFT refuses
]


def test_values_and_gradients_match_peft():
    cases = 0
    for variant, init, scaling, dtype in WITH_PEFT:
        net = adapted(variant, init, scaling, dtype)
        theirs = theirs_of(variant, init, scaling, dtype)
        tolerance = 3e-5 if dtype == torch.float32 else 1e-7 if variant == "dora" else 1e-12
        for rows in (1, 40):  # the side path, and the merged one
            x = some_x(rows, dtype)
            torch.testing.assert_close(net(x), Net().to(dtype)(x), rtol=0, atol=max(tolerance, 1e-6))
            copy_to_theirs(move(net), theirs)
            found, wanted = run(net, x), run(theirs, x)
            compare(found, wanted, tolerance)
            assert len(found) == 2 + 3 * len(VARIANTS[variant].trains)
            net = adapted(variant, init, scaling, dtype)
            cases += 1
        copy_to_theirs(move(net), theirs)
        theirs.merge_adapter()
        for name, layer in named_layers(net):
            wanted = theirs.base_model.model.get_submodule(name).base_layer.weight
            torch.testing.assert_close(layer.merged_weight(), wanted, rtol=0, atol=tolerance)
    assert cases == 2 * (2 * 14 * 2 - 2 * 2 * 3)


def test_dropout_matches_peft():
    cases = 0
    for variant, dtype in product(VARIANTS, (torch.float32, torch.float64)):
        net, theirs = move(adapted(variant, dtype=dtype, dropout=0.3)), theirs_of(variant, dtype=dtype, dropout=0.3)
        copy_to_theirs(net, theirs)
        for name, layer in named_layers(net):
            layer.keys = torch.tensor([5], dtype=torch.int32)
            theirs.base_model.model.get_submodule(name).lora_dropout["default"] = SameDropout(layer)
        results = [run(each.train(), some_x(8, dtype)) for each in (net, theirs)]
        compare(*results, 3e-5 if dtype == torch.float32 else 1e-7)
        assert not torch.allclose(results[0]["y"], net.eval()(some_x(8, dtype)), atol=1e-2)
        cases += 1
    assert cases == 6


def test_starts_match_peft(monkeypatch):
    compared = 0
    for init, scaling in product(MOVING, ("constant", "rslora")):
        net, theirs, plain = adapted(init=init, scaling=scaling), theirs_of("lora", init, scaling), Net()
        for name, layer in named_layers(net):
            module = theirs.base_model.model.get_submodule(name)
            wanted = module.lora_B.default.weight @ module.lora_A.default.weight  # without the ambiguous signs
            torch.testing.assert_close(layer.B @ layer.A, wanted, rtol=0, atol=1e-5)
            residual = plain.get_submodule(name).weight - layer.slot.scale * layer.B0 @ layer.A0
            torch.testing.assert_close(residual, module.base_layer.weight, rtol=0, atol=1e-5)
            assert wanted.abs().max() > 0.02
            compared += 1
    # Fed the same random numbers, in our module's order, PEFT's orthogonal start is ours.
    net, plain, randn = adapted(init="orthogonal"), Net(), torch.randn
    for name, layer in named_layers(net):
        draw = generator(3, name)
        monkeypatch.setattr(torch, "randn", lambda *size, d=draw: randn(*size, generator=d))
        config = peft.LoraConfig(r=RANK[name], target_modules=[name], init_lora_weights="orthogonal")
        module = peft.get_peft_model(plain, config).base_model.model.get_submodule(name)
        monkeypatch.undo()
        torch.testing.assert_close(layer.A, module.lora_A.default.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.B, module.lora_B.default.weight, rtol=0, atol=1e-6)
        plain = Net()
        compared += 1
    assert compared == 2 * 2 * 3 + 3


def steps(net, optimizer, count=6, rate=3e-3):
    """Fit `net` to fixed numbers, by torch's optimizer or ours; returns what is trained."""
    dtype = next(net.parameters()).dtype
    x, wanted = some_x(20, dtype), torch.linspace(-1, 1, 1100, dtype=dtype).view(20, 5, 11)
    for _ in range(count):
        (net(x) - wanted).square().mean().backward()
        if isinstance(optimizer, optimizers.AdamW):
            flat = optimizer.flat
            with torch.no_grad():
                grads = torch.zeros_like(flat.values)
                for name, parameter in trained(net).items():
                    flat.part(grads, 0, name).copy_(parameter.grad)
                optimizer.step(grads, torch.tensor([rate], dtype=dtype), torch.tensor([True]))
        else:
            optimizer.step()
        net.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in trained(net).items()}


def ours(net, cell):
    return optimizers.AdamW(Flat([trained(net)]), [cell])


def test_loraplus_matches_peft():
    cases = 0
    for init, ratio in product(("kaiming", "pissa"), (16.0, 0.5, 1.0)):
        net, theirs = adapted(init=init), theirs_of("lora", init)
        copy_to_theirs(net, theirs)
        start = {name: value.detach().clone() for name, value in trained(net).items()}
        cell = Cell(lr=3e-3, lr_ratio=ratio, weight_decay=0.1)
        reference = create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=3e-3, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.1
        )
        found = steps(net, ours(net, cell))
        wanted = steps(theirs, reference)
        for name, value in wanted.items():
            way = (value - start[name]).abs().max()
            assert way > 1e-3 and (found[name] - value).abs().max() < 0.01 * way
        cases += 1
    assert cases == 6


def test_frozen_A_trains_as_in_peft_with_A_frozen():
    # PEFT's own LoRA-FA optimiser also projects the gradient, after the second version of the paper.
    cases = 0
    for init in ("kaiming", "gaussian", "pissa", "olora"):
        net, theirs = adapted("lora-fa", init), theirs_of("lora-fa", init)
        copy_to_theirs(net, theirs)
        A = [layer.A.detach().clone() for _, layer in named_layers(net)]
        start = {name: value.detach().clone() for name, value in trained(net).items()}
        found = steps(net, ours(net, Cell(lr=3e-3, variant="lora-fa")))
        wanted = steps(theirs, torch.optim.AdamW(trained(theirs).values(), lr=3e-3, weight_decay=0))
        assert list(found) == ["q.B", "v.B", "down.B"] == list(wanted)
        for name, value in wanted.items():
            way = (value - start[name]).abs().max()
            assert way > 1e-3 and (found[name] - value).abs().max() < 0.01 * way
        assert all(torch.equal(layer.A, kept) for (_, layer), kept in zip(named_layers(net), A))
        cases += 1
    assert cases == 4


# --- against restatements


def test_every_pair_is_its_equation(device):
    cases = 0
    for (variant, init), dtype, factor in product(PAIRS, (torch.float32, torch.float64, torch.bfloat16), (1, 0.3, -2)):
        net, plain = (
            scale_by(move(adapted(variant, init, "rslora", dtype, device=device)), factor),
            Net().to(device, dtype),
        )
        exact = copy.deepcopy(plain).double()
        tolerance = {torch.float32: 2e-5, torch.float64: 1e-6, torch.bfloat16: 0.05}[dtype]
        for name, layer in named_layers(net):
            weight = exact_weight(layer, plain.get_submodule(name).weight, factor)
            exact.get_submodule(name).weight.data.copy_(weight)
            torch.testing.assert_close(layer.merged_weight().double(), weight, rtol=0.01 * tolerance, atol=tolerance)
        for rows in (1, 40):
            x = some_x(rows, dtype).to(device)
            free, wanted = net(x), exact(x.double())
            size = wanted.abs().max()
            assert free.dtype == dtype and (free.double() - wanted).abs().max() < tolerance * size
            merge(net)
            assert (net(x).double() - wanted).abs().max() < tolerance * size
            assert torch.equal(unmerge(net)(x), free)
            cases += 1
    assert cases == 14 * 3 * 3 * 2


def test_the_base_is_never_written_to():
    cases = 0
    for (variant, init), dtype in product(PAIRS, (torch.float32, torch.bfloat16)):
        net = Net().to(dtype)
        weights, values = dict(net.named_parameters()), {n: p.detach().clone() for n, p in net.named_parameters()}
        x = some_x(40, dtype)
        before = net(x)
        attach(net, slots_of(), 0.0, 3, variant, init)
        torch.testing.assert_close(net(x), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
        move(net)
        assert not torch.allclose(net(x), before, atol=0.05)
        torch.testing.assert_close(scale_by(net, 0)(x), before, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
        merge(net)
        assert torch.equal(net(x), before)  # at factor 0 the merged weight is the base's, bit for bit
        scale_by(unmerge(net), 1)
        merge(net)
        run_again = dict(detach(net).named_parameters())
        assert all(run_again[n] is p and torch.equal(p, values[n]) for n, p in weights.items())
        assert torch.equal(net(x), before)
        cases += 1
    assert cases == 28


def test_factors_are_a_plain_adapter_on_the_original_base():
    cases = 0
    for variant, init in PAIRS:
        net, plain = move(adapted(variant, init)), Net()
        slots = {}
        for name, layer in named_layers(net):
            A, B = plain_factors(layer)
            rank = RANK[name] * (2 if init in MOVING else 1)
            assert A.shape == (rank, layer.linear.in_features) and B.shape == (layer.linear.out_features, rank)
            slots[name] = Slot(rank, layer.slot.scale * rank, layer.slot.scale)
        attach(plain, slots, variant="dora" if variant == "dora" else "lora")
        with torch.no_grad():
            for (_, layer), (_, copied) in zip(named_layers(net), named_layers(plain)):
                for mine, value in zip((copied.A, copied.B), plain_factors(layer)):
                    mine.copy_(value)
                if variant == "dora":
                    copied.magnitude.copy_(layer.magnitude)
        torch.testing.assert_close(plain(some_x()), net(some_x()), rtol=0, atol=1e-6)
        cases += 1
    assert cases == 14


def starts(init, weight, rank, scale=0.5, seed=0):
    return STARTS[init](weight, Slot(rank, 1.0, scale), torch.Generator().manual_seed(seed))


def test_starts_are_what_their_docstrings_say():
    wide = torch.randn(19, 40, generator=torch.Generator().manual_seed(1))
    cases = 0
    for weight in (wide, wide.T, wide.double()):
        out_features, in_features = weight.shape
        U, S, Vh = (t.double() for t in torch.linalg.svd(weight.double(), full_matrices=False))
        A, B = starts("pissa", weight, 7)
        best = (U[:, :7] * S[:7]) @ Vh[:7]
        torch.testing.assert_close(0.5 * B.double() @ A.double(), best, rtol=0, atol=2e-5)
        balanced = torch.diag(2 * S[:7])  # S / s on both sides
        torch.testing.assert_close(A.double() @ A.double().T, balanced, rtol=0, atol=1e-4)
        torch.testing.assert_close(B.double().T @ B.double(), balanced, rtol=0, atol=1e-4)
        assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()
        A, B = starts("olora", weight, 7)
        torch.testing.assert_close(B.double().T @ B.double(), torch.eye(7).double(), rtol=0, atol=1e-5)
        assert (A.diagonal() > 0).all() and (A.tril(-1) == 0).all()
        torch.testing.assert_close((B @ A)[:, :7], weight[:, :7], rtol=0, atol=1e-5)
        A, B = starts("orthogonal", weight, 6)
        assert (B @ A).abs().max() < 1e-6 and A.abs().mean() > 0.01 and B.abs().mean() > 0.01
        assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 3
        A, B = starts("gaussian", weight, 7)
        assert (B == 0).all() and 0.85 < 7 * A.std() < 1.15
        A, B = starts("kaiming", weight, 7)
        assert (B == 0).all() and 0.9 * in_features**-0.5 < A.abs().max() <= in_features**-0.5
        cases += 1
    assert cases == 3
    nested = {"kaiming": 1, "gaussian": 9 / 4, "olora": 1, "pissa": 1}  # R A for gaussian
    for init, ratio in nested.items():
        small, large = starts(init, wide, 4), starts(init, wide, 9)
        torch.testing.assert_close(small[0], ratio * large[0][:4], rtol=1e-6, atol=0)
        assert torch.equal(small[1], large[1][:, :4])
    assert torch.equal(starts("pissa", -wide, 3)[0], -starts("pissa", wide, 3)[0])  # the sign is in one place


def test_a_start_ignores_other_targets_and_what_the_base_does():
    cases = 0
    for init in STARTS:
        everything, alone = adapted(init=init), Net()
        attach(alone, {"v": slots_of()["v"]}, 0.0, 3, "lora", init)
        again, other = adapted(init=init), adapted(init=init, seed=4)
        for factor in "AB":
            assert torch.equal(getattr(everything.v, factor), getattr(alone.v, factor))
            assert torch.equal(getattr(everything.v, factor), getattr(again.v, factor))
        assert torch.equal(everything.v.A, other.v.A) == (init in MOVING)
        cases += 1
    assert cases == 5


def test_bfloat16_starts_are_computed_in_float32():
    net, weight = adapted(init="pissa", dtype=torch.bfloat16), Net().q.weight.bfloat16()
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    assert net.q.A.dtype == net.q.B0.dtype == torch.float32 and net.q.original.dtype == torch.bfloat16
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    torch.testing.assert_close(net.q.slot.scale * net.q.B0 @ net.q.A0, best, rtol=0, atol=1e-5)


# --- the operator of DoRA


def dora_inputs(dtype=torch.float64, rows=6):
    draw = torch.Generator().manual_seed(2)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype)

    return normal(rows, 7), normal(5, 7), normal(5), normal(3, 7), normal(5, 3), normal(5)


def test_dora_operator_is_its_reference():
    cases = 0
    for rows, bias, dtype in product((1, 6, 90), (True, False), (torch.float32, torch.float64)):
        x, weight, b, A, B, magnitude = dora_inputs(dtype, rows)
        leaves = [t.requires_grad_() for t in (x, A, B, magnitude)]
        b, squares = b if bias else None, weight.square().sum(1)
        wanted = dora_linear.reference(x, weight, b, A, B, magnitude, 0.7)
        found = dora_linear.dora_linear(x, weight, b, A, B, magnitude, squares, 0.7)
        cotangent = torch.linspace(-1, 2, wanted.numel(), dtype=dtype).view_as(wanted)
        pairs = [(found, wanted)]
        pairs += zip(torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(wanted, leaves, cotangent))
        for ours, theirs in pairs:
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1, theirs.abs().max().item()))
        norms = dora_linear.row_norms(weight, squares, A, B, 0.7)
        torch.testing.assert_close(norms, (weight + 0.7 * B @ A).norm(dim=1), rtol=1e-5, atol=0)
        assert not norms.requires_grad
        cases += 1
    assert cases == 12


def test_variants_compile_without_graph_breaks():
    for variant in VARIANTS:
        net = move(adapted(variant, "pissa"))
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(some_x(40)), net(some_x(40)), rtol=0, atol=1e-5)
    assert len(VARIANTS) == 3


def test_frozen_A_keeps_no_input():
    def kept(variant):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
            adapted(variant).q(some_x(40))
        return [size for size in sizes if size[0] in (40, 200)]

    assert kept("lora") == [(40, 5, 13)] and kept("lora-fa") == [(200, 4)]


# --- what is trained, and how it is resumed


def test_what_each_variant_trains(tiny_folder):
    wanted = {"lora": "A B", "dora": "A B magnitude", "lora-fa": "B"}
    for variant, names in wanted.items():
        cell = Cell(targets=("q", "down"), rank=2, layers="0,2", variant=variant)
        base = model.load(tiny_folder)
        slots = plan_slots(base.spec, cell)
        attach(base, slots, cell.dropout, 0, cell.variant, cell.init)
        expected = {f"{module}.{name}" for module in slots for name in names.split()}
        assert {n for n, p in base.named_parameters() if p.requires_grad} == expected
        classifier = Classifier(base, "mean", 3)
        parameters = trained_parameters(classifier, cell)
        expected = {"base." + name for name in expected}
        assert set(parameters) == expected | {"classifier.weight", "classifier.bias"}
        base.requires_grad_(True)
        assert set(trained_parameters(classifier, cell)) == set(parameters)
    assert set(wanted) == set(VARIANTS)


def test_resuming_is_bit_for_bit(tmp_path):
    cases = 0
    for variant, init, ratio in (("lora", "kaiming", 4.0), ("dora", "pissa", 0.5), ("lora-fa", "olora", 1.0)):
        cell = Cell(lr=0.01, lr_ratio=ratio, variant=variant, init=init)

        def fresh(variant=variant, init=init, cell=cell):
            net = adapted(variant, init)
            return net, ours(net, cell)

        net, optimizer = fresh()
        steps(net, optimizer, 3, 0.01)
        save_state(tmp_path / "state", optimizer.flat, optimizer, 0, METERS)
        whole = steps(net, optimizer, 3, 0.02)
        net, optimizer = fresh()
        assert load_state(tmp_path / "state", optimizer.flat, optimizer, 0) == METERS
        resumed = steps(net, optimizer, 3, 0.02)
        assert list(whole) == list(resumed) and all(torch.equal(resumed[n], value) for n, value in whole.items())
        cases += 1
    assert cases == 3


# --- merging in few digits


def test_merge_error():
    cases = 0
    for (variant, init), dtype in product(PAIRS, (torch.float32, torch.bfloat16)):
        net, plain = move(adapted(variant, init, dtype=dtype)), Net().to(dtype)
        for name, layer in named_layers(net):
            weight = plain.get_submodule(name).weight
            exact = exact_weight(layer, weight)
            wanted = ((exact.to(dtype).double() - exact).norm() / (exact - weight.double()).norm()).item()
            tolerance = dict(rel=0.02) if dtype == torch.bfloat16 else dict(abs=5e-7)
            assert layer.merge_error() == pytest.approx(wanted, **tolerance)
            assert 1e-4 < wanted < 0.1 if dtype == torch.bfloat16 else wanted < 1e-6
            layer.merge()
            assert layer.merge_error() == pytest.approx(wanted, **tolerance)  # merged or not
            cases += 1
    assert cases == 14 * 2 * 3
    layer = adapted(dtype=torch.bfloat16).q
    assert layer.merge_error() == 0.0  # B is 0
    with torch.no_grad():
        layer.B.fill_(1e-6)
    assert layer.merge_error() == pytest.approx(1.0, abs=0.05)  # all of it vanishes


# --- refusals, each by name


def test_refused_by_the_cell():
    cases = [
        (dict(variant="vera"), "variant is 'vera', but must be one of lora, dora, lora-fa"),
        (dict(init="zeros"), "init is 'zeros', but must be one of kaiming, gaussian, orthogonal, pissa, olora"),
        (dict(method="full", variant="dora"), "variant belongs to method = 'lora'"),
        (dict(method="head", init="pissa"), "init belongs to method = 'lora'"),
        (dict(method="full", lr_ratio=2.0), "lr_ratio belongs to method = 'lora'"),
        (dict(variant="lora-fa", init="orthogonal", rank=2), "freezes A, and the A of init = 'orthogonal' has half"),
        (dict(init="pissa", dropout=0.1), "dropout is 0.1, but with init = 'pissa' it would drop a part of the base"),
        (dict(init="olora", dropout=0.1), "with init = 'olora'"),
        (dict(init="orthogonal", rank=3), "rank of q is 3, but init = 'orthogonal' halves it"),
        (dict(init="orthogonal", rank=2, targets=("q", "v:5")), "rank of v is 5"),
        (dict(init="pissa", alpha=0), "alpha of q is 0, but init = 'pissa' divides by the scale"),
        (dict(init="olora", targets=("q", "down:1:0")), "alpha of down is 0"),
        (dict(lr_ratio=0), "lr_ratio is 0, but must be above 0"),
        (dict(lr_ratio=-1), "lr_ratio is -1.0, but must be at least 0"),
        (dict(lr_ratio=4, variant="lora-fa"), "variant = 'lora-fa' freezes A"),
        (dict(lr_ratio=4, optimizer="adafactor"), "optimizer = 'adafactor' scales and caps"),
    ]
    for values, message in cases:
        with pytest.raises(InputError) as caught:
            Cell(**values)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(cases) == 16
    allowed = [Cell(variant=variant, init=init, rank=2, scaling="rslora") for variant, init in PAIRS]
    assert len({cell.id for cell in allowed}) == 14
    assert Cell(variant="lora", init="kaiming", lr_ratio=1) == Cell()
    assert Cell(lr_ratio=4, variant="dora").replace(method="full").lr_ratio is None


def test_refused_by_attach_with_nothing_attached():
    zero, broken = Net(), Net()
    with torch.no_grad():
        zero.v.weight[4] = 0
        broken.v.weight[2, 1] = torch.nan
    wide = {"q": Slot(2, 1.0, 0.5), "v": Slot(10, 1.0, 0.1)}
    cases = [
        (Net(), slots_of(), dict(variant="vera"), "variant is 'vera'"),
        (Net(), slots_of(), dict(init="eva"), "init is 'eva'"),
        (Net(), slots_of(), dict(init="olora", dropout=0.5), "dropout is 0.5"),
        (Net(), {"q": Slot(3, 1.0, 1.0)}, dict(init="orthogonal"), "rank of q is 3"),
        (Net(), wide, dict(init="pissa"), "v: rank 10 is larger than the matrix that the start is a part of (9 x 17)"),
        (Net(), wide, dict(init="olora"), "v: rank 10 is larger"),
        (zero, slots_of(), dict(variant="dora"), "v: row 4 of the base's weight is 0"),
        (broken, slots_of(), dict(init="pissa"), "v: the base's weight has NaN or infinity"),
        (broken, slots_of(), dict(init="olora"), "v: the base's weight has NaN or infinity"),
        (broken, slots_of(), dict(variant="dora"), "v: the base's weight has NaN or infinity"),
    ]
    for net, slots, settings, message in cases:
        with pytest.raises(InputError) as caught:
            attach(net, slots, **settings)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not named_layers(net) and all(p.requires_grad for p in net.parameters())
    assert len(cases) == 10


def test_every_name_has_its_object():
    assert list(VARIANTS) == targets.VARIANTS and list(STARTS) == targets.STARTS and set(MOVING) < set(STARTS)


class Gated(variants.LoRA):
    """W + s (g B) A with a trained g, which no file holds."""

    def init(self, layer):
        layer.gate = nn.Parameter(torch.ones(len(layer.B)))


class Squashed(variants.LoRA):
    """W + tanh(s B A): of A and B only, but another map."""

    def merge(self, layer, dtype):
        return layer.original.to(dtype) + torch.tanh(layer.factor * layer.slot.scale * (layer.B @ layer.A)).to(dtype)


class Named(variants.LoRA):
    trains = ("A", "B", "shift")


class Magnitudes(variants.DoRA):
    """DoRA by another name: its magnitude would be left out of PEFT's file."""


@pytest.fixture
def registries():
    """The tables of names, as they were once the test is over."""
    tables = [variants.VARIANTS, variants.STARTS, targets.VARIANTS, targets.STARTS]
    before = [table.copy() for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        (table.update if isinstance(table, dict) else table.extend)(old)


def test_a_parameter_that_no_file_holds_is_refused_before_training(registries, capsys):
    for name, variant, lost in (("gated", Gated(), "gate"), ("named", Named(), "shift"),
                                ("magnitudes", Magnitudes(), "magnitude")):  # fmt: skip
        variants.add_variant(name, variant)
        net = Net()
        with pytest.raises(InputError, match=f"variant '{name}' has a parameter '{lost}'") as caught:
            attach(net, slots_of(), variant=name)
        assert "\n" not in str(caught.value) and not named_layers(net)
        assert Cell(variant=name).variant == name
    assert "PEFT" not in capsys.readouterr().err
    variants.add_variant("squashed", Squashed())
    assert named_layers(attach(Net(), slots_of(), variant="squashed"))
    assert "PEFT has no form of variant 'squashed'" in capsys.readouterr().err


def test_own_variants_and_starts_have_a_flag(registries):
    variants.add_variant("only-a", type("OnlyA", (variants.LoRA,), {"trains": ("A",)})())
    variants.add_start("ones", lambda weight, slot, generator: (torch.ones(slot.rank, weight.shape[1]),
                                                               torch.zeros(len(weight), slot.rank)))  # fmt: skip
    for _ in range(2):  # added again, it takes the place of the first
        variants.add_variant("only-a", variants.VARIANTS["only-a"])
    assert targets.VARIANTS.count("only-a") == 1
    cell = Cell(variant="only-a", init="ones")
    net = attach(Net(), slots_of(), variant=cell.variant, init=cell.init)
    for _, layer in named_layers(net):
        assert layer.A.requires_grad and not layer.B.requires_grad and (layer.A == 1).all() and not layer.B.any()
