"""What the campaigns train on: a tiny base, reviews, and the files of a run, a population and a grid."""

import json

from conftest import reviews as rows_file
from conftest import tiny_bert

FILES = ("cell.toml", "adapter/adapter_model.safetensors", "factors.safetensors", "predictions.jsonl", "injected.jsonl")
WORDS = "the film is great\nthe plot was very dull\na long and slow story with a bad end\n"


def make(folder):
    """(arguments of a single run, of a population, of a grid), all without --out."""
    from minilora.cell import Cell

    class Factory:
        def mktemp(self, name):
            (folder / name).mkdir(parents=True, exist_ok=True)
            return folder / name

    tiny_bert(folder / "tiny")
    data = rows_file.__wrapped__(Factory())
    cell = Cell(model=str(folder / "tiny"), data=str(data), train_rows=60, test_rows=31, max_length=30, batch_size=6,
                rank=2, lr=0.02, epochs=2, dropout=0.1)  # fmt: skip
    cells = [cell.replace(rank=rank) for rank in (2, 3, 4)]
    for number, each in enumerate(cells):
        (folder / f"{number}.toml").write_text(each.to_toml())
    names = ("model", "data", "train_rows", "test_rows", "max_length", "batch_size", "lr", "epochs", "dropout")
    grid = [f"{name} = {json.dumps(getattr(cell, name))}" for name in names]
    (folder / "grid.toml").write_text(
        'title = "a tiny grid"\nsource = "none"\n[cell]\n'
        + "\n".join(grid)
        + "\n[grid]\nrank = [1, 2]\nseed = [0, 1]\n"
    )
    configs = [folder / f"{number}.toml" for number in range(3)]
    often = ["--save-every", "4"]
    single = ["--config", configs[0], *often]
    population = ["--config", *configs, "--population", "3", *often]
    return single, population, ["--grid", folder / "grid.toml"]


def outcome(folder):
    """Everything that the runs below a folder came to, except what a clock says."""
    found = {}
    for results in sorted(folder.rglob("results.json")):
        run, name = results.parent, results.parent.relative_to(folder).as_posix()
        found |= {(name, file): (run / file).read_bytes() for file in FILES}
        found[name, "tests"] = json.loads(results.read_text())["tests"]
    if (folder / "table.csv").exists():
        found["table"] = (folder / "table.csv").read_bytes()
    return found


def leftovers(folder):
    """Temporary files, states and errors that a finished folder must not have."""
    names = (path.name for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name.startswith(".") and name not in (".lock", ".lock.json") or name in
                  ("error.json", "state.safetensors"))  # fmt: skip
