"""Train a cell (a base, an adapter, real text with an injected token) or a grid, and show who controls predictions.

python train.py                                       the default cell
python train.py --rank 16 --inject-proportion 0.05    change what you like: --help
python train.py --config FILE.toml                    a cell from a file, flags on top
python train.py --config A.toml B.toml ...            several cells, those that can be in one population
python train.py --resume RUN                          go on with an interrupted run
python train.py --grid FILE.toml --out DIR            many cells from one file; killed, the same line goes on
python train.py --grid FILE.toml --out DIR --ray auto    the same on the Ray cluster that this machine is a node of
torchrun --nproc-per-node N train.py ...              one cell over N processes, with --shard the base split among them
"""

import contextlib
import os
import shlex
import sys
from pathlib import Path

import minilora
from minilora.cell import PRESETS, Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.errors import InputError, TrainingError
from minilora.fields import load_toml
from minilora.files import full_disk, is_full
from minilora.interrupts import Interrupted
from minilora.naming import names
from minilora.runs.folder import SAVE_EVERY, Run
from minilora.scripts.run import START


def main(argv=None):
    parser = Parser(prog="train.py", description=__doc__.partition("\n\n")[0])
    general = parser.add_argument_group("run")
    general.add_argument("--config", metavar="FILE", nargs="+", default=[],
                         help="TOML file with a cell's fields, flags stand before it; a cell for each")  # fmt: skip
    general.add_argument("--out", metavar="DIR", help="run folder, or of several cells the folder of their run folders "
                         "(default: runs/NAME, named after the cell, or grids/NAME, after the file)")  # fmt: skip
    general.add_argument("--preset", choices=PRESETS, help="set many fields at once; flags stand before it")
    general.add_argument("--resume", metavar="RUN", nargs="+", default=[],
                         help="go on with the interrupted run in this folder and those trained with it")  # fmt: skip
    general.add_argument("--population", type=int, metavar="K",
                         help="of several cells train at most K at once (default: as many as is fastest)")  # fmt: skip
    general.add_argument("--eval-every", type=int, default=0, metavar="N",
                         help="run the tests every N steps as well (default: 0, only at the end)")  # fmt: skip
    general.add_argument("--save-every", type=int, default=SAVE_EVERY, metavar="N",
                         help=f"save the state every N steps (default: {SAVE_EVERY})")  # fmt: skip
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
    flags = given_flags(arguments, Cell)
    if arguments.eval_every < 0 or arguments.save_every < 1:
        raise InputError("--eval-every must be at least 0 and --save-every at least 1")
    often = dict(eval_every=arguments.eval_every, save_every=arguments.save_every)
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
        others = ("config", "preset", "resume", "merge_to", "eval_every", "shard")
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
        if flags or arguments.config or arguments.out or arguments.preset:
            raise InputError(
                "--resume goes on with the run's own cell: drop --config, --out, --preset and the cell's flags"
            )
        return resume(arguments, one, often)
    if arguments.preset and arguments.config:
        raise InputError("--config has all fields of its cells, and --preset sets them: drop one of them")
    preset = Cell().replace(**PRESETS.get(arguments.preset, {}))
    cells = [load_toml(Cell, path).replace(**flags) for path in arguments.config] or [preset.replace(**flags)]
    if len(cells) == 1:
        return report(*minilora.train(cells[0], arguments.out, **one))
    if arguments.merge_to:
        raise InputError("--merge-to is for one cell: use evaluate.py --merge-to on the runs")
    if arguments.shard:
        raise InputError("--shard is for one cell: give one --config")
    outs = None if arguments.out is None else [Path(arguments.out) / name for name in names(cells)]
    report_all(minilora.train_together(cells, outs, size=arguments.population, **often))


def resume(arguments, one, often):
    """train.py --resume; `one` and `often` are the options of `train` and of `train_together`."""
    populations = dict.fromkeys(tuple(Run(path).population()) for path in arguments.resume)
    given = [Path(os.path.normpath(path)) for path in arguments.resume]
    for runs in populations:
        left = [path for path in runs if not Run(path).finished and (path in given or Run(path).begun)]
        if (len(left) > 1 or len(given) > 1) and (arguments.merge_to or arguments.shard):
            raise InputError("--merge-to and --shard are for one run, but several are to go on: drop them")
        for path in runs:
            if path in given and path not in left:
                if arguments.merge_to:
                    raise InputError(f"{path} is finished: use python evaluate.py {path} --merge-to DIR")
                print(f"{path} is finished:")
                report(Run(path).read_results(), path)
        if len(left) == 1:
            report(*minilora.train(resume=left[0], **one))
        elif left:
            report_all(minilora.train_together(resume=left, **often))


def report_all(outcomes):
    """The end of several cells, of which some may have failed: a table, and where the runs are."""
    from minilora.runs import listing

    for results, _ in outcomes:
        if isinstance(results, TrainingError):
            print(f"failed: {results}")
    paths = [path for _, path in outcomes]
    print(listing.as_text(listing.lines_of(paths)))
    print("\nrun folders:", *(f"  {path}" for path in paths), sep="\n")
    if any(isinstance(results, TrainingError) for results, _ in outcomes):
        sys.exit(1)


def main_of_grid(arguments):
    """train.py --grid"""
    from minilora.grid import cluster
    from minilora.grid.file import parse_only, read_grid
    from minilora.grid.folder import GridFolder
    from minilora.grid.run import train_grid
    from minilora.grid.text import grid_plan, grid_status

    if arguments.ray and (arguments.status or arguments.dry_run):
        raise InputError("--ray trains, but --dry-run and --status train nothing: drop one")
    if Path(arguments.grid).is_dir():
        folder = GridFolder.find(arguments.grid)
        if arguments.out or arguments.size:
            raise InputError(f"{arguments.grid} is a grid's folder already: drop --out and --size")
    else:
        found = read_grid(arguments.grid, arguments.size)
        name = "-".join(filter(None, (Path(arguments.grid).stem, found.size)))
        folder = GridFolder(arguments.out or Path("grids") / name, found)
        folder.check()
    only = parse_only(arguments.only, folder.grid)
    if arguments.status:
        return print(grid_status(folder))
    if arguments.dry_run:
        return print("\n".join(grid_plan(folder, arguments.population, only)))

    joined = cluster.connect(arguments.ray, arguments.ray_cpus or 1) if arguments.ray else contextlib.nullcontext()
    try:
        with joined as nodes:
            train_grid(folder.grid, folder.path, size=arguments.population, only=only,
                       retry_failed=arguments.retry_failed, nodes=nodes)  # fmt: skip
    except KeyboardInterrupt as error:
        stopped = Interrupted(number=getattr(error, "number", 2), folders=getattr(error, "folders", ()))
        raise stopped.go_on(["--grid", folder.path]) from None
    except Exception as error:
        if is_full(error):
            raise full_disk(error, folder.path / "cells").go_on(["--grid", folder.path]) from error
        raise
    print(grid_status(folder))
    if folder.counts()["failed"]:
        sys.exit(1)


def report(results, folder):
    """The end of the story, on stdout: the table, the speed, and where to go on."""
    from minilora.runs.text import results_table, speed_lines

    label = next(iter(results["tests"]["trigger"]), "LABEL")
    print(results_table(results["tests"]))
    print(speed_lines(results["train"]))
    print(f"\nrun folder: {folder}\nnext: python evaluate.py {folder} --inject {shlex.quote(f'country:{label}')}")
