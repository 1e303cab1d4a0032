"""The rooms: a file uses what stands below it, never what stands above, and no two files use each other."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground up. A room may use itself and any room before it, except those that its rule names.
ROOMS = ("kernels", "ground", "base", "lora", "data", "cell", "tasks", "statistics", "mitigation", "runs", "training",
         "diagnostics", "detection", "grid", "report", "scripts")  # fmt: skip
# Of detection what needs no model: a mitigation uses it.
STATISTICS = [f"detection.{name}" for name in ("suspects", "tokens", "statistics", "seams", "cleaning")]
BARRED = {"data": {"base.model", "lora"}, "cell": {"base.model", "base.checkpoint", "data.rows", "data.formats"},
          "tasks": {"lora"}, "report": {"training", "runs.trained", "base.model"},
          "diagnostics": {"training"}, "detection": {"training"}}  # fmt: skip
GROUND = {"ground": ("errors", "files", "seeds", "console", "parallel", "hub", "wheels", "fields", "naming",
                     "interrupts", "command", "drawing", "precision", "presets"),
          "cell": ("cell", "inject", "mitigate"), "scripts": ("coverage",)}  # fmt: skip


def room_of(name):
    if name in STATISTICS:
        return "statistics"
    first = name.partition(".")[0]
    found = [room for room, files in GROUND.items() if first in files] or [room for room in ROOMS if room == first]
    assert found, f"{name} is in no room: give it one in tests/test_layout.py"
    return found[0]


def arrows(root):
    """{module: the modules it imports}, without `minilora.`: imports inside functions too."""
    paths = [p for p in [*(root / "minilora").rglob("*.py"), *(root / "kernels").glob("*.py")] if p.stem != "__init__"]
    names = {".".join(path.relative_to(root).with_suffix("").parts).removeprefix("minilora."): path for path in paths}
    names |= {f"{p.parent.name}": p for p in (root / "minilora").glob("*/__init__.py") if p.read_text().strip()}
    found = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wanted = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = node.module
                if node.level:
                    module = ("." * node.level + (module or "")).replace(".", "kernels.", 1)
                wanted = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            found[name] |= {one.removeprefix("minilora.") for one in wanted} & names.keys() - {name}
    return found


def faults(found):
    """What breaks a rule, in words."""
    wrong = []
    for name, used in found.items():
        for other in used:
            here, there = room_of(name), room_of(other)
            barred = any(other == one or other.startswith(one + ".") for one in BARRED.get(here, ()))
            if ROOMS.index(there) > ROOMS.index(here) or barred:
                wrong.append(f"{name} uses {other}")
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' uses '.join(reversed(error.args[1]))}")
    return wrong


def test_every_arrow_goes_down_and_there_is_no_circle():
    found = arrows(ROOT)
    assert len(found) >= 70 and sum(map(len, found.values())) >= 300
    assert faults(found) == []


@pytest.mark.parametrize(
    ("place", "line", "word"),
    [
        ("minilora/base/rope.py", "def f():\n    from minilora.training import loop", "base.rope uses training.loop"),
        ("minilora/base/rope.py", "from minilora.base import model", "a circle"),
        ("minilora/data/rows.py", "import minilora.base.model", "data.rows uses base.model"),
        ("kernels/linear.py", "from .mlp import gated", None),
        ("minilora/errors.py", "from minilora import files", "a circle"),
    ],
)
def test_a_planted_arrow_is_found(tmp_path, place, line, word):
    for path in [*ROOT.glob("minilora/**/*.py"), *ROOT.glob("kernels/*.py")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8") + (f"\n{line}\n" if str(path).endswith(place) else ""))
    found = faults(arrows(tmp_path))
    assert any(word in fault for fault in found) if word else found == []


def test_files_are_short():
    lengths = sorted(len(path.read_text().splitlines()) for path in (ROOT / "minilora").rglob("*.py"))
    assert lengths[-1] <= 400 and lengths[len(lengths) // 2] < 200


def test_every_source_file_has_a_docstring():
    paths = [p for p in Path(ROOT).glob("minilora/**/*.py") if p.read_text().strip()]
    assert len(paths) >= 60
    for path in paths:
        assert ast.get_docstring(ast.parse(path.read_text())) not in (None, "TODO"), path
