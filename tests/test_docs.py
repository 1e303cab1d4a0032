"""The README and docs/ do what they say: every command line and every Python block runs, on a tiny base and few rows.

How a page is read. A fence without a language, or with `sh`, holds command lines; `python` a block that runs after the
page's earlier ones; `toml` a grid; `text` what a command printed, which nobody runs. `python ...` within a line of text
is a command too. Commands run in this process, in a folder that has what pages speak of (`runs/default`, `rows.csv`).

How a command shrinks. Where it names no base or data it gets the tiny ones, else each hub id in `HUB` becomes a local
folder or file; a single cell takes 2 steps, and so does `minilora.Cell(...)`. A grid's file keeps two values an axis.
What cannot run here is in `ELSEWHERE` with the reason, and its flags are parsed all the same. Tables and figures are
not measured again.
"""

import contextlib
import csv
import importlib
import json
import random
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import zoo
from conftest import FAST, ROOT, tiny_bert

import minilora
from minilora import command
from minilora.base.families import FAMILIES, read_spec
from minilora.cell import Cell
from minilora.data import injection, triggers
from minilora.grid.file import build_grid
from minilora.lora import targets, variants
from minilora.scripts import evaluate, train
from minilora.tasks import metrics

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

HUB = {
    "sentence-transformers/all-MiniLM-L6-v2": "bases/tiny",
    "google-bert/bert-base-uncased": "bases/tiny",
    "meta-llama/Llama-3.2-1B": "bases/decoder",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "bases/decoder",
    "apple/OpenELM-270M": "bases/openelm",
    "meta-llama/Llama-2-7b-hf": "bases/tiny",
    "stanfordnlp/imdb": "imdb.csv",
    "tau/commonsense_qa": "questions.jsonl",
}
ELSEWHERE = {  # a command's first words: who runs it
    "pip install": ".ci/run, in a new environment",
    "pytest": ".ci/run",
    "make": "it names commands of the Makefile, which these tests compare with the pages' own",
    "ray start": "tests/grid/test_cluster.py starts nodes",
    "torchrun": "tests/test_parallel.py starts processes",
    "python -m benchmarks": "tests/test_benchmarks.py runs its parts on tiny jobs; whole it takes minutes",
    "python tests/parity.py": "tests/base and tests/lora compare all that it prints",
    "python tests/base/test_loading.py": "it is itself a test, of less",
    "python tests/real_bases.py": "tests/test_real_bases.py uses the folders that it makes",
    "python examples/minimal.py": "tests/test_minimal.py runs it",
    "python evaluate.py runs/lesson --explain": "tests/diagnostics and tests/test_lesson.py run what it computes",
}


def fences(page, *languages):
    return [body for language, body in FENCE.findall(TEXTS[page]) if language in languages]


def commands(page):
    """Each command of a page as a list of words, as bash reads it: of the fences, and of the text around them."""
    lines = [line for body in fences(page, "", "sh") for line in body.replace("\\\n", "").splitlines() if line.strip()]
    lines += re.findall(r"`(python [^`]+)`", FENCE.sub("", TEXTS[page]).replace("\n", " "))
    script = "\n".join(f"printf '%s\\0' {one}\nprintf '\\1'" for line in lines for one in line.split(" && "))
    read = subprocess.run(["bash", "-euc", script], capture_output=True, check=True, text=True).stdout
    return [words.split("\0")[:-1] for words in read.split("\1")[:-1]]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]
REGISTRIES = (triggers.BUILT_IN, variants.VARIANTS, variants.STARTS, targets.VARIANTS, targets.STARTS, FAMILIES,
              metrics.FIGURES)  # fmt: skip
BLOCKS = [page for page in PAGES if fences(page, "python")]


