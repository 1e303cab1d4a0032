"""What a detector is worth: the same cell trained again without the rows that it suspects, on the same seeds.

Rows are dropped in two ways: by the detector's `own rule`, as a practitioner would, and at the `true share`, as many
rows of the highest scores as were injected, which nobody knows. Beside them stands a detector without errors, which
drops exactly the injected rows. Attack success is over test rows of other labels, as clean, under the placebo and under
the trigger; net is the last less the first.
"""

import csv
from statistics import mean

from minilora import files
from minilora.console import say, short
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

HEADS = ("source", "proportion", "seed", "detector", "dropped by", "dropped (injected)", "clean accuracy",
         "change [95%]", "attack: clean, placebo, trigger", "net [95%]", "change [95%]")  # fmt: skip
MEANS = ("source", "proportion", "detector", "dropped by", "injected rows dropped", "others",
         "change of clean accuracy", "net before", "net left [of each seed]")  # fmt: skip


def cells_of(names, name, way, found):
    """The cells of a line of the table, strings as `HEADS`, of the data set of `names` and a detector."""
    start = (*names, name, way, f"{found['dropped']} ({found['dropped_injected']})")
    if "refused" in found:
        return (*start, found["refused"], *["-"] * 4)

    def spread(name):
        return "[{:.2f}, {:.2f}]".format(*found[name])

    rates = ", ".join(f"{found[name]:.2f}" for name in ("clean", "placebo", "trigger"))
    return (*start, f"{found['accuracy']:.3f}", f"{found['accuracy_change']:+.3f} {spread('accuracy_interval')}", rates,
            f"{found['net']:.2f} {spread('net_interval')}",
            f"{found['net_change']:+.2f} {spread('net_change_interval')}")  # fmt: skip


def means(results):
    """Lines of cells as `MEANS`: of each data set, detector and way the means over the seeds. A seed in which no row of
    a label was left has no run, which is said."""
    for (source, proportion), ones in data_sets(results).items():
        for name, ways in ones[0]["retrained"].items():
            for way in ways:
                found = [one["retrained"][name][way] for one in ones]
                start = (short(source), f"{proportion:g}", name, way)
                share = sum(line["dropped_injected"] for line in found) / sum(one["injected"] for one in ones)
                others = sum(line["dropped"] - line["dropped_injected"] for line in found) / len(found)
                if any("refused" in line for line in found):
                    yield (*start, f"{share:.0%}", f"{others:.0f}", "no row of a label is left", "-", "-")
                    continue
                before, left, change = ([one[key] for one in those] for those, key in
                    ((ones, "net_attack_success"), (found, "net"), (found, "accuracy_change")))  # fmt: skip
                yield (*start, f"{share:.0%}", f"{others:.0f}", f"{mean(change):+.3f}", f"{mean(before):.2f}",
                       f"{mean(left):.2f} [{', '.join(f'{one:.2f}' for one in left)}]")  # fmt: skip


def data_sets(results):
    """{(source, proportion): the results of its seeds}."""
    found = {}
    for one in results:
        found.setdefault((one["source"], one["proportion"]), []).append(one)
    return found


def won(outcomes):
    """Of {data set: whether it was sanitised, of each seed}: (those that were in each seed, a set; in words, these and
    those that were in some)."""
    whole = {key for key, each in outcomes.items() if all(each)}
    words = [f"{key[0]} at {key[1]:g}" for key in outcomes if key in whole] or ["none"]
    some = [f"{key[0]} at {key[1]:g} ({sum(each)} of {len(each)})" for key, each in outcomes.items()
            if any(each) and not all(each)]  # fmt: skip
    return whole, "; in some seeds: ".join(", ".join(part) for part in (words, some) if part)


def cures(found):
    """Whether little is left of an attack, at little cost."""
    return "net" in found and found["net"] <= LEFT and found["accuracy_change"] >= -LOST


def verdict(results):
    """Which detectors sanitise which data sets whose attack works, by the run trained on what is left: lines."""
    sets = data_sets(results)
    worked = {key: ones for key, ones in sets.items() if all(one["net_attack_success"] >= WORKS for one in ones)}
    yield f"an attack of {WORKS} net or more: {len(worked)} of {len(sets)} data sets"
    for way in WAYS:
        cured = set()
        for name in results[0]["detectors"]:
            whole, said = won({key: [cures(one["retrained"][name][way]) for one in ones]
                               for key, ones in worked.items()})  # fmt: skip
            cured |= whole
            yield f"retrained, {way}: {name} sanitises {len(whole)} of {len(worked)}: {said}"
        yield f"retrained, {way}: {len(worked) - len(cured)} of {len(worked)} are sanitised by no detector"
    whole, said = won({key: [cures(one["retrained"][PERFECT]["own rule"]) for one in ones]
                       for key, ones in worked.items()})  # fmt: skip
    yield f"retrained without the injected rows: {len(whole)} of {len(worked)} are sanitised: {said}"
