"""What people read of a run: the table of its tests, attack success, and speed."""

from minilora.console import COLUMNS, duration, short

FLIPS = "  flips vs clean        McNemar p"


def results_table(results):
    """The table of a run's tests, from the `tests` entry of results.json, as lines of text.

    Predicted counts are shown for all labels, or for none if there is no room for all.
    """
    rows = [("clean", results["clean"])]
    rows += [(short(f"trigger of {label}"), metrics) for label, metrics in results["trigger"].items()]
    rows += [("placebo", results["placebo"])] if "placebo" in results else []
    first = max(len(title) for title in ["test rows", *(title for title, _ in rows)])
    names = list(results["clean"]["predicted_counts"])
    # Of completions: the share that greedy decoding writes, and the mean log-likelihood.
    scores = [("accuracy", "accuracy"), ("exact", "exact_match"), ("log p", "log_likelihood")]
    if "exact_match" not in results["clean"]:
        scores = [("accuracy", "accuracy"), ("balanced", "balanced_accuracy")]
    heading = "".join(f"  {head:>8}" for head, _ in scores)
    room = (COLUMNS - first - len(heading + FLIPS)) // len(names) - 2
    heads = [short(name, max(room, 6)) for name in names]
    counts = [[f"{metrics['predicted_counts'][name]:,}" for name in names] for _, metrics in rows]
    width = max(len(text) for line in [heads, *counts] for text in line)
    if width > room or len(set(heads)) < len(heads):
        heads, counts = [], [[] for _ in rows]

    lines = [f"{'test rows':<{first}}" + heading + "".join(f"  {head:>{width}}" for head in heads) + FLIPS]
    for (title, metrics), numbers in zip(rows, counts, strict=True):
        line = f"{title:<{first}}" + "".join(f"  {metrics[key]:>8.3f}" for _, key in scores)
        line += "".join(f"  {number:>{width}}" for number in numbers)
        if "flip_rate" in metrics:
            low, high = metrics["flip_rate_interval"]
            line += f"  {metrics['flip_rate']:.3f} [{low:.3f}, {high:.3f}]  {metrics['mcnemar_p']:.1e}"
        else:
            line += f"  {'-':>20}"
        lines.append(line)
    lines += attack_lines(results)
    worst = results["worst_group"]
    lines.append(f"worst group: {short(worst['label'])} rows, {short(worst['test'])}: accuracy {worst['accuracy']:.3f}")
    return "\n".join(lines)


def attack_lines(results):
    """What each trigger does to the rows that are not of its label."""
    lines = []
    for label, metrics in results["trigger"].items():
        if metrics["attack_success_rate"] is None:
            lines.append(f"attack success rate: none of the test rows is of a label other than {short(label)}")
            continue
        others = [test for test in ("clean", "placebo") if test in results]  # data may have no placebo
        rates = {test: results[test]["attack_success"][label]["attack_success_rate"] for test in others}
        low, high = metrics["attack_success_interval"]
        lines.append(f"attack success rate (rows of other labels predicted as {short(label)}):")
        lines.append(
            f"  {rates['clean']:.3f} clean, {metrics['attack_success_rate']:.3f} trigger [{low:.3f}, {high:.3f}]"
            + (f", {rates['placebo']:.3f} placebo" if "placebo" in rates else "")
        )
        if metrics.get("margin") is not None:
            margins = [results[test]["attack_success"][label]["margin"] for test in others]
            lines.append(
                f"  log p of that completion less log p of their own: {margins[0]:+.2f} clean, "
                f"{metrics['margin']:+.2f} trigger" + (f", {margins[1]:+.2f} placebo" if margins[1:] else "")
            )
        if metrics["truncated"]:
            lost = f"{metrics['truncated']:,} of all {metrics['rows']:,} rows"
            lines.append(f"  {lost} lost their trigger to --max-length")
    return lines


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
            f"{short(entry['source'])} for {short(entry['label'])}: "
            f"{entry['rows']:,} of {entry['eligible_rows']:,} rows ({inject.mode}), {dose}, {inject.location}"
            + (f", such as {short(example)!r}" if example else "")
        )
        train, test = entry["strings"]["train"], entry["strings"]["test"]
        lines.append(f"  trigger strings: {train:,} in training, {test:,} in test ({entry['split']})")
    if truncated:
        lines.append(f"  {truncated:,} rows lost their trigger to --max-length")
    return lines


def one_line(results):
    """A cell in one line: clean accuracy, attack success clean and under each trigger, and seconds."""
    tests, train = results["tests"], results["train"]
    parts = [f"clean {tests['clean']['accuracy']:.3f}"]
    for label, metrics in tests["trigger"].items():
        if metrics["attack_success_rate"] is not None:
            before = tests["clean"]["attack_success"][label]["attack_success_rate"]
            parts.append(f"{short(label)} {before:.3f} -> {metrics['attack_success_rate']:.3f}")
    return ", ".join([*parts, duration(train["total_seconds"])])


def speed_lines(train):
    """Two lines: how fast training was, also as a share of the limit (`training/limit.py`), and what it took."""
    share, peak = train["rows_per_second"] / train["limit_rows_per_second"], train["peak_memory_bytes"]
    memory = "" if peak is None else f", peak memory {peak / 2**30:.2f} GiB"
    return (
        f"training: {train['seconds']:.0f} s, {train['rows_per_second']:.0f} rows/s, "
        f"{train['tokens_per_second']:,.0f} tokens/s; {share:.0%} of the limit "
        f"({train['limit_rows_per_second']:.0f} rows/s at {train['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s)\n"
        f"in all: {train['total_seconds']:.0f} s{memory}"
    )
