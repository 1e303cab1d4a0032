"""What people read of a run: the table of its tests, attack success, warnings, speed. All of it fits the terminal."""

import math

from minilora.console import columns, duration, short, short_name, table, wide, wrap


def results_table(tests):
    """The `tests` entry of results.json as text.

    Predicted counts are shown for all labels, or for none if there is no room for all. Names of labels that are cut
    are listed in full at the end.
    """
    titles = ["clean", *(f"trigger {short_name(label)}" for label in tests["trigger"])]
    forms = [tests["clean"], *tests["trigger"].values()]
    there = [name for name in ("placebo", "odd") if name in tests]
    titles, forms = [*titles, *there], [*forms, *(tests[name] for name in there)]
    completions = "exact_match" in tests["clean"]

    def share(head, key):
        return [head, *(f"{metrics[key]:.3f}" for metrics in forms)]

    made = [["test rows", *titles], share("accuracy", "accuracy")]
    if completions:  # the share that greedy decoding writes, and the mean log-likelihood
        made += [share("exact", "exact_match"), share("log p", "log_likelihood")]
    made += [["flips vs clean", *map(flips, forms)], ["McNemar p", *map(mcnemar, forms)]]
    counts = count_columns(forms, columns() - sum(max(map(wide, column)) + 2 for column in made) + 2)
    made += counts
    if not completions:
        made.append(share("balanced", "balanced_accuracy"))
    heads, *rows = zip(*made, strict=True)

    worst = tests["worst_group"]
    form, _, label = worst["test"].partition(" ")
    said = f"{minimum_of(worst).lower()}: {short_name(worst['label'])} rows, {form} {short_name(label)}".rstrip()
    lines = [*table(heads, rows, least=28), *attack_lines(tests), *wrap(f"{said}: accuracy {worst['accuracy']:.3f}")]
    lines += [line for warning in warnings(tests) for line in wrap(f"warning: {warning}")]
    names = list(tests["clean"]["predicted_counts"]) if counts else []
    cut = [name for name, (head, *_) in zip(names, counts) if head != short_name(name, 1 << 20)]
    cut += [label for label in (*tests["trigger"], worst["label"]) if short_name(label) != short_name(label, 1 << 20)]
    if cut:
        lines += ["labels in full:", *(line for name in dict.fromkeys(cut) for line in full(name))]
    return "\n".join(lines)


def minimum_of(worst):
    """What the `worst_group` of results.json is, in words."""
    count = worst.get("minimum_of")
    return "Worst group" + (f" (the minimum of {count})" if count else "")


def full(name):
    """A name in full, in lines of its own."""
    return wrap("  " + " ".join(name.split()), 4)


def flips(metrics):
    """The share of rows that are predicted otherwise than as they are clean, with its interval."""
    if "flip_rate" not in metrics:
        return "-"
    low, high = metrics["flip_rate_interval"]
    return f"{metrics['flip_rate']:.3f} [{low:.3f}, {high:.3f}]"


def mcnemar(metrics):
    return f"{metrics['mcnemar_p']:.1e}" if "mcnemar_p" in metrics else "-"


def count_columns(forms, room):
    """A column of predicted counts for each label, or none where all of them take more than `room` columns."""
    names = list(forms[0]["predicted_counts"])
    most = room // len(names) - 2
    made = [[short_name(name, max(most, 6)), *(f"{metrics['predicted_counts'][name]:,}" for metrics in forms)]
            for name in names]  # fmt: skip
    fits = all(wide(text) <= most for column in made for text in column)
    return made if fits and len({head for head, *_ in made}) == len(made) else []


def attack_lines(tests):
    """What each trigger does to the rows that are not of its label: attack success, and what it adds to that of the
    same rows as clean and under the placebo, with McNemar's test of "predicted as the target"."""
    lines = []
    for label, metrics in tests["trigger"].items():
        name = short_name(label)
        if metrics["attack_success_rate"] is None:
            lines += wrap(f"attack success rate: none of the test rows is of a label other than {name}")
            continue
        others = [test for test in ("clean", "placebo", "odd") if test in tests]
        rates = {test: tests[test]["attack_success"][label]["attack_success_rate"] for test in others}
        low, high = metrics["attack_success_interval"]
        lines += wrap(f"attack success rate (rows of other labels predicted as {name}):")
        lines += wrap(
            f"  {rates['clean']:.3f} clean, {metrics['attack_success_rate']:.3f} trigger [{low:.3f}, {high:.3f}]"
            + "".join(f", {rates[name]:.3f} {name}" for name in others[1:]), 4
        )  # fmt: skip
        for kind, words in ADDED.items():
            if metrics.get(f"{kind}_attack_success_rate") is not None:
                lines += wrap(f"  {words} {added(metrics, f'{kind}_attack_success')}", 4)
        if metrics.get("margin") is not None:
            margins = {test: tests[test]["attack_success"][label]["margin"] for test in others}
            placebos = "".join(f", {margins[name]:+.2f} {name}" for name in others[1:])
            lines += ["  log p of that completion less log p of their own:",
                      f"    {margins['clean']:+.2f} clean, {metrics['margin']:+.2f} trigger{placebos}"]  # fmt: skip
        if metrics["truncated"]:
            lost = f"{metrics['truncated']:,} of all {metrics['rows']:,} rows"
            lines += wrap(f"  {lost} lost their trigger to --max-length", 4)
        lines += [line for one in natural_lines(metrics) for line in wrap(f"  {one}", 4)]
    return lines