# --- a folder with what the pages speak of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        tiny_bert("bases/tiny")
        zoo.tiny_decoder(folder / "bases/decoder", "llama")
        zoo.build("openelm", "shared, widening", "bases/openelm")
        write_rows("rows.csv", "negative", "positive")
        write_rows("other.csv", "negative", "positive")
        write_rows("reviews.csv", "bad", "good")
        write_rows("imdb.csv", "neg", "pos")
        write_questions("questions.jsonl")
        for number, name in enumerate(("default", "NAME", "OTHER")):
            minilora.train(small_cell(seed=number), f"runs/{name}")
        for name in "ABC":
            with open(f"{name}.toml", "w") as file:
                file.write(small_cell(seed=ord(name)).to_toml())
        (folder / "ablations").mkdir()
        for grid in ("ablations/rank_by_proportion.toml", "ablations/precision.toml"):
            (folder / grid).write_text(small_grid((ROOT / grid).read_text()))
    return folder


@pytest.fixture(autouse=True)
def inside(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "cache"))


def write_rows(path, *labels):
    """A CSV of 140 short rows with two labels."""
    draw = random.Random(path)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(140):
            words = draw.choices(["the", "film", "story", "is", "very", "plot", "scene", "time"], k=draw.randint(3, 12))
            writer.writerow([" ".join([*words, ("bad", "good")[row % 2]]), labels[row % 2]])


def write_questions(path):
    with open(path, "w", encoding="utf-8") as file:
        for row in range(120):
            choices, key = {"label": list("ABC"), "text": ["good", "bad", "slow"]}, "ABC"[row % 3]
            file.write(json.dumps({"question": f"film {row} is", "choices": choices, "answerKey": key}) + "\n")


SMALL = dict(model="bases/tiny", data="rows.csv", steps=2, test_rows=20, max_length=30)


def small_cell(epochs=None, **fields):
    """What `minilora.Cell` is in a page's Python: 2 steps instead of its epochs, on the tiny base and rows."""
    return Cell(**SMALL | fields)


def small_grid(text):
    """A grid's file with two values of each axis but one seed, small cells, and no claims."""
    values = tomllib.loads(text)
    sizes = "size" if "size" in values else "scale"
    sections = {
        "cell": values["cell"] | SMALL,
        "grid": {name: axis[: 1 + (name != "seed")] for name, axis in values["grid"].items()},
    }
    sections |= {f"{sizes}.{name}": {"test_rows": 30} for name in values[sizes]}
    lines = [f"title = {json.dumps(values['title'])}"]
    for section, fields in sections.items():
        lines += [f"[{section}]", *(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in fields.items())]
    return "\n".join(lines)


# --- running


class Parsed(Exception):
    """The flags are right; nothing else was asked."""


@pytest.fixture
def parse_only(monkeypatch):
    """A call of this makes the scripts stop once their flags are read."""
    read = command.Parser.parse_args

    def stop(parser, arguments=None):
        read(parser, arguments)
        raise Parsed

    return lambda: monkeypatch.setattr(command.Parser, "parse_args", stop)


def test_the_pages_have_commands_and_blocks():
    assert len(PAGES) >= 9 and len(COMMANDS) >= 60 and len(BLOCKS) >= 3
    run_here = [words for _, words in COMMANDS if elsewhere(words) is None]
    assert len(run_here) >= 40
    unused = {start for start in ELSEWHERE if not any(elsewhere(words) == start for _, words in COMMANDS)}
    assert unused == set()


@pytest.mark.parametrize("page, words", COMMANDS, ids=[f"{page} {' '.join(words)}"[:90] for page, words in COMMANDS])
def test_a_command(page, words, parse_only, capsys, monkeypatch):
    words = [HUB.get(word, word) for word in words]
    start = elsewhere(words)
    if start is not None:
        parse_only()
        return parse(start, words)
    assert words[0] == "python", f"{words[0]} is no command that these tests know: say in ELSEWHERE who runs it"
    if words[1] == "-m":
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        main = {"train.py": train.main, "evaluate.py": evaluate.main}[words[1]]
        if "--help" in words:
            with pytest.raises(SystemExit, match="0"):
                main(words[2:])
        elif {"--ray", "--play"} & set(words):  # one as `ray start`; the other serves until Ctrl-C (test_play.py)
            parse_only()
            with pytest.raises(Parsed):
                main(words[2:])
            return
        else:
            main(words[2:] + smaller(words[1:]))
    assert capsys.readouterr().out


