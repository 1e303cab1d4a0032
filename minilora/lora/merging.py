"""A trained base as a checkpoint folder that transformers loads: `--merge-to DIR`.

The source's weight files are copied, headers and all, and the tensors that training changed are overwritten in place,
one by one: every other byte is the source's, sharded as it is, and no second copy of the model is ever in memory. An
adapter is merged into the source's own weights (not into those that the run cast to its dtype), in float32 or wider,
and rounded once to the tensor's dtype; `merge.json` says how much of the change that lost. Left out: other dtypes than
the source's, and a head in transformers' format, which has none for our pooling: ours is beside it, as `head.json`
and `classifier.safetensors`, which transformers does not read.
"""

import contextlib
import fnmatch
import os
import shutil
import uuid
from pathlib import Path

import torch
from torch import nn

from minilora import files
from minilora.base import checkpoint
from minilora.base.model import Base
from minilora.base.places import stored_head, tensor_places
from minilora.errors import InputError
from minilora.lora import storage
from minilora.lora.adapter import variant_of
from minilora.lora.layer import LoRALinear, named_layers

MERGE, CLASSIFIER = "merge.json", "classifier.safetensors"
# The files beside the weights that are copied.
COPIED = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
          "vocab.*", "merges.txt", "chat_template*", "*.model")  # fmt: skip


def check(folder, cell):
    """Raise InputError unless a run of this cell can be exported to the new `folder`."""
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists: choose another --merge-to")
    if cell.method == "head":
        raise InputError("method = 'head' leaves the base as it is, so that there is nothing to merge: drop --merge-to")


def write(folder, model, cell, label_names=(), *, source, tokenizer=None):
    """Write the base of `model`, with what the cell trained, to the new `folder`; returns what `merge.json` holds.

    source     folder of the checkpoint that the base was loaded from
    tokenizer  folder of its tokenizer, if that is another

    The folder appears whole or not at all. `rounding` in `merge.json` is ||M - W'|| / ||W' - W|| for each changed
    module, Frobenius norms, of W the source's weight, W' the exact new one and M what is written: the mean, and the
    worst. Raises InputError as `check`, and where a new weight overflows its tensor's dtype.
    """
    check(folder, cell)
    source, base, found = Path(source), model.base, {}
    tensors = checkpoint.Tensors(source)
    with whole_folder(folder) as target:
        for path in checkpoint.weight_files(source):
            shutil.copyfile(path, target / path.name)
        if tensors.path.name == checkpoint.INDEX:
            shutil.copyfile(tensors.path, target / checkpoint.INDEX)
        for origin in filter(None, (source, tokenizer)):
            for name in os.listdir(origin):
                if any(fnmatch.fnmatch(name, pattern) for pattern in COPIED) and os.path.isfile(origin / name):
                    shutil.copyfile(origin / name, target / name)
        new = replacements(base, cell.method)
        changed = changed_tensors(base.spec, tensors, new)
        for name, parts in changed.items():
            stored, value = tensors.stored(name), tensors[name].clone()
            for parameter, rows, transposed in parts:
                view = value.t() if transposed else value
                merged, found[parameter] = new[parameter](view[rows])
                if not merged.isfinite().all():
                    raise InputError(f"{name}: the new weight overflows {merged.dtype}: keep the adapter unmerged")
                view[rows] = merged
            with open(target / stored.path.name, "r+b") as file:
                file.seek(stored.start)
                file.write(memoryview(value.view(-1).view(torch.uint8).numpy()))
            stored.give_back()
        worst = max(found, key=found.get)
        record = {
            "model": cell.model,
            "revision": cell.revision,
            "method": cell.method,
            "dtypes": sorted({str(tensors.dtype(name)).removeprefix("torch.") for name in changed}),
            "rounding": {
                "modules": len(found),
                "mean": sum(found.values()) / len(found),
                "worst": found[worst],
                "worst_module": worst.removesuffix(".weight"),
            },
        }
        head = getattr(model, "classifier", None)
        if head is not None:
            files.write_tensors(target / CLASSIFIER, head.state_dict())
            files.write_json(
                target / storage.HEAD,
                {"pooling": model.pooling, "label_names": list(label_names), "tensors": CLASSIFIER},
            )
        files.write_json(target / MERGE, record)
    return record


def describe(record):
    """A line about what `write` returned."""
    rounding = record["rounding"]
    return (
        f"rounding to {'/'.join(record['dtypes'])} lost {rounding['mean']:.1e} of the change on average, "
        f"{rounding['worst']:.1e} at worst ({rounding['worst_module']})"
    )


@contextlib.contextmanager
def whole_folder(folder):
    """Yield a temporary folder beside `folder`; on success flush its files to disk and rename it."""
    folder = Path(folder)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replacements(base, method):
    """{parameter of a plain `Base`: function from the source's value to (the new one in its dtype, the rounding)}."""
    if method == "lora":
        layers = named_layers(base)
        return {f"{name}.weight": lambda weight, layer=layer: merged(layer, weight) for name, layer in layers}
    trained = {name: parameter.detach() for name, parameter in base.named_parameters()}
    return {name: lambda weight, value=value: rounded(value.cpu(), weight) for name, value in trained.items()}


def merged(layer, weight):
    """The weight [out, in] that the adapter of `layer` makes of another base `weight`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    twin = LoRALinear(linear, layer.slot, variant=variant_of(layer))
    for name in ("A", "B", "magnitude", "A0", "B0"):
        if (value := getattr(layer, name)) is not None:
            value = value.detach().cpu()
            setattr(twin, name, value if name in ("A0", "B0") else nn.Parameter(value, requires_grad=False))
    twin.factor = layer.factor
    return twin.merged_weight(), twin.merge_error()


def rounded(exact, weight):
    new = exact.to(weight.dtype)
    lost, change = (exact - new).norm(), (exact - weight).norm()
    return new, (lost / change).item() if lost else 0.0


def changed_tensors(spec, tensors, new):
    """{tensor of the source: [(parameter, out rows of the tensor, whether it is stored transposed), ...]}."""
    with torch.device("meta"):
        plain = Base(spec, unembedding="unembedding.weight" in new)
    places, changed = tensor_places(plain, tensors.keys()), {}
    for parameter in new:
        name, rows, transposed = places[parameter]
        changed.setdefault(name, []).append((parameter, rows, transposed))
    head = stored_head(spec, tensors.keys())
    if spec.tied and "embed.tokens.weight" in new and head is not None:
        changed[head] = [("embed.tokens.weight", slice(None), False)]  # stored twice
    return changed
