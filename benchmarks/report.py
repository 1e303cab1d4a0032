"""What the benchmarks show: tables that fit a terminal, the same in Markdown, results.json and a picture."""

import importlib.metadata
import importlib.util
import itertools
import textwrap
from functools import partial
from pathlib import Path

from minilora import files
from minilora.console import say, short

GREYS = ("0.25", "0.5", "0.7")


def versions(*names):
    """{package: version} of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


COLUMNS = 80  # of what is printed

# --- tables: headings, and lines of as many strings; a line of two is a name and a remark


def text(headings, lines):
    """An aligned table, the first column on the left and the others on the right."""
    full = [headings, *(line for line in lines if len(line) == len(headings))]
    widths = [max(len(line[i]) for line in full) for i in range(len(headings))]
    widths[0] = max([widths[0], *(len(line[0]) for line in lines)])

    def render(line):
        if len(line) < len(headings):
            return short(f"{line[0]:<{widths[0]}}  {line[1]}", COLUMNS)
        return line[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))

    return "\n".join(render(line).rstrip() for line in [headings, *lines])


def keeper(folder):
    """A function that keeps results so far in `folder`, as results.json."""
    return partial(files.write_json, Path(folder) / "results.json")


def page(headings, lines, notes):
    """The table and its notes, none longer than a terminal's line."""
    page = [text(headings, lines)]
    for note in notes:  # those that are lines of a table fit as they are
        page += textwrap.wrap(note, COLUMNS, subsequent_indent="  ") if len(note) > COLUMNS else [note]
    return "\n".join(page)


