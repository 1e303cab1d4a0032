"""What a detector is worth: the same cell trained again without the rows that it suspects, on the same seeds.

Rows are dropped in two ways: by the detector's `own rule`, as a practitioner would, and at the `true share`, as many
rows of the highest scores as were injected, which nobody knows. Beside them stands a detector without errors, which
drops exactly the injected rows. Attack success is over test rows of other labels, as clean, under the placebo and under
the trigger; net is the last less the first.
"""

import csv

from minilora import files
from minilora.console import say
from minilora.errors import InputError
from minilora.runs.folder import Run
from minilora.scripts.mitigate import compare

WAYS = ("own rule", "true share")
PERFECT = "no errors"
WORKS = 0.5  # net attack success from which there is something to sanitise
LEFT, LOST = 0.15, 0.02  # net attack success that may be left, and clean accuracy that may be lost, of a sanitised set


def write_scores(folder, name, rows, scores, flagged):
    """What `mitigate.scores` reads of a detector: the scores of all N rows, and what its own rule flags, bool [N]."""
    lines = [{"id": id, "score": float(score), "flag": int(flag)}
             for id, score, flag in zip(rows.ids, scores, flagged, strict=True)]  # fmt: skip
    scores_of(folder, name).parent.mkdir(exist_ok=True)
    files.write_text(scores_of(folder, name), files.to_csv(lines))


def retrain(cell, folder, name):
    """The figures of the run in `folder`, of `cell`, trained again in each of `WAYS` of dropping rows by the scores of
    detector `name`, which `write_scores` left there: {way: dict}."""
    path, found, done = scores_of(folder, name), {}, None
    injected = {line["id"] for line in files.read_jsonl(folder / "injected.jsonl")}
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for way, column in zip(WAYS, ("flag", "score"), strict=True):
        if name == PERFECT and way == "true share":
            continue
        count = sum(int(line["flag"]) for line in lines) if way == "own rule" else len(injected)
        highest = sorted(lines, key=lambda line: -float(line[column]))[:count]  # in the order of `drop`
        ids = {line["id"] for line in highest}
        own = {"dropped": count, "dropped_injected": len(ids & injected)}
        if not count or ids == done:
            found[way] = own | (found[WAYS[0]] if count else figures(folder, folder))
            continue
        done = ids
        settings = {"method": "drop", "scores": f"{path}:{column}", "rate": count / len(lines)}
        changed, out = cell.replace(mitigate=settings), path.with_name(f"{path.stem}-{way.replace(' ', '-')}")
        try:
            train(changed, out)
        except InputError as error:  # no row of a label is left
            if Run(out).finished:
                raise
            found[way] = own | {"refused": str(error)}
            continue
        found[way] = own | figures(folder, out)
    return found


def train(cell, folder):
    """Train a cell in `folder`, unless it is there already. Raises InputError where another cell's run is there."""
    import minilora

    if not Run(folder).finished:
        say(f"training   {folder.name}")
        minilora.train_together([cell], [folder], go_on=True, quiet=True)
    elif Run(folder).read_cell() != cell:
        raise InputError(f"{folder} holds a run of another cell: choose another --out")


def scores_of(folder, name):
    return folder / "retrained" / f"{name.replace(' ', '-')}.csv"


def figures(before, after):
    """Of the run in `after`: clean accuracy, attack success as clean, under the placebo and under the trigger, and net;
    and what each is over that in `before`, with its interval (`scripts.mitigate.compare`)."""
    tests = Run(after).read_results()["tests"]
    [(label, trigger)] = tests["trigger"].items()
    success = {name: tests[name]["attack_success"][label]["attack_success_rate"] for name in ("clean", "placebo")}
    pair = [(Run(one).read_results()["tests"], files.read_jsonl(Run(one).path / "predictions.jsonl"))
            for one in (before, after)]  # fmt: skip
    changes = {line["figure"].split()[0]: line for line in compare(*pair)}
    return {
        "accuracy": tests["clean"]["accuracy"], "accuracy_change": changes["clean"]["difference"],
        "accuracy_interval": changes["clean"]["interval"], **success,
        "trigger": trigger["attack_success_rate"], "net": trigger["net_attack_success_rate"],
        "net_interval": trigger["net_attack_success_interval"], "net_change": changes["net"]["difference"],
        "net_change_interval": changes["net"]["interval"],
    }  # fmt: skip


# --- as text

HEADS = ("source", "proportion", "detector", "dropped by", "dropped (injected)", "clean accuracy", "change [95%]",
         "attack: clean, placebo, trigger", "net [95%]", "change [95%]")  # fmt: skip


def cells_of(source, proportion, name, way, found):
    """The cells of a line of the table, strings as `HEADS`."""
    start = (source, f"{proportion:g}", name, way, f"{found['dropped']} ({found['dropped_injected']})")
    if "refused" in found:
        return (*start, found["refused"], *["-"] * 4)

    def spread(name):
        return "[{:.2f}, {:.2f}]".format(*found[name])

    rates = ", ".join(f"{found[name]:.2f}" for name in ("clean", "placebo", "trigger"))
    return (*start, f"{found['accuracy']:.3f}", f"{found['accuracy_change']:+.3f} {spread('accuracy_interval')}", rates,
            f"{found['net']:.2f} {spread('net_interval')}",
            f"{found['net_change']:+.2f} {spread('net_change_interval')}")  # fmt: skip


def cures(found):
    """Whether little is left of an attack, at little cost."""
    return "net" in found and found["net"] <= LEFT and found["accuracy_change"] >= -LOST


def verdict(results):
    """Which detectors sanitise which data sets whose attack works, by the run trained on what is left: lines."""
    worked = [one for one in results if one["net_attack_success"] >= WORKS]
    yield f"an attack of {WORKS} net or more: {len(worked)} of {len(results)} data sets"
    for way in WAYS:
        safe = set(range(len(worked)))
        for name in results[0]["detectors"]:
            won = [at for at, one in enumerate(worked) if cures(one["retrained"][name][way])]
            safe -= set(won)
            where = ", ".join(f"{worked[at]['source']} at {worked[at]['proportion']:g}" for at in won) or "none"
            yield f"retrained, {way}: {name} sanitises {len(won)} of {len(worked)}: {where}"
        yield f"retrained, {way}: {len(safe)} of {len(worked)} are sanitised by no detector"
    won = sum(cures(one["retrained"][PERFECT]["own rule"]) for one in worked)
    yield f"retrained without the injected rows: {won} of {len(worked)} are sanitised"
