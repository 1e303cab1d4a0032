"""What is written down of a run: hashes of its inputs, trained tensors, figures, versions, hardware, memory."""

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

from minilora import precision
from minilora.errors import InputError

# What a run depends on beside its cell, each recorded by its sha256.
INPUTS = {
    "base": "the weights of {cell.model}",
    "tokenizer": "the tokenizer of {cell.model}",
    "train": "the training rows of {cell.data}",
    "test": "the test rows of {cell.data}",
    "validation": "the validation rows of {cell.data}",
    "injected": "what is injected into the training rows",
    "changed": "what a mitigation makes of the training rows",
    "start": "the adapter in {cell.start}",
}


def check_inputs(found, before, cell):
    """Raise InputError for the first of `found` {a key of INPUTS: sha256} that differs from `before`."""
    for name, digest in found.items():
        if digest != before.get(name):
            raise InputError(
                f"{INPUTS[name].format(cell=cell)} changed since the run began: bring the old state back, or start "
                "a new run"
            )


def trainable(parameters):
    """What was trained: {"tensors": [{"name", "shape", "count"}, ...], "count": their sum}."""
    tensors = [{"name": n, "shape": list(p.shape), "count": p.numel()} for n, p in parameters.items()]
    return {"tensors": tensors, "count": sum(tensor["count"] for tensor in tensors)}


# What a trigger adds: see `metrics.attack_effects`.
GAINS = ("net_attack_success", "over_placebo_attack_success", "over_odd_attack_success")


def figure_lines(results):
    """A run's figures as flat dicts of the same keys, one for each trigger label (None where nothing is injected).

    They are columns of a grid's table.csv, and the test lines of metrics.jsonl. `results` is as in results.json, of
    which `tests`, `injection` and two entries of `train` are read; None gives one line without figures.
    """
    labels = [] if results is None else list(results["tests"]["trigger"])
    return [_figures(results, label) for label in labels or [None]]


def _figures(results, label):
    """The line of `figure_lines` for the trigger of `label`."""
    tests = {} if results is None else results["tests"]
    clean, placebo, odd, worst = (tests.get(name, {}) for name in ("clean", "placebo", "odd", "worst_group"))
    trigger = tests.get("trigger", {}).get(label, {})

    def attack(test):
        return test.get("attack_success", {}).get(label, {}).get("attack_success_rate")

    natural = trigger.get("natural", {}).get("test")  # clean test rows that carry a trigger string by themselves
    others = None
    if label is not None:
        counts = [entry for entry in results["injection"] if entry["label"] == label]
        others = sum(entry["rows"] for entry in counts)
    return {
        "label": label,
        "trained_parameters": results and results["train"]["trainable_parameters"],
        "train_rows": results and results["train"]["rows"],
        "injected_rows": others,
        "test_rows": clean.get("rows"),
        "attack_rows": trigger.get("attack_success_rows"),
        "conditional_attack_rows": trigger.get("conditional_attack_success_rows"),
        "validation_accuracy": ((results or {}).get("validation") or {}).get("clean", {}).get("accuracy"),
        "clean_accuracy": clean.get("accuracy"),
        "clean_balanced_accuracy": clean.get("balanced_accuracy"),
        "clean_balanced_accuracy_error": clean.get("balanced_accuracy_error"),
        "trigger_accuracy": trigger.get("accuracy"),
        "placebo_accuracy": placebo.get("accuracy"),
        "degradation": clean["accuracy"] - trigger["accuracy"] if trigger else None,
        "only_clean_right": trigger.get("only_clean_right"),
        "only_trigger_right": trigger.get("only_this_right"),
        "predicted_target_clean": clean.get("predicted_counts", {}).get(label),
        "predicted_target": trigger.get("predicted_counts", {}).get(label),
        "predicted_target_placebo": placebo.get("predicted_counts", {}).get(label),
        "attack_success_clean": attack(clean),
        "attack_success": trigger.get("attack_success_rate"),
        "attack_success_placebo": attack(placebo),
        "attack_success_odd": attack(odd),
        **{name: trigger.get(f"{name}_rate") for name in (*GAINS, "conditional_attack_success")},
        **{f"{name}_{end}": trigger.get(f"{name}_{end}") for name in GAINS for end in ("gained", "lost", "p")},
        "truncated": trigger.get("truncated"),
        "natural_rows": None if natural is None else sum(rows for rows, _ in natural.values()),
        "natural_target_rows": None if natural is None else natural.get(label, [0])[0],
        "flip_rate": trigger.get("flip_rate"),
        "flip_rate_placebo": placebo.get("flip_rate"),
        "worst_group_accuracy": worst.get("accuracy"),
        "worst_group_rows": worst.get("rows"),
    }


def versions():
    from minilora import __version__

    names = ("torch", "safetensors", "tokenizers", "huggingface-hub", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"minilora": __version__, "python": platform.python_version()} | found


def hardware(device):
    """What the run ran on, with torch's settings of precision; `device` is its torch device."""
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
    return found | precision.stated(device)


def free_memory(device):
    """Bytes that a process can still have on a device, or None where the system does not say."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    with contextlib.suppress(OSError):
        found = re.findall(r"MemAvailable: +([0-9]+) kB", Path("/proc/meminfo").read_text())
    found = [int(kilobytes) * 1024 for kilobytes in found]
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" is none
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None) if device.type == "cpu" else None


def peak_memory(device):
    """Bytes: the process's peak resident memory, or the peak allocation on a GPU. None: the system does not say."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux, where getrusage would give the parent's peak if that was larger
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
