"""Change the adapter of a finished run against shortcuts, and run its tests before and after.

python evaluate.py RUN --mitigate all --other RUN2 --suspects date        each of these in turn, as a table
python evaluate.py RUN --mitigate truncate --keep 1 --cut tail            fewer singular directions
python evaluate.py RUN --mitigate descale-intruders --threshold 0.5       weaker intruder dimensions
python evaluate.py RUN --mitigate project-out --suspects date             blind to where dates move the inputs
python evaluate.py RUN --mitigate merge --other RUN2 --how ties           mixed with another adapter
python evaluate.py RUN --mitigate fine-prune --rows 64                    pruned, then tuned on clean rows
"""

import json
from pathlib import Path

import numpy as np

import minilora
from minilora import files, parallel
from minilora.command import Parser
from minilora.console import quiet, say, table
from minilora.errors import InputError, to_type

# {name: {flag: default}}: what each way takes.
WAYS = {
    "truncate": {"keep": None, "cut": "tail"},
    "descale-intruders": {"threshold": 0.5, "factor": 0.75},
    "project-out": {"suspects": None, "rows": 200},
    "merge": {"other": None, "how": "linear", "weight": 0.5, "density": 0.5},
    "fine-prune": {"rows": 64, "share": 0.5, "epochs": 5, "lr": None},
}
CHOICES = {"cut": ("tail", "top"), "how": ("linear", "ties", "dare")}  # `all` tries each
NEEDED = ("suspects", "other")


