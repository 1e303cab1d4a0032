"""`python -m benchmarks operators`: each operator of kernels/ against its reference, PEFT's layer and the limit.

An operator is a line of `OPERATORS`: how its inputs are made, itself, and what it is compared with. Everything else
follows from these. FLOPs are counted while the reference runs forward and backward: products exactly, anything else as
one operation for each number of its largest operand. Bytes are the least that must move: forward, all inputs are read
and the outputs written; backward, inputs and the outputs' gradients are read, and the gradients of what is trained
written. The limit is the lower of the measured rate of products and of that of memory times the arithmetic intensity
(FLOPs a byte): Williams, Waterman and Patterson 2009 (CACM 52, 4). An operator whose inputs lie in a cache may so be
above it. Times are of forward and backward, the median of repeats interleaved with what it is compared with. A
reference has all its inputs in the dtype of the first, so that in bfloat16 it is less exact than the operator.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minilora import parallel
from minilora.command import Parser
from minilora.console import Progress
from minilora.errors import InputError
from minilora.kernels import adamw, attention, cross_entropy, dora_linear, linear, lora_linear, mlp, norms, rotary
from minilora.runs.record import hardware, versions

from . import limits, report


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens of width D, H heads, inner width I, rank R, vocabulary V."""

    B: int
    T: int
    D: int
    H: int
    I: int  # noqa: E741
    R: int
    V: int


SECONDS = 3.0  # on one operator, after which no repeat but the first three begins
SHAPES = {
    "minilm": Shape(B=32, T=30, D=384, H=12, I=1536, R=8, V=30522),  # the default base and a batch of the default data
    "llama-1b": Shape(B=8, T=512, D=2048, H=32, I=8192, R=8, V=128256),
}


@dataclass(frozen=True)
class Operator:
    """`make(shape, tensor)` gives the inputs, `tensor(*size, trained=False)` makes one. `peer(*inputs)` gives what
    another library has for the same, to be called with the inputs. `counted` is what FLOPs are counted on where the
    reference does more than it must.
    """

    name: str
    make: Callable
    call: Callable
    reference: Callable
    peer: Callable | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    counted: Callable | None = None


def adapted(shape, tensor):
    """q's: x, W, b, A, B and the scale."""
    return (tensor(shape.B, shape.T, shape.D, trained=True), tensor(shape.D, shape.D), tensor(shape.D),
            *factors(shape, tensor), 0.5)  # fmt: skip


def factors(shape, tensor):
    A = tensor(shape.R, shape.D, trained=True, dtype=torch.float32)
    return A, tensor(shape.D, shape.R, trained=True, dtype=torch.float32)


def directed(shape, tensor):
    x, weight, bias, A, B, scale = adapted(shape, tensor)
    return x, weight, bias, A, B, tensor(shape.D, trained=True, dtype=torch.float32), scale


def peft_linear(dora=False):
    """PEFT's layer around the same weight, with the same factors."""

    def make(x, weight, bias, A, B, *rest):
        from peft import LoraConfig, inject_adapter_in_model

        inner = nn.Linear(*weight.T.shape, device=weight.device, dtype=weight.dtype)
        holder = nn.ModuleDict({"linear": inner})
        config = LoraConfig(r=len(A), lora_alpha=rest[-1] * len(A), use_dora=dora, target_modules=["linear"])
        inject_adapter_in_model(config, holder)
        layer = holder["linear"].to(weight.device)
        values = {"base_layer.weight": weight, "base_layer.bias": bias, "lora_A.default.weight": A,
                  "lora_B.default.weight": B}  # fmt: skip
        if dora:
            values["lora_magnitude_vector.default.weight"] = rest[0]
        layer.load_state_dict(values)
        return lambda x, *_: layer(x)

    return make


def joint(shape, tensor):
    """q, k and v of one x, each with an adapter."""
    x, *q = adapted(shape, tensor)
    return x, [tuple(q), *(tuple(adapted(shape, tensor)[1:]) for _ in range(2))]