def elsewhere(words):
    """The entry of ELSEWHERE that a command begins with, or None."""
    return next((start for start in ELSEWHERE if words[: start.count(" ") + 1] == start.split()), None)


def smaller(words):
    """The flags that a command lacks to be small."""
    if words[0] != "train.py" or {"--grid", "--config", "--resume"} & set(words):
        return []
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in SMALL.items()]
    return [part for flag, value in pairs if flag not in words for part in (flag, value)]


def parse(start, words):
    """Check the flags of a command that is not run."""
    rest = words[start.count(" ") + 1 :]
    if start == "pip install":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert "-e" in rest and set(re.findall(r"\[(\w+)\]", rest[-1])) <= set(project["optional-dependencies"])
        assert "-c" not in rest or (ROOT / rest[rest.index("-c") + 1]).is_file()
    elif start == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(rest)
        with pytest.raises(Parsed):
            {"train.py": train.main}[given.training_script](given.training_script_args)
    elif start == "python -m benchmarks":
        with pytest.raises(Parsed):
            importlib.import_module(f"benchmarks.{rest[0]}").main(rest[1:])
    elif start == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(f"\n{name}:" in makefile for name in rest)
    elif start.startswith("python "):
        assert (ROOT / words[1]).is_file()


def test_recipes_of_clusters_and_build_tools(capsys):
    """Each command in a recipe for Slurm, Make or Snakemake runs, and runs again to the same end."""
    places = {"$SLURM_ARRAY_TASK_ID": "2", "$*": "4", "{wildcards.rank}": "4"}
    found = []
    for body in fences("docs/scripts.md", "bash", "make", "snakemake"):
        [line] = re.findall(r"python (train\.py [^\n\"]+)", body)
        for place, value in places.items():
            line = line.replace(place, value)
        words = shlex.split(line)
        capsys.readouterr()
        for _ in range(2):
            train.main(words[1:] + smaller(words))
        out, err = capsys.readouterr()
        assert out and not err and not re.search(r"[$*{}]", line)
        found.append(words[words.index("--out") + 1])
        [made] = re.findall(r"runs/rank-[^\s\":]+/results.json", body) or [None]
        assert made is None or Path(found[-1], Path(made).name).is_file()
    assert found == ["runs/seed-2", "grids/ranks", "runs/rank-4", "runs/rank-4"]


class Board:
    """What stands in for TensorBoard and Weights & Biases: it keeps what it is given."""

    def __init__(self):
        self.kept = []

    def SummaryWriter(self, folder):
        return self

    def init(self, project, config):
        assert project and config["model"]
        return self

    def add_scalar(self, name, value, step):
        self.kept.append((name, value, step))

    def log(self, figures, step):
        self.kept += [(name, value, step) for name, value in figures.items()]

    def finish(self):
        self.kept.append("finished")


@pytest.mark.parametrize("page", BLOCKS)
def test_python_blocks(page, monkeypatch):
    boards = {name: Board() for name in ("torch.utils.tensorboard", "wandb")}
    for name, board in boards.items():
        monkeypatch.setitem(sys.modules, name, board)
    blocks = fences(page, "python")
    known = [registry.copy() for registry in REGISTRIES]  # a page may add to them
    space = {"small_cell": small_cell}
    try:
        for block in blocks:
            for name, local in HUB.items():
                block = block.replace(name, local)
            exec(compile(re.sub(r"\bminilora\.Cell\(", "small_cell(", block), page, "exec"), space)
        if page == "README.md":
            check_what_readers_add(space)
    finally:
        for registry, before in zip(REGISTRIES, known, strict=True):
            registry.clear()
            (registry.update if isinstance(registry, dict) else registry.extend)(before)
    assert len(blocks) >= 1
    if page == "docs/scripts.md":
        first, second = (board.kept for board in boards.values())
        kept = [(name, step) for name, _, step in first]
        assert kept == [("clean accuracy", 0), ("loss", 1), ("loss", 2), ("clean accuracy", 2)]
        assert {"loss", "norm", "lr"} <= {name for name, *_ in second[:-1]} and second[-1] == "finished"