def parser():
    made = Parser(prog=to_type("evaluate"), description=__doc__.partition("\n\n")[0])
    made.add_argument("run", metavar="RUN", help="folder of a finished run")
    made.add_argument("--mitigate", required=True, choices=("all", *WAYS),
                      help="what is done to its adapter; all: each in turn that can be done")  # fmt: skip

    def add(flag, help, kind=float, metavar="X", **more):
        takes = [name for name, own in WAYS.items() if flag in own]
        default = WAYS[takes[0]][flag] if len(takes) == 1 else None
        stated = "" if default is None else f" (default: {default})"
        more |= {"choices": CHOICES[flag]} if flag in CHOICES else {"type": kind, "metavar": metavar}
        made.add_argument(f"--{flag}", help=f"{', '.join(takes)}: {help}{stated}", **more)

    add("keep", "how many singular directions stay (default: half of the rank)", int, "N")
    add("cut", "which end of the singular values is cut off")
    add("threshold", "largest cosine with the base's singular vectors of what counts as an intruder")
    add("factor", "what an intruder is multiplied by")
    add("suspects", "suspected strings: date, country, color, html, file:PATH or a text", str, "SOURCE", nargs="+")
    add("other", "a run or an adapter on the same base", str, "DIR")
    add("how", "how the two are mixed")
    add("weight", "the other's share")
    add("density", "share of the entries that ties and dare keep")
    add("rows", "how many clean training rows are used (default: 64, of project-out 200)", int, "N")
    add("share", "share of the directions that is pruned")
    add("epochs", "passes over the clean rows", int, "N")
    add("lr", "learning rate of the tuning (default: a tenth of the run's)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    made.add_argument("--out", metavar="DIR", help="write the new adapter, results.json and predictions.jsonl there")
    made.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: the run's)")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("-q", "--quiet", action="store_true", help="print only the result: no progress")
    made.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    return made


def main(argv=None):
    arguments = parser().parse_args(argv)
    parallel.refuse("an evaluation", "start that with python")
    plans = plans_of(arguments)
    out = Path(arguments.out) if arguments.out else None
    if out:
        if arguments.mitigate == "all":
            raise InputError("--out is for one new adapter, but --mitigate all tries several: name one of them")
        if out.exists():
            raise InputError(f"{out} exists: choose another --out")
        files.try_folder(out, "--out")
    with quiet(arguments.quiet):
        answer(arguments, plans, out)


def plans_of(arguments):
    """[(way, {flag: value}), ...]: the one that is asked for, or for `all` every one that can be done."""
    flags = dict.fromkeys(flag for own in WAYS.values() for flag in own)
    given = {flag: getattr(arguments, flag) for flag in flags if getattr(arguments, flag) is not None}
    if arguments.mitigate != "all":
        takes = WAYS[arguments.mitigate]
        if wrong := sorted(given.keys() - takes.keys()):
            raise InputError(f"--{wrong[0]} is not for --mitigate {arguments.mitigate}: drop it")
        if lacking := [flag for flag in NEEDED if flag in takes and flag not in given]:
            raise InputError(f"--mitigate {arguments.mitigate} needs --{lacking[0]}: give it too")
        return [(arguments.mitigate, takes | given)]
    plans = []
    for way, takes in WAYS.items():
        own = takes | {flag: value for flag, value in given.items() if flag in takes}
        if any(own.get(flag, "") is None for flag in NEEDED):
            continue
        tried = next((flag for flag in CHOICES if flag in takes and flag not in given), None)
        plans += [(way, own | {tried: choice}) for choice in CHOICES[tried]] if tried else [(way, own)]
    return plans


def answer(arguments, plans, out):
    """Run the tests before and after each, print what changed, and write it."""
    from minilora.lora import storage

    changes = {"device": arguments.device} if arguments.device else {}
    run = minilora.open(arguments.run, **changes)
    before, lines = run.run_tests(), []
    for way, given in plans:
        name = " ".join([way, *(given[flag] for flag in CHOICES if flag in given)])
        with apply(run, way, given, arguments.seed):
            say(f"mitigated  {name}: ranks {ranks(run)}")
            figures, predictions = run.run_tests()
            made = [{"mitigation": name} | line for line in compare(before, (figures, predictions))]
            lines += made
            if out:
                out.mkdir(parents=True)
                storage.save(out / "adapter", run.model, run.cell, run.labels)
                files.write_jsonl(out / "predictions.jsonl", predictions)
                told = {"run": str(arguments.run), "mitigate": way, "seed": arguments.seed} | given
                files.write_json(out / "results.json", told | {"changes": made, "tests": figures})
    if arguments.json:
        return print(json.dumps(lines, allow_nan=False))
    print("\n".join(table(HEAD, [shown(line) for line in lines], least=20)))
    if out:
        print(f"written to {out}")


def apply(run, way, given, seed):
    """Do it to the opened run; see `minilora/mitigation/after.py`."""
    from minilora.mitigation import after, inputs

    if way == "truncate":
        most = max(len(part.A) for part in run.adapter.values())
        return after.truncate(run, given["keep"] or (most + 1) // 2, given["cut"])
    if way == "descale-intruders":
        return after.descale_intruders(run, given["threshold"], given["factor"])
    if way == "merge":
        return after.merge(run, given["other"], given["how"], given["weight"], given["density"], seed)
    rows = clean_rows(run, given["rows"], seed)
    if way == "project-out":
        return after.project_out(run, inputs.directions_of(run, given["suspects"], rows.texts, seed))
    return after.fine_prune(run, rows, given["share"], given["epochs"], given["lr"], seed)


def clean_rows(run, count, seed):
    """`count` drawn training rows that carry no injected trigger: clean rows, such as a practitioner writes by hand."""
    rows = run.rows.rows
    clean = np.setdiff1d(np.arange(len(rows)), run.rows.index)
    if not 1 <= count <= len(clean):
        raise InputError(f"--rows is {count}, but must be from 1 to the {len(clean):,} clean training rows")
    return rows.take(np.sort(np.random.default_rng([seed, len(rows)]).permutation(clean)[:count]))


def ranks(run):
    found = sorted({len(part.A) for part in run.adapter.values()})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


HEAD = ["mitigation", "figure", "before", "after", "difference", "95% interval", "p"]


def compare(before, after):
    """What changed, a dict a figure: `before`, `after`, `difference`, its `interval`, and McNemar's `p` where it is of
    pairs that are hit or not. `before` and `after`: what `run_tests` gives, of the same rows in the same order."""
    (figures, old), (_, new) = before, after
    pairs = list(zip(old, new, strict=True))
    right = [[row["clean"]["predicted"] == row["label"] for row in pair] for pair in pairs]
    lines = [pair_line("clean accuracy", right)]
    for label in figures["trigger"]:
        others = [pair for pair in pairs if pair[0]["label"] != label]
        if not others:
            continue
        hits = {test: np.array([[row[test]["predicted"] == label for row in pair] for pair in others])
                for test in ("clean", f"trigger {label}")}  # fmt: skip
        lines.append(pair_line(f"attack {label}", hits[f"trigger {label}"]))
        net = hits[f"trigger {label}"].astype(float) - hits["clean"]
        lines.append(mean_line(f"net {label}", net))
    return lines


def pair_line(name, hits):
    """`hits` bool [rows, 2]. The interval and the p-value: `metrics.gain`."""
    from minilora.tasks.metrics import gain

    first, second = np.asarray(hits).T
    found = gain("x", first, second)
    return {"figure": name, "before": float(first.mean()), "after": float(second.mean()), "difference": found["x_rate"],
            "interval": found["x_interval"], "p": found["x_p"]}  # fmt: skip


def mean_line(name, values):
    """`values` float [rows, 2], from -1 to 1. The interval is that of `metrics.paired_interval`, for differences that
    may also be 2: the normal one of their mean once a row that gains 1 and a row that loses 1 are added."""
    from minilora.tasks.metrics import Z95

    moved = values[:, 1] - values[:, 0]
    more = np.append(moved, [1.0, -1.0])
    middle, half = float(more.mean()), Z95 * float(more.std()) / len(more) ** 0.5
    return {"figure": name, "before": float(values[:, 0].mean()), "after": float(values[:, 1].mean()),
            "difference": float(moved.mean()), "interval": [middle - half, middle + half], "p": None}  # fmt: skip


def shown(line):
    low, high = line["interval"]
    p = "-" if line["p"] is None else f"{line['p']:.1e}"
    numbers = [f"{line['before']:.3f}", f"{line['after']:.3f}", f"{line['difference']:+.3f}"]
    return [line["mitigation"], line["figure"], *numbers, f"[{low:+.3f}, {high:+.3f}]", p]
