"""torch's global settings that decide what products are computed in and whether a run repeats bit for bit.

All are set here, for a block, and restored after it:

tf32           products of float32 numbers read their inputs with 10 bits of mantissa; float32 products read all 23.
               Beside a bfloat16 base it is always so: there these products are an adapter's, whose inputs and results
               have 7 bits anyway
sums           products of bfloat16 numbers are summed in float32, never partly in bfloat16
cuDNN          neither its attention, which plans anew for each padded length (seconds), nor timing of its algorithms
deterministic  torch refuses, or replaces, operations whose sums change their order from run to run

That a cell's `products` are bfloat16 is no such setting: the base's matrices are then rounded (`base/model.py`), and
`kernels/linear.py` multiplies in the dtype of the matrix.
"""

import contextlib
import os
import re

from minilora.errors import InputError, shown

WORKSPACE, FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with one of these cuBLAS repeats its sums
AMPERE = (8, 0)  # the first compute capability with TF32


def refuse(cell):
    """Raise InputError for a device, a dtype and products that do not go together, whatever this machine has."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", cell.device):
        raise InputError(f"device is {shown(cell.device)}: use auto, cpu, cuda, cuda:N or mps")
    if cell.dtype == "bfloat16" != cell.products:
        raise InputError(
            f"products = {cell.products!r} needs a base stored in float32, but dtype is 'bfloat16': drop one of them"
        )
    for name in ("dtype", "products") if cell.method == "full" else ():
        if (value := getattr(cell, name)) == "bfloat16":
            raise InputError(f"method = 'full' trains the base, in float32, but {name} is {value!r}: drop one of them")


def check(cell, device):
    """Raise InputError where a cell's precision cannot be had on its torch device."""
    import torch

    if cell.products == "tf32":
        has = device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= AMPERE
        if not has:
            raise InputError(
                f"products = 'tf32' needs an NVIDIA GPU of the Ampere generation or later, but the device is {device}: "
                "use --products float32 or bfloat16"
            )
    if cell.deterministic == "on" and device.type == "cuda":
        late = torch.cuda.is_initialized() and os.environ.get(WORKSPACE) not in FIXED
        if late:
            raise InputError(
                f"deterministic = 'on' needs {WORKSPACE}={FIXED[0]} before CUDA starts, but it has started: "
                "set the variable and start Python again"
            )
        if os.environ.get(WORKSPACE) not in FIXED:
            os.environ[WORKSPACE] = FIXED[0]  # stays, as CUDA reads it only once


def settings():
    """{name: (its value now, a function that sets it)} of torch's global settings."""
    import torch

    cuda = torch.backends.cuda

    def attribute(owner, name):
        return getattr(owner, name), lambda value: setattr(owner, name, value)

    def deterministic(value):
        on, warns = value
        torch.use_deterministic_algorithms(on, warn_only=warns)

    here = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return {
        "float32_products": attribute(cuda.matmul, "fp32_precision"),
        "bfloat16_reduced_sums": attribute(cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        "cudnn_attention": (cuda.cudnn_sdp_enabled(), cuda.enable_cudnn_sdp),
        "cudnn_timing": attribute(torch.backends.cudnn, "benchmark"),
        "deterministic": (here, deterministic),
    }


@contextlib.contextmanager
def applied(cell):
    """Have torch compute with the precision of `cell` in this block."""
    wanted = {
        "float32_products": "tf32" if cell.products == "tf32" or cell.dtype == "bfloat16" else "ieee",
        "bfloat16_reduced_sums": False,
        "cudnn_attention": False,
        "cudnn_timing": False,
        "deterministic": (cell.deterministic == "on", False),
    }
    with contextlib.ExitStack() as undo:
        for name, (now, put) in settings().items():
            if plain(now) != wanted[name]:
                undo.callback(put, now)
                put(wanted[name])
        yield


@contextlib.contextmanager
def ways(chosen, dtype):
    """Have the kernels go the ways that a training has chosen (`training/choices.py`) in this block, with a base stored
    in that dtype, by its name; what is not chosen stays as it is."""
    import torch

    from minilora.kernels import attention, linear

    longest = chosen.get("attention")
    longest = None if longest is None else int(longest)
    with linear.using(chosen.get("products")), attention.using(getattr(torch, dtype), longest):
        yield


def plain(value):
    """torch's "none" for the precision of products is IEEE's. Left as it is: torch's older names for these settings
    cannot be read once a newer one has been set."""
    return "ieee" if value == "none" else value


def stated(device):
    """{setting: its value now} as a run's record has them, strings only; of a CPU just those that it has."""
    found = {name: plain(value) for name, (value, _) in settings().items()}
    found["deterministic"] = "on" if found["deterministic"][0] else "off"
    if device.type != "cuda":
        return {"deterministic": found["deterministic"]}
    found = {name: {True: "on", False: "off"}.get(value, value) for name, value in found.items()}
    return found | {"cublas_workspace": os.environ.get(WORKSPACE, "torch's")}
