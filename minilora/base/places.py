"""Which tensor of a checkpoint is which parameter of a `Base`, and what becomes of the rest.

Every tensor is read, refused by its name, or said not to be used. Names may have the prefixes that a compiled,
parallel or PEFT model puts before them; these are taken off and said. Left out: the tensors' values, but for one
question: whether a checkpoint that should share its embedding with the output brings another output matrix.
"""

import re
from dataclasses import replace

from minilora import console
from minilora.base import families
from minilora.base.checkpoint import PIECE
from minilora.base.spec import TARGETS
from minilora.errors import InputError

# What torch.compile, FSDP and activation checkpointing put into names, at any depth; DDP and PEFT before all of them.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
LEADING = ("module.", "base_model.model.")


def plain_names(present):
    """({plain name: the tensor's name in the checkpoint}, the prefixes that were taken off).

    Plain: without the names of wrappers, and with PyTorch's words for a LayerNorm's parameters (the first BERT
    checkpoints have TensorFlow's). Raises InputError where two tensors have the same plain name.
    """
    plain, prefixes = {name: WRAPPERS.sub("", name) for name in present}, set()
    for name in present:
        prefixes |= {f"{found}." for found in WRAPPERS.findall(name)}
    while leading := next((p for p in LEADING if plain and all(n.startswith(p) for n in plain.values())), None):
        plain = {name: value.removeprefix(leading) for name, value in plain.items()}
        prefixes.add(leading)
    found = {}
    for stored, name in plain.items():
        if name.endswith(("LayerNorm.gamma", "LayerNorm.beta")):
            module, _, leaf = name.rpartition(".")
            name = f"{module}.{'weight' if leaf == 'gamma' else 'bias'}"
        if name in found:
            raise InputError(f"the checkpoint has {name} twice (as {found[name]} and {stored}): remove one of them")
        found[name] = stored
    return found, sorted(prefixes)


def tensor_places(model, present):
    """Map each parameter of `model` to (its tensor among those `present` in the checkpoint, the out rows that it takes
    of it, whether that is stored transposed).

    Raises InputError when a tensor is missing, or when there is one that the family does not know.
    """
    family = families.find(model.spec.family)
    present, _ = plain_names(present)
    head = head_name(family, present)
    found, bare = {}, set()
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        place = family.place(module, model.spec)
        if module == "unembedding" and head:
            place = place._replace(module=head)
        found[name] = f"{place.module}.{leaf}", place.rows
        if module != "unembedding":
            bare.add(found[name][0])
    prefix = max(family.prefixes, key=lambda p: len({p + source for source in bare} & present.keys()))
    places = {}
    for name, (source, rows) in found.items():
        projection = name.rpartition(".")[0].rpartition(".")[2] in TARGETS
        transposed = family.transposed and projection and name.endswith(".weight")
        places[name] = (prefix + source if source in bare else source), rows, transposed
    sources = {source for source, *_ in places.values()}
    missing = sorted(sources - present.keys())
    if missing:
        raise InputError(
            f"the checkpoint lacks {len(missing)} tensors that its config.json asks for (first: {missing[0]}"
            f"{_prefixed(missing[0].removeprefix(prefix), present)}): fetch it again, or correct its config.json"
        )
    extra = [name for name in present.keys() - sources if not _left_out(name, family)]
    if model.has_unembedding:  # a bias is a part of what makes logits
        extra += [name for name in (f"{head}.bias",) if name in present.keys() - sources]
    if extra:
        raise InputError(
            f"the checkpoint has {len(extra)} tensors that a {model.spec.family} model of its config.json does not "
            f"have (first: {min(extra)}): config.json and weights do not belong together"
        )
    return {name: (present[source], rows, transposed) for name, (source, rows, transposed) in places.items()}


def _prefixed(source, present):
    """A hint for a missing tensor that is there under another name."""
    other = next((name for name in present if name.endswith("." + source)), None)
    return "" if other is None else f"; there is {other}, so that its prefix may be the fault"


def _left_out(name, family):
    """What the family calls the part that `name` belongs to, if the base does not need that, else None."""
    for prefix in sorted(family.prefixes, key=len, reverse=True):
        if name.startswith(prefix) and (found := re.match(family.unused, name[len(prefix) :])):
            return re.sub(r"\.\d+\.", ".*.", prefix + found[0]).strip(".")
    return None


def head_name(family, present):
    """The module of the unembedding among the plain names `present`, None without one."""
    ends = f".{family.unembed}.weight"
    return next((name.removesuffix(".weight") for name in present if f".{name}".endswith(ends)), None)


def stored_head(spec, present):
    """The name that the checkpoint has for the weight of the unembedding, None if it has none."""
    plain, _ = plain_names(present)
    head = head_name(families.find(spec.family), plain)
    return plain[f"{head}.weight"] if head else None


def own_head(spec, tensors):
    """`spec`, untied where the checkpoint brings an unembedding that differs from the embedding: it counts."""
    plain, _ = plain_names(tensors.keys())
    family = families.find(spec.family)
    head, embedding = head_name(family, plain), family.place("embed.tokens", spec).module
    places = [plain[p + embedding + ".weight"] for p in family.prefixes if p + embedding + ".weight" in plain]
    if not (spec.tied and head and places) or equal(tensors, plain[head + ".weight"], places[0]):
        return spec
    console.say(f"base: config.json shares the embedding with the output, but {head}.weight differs: it is used")
    return replace(spec, tied=False)


def equal(tensors, one, other):
    """Whether two stored tensors hold the same numbers; about `PIECE` bytes of each are in memory at a time."""
    if tensors.shape(one) != tensors.shape(other):
        return False
    one, other = ((tensors[name], tensors.stored(name)) for name in (one, other))
    step = max(1, PIECE // max(1, one[0].element_size() * one[0][:1].numel()))
    for a, b in zip(one[0].split(step), other[0].split(step), strict=True):
        if not (a == b).all():
            return False
        one[1].give_back()
        other[1].give_back()
    return True


def say_unused(places, present, family):
    """Say in one line which prefixes were taken off names, and which parts of the checkpoint are not used."""
    plain, prefixes = plain_names(present)
    if prefixes:
        console.say(f"base: prefixes taken off the names of tensors: {' '.join(prefixes)}")
    used, parts = {source for source, *_ in places.values()}, {}
    for name, stored in plain.items():
        if stored not in used:
            part = _left_out(name, family)
            parts[part] = parts.get(part, 0) + 1
    if parts:
        console.say(
            "base: tensors that are not used: " + ", ".join(f"{part} ({n})" for part, n in sorted(parts.items()))
        )


def check_shapes(model, places, tensors, folder):
    """Raise InputError for the first tensor whose shape is not that of its parameter, or of all that it fuses."""
    wanted = {}
    for name, parameter in model.named_parameters():
        source, _, transposed = places[name]
        rows, *rest = parameter.shape
        wanted[source] = wanted.get(source, (0,))[0] + rows, *rest, transposed
    for source, (*shape, transposed) in wanted.items():
        shape = shape[::-1] if transposed else shape
        if list(tensors.shape(source)) != shape:
            raise InputError(
                f"{folder}: tensor {source} has shape {list(tensors.shape(source))}, but config.json asks for "
                f"{shape}: the files do not belong together, fetch the checkpoint again"
            )
