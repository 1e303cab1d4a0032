"""Clean adapters of the same base, beside which a scan's figures are put: trained once, their figures kept.

They have the scanned adapter's rank, targets and layers, and each a seed and a split of its own. Their figures are kept
in our cache by the hash of all that they follow from, so that more of them later train only the new ones.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import minilora
from minilora import files
from minilora.cell import Cell
from minilora.console import say
from minilora.data.rows import fingerprint_rows, rows_of
from minilora.detection.probe import Probe, Reader, Sentences
from minilora.detection.search import library, of_piece
from minilora.detection.weights import statistics
from minilora.diagnostics.energy import energies, updates
from minilora.lora.targets import ranges

FORMAT = 3  # of what is kept, and of how it is made
ROWS = 1500  # of the default data that each clean adapter is trained on; of other data all


def cells_like(run, count, data=None):
    """`count` cells of clean adapters that are built as the run's is, trained on `data` (default: the default rows)."""
    layers = updates(run)
    slot = next(iter(layers.values())).slot
    places = sorted({int(name.split(".")[1]) for name in layers})
    targets = [target for target in run.setting.spec.targets if any(name.endswith(f".{target}") for name in layers)]
    kept = ("model", "revision", "tokenizer", "dtype", "device", "task", "prompt", "completion", "pooling")
    fields = {name: getattr(run.cell, name) for name in kept}
    cell = Cell(
        **fields, rank=slot.rank, alpha=slot.scale * slot.rank, targets=tuple(targets), layers=ranges(places),
        train_rows=ROWS, test_rows=20, batch_size=16, max_length=run.cell.max_length, inject={"sources": ("none",)},
    )  # fmt: skip
    cell = cell if data is None else cell.replace(data=str(data), train_rows=None)
    return [cell.replace(seed=seed, seed_split=seed) for seed in range(count)]


def clean_figures(run, kinds, count, data=None, budget=None, known=None):
    """The `figures` of `count` clean adapters, a list. Those that are not kept from before are trained together.

    Raises `Spent` when the budget is over; what was done until then is kept.
    """
    cells = cells_like(run, count, data)
    whole = rows_of(cells[0].replace(train_rows=None))
    paths = [kept_at(cell, run, kinds, list(map(fingerprint_rows, whole))) for cell in cells]
    missing = [at for at, path in enumerate(paths) if not path.is_file()]
    if missing:
        say(f"clean null: training {len(missing)} adapters, {count - len(missing)} kept from before")
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / str(at) for at in missing]
            minilora.train_together([cells[at] for at in missing], outs, quiet=True, on_step=budget)
            for at, out in zip(missing, outs, strict=True):
                made = figures(minilora.open(out), kinds, budget, known)
                paths[at].parent.mkdir(parents=True, exist_ok=True)
                files.write_json(paths[at], made)
    return [files.read_json(path, f"delete {path.parent}") for path in paths]


def figures(run, kinds, budget=None, known=None):
    """What a scan compares of a clean adapter: {"outlier", "kind", "piece", "weights"}."""
    reader, moved = Reader(run, budget, known), energies(run)
    found = {"outlier": moved.outlier, "kind": None, "piece": None, "weights": statistics(run)}
    if reader.has_margins:
        kinds, probe, sentences = best_kinds(reader, moved.ids, kinds)
        found |= {"kind": kinds[0].residual}
        found |= {"piece": of_piece(reader, sentences, probe, int(moved.ids[0])).residual}
    return found


def best_kinds(reader, pieces, kinds):
    """(The `Suspect`s of the library, the probe, the sentences) of what a reader reads."""
    sentences = Sentences(reader)
    table = reader.run.base.embed.tokens.weight.float().cpu().numpy()
    probe = Probe(sentences, sorted(pieces.tolist()), table)
    return library(reader, sentences, probe, kinds), probe, sentences


def kept_at(cell, run, kinds, rows):
    """Where the figures of a clean adapter are kept: by the cell, the base's and the tokenizer's files
    (`run.setting.inputs`), the library of kinds, and the hashes of all rows that the cell draws from."""
    made_from = [FORMAT, cell.to_dict(), run.setting.inputs, kinds, rows]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return files.cache() / "scans" / f"{key[:32]}.json"