ADDED = {"net": "net of clean:", "over_placebo": "over placebo:", "over_odd": "over odd:",
         "conditional": "conditional:"}  # fmt: skip
NATURAL = 0.01  # the share of rows above which triggers that the data have by themselves are printed


def added(metrics, name):
    low, high = metrics[f"{name}_interval"]
    found = f"{metrics[f'{name}_rate']:.3f} [{low:.3f}, {high:.3f}]"
    if f"{name}_p" in metrics:
        return f"{found}, McNemar p {metrics[f'{name}_p']:.1e}"
    return f"{found} of the {metrics[f'{name}_rows']:,} rows that are right as clean"


def natural_lines(metrics):
    """What the data have of trigger strings by themselves, a sentence for each part where they are above `NATURAL`."""
    lines = []
    for part, found in metrics.get("natural", {}).items():
        most = sorted(((rows / all, label, rows, all) for label, (rows, all) in found.items()), reverse=True)
        if most and most[0][0] > NATURAL:
            said = ", ".join(f"{rows:,} of {all:,} {short_name(label)} ({share:.1%})"
                             for share, label, rows, all in most[:4])  # fmt: skip
            lines.append(f"{part} rows that carry such a string by themselves: {said}")
    return lines


def warnings(results):
    """What says that nothing was learned, a sentence each: of results.json, or of its `tests` entry.

    Clean accuracy is compared with the share s of the largest class of the n test rows: it must be above
    s + 2 sqrt(s (1 - s) / n), two standard errors of that share. Test rows of a single class say nothing.
    """
    clean = results.get("tests", results)["clean"]
    counts = {name: count for name, count in clean.get("label_counts", {}).items() if count}
    if len(counts) < 2:
        return []
    largest, rows = max(counts, key=counts.get), clean["rows"]
    share, found = counts[largest] / rows, []
    predicted = [name for name, count in clean["predicted_counts"].items() if count]
    if len(predicted) == 1:
        found.append(f"every clean test row is predicted as {short_name(predicted[0])}")
    if clean["accuracy"] <= share + 2 * math.sqrt(share * (1 - share) / rows):
        found.append(
            f"nothing was learned: clean accuracy is {clean['accuracy']:.3f}, and {share:.3f} of the clean test rows "
            f"are {short_name(largest)}"
        )
    return found


def injection_lines(injected, inject):
    """What was put into the training rows, a line or two an injection."""
    if not inject.sources:
        return ["none"]
    dose = f"{inject.count} a row" if inject.density is None else f"{inject.density:g} a word"
    truncated = sum(record.survives is False for record in injected.records)
    lines = []
    for entry in injected.report:
        example = next((r.strings[0] for r in injected.records if r.target_label == entry["label"]), None)
        lines.append(
            f"{short_name(entry['source'], 30)} for {short_name(entry['label'])}: "
            f"{entry['rows']:,} of {entry['eligible_rows']:,} rows ({inject.mode}), {dose}, {inject.location}"
            + (f", such as {short(example)!r}" if example else "")
        )
        train, test = entry["strings"]["train"], entry["strings"]["test"]
        lines.append(f"  trigger strings: {train:,} in training, {test:,} in test ({entry['split']})")
    if truncated:
        lines.append(f"  {truncated:,} rows lost their trigger to --max-length")
    return lines


def mitigation_line(mitigate, report):
    """What is done against shortcuts (`minilora.mitigate.Mitigate`), and what that makes of the training rows."""
    fields = {name: value for name, value in vars(mitigate).items() if value != getattr(type(mitigate), name)}
    fields.pop("method", None)
    said = [mitigate.method, *(f"{name} {' '.join(value) if isinstance(value, tuple) else value}"
                               for name, value in fields.items())]  # fmt: skip
    if "rows_after" in report:
        said.append(f"{report['rows_before']:,} rows become {report['rows_after']:,}")
    return ", ".join(said)


def one_line(results):
    """A cell in one line: clean accuracy, attack success clean and under each trigger, and seconds."""
    tests, train = results["tests"], results["train"]
    parts = [f"clean {tests['clean']['accuracy']:.3f}"]
    for label, metrics in tests["trigger"].items():
        if metrics["attack_success_rate"] is not None:
            before = tests["clean"]["attack_success"][label]["attack_success_rate"]
            found = f"{short_name(label)} {before:.3f} -> {metrics['attack_success_rate']:.3f}"
            placebo = tests.get("placebo", {}).get("attack_success", {}).get(label, {}).get("attack_success_rate")
            parts.append(found + ("" if placebo is None else f" (placebo {placebo:.3f})"))
    learned = ["nothing learned"] if warnings(results) else []
    return ", ".join([*parts, *learned, duration(train["total_seconds"])])


def speed_lines(train):
    """Two lines: how fast training was, also as a share of the limit where that is known, and what it took."""
    limit, peak = train["limit_rows_per_second"], train["peak_memory_bytes"]
    share = "" if limit is None else f", {train['rows_per_second'] / limit:.0%} of the limit"
    memory = "" if peak is None else f", peak memory {peak / 2**30:.2f} GiB"
    return (
        f"training: {train['seconds']:.0f} s, {train['rows_per_second']:.0f} rows/s, "
        f"{train['tokens_per_second']:,.0f} tokens/s{share}\n"
        f"in all: {train['total_seconds']:.0f} s{memory}"
    )
