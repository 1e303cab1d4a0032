"""How a training step is taken: eagerly, by CUDA graphs (`graphs.py`), or through torch.compile, which is done here.

`--compile auto` takes graphs on CUDA and eager steps elsewhere, `off` always eager steps, and `on` compiles. Forward,
backward, clipping and optimiser then become one graph (`trace_autograd_ops`). The batches' sizes are its only unknowns,
so that one compilation serves all padded lengths and the last batch of an epoch; what is a Python number in the step (a
scale, a decay) is a constant of it. On CUDA that graph is replayed as a CUDA graph, recorded once for each padded size:
its memory is reused by the next step, so what a step returns is copied out.

Measured for the default cell on two CPU cores with torch 2.13: 44 s, or 9 s where an earlier run left the artefacts in
the cache, for steps that are no faster than eager ones.
"""

import os

import torch

from minilora import parallel
from minilora.files import cache
from minilora.training.feed import STEPS_REPAID

# The tracer's settings: see the module's docstring. Without the last, custom autograd functions are compiled anew in
# every run; a changed one is told apart, as the graphs of its forward and backward are in the key.
DYNAMO = {"trace_autograd_ops": True, "specialize_float": True}
FUNCTORCH = {"autograd_cache_allow_custom_autograd_functions": True}


def choose(cell, device, steps):
    """How a cell's steps are taken, and why: ("eager", "graphs" or "compiled", reason). `steps`: how many are left.

    Where compiling is wanted a small step is compiled first: some seconds, and none of what is needed can then be
    missing.
    """
    if cell.compile == "off":
        return "eager", "--compile off"
    if parallel.count() > 1:
        return "eager", "several processes sum their gradients"
    if cell.mitigate.method == "group-dro":
        return "eager", "group DRO keeps weights from step to step"
    if cell.optimizer == "adafactor":
        return "eager", "torch's Adafactor waits for its rate"
    if cell.compile == "on":
        lacking = obstacle(device)
        return ("eager", f"nothing can be compiled here: {lacking}") if lacking else ("compiled", "--compile on")
    if device.type != "cuda":
        return "eager", f"there are no graphs on {device.type}, and compiling repays itself nowhere"
    if steps < STEPS_REPAID:
        return "eager", f"{steps:,} steps do not repay recording one"
    return "graphs", "one for each padded length"


def obstacle(device):
    """Why no step can be compiled for `device`, in one line; None where one can."""
    use_cache()
    weight = torch.ones(2, 3, device=device, requires_grad=True)

    def step(micro_batches):
        (gradient,) = torch.autograd.grad((weight * 2.0).sin().sum(), [weight])
        return gradient

    try:
        compiled(step, "classification", device)([])
    except Exception as error:  # of any type: no compiler, no headers, no triton, an older torch
        return first_line(error)
    return None


def first_line(error):
    """What an error says, in a line."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)


def use_cache():
    """Let torch keep what it compiles in minilora's cache, unless the user has chosen a place or it cannot be there."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = cache() / "compiled"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # torch runs what it finds there
        except OSError:
            return
        if os.access(folder, os.W_OK):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def compiled(step, task, device, state=(), backend="inductor"):
    """`step(micro_batches, *tensors)`, from a list of `Batch` and tensors to tensors, as one graph, made when called.

    The step of task lm, whose loss has as many terms as the rows have tokens to predict, comes as several graphs.

    Of the batches the sizes may change from call to call; how many they are, and the shapes of `tensors`, may too, but
    each such change compiles again. `state` are the tensors beside the module's parameters that the step changes in
    place, from call to call the same: CUDA graphs need to know. Nothing in `step` may wait for the device.
    """
    import torch._dynamo
    import torch._functorch.config

    whole = task == "classification"
    graphs = whole and device.type == "cuda" and backend == "inductor"
    for tensor in state:
        torch._dynamo.mark_static_address(tensor)
    run = torch.compile(step, fullgraph=whole, backend=backend, mode="reduce-overhead" if graphs else None)

    def call(micro_batches, *tensors):
        for batch in micro_batches:
            for tensor in (batch.ids, batch.lengths, batch.answers):
                for dimension in range(tensor.dim()):
                    torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(DYNAMO), torch._functorch.config.patch(FUNCTORCH):
            found = run(micro_batches, *tensors)
        return torch.utils._pytree.tree_map(torch.clone, found) if graphs else found

    return call