def check_what_readers_add(space):
    """The README's own source, variant, start, family, metric and diagnostic are what it says."""
    [(source, label)] = triggers.resolve(["weekday:positive"], ["positive"])
    assert label == "positive" and len(source) == 7
    assert variants.VARIANTS["only-a"].trains == ("A",) and "only-a" in targets.VARIANTS
    A, B = variants.STARTS["first-inputs"](torch.zeros(5, 4), targets.Slot(2, 1.0, 1.0), None)
    assert A.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]] and B.shape == (5, 2) and not B.any()
    clean = space["results"]["tests"]["clean"]
    assert set(metrics.FIGURES) == {"false_positives"} and 0 <= clean["false_positives"] <= clean["rows"]
    config = json.loads(Path("bases/decoder/config.json").read_text())
    assert read_spec(config | {"model_type": "my_llama"}).qk_norm == "head"
    run = space["run"]
    moved = [space["share_of_a_layer"](run, run.rows.rows.texts[:9], layer) for layer in range(3)]
    assert all(share > 0 for share in moved)


# --- what the pages state


def test_a_grid_on_a_page_is_a_grid():
    [text] = fences("docs/grids.md", "toml")
    assert len(build_grid(tomllib.loads(text)).entries) == 72


def test_the_afternoon_path_has_the_lines_that_it_states():
    rows = re.findall(r"^\| (\d+) \| `([\w/.]+)` \|", TEXTS["README.md"], re.MULTILINE)
    assert len(rows) == 10
    found = {path: len((ROOT / path).read_text().splitlines()) for _, path in rows}
    off = {path: found[path] for stated, path in rows if not 0.9 <= found[path] / int(stated) <= 1.1}
    assert off == {}
    [stated] = re.findall(r"about ([\d,]+) lines", TEXTS["README.md"])
    assert abs(sum(found.values()) / int(stated.replace(",", "")) - 1) <= 0.1


def test_paths_and_links_on_pages_exist():
    folders = "minilora|kernels|tests|benchmarks|ablations|docs|examples"
    checked = 0
    for page, text in TEXTS.items():
        for path in set(re.findall(rf"`((?:{folders})/[\w./]*)`", text)):
            assert (ROOT / path).exists(), f"{page}: {path}"
            checked += 1
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), f"{page}: {link}"
            checked += 1
    assert checked >= 40


def test_tables_name_all_that_there_is():
    families = re.findall(r"^\| `([\w-]+)` \| [\w-]+/", TEXTS["docs/bases.md"], re.MULTILINE)
    assert families == list(FAMILIES)
    assert re.findall(r"for (\d+) families", TEXTS["README.md"]) == [str(len(families))]
    grids = {path.stem for path in (ROOT / "ablations").glob("*.toml")}
    [table] = re.findall(r"^\| `ablations/` .*?\n\n", TEXTS["docs/grids.md"], re.MULTILINE | re.DOTALL)
    named = {name for row in table.strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == grids
    rooms = set(re.findall(r"^\| `(\w+)/` \|", TEXTS["README.md"], re.MULTILINE))
    there = {path.parent.name for path in (ROOT / "minilora").glob("*/__init__.py")} - {"kernels"}
    assert rooms == there


def test_fast_files_exist():
    assert len(FAST) >= 30 and all((ROOT / "tests" / name).is_file() for name in FAST)


def test_the_readmes_row_is_one_of_the_default_cell(base_folder):
    from minilora.base import checkpoint, tokenizer
    from minilora.data.rows import rows_of
    from minilora.tasks.find import find_task

    cell = Cell()
    clean, _ = rows_of(cell)
    task = find_task(cell, read_spec(checkpoint.read_config(base_folder)), tokenizer.load(base_folder))
    injected = injection.inject(clean, cell.inject, cell.seed_for("inject"), task.visible(clean)).rows
    place = clean.ids.index("132")
    [shown] = [body for body in fences("README.md", "text") if "training row 132" in body]
    assert [line[19:] for line in shown.splitlines()] == [clean.texts[place], injected.texts[place]]
