"""What a run depends on and was made with: inputs by their hashes, trained tensors, versions, hardware, memory."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path

from minilora.errors import InputError

# What a run depends on beside its cell, each recorded by its sha256.
INPUTS = {
    "base": "the weights of {cell.model}",
    "tokenizer": "the tokenizer of {cell.model}",
    "train": "the training rows of {cell.data}",
    "test": "the test rows of {cell.data}",
    "injected": "what is injected into the training rows",
    "start": "the adapter in {cell.start}",
}


def check_inputs(found, before, cell):
    """Raise InputError, naming the first, for inputs `found` {a key of INPUTS: sha256} that are not as `before`."""
    for name, digest in found.items():
        if digest != before.get(name):
            raise InputError(
                f"{INPUTS[name].format(cell=cell)} changed since the run began: bring the old state back, or start "
                "a new run"
            )


def trainable(parameters):
    """The certificate of what was trained: {"tensors": [{name, shape, count}, ...], "count": all of them}."""
    tensors = [{"name": n, "shape": list(p.shape), "count": p.numel()} for n, p in parameters.items()]
    return {"tensors": tensors, "count": sum(tensor["count"] for tensor in tensors)}


def versions():
    from minilora import __version__

    names = ("torch", "safetensors", "tokenizers", "huggingface-hub", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"minilora": __version__, "python": platform.python_version()} | found


def hardware(device):
    """What the run ran on; `device` is its torch device."""
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    found = {
        "device": str(device),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def peak_memory(device):
    """Bytes: the process's peak resident memory, or the peak allocation on a GPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux, where the figure below is the parent's if that was larger
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