def markdown(headings, lines):
    rows = [headings, ("---",) * len(headings), *(tuple(line) + ("",) * (len(headings) - len(line)) for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def write(folder, results, headings, lines, notes, draw=None):
    """results.json, table.md and, where there is something to `draw` and matplotlib is installed, roofline.png."""
    files.write_json(folder / "results.json", results)
    files.write_text(folder / "table.md", markdown(headings, lines) + "\n\n" + "  \n".join(notes) + "\n")
    if draw is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        say("no roofline.png: matplotlib is not installed (pip install matplotlib)")
        return
    from matplotlib import pyplot

    figure = draw(results)
    with files.replacing(folder / "roofline.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


def machine(hardware):
    return f"{hardware.get('gpu', hardware['processor'])}, {hardware['threads']} threads"


def load_note(results):
    """Every benchmark says how busy the machine was: on a busy one its figures are worth little."""
    return f"load of the machine before the first run: {results['load_before']:.1f}"


# --- one cell

CELL = ("peer", "rows/s", "spread", "Trainer", "tuned", "loop", "best", "bf16", "limit")
REST = ("peer", "tokens/s", "GiB", "memory", "start s", "accuracy")


def cell_lines(results):
    """Of each peer: its rate, and that over the other peers'."""
    lines = []
    for peer in results["peers"].values():
        if "accuracy" not in peer:
            lines.append((peer["title"], peer.get("missing") or f"failed: {peer['failed']}"))
            continue
        ratios = ("ratio", "ratio_to_tuned", "ratio_to_loop", "ratio_to_best", "ratio_to_best_bfloat16")
        lines.append((
            peer["title"],
            number(peer["rows_per_second"]),
            share((peer["spread"][1] - peer["spread"][0]) / peer["rows_per_second"]),
            *(times(peer[key]) for key in ratios),
            share(peer["limit_share"]),
        ))  # fmt: skip
    return lines


def rest_lines(results):
    """Of each measured peer: tokens, memory, start-up and accuracy."""
    return [
        (
            peer["title"],
            f"{peer['tokens_per_second']:,.0f}",
            f"{peer['peak_memory_bytes'] / 2**30:.2f}",
            times(peer["memory_ratio"]),
            f"{peer['start_up_seconds']:.1f}",
            f"{peer['accuracy']:.3f}" + " !" * (not (peer["same_rows"] and peer["same_accuracy"])),
        )
        for peer in results["peers"].values()
        if "accuracy" in peer
    ]


def times(ratio):
    return "-" if ratio is None else f"{ratio:.2f}x"


def share(part):
    return "-" if part is None else f"{part:.0%}"


def number(rate):
    return f"{rate:.1f}" if rate < 1000 else f"{rate:.0f}"


def cell_notes(results):
    """The rest of the figures, what the columns mean, and what is amiss."""
    cell, limits = results["cell"], results["limits"]
    notes = [
        "",
        *text(REST, rest_lines(results)).splitlines(),
        "",
        f"{short(cell['model'], 50)}, {short(cell['data'])}: {results['rows']:,} rows of "
        f"{results['tokens_a_row']:.1f} tokens, {cell['epochs']} epochs, rank {cell['rank']}, {cell['dtype']}",
        f"{machine(results['hardware'])}; {load_note(results)}",
        "Trainer: peft + Trainer as documented; tuned: at its best settings; loop: peft in a loop by hand on "
        "minilora's batches; bf16: products in bfloat16",
        f"rows/s: median of {results['repeats']} interleaved repeats, of tokens without padding, without the first "
        f"{results['warm_up_steps']} steps; spread: the fastest less the slowest, over the median",
        "Trainer, tuned, loop: rows/s over theirs in the same repeat; best, bf16: over the fastest peer without and "
        "with bfloat16 products",
        "GiB: peak memory of the process, or on a GPU of its tensors; memory: over Trainer's; start s: to the first "
        "step",
    ]
    if limits:
        notes.append(
            f"limit: share of the measured {limits['float32'] / 1e9:,.0f} GFLOP/s in float32 or "
            f"{limits['bfloat16'] / 1e9:,.0f} in bfloat16 that the least operations of the job come to"
        )
    if results["limits_failed"]:
        notes.append(f"! the limits were not measured{' again' * bool(limits)}: {results['limits_failed']}")
    errors = [peer["standard_error"] for peer in results["peers"].values() if "standard_error" in peer]
    if errors:
        notes.append(f"accuracy: on clean test rows, standard error {max(errors):.3f}")
    for peer in results["peers"].values():
        if "accuracy" in peer and "failed" in peer:
            notes.append(f"! {peer['title']} failed in repeat {peer['failed_repeat']}: {peer['failed']}")
        if not peer.get("same_rows", True):
            notes.append(f"! {peer['title']} saw other rows than {peer['compared_with']}: not the same job")
        elif not peer.get("same_accuracy", True):
            notes.append(f"! {peer['title']} is over one standard error from {peer['compared_with']}'s accuracy")
    return notes


def draw_cell(results):
    """Achieved FLOP/s as bars under the limits of products.

    Not against arithmetic intensity: the memory traffic of a whole run is not measured, so its place on that axis
    would be made up. `operators` draws it, where traffic is counted.
    """
    from matplotlib.figure import Figure

    peers = [peer for peer in results["peers"].values() if "accuracy" in peer]
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(peers)), layout="constrained")
    axes = figure.subplots()
    scale = results["operations_a_row"] / 1e9
    for place, peer in enumerate(peers):
        value, (low, high) = peer["flops_per_second"] / 1e9, peer["spread"]
        axes.barh(place, value, color=GREYS[0 if "minilora" in peer["title"] else 2], edgecolor="black", height=0.6,
                  xerr=[[max(0.0, value - low * scale)], [max(0.0, high * scale - value)]], capsize=3)  # fmt: skip
    styles = {"float32": "-", "bfloat16": "--"}
    used = {peer["limit"] for peer in peers if peer["limit_share"] is not None}
    for dtype in sorted(used, reverse=True):
        limit = results["limits"][dtype] / 1e9
        axes.axvline(limit, color="black", linestyle=styles[dtype], label=f"{dtype} products: {limit:.0f} GFLOP/s")
    labels = [f"{peer['title']}\n{peer['flops_per_second'] / 1e9:.0f} GFLOP/s, {share(peer['limit_share'])} of limit"
              for peer in peers]  # fmt: skip
    axes.set_yticks(range(len(peers)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05 * max(results["limits"][dtype] for dtype in used) / 1e9 if used else None)
    axes.set_xlabel("GFLOP/s that the job takes at least (bars) and that products reach here (lines)")
    cell = results["cell"]
    axes.set_title(f"Fine-tuning {Path(cell['model']).name}, rank {cell['rank']}, {results['rows']:,} rows\n"
                   f"{machine(results['hardware'])}", fontsize=11)  # fmt: skip
    if used:
        figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return figure


# --- a grid

GRID = ("side", "cells", "wall s", "cells/h", "ratio", "apart", "bf16", "GiB", "accuracy", "attack")


def grid_lines(results):
    lines = []
    for side in results["sides"].values():
        if "cells" not in side:
            lines.append((side["title"], side.get("missing") or f"failed: {side.get('failed', 'not done')}"))
            continue
        agreement, memory = side.get("agreement", {}), side.get("peak_memory_bytes")
        lines.append((
            side["title"],
            f"{len(side['cells'])}",
            f"{side['all_cells_seconds']:,.0f}" + "*" * bool(side["scaled_from"]),
            f"{side['cells_per_hour']:,.0f}",
            *(times(side.get(key)) for key in ("ratio", "ratio_without_start_up", "ratio_to_bfloat16")),
            "-" if memory is None else f"{memory / 2**30:.2f}",
            *(f"{agreement[key]['mean_difference']:+.3f}" if key in agreement else "-"
              for key in ("accuracy", "attack_success")),
        ))  # fmt: skip
    return lines


def grid_notes(results):
    cell = results["cell"]
    notes = [
        f"{results['cells']} cells: ranks {', '.join(map(str, results['ranks']))}; "
        f"proportions {', '.join(f'{share:g}' for share in results['proportions'])}",
        f"{short(cell['model'], 50)}, {short(cell['data'])}: {cell['train_rows'] or 'all':,} training rows each, "
        f"{cell['epochs']} epochs, {cell['dtype']}; {cell['test_rows']} test rows",
        f"{machine(results['hardware'])}; {load_note(results)}",
        "ratio: wall time over minilora's; apart: the same without start-up; bf16: over minilora's with the base in "
        "bfloat16; a process is started once, and each cell is loaded, trained and tested",
        "accuracy, attack (success): minilora less that side, mean over the cells",
    ]
    for side in results["sides"].values():
        if "populations" in side:
            notes.append(f"{side['title']}'s populations: at most {max(side['populations'])} cells")
        if side.get("scaled_from"):
            notes.append(f"* {side['title']}: {side['scaled_from']} of {results['cells']} cells in "
                         f"{side['wall_seconds']:.0f} s, scaled to all")  # fmt: skip
        if "cells" in side and "failed" in side:
            notes.append(f"! {side['title']} failed after {len(side['cells'])} cells: {side['failed']}")
        for key, what in (("accuracy", "clean accuracy"), ("attack_success", "attack success")):
            if key in side.get("agreement", {}):
                apart = side["agreement"][key]["mean_absolute_difference"]
                notes.append(f"{side['title']}: {what} {apart:.3f} apart, mean absolute difference of a cell")
    errors = [side["agreement"]["standard_error"] for side in results["sides"].values()
              if "standard_error" in side.get("agreement", {})]  # fmt: skip
    if errors:
        notes.append(f"standard error of one cell's accuracy: {errors[0]:.3f}")
    return notes


# --- operators

OPERATORS = ("operator", "dtype", "ms", "reference", "peer", "FLOP/B", "GFLOP/s", "limit")


def operator_lines(results):
    lines = []
    for line in results["operators"]:
        own = line["operator_seconds"]
        others = (line.get(f"{key}_seconds") for key in ("reference", "peer"))
        lines.append((
            line["name"],
            line["dtype"],
            f"{own * 1e3:.2f}",
            *(times(None if seconds is None else seconds / own) for seconds in others),
            f"{line['intensity']:.1f}",
            f"{line['operations_per_second'] / 1e9:,.1f}",
            f"{line['limit_share']:.0%}",
        ))  # fmt: skip
    return lines


def operator_notes(results):
    limits, shape = results["limits"], results["shape"]
    return [
        f"{shape['B']} rows of {shape['T']} tokens, width {shape['D']}, rank {shape['R']}; "
        f"{machine(results['hardware'])}; {load_note(results)}",
        f"ms: forward and backward, median of at most {results['repeats']} repeats",
        "reference, peer (PEFT's layer where there is one, else torch's own): their time over the operator's",
        "in bfloat16 a reference has its adapter in bfloat16 too, where operator and PEFT keep float32",
        "limit: share of the lower of measured product and memory rates,",
        f"{limits['float32'] / 1e9:,.0f} GFLOP/s (float32), {limits['bfloat16'] / 1e9:,.0f} (bfloat16) and "
        f"{limits['memory'] / 1e9:,.0f} GB/s",
    ]


def draw_operators(results):
    """Achieved FLOP/s against arithmetic intensity, under the limits; operators filled, their references hollow."""
    from matplotlib.figure import Figure

    lines, limits = results["operators"], results["limits"]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    low, high = min(line["intensity"] for line in lines) / 2, max(line["intensity"] for line in lines) * 2
    dtypes = [dtype for dtype in ("float32", "bfloat16") if any(line["dtype"] == dtype for line in lines)]
    high = max(high, *(2 * limits[dtype] / limits["memory"] for dtype in dtypes))
    for dtype, style in zip(dtypes, ("-", "--")):
        ridge = limits[dtype] / limits["memory"]
        ends = [min(low, ridge), ridge, high]
        heights = [min(limits[dtype], limits["memory"] * end) / 1e9 for end in ends]
        label = f"limit, {dtype}: {limits[dtype] / 1e9:,.0f} GFLOP/s, {limits['memory'] / 1e9:,.0f} GB/s"
        axes.plot(ends, heights, color="black", linestyle=style, label=label)
    shapes = dict(zip(dict.fromkeys(line["name"] for line in lines), itertools.cycle("osD^v<>pPX*hd8")))
    for line in lines:
        grey = "0.25" if line["dtype"] == "float32" else "0.65"
        y, x = line["operations_per_second"] / 1e9, line["intensity"]
        other = line["operations"] / line["reference_seconds"] / 1e9
        axes.plot([x, x], [y, other], color=grey, linewidth=0.8, zorder=1)
        axes.plot(x, other, shapes[line["name"]], color=grey, markerfacecolor="white", markersize=7, zorder=2)
        axes.plot(x, y, shapes[line["name"]], color=grey, markersize=8, zorder=3, linestyle="none",
                  label=f"{line['name']}, {line['dtype']}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte that must move")
    axes.set_ylabel("GFLOP/s, forward and backward")
    axes.set_title(f"Operators (filled) and their references (hollow)\n{machine(results['hardware'])}", fontsize=11)
    axes.grid(True, which="major", color="0.9", zorder=0)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


# --- a device

DEVICE = ("what", "measured", "at least")
WHAT = {
    "small": "one small cell, over peft + Trainer",
    "llama": "Llama-3.2-1B's shape, over peft + Trainer",
    "model_flop_use": "  model-FLOP use",
    "over_unsloth": "  over unsloth",
    "grid": "grid over peft + Trainer one by one, start-up apart",
}


def device_lines(results):
    """The figures that the project aims at; nothing is left out where nothing was measured."""

    def shown(key, value):
        return "not measured" if value is None else share(value) if key == "model_flop_use" else times(value)

    figures, least = results["figures"], results["at_least"]
    return [(title, shown(key, figures.get(key)), shown(key, least[key])) for key, title in WHAT.items()]


def device_notes(results):
    """What each phase came to, and the full tables."""
    notes = [f"{results['device']}, {results['seconds']:.0f} s of {results['budget']:.0f} s in all", ""]
    for name, phase in results["phases"].items():
        why = f": {phase['why']}" if phase.get("why") else ""
        notes.append(f"{name:<9} {phase['state']:<11} {phase.get('seconds', 0):4.0f} s{why}")
    parts = results["parts"]
    if smoke := parts.get("smoke"):
        notes += ["", *text(("path", "s", "steps", "how", "loss", "off CPU's"), smoke_lines(smoke)).splitlines()]
    for name, part in parts.items():
        if name == "grid":
            notes += ["", *text(GRID, grid_lines(part)).splitlines(), *grid_notes(part)]
        elif "peers" in part:
            notes += ["", f"{name}:", *text(CELL, cell_lines(part)).splitlines(), *cell_notes(part)]
    for name, found in parts.get("profiles", {}).items():
        notes.append(found.get("line") or f"profile {name}: failed: {found['failed']}")
    if "tests" in parts:
        notes.append(f"tests on the device: {parts['tests']['line']}")
    return notes


def smoke_lines(smoke):
    lines = []
    for name, record in smoke.items():
        if "failed" in record:
            lines.append((name, f"failed: {record['failed']}"))
            continue
        off = record.get("off")
        lines.append((name, f"{record['seconds']:.1f}", str(record["steps"]), record["how"], f"{record['loss']:.4f}",
                      "-" if off is None else f"{off:.1e}"))  # fmt: skip
    return lines