def peft_joint(x, projections):
    layers = [peft_linear()(x, *projection) for projection in projections]
    return lambda x, *_: tuple(layer(x) for layer in layers)


def dora(x, weight, bias, A, B, magnitude, scale):
    squares = weight.to(A.dtype).square().sum(1)  # known beforehand, but cheap beside the rest
    return dora_linear.dora_linear(x, weight, bias, A, B, magnitude, squares, scale)


def heads(shape, tensor):
    """q, k, v and the mask of rows, some of which end in padding, and the scale."""
    size = shape.B, shape.H, shape.T, shape.D // shape.H
    mask = 0 * tensor(shape.B, 1, 1, shape.T)
    mask[::3, ..., -shape.T // 4 :] = -torch.inf
    return *(tensor(*size, trained=True) for _ in "qkv"), mask, size[-1] ** -0.5


def torch_attention(*_):
    return lambda q, k, v, mask, scale: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def turned(shape, tensor):
    """q of all heads, and the cosines and sines of its places."""
    width = shape.D // shape.H // 2 * 2
    angles = tensor(1, 1, shape.T, width // 2)
    tables = torch.cat([angles, angles], -1).cos(), torch.cat([-angles, angles], -1).sin()
    return tensor(shape.B, shape.H, shape.T, shape.D // shape.H, trained=True), *tables


def unembedded(shape, tensor):
    """Hidden states, the unembedding, no bias, and the tokens wanted."""
    hidden = tensor(shape.B * shape.T, shape.D, trained=True)
    wanted = torch.arange(len(hidden), device=hidden.device) * 7 % shape.V
    return hidden, tensor(shape.V, shape.D), None, wanted


def torch_cross_entropy(*_):
    return lambda hidden, weight, bias, wanted: F.cross_entropy(F.linear(hidden, weight), wanted, reduction="sum")


def state(shape, tensor):
    """Eight members' flat state of q, k and v in six layers, and their steps, rates and decays."""
    K, size = 8, 6 * 3 * 2 * shape.R * shape.D
    values, grads, m, v = (tensor(K, size) for _ in range(4))
    return values, grads, m, v.square(), torch.full((K,), 3.0, device=v.device), tensor(K).abs(), tensor(K).abs()


def adamw_in_place(p, g, m, v, *rest):
    adamw.adamw(p, g, m, v, *rest)
    return p, m, v


def adamw_reference(p, g, m, v, t, r, w):
    return adamw.reference(p, g, m, v, t[:, None], r[:, None], w[:, None])


def torch_adamw(p, g, *_):
    """torch's fused AdamW, which has one rate for all."""
    parameters = [nn.Parameter(row.clone()) for row in p]
    for parameter, grad in zip(parameters, g, strict=True):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(parameters, fused=True)
    return lambda *_: optimizer.step()


SILU = mlp.ACTIVATIONS["silu"]
# Dropout is not here: it has no reference but its own statistics.
OPERATORS = [
    Operator(
        "linear", lambda shape, tensor: adapted(shape, tensor)[:3], linear.linear, linear.reference, lambda *_: F.linear
    ),
    *(
        Operator(f"lora_linear {form}", adapted, lambda *inputs, form=form: lora_linear.lora_linear(*inputs, form=form),
                 lora_linear.reference, peft_linear(), ("float32", "bfloat16")[: 2 if form == "side" else 1])
        for form in lora_linear.FORMS
    ),
    Operator(
        "lora_linears q k v", joint, lora_linear.lora_linears,
        lambda x, projections: tuple(lora_linear.reference(x, *projection) for projection in projections), peft_joint,
    ),
    Operator(
        "dora_linear", directed, dora, dora_linear.reference, peft_linear(dora=True),
        counted=lambda x, weight, bias, A, B, magnitude, scale: (
            magnitude * lora_linear.reference(x, weight, None, A, B, scale) + bias
        ),
    ),
    Operator("attention", heads, attention.attention, attention.reference, torch_attention),
    Operator(
        "rms_norm", lambda shape, tensor: (tensor(shape.B, shape.T, shape.D, trained=True), tensor(shape.D)),
        lambda x, weight: norms.rms_norm(x, weight, 1e-5), lambda x, weight: norms.reference(x, weight, 1e-5),
        lambda *_: lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5),
    ),
    Operator(
        "layer_norm", lambda shape, tensor: (tensor(shape.B, shape.T, shape.D, trained=True), 1 + tensor(shape.D),
                                             tensor(shape.D)),
        lambda x, weight, bias: norms.layer_norm(x, weight, bias, 1e-12),
        lambda x, weight, bias: norms.layer_reference(x, weight, bias, 1e-12),
        lambda *_: lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-12),
    ),
    Operator("rotate", turned, rotary.rotate, rotary.reference),
    Operator(
        "gated", lambda shape, tensor: [tensor(shape.B, shape.T, shape.I, trained=True) for _ in "gu"],
        lambda gate, up: mlp.gated(gate, up, SILU), lambda gate, up: mlp.reference(gate, up, SILU),
        lambda *_: lambda gate, up: F.silu(gate) * up,
    ),
    Operator("linear_cross_entropy", unembedded, cross_entropy.linear_cross_entropy, cross_entropy.reference,
             torch_cross_entropy),
    Operator("adamw", state, adamw_in_place, adamw_reference, torch_adamw, ("float32",)),
]  # fmt: skip


class Count(TorchDispatchMode):
    """Operations of all that runs inside: products exactly, else one for each number of the largest operand."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.operations += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif not (function.is_view or function.overloadpacket in FREE):
            sizes = [tensor.numel() for tensor in tree_leaves((args, kwargs, out)) if torch.is_tensor(tensor)]
            self.operations += max(sizes, default=0)
        return out


aten = torch.ops.aten
FREE = {aten.empty, aten.empty_like, aten.detach, aten.clone, aten.copy_, aten._to_copy, aten.zeros, aten.zeros_like,
        aten.ones_like, aten.full, aten.fill_, aten.cat, aten._unsafe_view, aten.randn}  # fmt: skip


def maker(dtype, device):
    """`tensor` for an operator's `make`: normal numbers, the same ones in each call with the same sizes in turn."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def tensor(*size, trained=False, dtype=dtype):
        values = torch.randn(*size, generator=generator, device=device) * size[-1] ** -0.5
        return values.to(dtype).requires_grad_(trained)

    return tensor


def tensors(inputs):
    return [leaf for leaf in tree_leaves(inputs) if torch.is_tensor(leaf)]


def runner(call, inputs):
    """A function that runs `call` on `inputs`, backward too where some are trained; it returns the outputs, a list."""
    trained = [leaf for leaf in tensors(inputs) if leaf.requires_grad]

    def work():
        outputs = tensors(call(*inputs))
        if trained:
            for leaf in trained:
                leaf.grad = None
            torch.autograd.backward(outputs, [y.detach() for y in outputs])  # gradients at hand, and not all the same
        return outputs

    return work


def as_one(reference):
    """`reference` with all its inputs in the dtype of the first."""

    def call(first, *rest):
        def cast(value):
            if isinstance(value, (list, tuple)):
                return type(value)(map(cast, value))
            return value.to(first.dtype) if torch.is_tensor(value) and value.is_floating_point() else value

        return reference(first, *map(cast, rest))

    return call


def demands(operator, shape, dtype):
    """(Operations, least bytes) of the operator, forward and backward; nothing is computed."""
    inputs = operator.make(shape, maker(dtype, torch.device("meta")))
    with Count() as count:
        outputs = runner(as_one(operator.counted or operator.reference), inputs)()
    moved = sum(leaf.nbytes for leaf in [*tensors(inputs), *outputs])
    gradients = sum(leaf.nbytes for leaf in tensors(inputs) if leaf.requires_grad)
    return count.operations, 2 * moved + gradients if gradients else moved


def contenders(operator, shape, dtype, device):
    """{"operator", "reference", "peer": a function that does the work}, on inputs that are equal but not shared."""
    calls = {"operator": operator.call, "reference": as_one(operator.reference)}
    inputs = {name: operator.make(shape, maker(dtype, device)) for name in [*calls, "peer"]}
    if operator.peer is not None:
        with contextlib.suppress(ImportError):  # where PEFT is not installed its column stays empty
            calls["peer"] = operator.peer(*inputs["peer"])
    return {name: runner(call, inputs[name]) for name, call in calls.items()}


def clock(work, device):
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(shape, dtypes, device, repeats, names=None, progress=None):
    """What results.json has of each operator at each dtype, and the limits."""
    load = os.getloadavg()[0]
    lines, rates = [], {name: 0.0 for name in ("float32", "bfloat16", "memory")}
    chosen = [operator for operator in OPERATORS if names is None or operator.name.split()[0] in names]
    for operator in chosen:
        for name in ("float32", "bfloat16"):
            rate = limits.product_rate(shape, getattr(torch, name), device)
            rates[name] = max(rates[name], rate)
        rates["memory"] = max(rates["memory"], limits.stream_rate(device, seconds=0.2))
        for name in operator.dtypes:
            if name not in dtypes:
                continue
            dtype = getattr(torch, name)
            works = contenders(operator, shape, dtype, device)
            times = {key: [] for key in works}
            began = time.perf_counter()
            for repeat in range(1 + repeats):  # the first warms up
                if repeat > 3 and time.perf_counter() - began > SECONDS:
                    break
                for key, work in works.items():
                    seconds = clock(work, device)
                    if repeat:
                        times[key].append(seconds)
            operations, moved = demands(operator, shape, dtype)
            lines.append({"name": operator.name, "dtype": name, "operations": operations, "bytes": moved}
                         | {f"{key}_seconds": statistics.median(values) for key, values in times.items()})  # fmt: skip
            if progress is not None:
                progress(1, 0)
    for line in lines:
        line["intensity"] = line["operations"] / line["bytes"]
        line["limit"] = min(rates[line["dtype"]], rates["memory"] * line["intensity"])
        line["operations_per_second"] = line["operations"] / line["operator_seconds"]
        line["limit_share"] = line["operations_per_second"] / line["limit"]
    return {"operators": lines, "limits": rates, "shape": vars(shape), "repeats": repeats, "load_before": load,
            "hardware": hardware(device), "versions": versions() | report.versions("peft")}  # fmt: skip


def main(argv):
    parser = Parser(prog="python -m benchmarks operators", description=__doc__.partition("\n\n")[0])
    names = list(dict.fromkeys(operator.name.split()[0] for operator in OPERATORS))
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--shape", choices=SHAPES, default="minilm", help="of which base (default: minilm)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="(default: 20)")
    parser.add_argument("--out", metavar="DIR", help="write results.json, table.md and roofline.png into this folder")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        raise InputError(f"--repeats is {arguments.repeats}, but must be at least 1")
    if arguments.out is not None:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)  # refused now rather than after the runs
    device = parallel.pick_device(arguments.device)
    total = sum(len(set(operator.dtypes) & set(arguments.dtypes)) for operator in OPERATORS
                if arguments.only is None or operator.name.split()[0] in arguments.only)  # fmt: skip
    with Progress("operators", total) as progress:
        results = measure(SHAPES[arguments.shape], arguments.dtypes, device, arguments.repeats, arguments.only,
                          progress.advance)  # fmt: skip
    shown = report.OPERATORS, report.operator_lines(results), report.operator_notes(results)
    print(report.page(*shown))
    if arguments.out is not None:
        report.write(Path(arguments.out), results, *shown, report.draw_operators)
