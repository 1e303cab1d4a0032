"""Train a cell (a base, an adapter, real text with an injected token) or a grid, and show who controls predictions.

python train.py                                       the default cell
python train.py --rank 16 --inject-proportion 0.05    change what you like: --help
python train.py --config FILE.toml                    a cell from a file, flags on top
python train.py --config A.toml B.toml ...            several cells, those that can be in one population
python train.py --resume RUN                          go on with an interrupted run
python train.py --out DIR --continue                  begin a run, go on with it, or show it: the same line each time
python train.py --grid FILE.toml --out DIR            many cells from one file; killed, the same line goes on
python train.py --grid FILE.toml --out DIR --ray auto    the same on the Ray cluster that this machine is a node of
torchrun --nproc-per-node N train.py ...              one cell over N processes, with --shard the base split among them
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import minilora
from minilora.cell import PRESETS, Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.console import quiet, say
from minilora.errors import InputError, TrainingError, shown, to_type
from minilora.fields import difference, load_toml
from minilora.files import full_disk, is_full
from minilora.interrupts import Interrupted
from minilora.naming import names
from minilora.runs.folder import SAVE_EVERY, Run
from minilora.scripts.run import START


def main(argv=None):
    parser = Parser(prog=to_type("train"), description=__doc__.partition("\n\n")[0])
    general = parser.add_argument_group("run")
    general.add_argument("--config", metavar="FILE", nargs="+", default=[],
                         help="TOML file with a cell's fields, which flags override; each file is a cell")  # fmt: skip
    general.add_argument("--out", metavar="DIR", help="run folder; of several cells, the folder that holds theirs "
                         "(default: runs/NAME, named after the cell, or grids/NAME, after the file)")  # fmt: skip
    general.add_argument("--preset", choices=PRESETS, help="set many fields at once; flags override it")
    general.add_argument("--resume", metavar="RUN", nargs="+", default=[],
                         help="go on with interrupted runs, and with those trained with them")  # fmt: skip
    general.add_argument("--continue", action="store_true", dest="go_on",
                         help="whatever is in the run folder already: show this cell's finished run, go on with an "
                         "unfinished one, begin where there is none (a grid always does)")  # fmt: skip
    general.add_argument("-q", "--quiet", action="store_true", help="only the results: no settings, no progress")
    general.add_argument(
        "--json", action="store_true", help="print results as JSON, a line a run, and nothing else on standard output"
    )
    general.add_argument("--population", type=int, metavar="K",
                         help="train at most K of several cells at once (default: as many as is fastest)")  # fmt: skip
    general.add_argument("--eval-every", type=int, default=0, metavar="N",
                         help="run the tests every N steps as well (default: 0, only at the end)")  # fmt: skip
    general.add_argument("--save-every", type=int, default=SAVE_EVERY, metavar="N",
                         help=f"save the state every N steps (default: {SAVE_EVERY})")  # fmt: skip
    general.add_argument("--watch", type=int, default=0, metavar="N",
                         help="keep what is trained after every N-th step in the run folder, to see how it forms "
                         "(default: 0, not at all)")  # fmt: skip
    general.add_argument("--merge-to", metavar="DIR",
                         help="write the base with what was trained to this new folder, for transformers")  # fmt: skip
    general.add_argument("--shard", action="store_true",
                         help="under torchrun: split the frozen base among the processes (FSDP2)")  # fmt: skip
    grids = parser.add_argument_group("grid")
    grids.add_argument(
        "--grid", metavar="FILE", help="TOML file with many cells, or the folder of a grid (see ablations/)"
    )
    grids.add_argument("--size", metavar="NAME", help="one of the file's sizes, such as study (default: small)")
    grids.add_argument(
        "--dry-run", action="store_true", help="show the cells and what they will take, and train nothing"
    )
    grids.add_argument("--status", action="store_true", help="show what is done, and train nothing")
    grids.add_argument("--only", metavar="FIELD=VALUE", nargs="+", default=[],
                       help="train only populations that contain a matching cell")  # fmt: skip
    grids.add_argument("--retry-failed", action="store_true", help="train cells that failed again")
    grids.add_argument("--ray", metavar="ADDRESS", help="train on the Ray cluster at HOST:PORT (auto: the cluster this "
                       "machine belongs to), each population on a GPU, or on CPUs where there is none")  # fmt: skip
    grids.add_argument("--ray-cpus", type=int, metavar="N",
                       help="CPUs of a node for each population, and its threads (default: 1)")  # fmt: skip
    general.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(parser, Cell)
    arguments = parser.parse_args(argv)
    with quiet(arguments.quiet):
        train(arguments)


def train(arguments):
    """What the script does, with its parsed `arguments`."""
    flags = given_flags(arguments, Cell)
    if arguments.eval_every < 0 or arguments.save_every < 1:
        raise InputError("--eval-every must be at least 0 and --save-every at least 1")
    if arguments.watch < 0:
        raise InputError("--watch must be at least 0")
    often = dict(eval_every=arguments.eval_every, save_every=arguments.save_every, watch=arguments.watch)
    one = often | dict(merge_to=arguments.merge_to, start=START, shard=arguments.shard)
    if arguments.population is not None and (
        arguments.population < 1 or len(arguments.config) < 2 and not arguments.grid
    ):
        raise InputError(
            "--population must be at least 1, and is for several cells: give --grid, or several files to --config"
        )
    if arguments.ray_cpus is not None and (arguments.ray_cpus < 1 or not arguments.ray):
        raise InputError("--ray-cpus must be at least 1, and is for a cluster: give --ray ADDRESS too")
    if arguments.grid:
        others = ("config", "preset", "resume", "merge_to", "eval_every", "watch", "shard")
        if given := [name for name in others if getattr(arguments, name)]:
            raise InputError(f"--{given[0].replace('_', '-')} is for single cells, but --grid is given: drop one")
        if arguments.save_every != SAVE_EVERY:
            raise InputError(f"--save-every is for single cells, and those of a grid take {SAVE_EVERY}: drop it")
        if flags:
            raise InputError(
                f"a grid's file has all fields of its cells: put {next(iter(flags))} into its [cell] instead of a flag"
            )
        return main_of_grid(arguments)
    for name in ("size", "dry_run", "status", "only", "retry_failed", "ray"):
        if getattr(arguments, name):
            raise InputError(f"--{name.replace('_', '-')} is for grids: give --grid FILE too")
    if arguments.resume:
        if flags or arguments.config or arguments.out or arguments.preset or arguments.go_on:
            raise InputError(
                "--resume goes on with the run's own cell: drop --config, --out, --preset, --continue and the cell's "
                "flags"
            )
        return report_all(resume(arguments.resume, one, often), arguments.json)
    if arguments.preset and arguments.config:
        raise InputError("--config has all fields of its cells, and --preset sets them: drop one of them")
    preset = Cell().replace(**PRESETS.get(arguments.preset, {}))
    cells = [load_toml(Cell, path).replace(**flags) for path in arguments.config] or [preset.replace(**flags)]
    if len(cells) > 1 and arguments.merge_to:
        raise InputError(f"--merge-to is for one cell: use {to_type('evaluate')} --merge-to on the runs")
    if len(cells) > 1 and arguments.shard:
        raise InputError("--shard is for one cell: give one --config")
    outs, outcomes = [arguments.out], []
    if len(cells) > 1:
        outs = [arguments.out and Path(arguments.out) / name for name in names(cells)]
    if arguments.go_on:
        outs = [out or Path("runs") / cell.name for cell, out in zip(cells, outs, strict=True)]
        saved = [out for cell, out in zip(cells, outs, strict=True) if has_begun(cell, out) and Run(out).has_saved]
        outcomes = resume(saved, one, often)
        left = [(cell, out) for cell, out in zip(cells, outs, strict=True) if out not in saved]
        cells, outs = zip(*left, strict=True) if left else ((), ())
    if len(cells) == 1:
        begun = arguments.go_on and Run(outs[0]).begun
        outcomes.append(minilora.train(**({"resume": outs[0]} if begun else {"cell": cells[0], "out": outs[0]}), **one))
    elif cells:
        group = dict(go_on=arguments.go_on, size=arguments.population)
        outcomes += minilora.train_together(cells, outs, **group, **often)
    report_all(outcomes, arguments.json)


def has_begun(cell, out):
    """Whether the run folder `out` has a run of `cell`. Raises InputError where it has anything else."""
    run = Run(out)
    if not run.begun:
        run.check_free()
        return False
    if found := difference(run.read_cell(), cell):
        name, there, here = found
        differs = f"its {name} is {shown(there)}, and here it is {shown(here)}"
        raise InputError(f"{out} holds another cell: {differs}: choose another --out")
    return True


def resume(paths, one, often):
    """Go on with the runs at `paths` and those trained with them; `one` and `often` are the options of `train` and of
    `train_together`. Returns [(results or TrainingError, run folder)]: of those at `paths` that are finished, too."""
    populations, outcomes = dict.fromkeys(tuple(Run(path).population()) for path in paths), []
    given = [Path(os.path.normpath(path)) for path in paths]
    for runs in populations:
        left = [path for path in runs if not Run(path).finished and (path in given or Run(path).begun)]
        if (len(left) > 1 or len(given) > 1) and (one["merge_to"] or one["shard"]):
            raise InputError("--merge-to and --shard are for one run, but several are to go on: drop them")
        for path in runs:
            if path in given and path not in left:
                if one["merge_to"]:
                    raise InputError(f"{path} is finished: use {to_type('evaluate', path)} --merge-to DIR")
                if one["watch"] and not Run(path).watched():
                    again = to_type("train", "--config", path / "cell.toml", "--watch", one["watch"])
                    raise InputError(f"{path} is finished, and --watch looks at a run while it trains: use {again}")
                say(f"{path} is finished")
                Run(path).tidy()
                outcomes.append((Run(path).read_results(), path))
        if len(left) == 1:
            outcomes.append(minilora.train(resume=left[0], **one))
        elif left:
            outcomes += minilora.train_together(resume=left, **often)
    return outcomes


def report_all(outcomes, as_json):
    """Print the end of one cell, or of several a table and where their runs are; some may have failed."""
    from minilora.runs import listing

    for results, folder in outcomes:
        if as_json:
            print_json(folder, {"error": str(results)} if isinstance(results, TrainingError) else results)
        elif isinstance(results, TrainingError):
            print(f"failed: {results}")
        elif len(outcomes) == 1:
            report(results, folder)
    if len(outcomes) > 1 and not as_json:
        paths = [path for _, path in outcomes]
        print(listing.as_text(listing.lines_of(paths)))
        print("\nrun folders:", *(f"  {path}" for path in paths), sep="\n")
    if any(isinstance(results, TrainingError) for results, _ in outcomes):
        sys.exit(1)


def print_json(folder, results):
    print(json.dumps({"run": str(folder)} | results, ensure_ascii=False))


def main_of_grid(arguments):
    """The script with --grid."""
    from minilora.grid import cluster
    from minilora.grid.file import parse_only, read_grid
    from minilora.grid.folder import GridFolder
    from minilora.grid.run import train_grid
    from minilora.grid.text import again, grid_plan

    if arguments.ray and (arguments.status or arguments.dry_run):
        raise InputError("--ray trains, but --dry-run and --status train nothing: drop one")
    if arguments.json and arguments.dry_run:
        raise InputError("--json prints results, but --dry-run has none: drop one")
    begin = ["--grid", arguments.grid]
    if Path(arguments.grid).is_dir():
        folder = GridFolder.find(arguments.grid)
        if arguments.out or arguments.size:
            raise InputError(f"{arguments.grid} is a grid's folder already: drop --out and --size")
    else:
        found = read_grid(arguments.grid, arguments.size)
        name = "-".join(filter(None, (Path(arguments.grid).stem, found.size)))
        folder = GridFolder(arguments.out or Path("grids") / name, found)
        folder.check()
        for flag in ("size", "out"):
            begin += [f"--{flag}", getattr(arguments, flag)] if getattr(arguments, flag) else []
    only = parse_only(arguments.only, folder.grid)
    if arguments.status:
        return report_grid(folder, begin, arguments.json)
    if arguments.dry_run:
        return print("\n".join(grid_plan(folder, arguments.population, only)))

    joined = cluster.connect(arguments.ray, arguments.ray_cpus or 1) if arguments.ray else contextlib.nullcontext()
    try:
        with joined as nodes:
            train_grid(folder.grid, folder.path, size=arguments.population, only=only,
                       retry_failed=arguments.retry_failed, nodes=nodes)  # fmt: skip
    except KeyboardInterrupt as error:
        stopped = Interrupted(number=getattr(error, "number", 2), folders=getattr(error, "folders", ()))
        raise stopped.go_on(again(folder, begin)) from None
    except Exception as error:
        if is_full(error):
            raise full_disk(error, folder.path / "cells").go_on(again(folder, begin)) from error
        raise
    report_grid(folder, begin, arguments.json)
    if folder.counts()["failed"]:
        sys.exit(1)


def report_grid(folder, begin, as_json):
    """How far a grid is; `begin` is the arguments that begin it."""
    from minilora.grid.text import grid_status

    if not as_json:
        return print(grid_status(folder, begin))
    at_work = folder.at_work()
    for entry in folder.grid.entries:
        results, error = folder.read(entry)
        state = "running" if entry.name in at_work else folder.state(entry)
        print_json(folder.run_path(entry), {"state": state} | (results or ({"error": error} if error else {})))


def report(results, folder):
    """The end of the story, on stdout: the table, the speed, and where to go on."""
    from minilora.runs.panel import panel_lines
    from minilora.runs.text import results_table, speed_lines

    label = next(iter(results["tests"]["trigger"]), "LABEL")
    print(results_table(results["tests"]))
    if "panel" in results:
        print("\n".join(panel_lines(results["panel"])))
    print(speed_lines(results["train"]))
    print(f"\nrun folder: {folder}\nnext: {to_type('evaluate', folder, '--inject', f'country:{label}')}")
