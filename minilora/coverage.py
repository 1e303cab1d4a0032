"""Which projections an adapter covers, decided before any weight is loaded.

A pattern that matches nothing, or names layers that are not there, is refused with what it did match: an ablation
of targets must not quietly train something else.

python -m minilora.coverage MODEL --targets q v --layers 0-3 --rank 8      reads only config.json
"""

import textwrap

from minilora.lora.targets import count_trained, parse_targets, plan_slots, ranges


def report(slots, spec, cell):
    """Lines of at most 100 columns: which of the checkpoint's tensors `slots` {module: Slot} adapt, how many
    parameters are trained there, and what of the base the cell's targets and layers leave as it is.

    Tensors are named as in a checkpoint without a task's prefix, weights in the layout that they are stored in.
    """
    groups, lines, by_layer = {}, [], dict.fromkeys(range(len(spec.layers)), 0)
    for name, slot in slots.items():
        _, layer, target = name.split(".")
        key = target, tensor_of(target, int(layer), spec), slot, spec.shape(target, int(layer))
        groups.setdefault(key, []).append(int(layer))
    for (target, tensor, slot, shape), layers in groups.items():
        trained = count_trained(slot, shape, cell.variant)
        lines.append(f"{target:<5}{tensor}")
        lines.append(
            f"     {shape[0]} x {shape[1]}, rank {slot.rank}, scale {slot.scale:.4g}, {trained:,} trained parameters, "
            f"{in_words(layers)}"
        )
        by_layer |= {layer: by_layer[layer] + trained for layer in layers}
    lines.append("")
    for trained in dict.fromkeys(filter(None, by_layer.values())):
        layers = [layer for layer, value in by_layer.items() if value == trained]
        lines.append(f"{in_words(layers)}: {trained:,} trained parameters" + " each" * (len(layers) > 1))
    lines.append(f"in all {sum(by_layer.values()):,} trained parameters on {len(slots)} projections")
    here = {name.rpartition(".")[2] for name in slots}
    named = parse_targets(cell.targets, cell.rank, cell.alpha, cell.scaling)
    absent = [target for target in named if target not in spec.targets]
    left = [target for target in spec.targets if target not in here]
    bare = [layer for layer, trained in by_layer.items() if not trained]
    missed = [f"{' '.join(absent)} (named, but a {spec.family} layer has no such projection)"] if absent else []
    missed += [f"{' '.join(left)} (not named)"] if left else []
    missed += [f"all of {in_words(bare)}"] if bare else []
    lines += [f"missed: {text}" for text in missed] or ["missed: nothing"]
    return [part for line in lines for part in textwrap.wrap(line, 100, subsequent_indent=" " * 5) or [""]]


def in_words(layers):
    return f"layer{'s' * (len(layers) > 1)} {ranges(layers)}"


def tensor_of(target, layer, spec):
    """The tensor that holds a projection's weight, with the part of it: h.{i}.attn.c_attn.weight[:, 0:768]."""
    from minilora.base import families

    family, name = families.find(spec.family), f"layers.{layer}.{target}"
    place, parts = family.place(name, spec), family.fused(name, spec)
    tensor = place.module.replace(family.layout.layer.format(i=layer), family.layout.layer, 1) + ".weight"
    if len(parts) == 1:
        return tensor
    if family.by_head:
        count = {2: "half", 3: "third"}[len(parts)]
        which = ("first", "second", "third")[parts.index(name)] if name != parts[-1] else "last"
        return f"{tensor}, the {which} {count} of each head's rows"
    rows = f"{place.rows.start}:{place.rows.stop}"
    return f"{tensor}[:, {rows}]" if family.transposed else f"{tensor}[{rows}]"


def main(argv=None):
    from minilora.base import checkpoint, families
    from minilora.base.source import resolve_config
    from minilora.cell import Cell
    from minilora.command import Parser, add_flags, given_flags
    from minilora.fields import marked

    parser = Parser(prog="python -m minilora.coverage", description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="hub id, or folder with config.json")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(parser, Cell, only=("revision", *marked(Cell, "slots")))
    cell = Cell(**given_flags(parser.parse_args(argv), Cell))
    spec = families.read_spec(checkpoint.read_config(resolve_config(cell.model, cell.revision)))
    title = f"{cell.model}: {spec.family}, {len(spec.layers)} layers of width {spec.width}\n"
    print("\n".join([title, *report(plan_slots(spec, cell), spec, cell)]))


if __name__ == "__main__":
    from minilora.command import exit_cleanly

    exit_cleanly(main)
