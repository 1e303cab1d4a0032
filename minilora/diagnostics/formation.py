"""How a shortcut forms: the same rows, put through every step that a run kept (`train.py --watch N`).

    clean accuracy  of test rows of all labels
    attack success  of the probe's rows, none of them of the target label: with the trigger, without it, and with the
                    placebo. A head that has learned nothing may predict the target for all rows, so what tells is
                    the success with the trigger less that without it: net attack success
    margin, shift   the margin with the trigger, and that less the margin without it
    span share      of attention on the trigger: see `attention.py`, the mean over layers and heads
    norm            |dW|_F of all modules together; effective rank (`spectrum.py`): the mean over modules
    alignment       in |dW x|^2 / (|dW|_F^2 |x|^2), the mean over modules: 1 where the update acts on x as it does on a
                    random direction, up to `in` where its only direction is that of x. x: what the module sees of the
                    span on the bare base, the mean over its tokens, less the mean of the clean rows' tokens
    lens            the shift as the head reads it below each layer and above the last (the logit lens: nostalgebraist,
                    2020), with the adapter and, by the same head, on the bare base
    decodable       the share of rows that a linear map fitted to other rows tells from their placebo, by layer. The
                    bare base has it too: that a trigger can be read from states says nothing of the adapter

A figure reaches a level at the first kept step from which on it stays there. Intervals are over rows, 95%.
"""

import contextlib
from functools import partial

import numpy as np
import torch

from minilora.data import token_cache
from minilora.diagnostics.attention import visible_to, watching
from minilora.diagnostics.probe import ROWS, Probe, sample
from minilora.diagnostics.spectrum import spectra
from minilora.diagnostics.stats import DRAWS, LEVEL, mean_interval
from minilora.errors import InputError, to_type
from minilora.lora.layer import named_layers
from minilora.lora.storage import read_tensors
from minilora.runs.folder import Run
from minilora.runs.trained import Trained
from minilora.runs.trained import open as open_run
from minilora.seeds import generator
from minilora.tasks.classification import of_rows, pool

ONSET, OF_END = 0.5, 0.9  # the levels of net attack success, and of clean accuracy as a share of its end
SURE = 0.95  # of the draws that must agree on what comes first
FOLDS, PENALTY = 5, 0.01  # of the linear maps; the penalty is a share of the mean variance


def formation(run_folder, rows=ROWS, seed=0, advance=None, label=None):
    """What the module's docstring lists, over the steps that were kept, as plain data for JSON:

    {"steps": [step], "rows": N, "label": the target,
     "figures": {name: [[mean, low, high] of each step]}: None where a step has none; of what is no mean of rows the
     ends are the same,
     "onset": {"step", "low", "high"} of net attack success, "onset_gross": of attack success as it is,
     "clean_90": of 90% of the last step's clean accuracy; a step is None where the level is not reached to stay,
     "first": "shortcut", "task", "neither" (it cannot be told) or "no shortcut",
     "lens": {"layers", "shift": [[of each layer] of each step], "low", "high", "bare": as `shift`, on the bare base},
     "decodable": {"with", "without": [[mean, low, high] of each layer]} of the adapter of the last step,
     "words": an answer in sentences}

    run_folder  a run's folder, or the run as `minilora.open` gives it, which is left as it was
    rows        of each sample at most: one of all labels, and the probe's
    advance     called as `advance(1)` after each step
    label       that of the trigger, see `Probe`

    Raises InputError for a run that kept fewer than two steps, and as `Probe`.
    """
    run = run_folder if isinstance(run_folder, Trained) else open_run(run_folder)
    if run.cell.task == "lm":
        raise InputError(f"{run.folder} is of task 'lm': how it forms is read off a classifier's head")
    steps = Run(run.folder).watched()
    if len(steps) < 2:
        again = to_type("train", "--config", run.folder / "cell.toml", "--watch", 10)
        raise InputError(f"{run.folder} kept no steps, so that nothing shows how it formed: train it again, {again}")
    fixed, found = Fixed(Probe(run, rows, label, seed), rows), []
    with contextlib.closing(replayed(run, steps)) as replay:
        for _ in replay:
            found.append(fixed.look())
            if advance:
                advance(1)
    values = {name: np.stack([own[name] for own in found], 1) for name in found[0]}  # [N, steps, ...]
    return summary(list(steps), values, fixed)


def replayed(run, steps):
    """Yield the steps of {step: path}, with what was trained by then on the run's model; at the end it is as before."""
    have, before = dict(run.model.named_parameters()), {}
    try:
        for step, path in steps.items():
            tensors = read_tensors(path)
            for name, value in tensors.items():
                if name not in have or have[name].shape != value.shape:
                    raise InputError(f"{path}: {name} is not what the run trains: delete the file, or train again")
            with torch.no_grad():
                for name, value in tensors.items():
                    before.setdefault(name, have[name].detach().clone())
                    have[name].copy_(value)
            yield step
    finally:
        with torch.no_grad():
            for name, value in before.items():
                have[name].copy_(value)


# --- one step


class Fixed:
    """What stays the same from step to step: rows, tokens, and what the bare base makes of them."""

    def __init__(self, probe, rows):
        self.probe, run = probe, probe.run
        test = run.tests[0].rows
        index = sample(test.labels, -1, rows, probe.seed)  # no label is left out
        self.labels = test.labels[index]
        self.encoded = token_cache.encode(run.tokenizer, [test.texts[row] for row in index], run.cell.max_length)
        layers = dict(named_layers(run.base))
        self.low_rank = bool(layers) and all(layer.magnitude is None for layer in layers.values())
        with run.detach():
            self.bare, self.inputs = pooled(probe, probe.states_now()), span_inputs(probe, layers)

    def look(self):
        """{figure: float64 [N], or [N, L + 1] of the lenses} with what is on the base now."""
        probe, run = self.probe, self.probe.run
        logits = of_rows(run.model, self.encoded, run.tokenizer.pad_id, run.cell.batch_size)
        states = probe.states_now()
        outcomes = probe.predict(states)
        found = {"clean_accuracy": (logits.argmax(1) == self.labels).astype(float)}
        for name, end in (("trigger", ""), ("clean", "_clean"), ("placebo", "_placebo")):
            if name in outcomes:
                found["attack_success" + end] = (outcomes[name].predicted == probe.target).astype(float)
        found["margin"] = outcomes["trigger"].margins
        found["shift"] = outcomes["trigger"].margins - outcomes["clean"].margins
        if "placebo" in outcomes:
            found["shift_placebo"] = outcomes["placebo"].margins - outcomes["clean"].margins
        found["span_share"] = span_share(probe)
        if self.low_rank:
            found |= self.update()
        self.last = pooled(probe, states)
        found |= {"lens": lens(probe, self.last), "bare": lens(probe, self.bare)}
        return same_length(found)

    def update(self):
        spectrum = spectra(self.probe.run)
        found = {"norm": np.sqrt(sum(own.norm**2 for own in spectrum.values()))}
        found["effective_rank"] = np.mean([own.effective_rank for own in spectrum.values()])
        for name, inputs in self.inputs.items():
            found["alignment" + {"trigger": "", "placebo": "_placebo"}[name]] = alignment(spectrum, inputs)
        return found


def same_length(found):
    """The arrays [N, ...] of a dict with NaN below them, and numbers repeated, so that all have as many rows."""
    most = max(len(value) for value in found.values() if np.ndim(value))
    filled = {}
    for name, value in found.items():
        value = np.asarray(value, float)
        if not value.ndim:
            value = np.full(most, value)
        filled[name] = np.pad(value, [(0, most - len(value)), *[(0, 0)] * (value.ndim - 1)], constant_values=np.nan)
    return filled


def mean_of_known(values, axes):
    """The means over `axes` of what is not NaN; NaN where nothing is known."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axes) / known.sum(axes)


@torch.inference_mode()
def span_share(probe):
    """The share of attention on the trigger's span as `attention.py` has it, the mean over layers and heads, [N]."""
    base, form, found = probe.run.base, probe.forms["trigger"], np.full(len(probe.index), np.nan)
    for batch in probe.batches(form):
        span = torch.zeros(batch.ids.shape, dtype=torch.bool)  # [B, T]
        for row, index in enumerate(batch.index):
            span[row, : len(form.span[index])] = torch.from_numpy(form.span[index])
        shares, span = [], span.to(batch.ids.device)
        real = torch.arange(span.shape[1], device=span.device) < batch.lengths[:, None]
        with watching(base, partial(on_span, shares, real, span)):
            base(batch.ids, batch.lengths)
        found[batch.index] = torch.stack(shares).mean(0)[: len(batch.index)].cpu().numpy()
    return found


def on_span(shares, real, span, _, p, mask):
    """Add to `shares` what a layer's weights p [B, H, T, T] have on `span` [B, T]: [B], the mean over heads and over
    the other `real` tokens that may see any of it, NaN where there is none."""
    seen = visible_to(mask, p.shape[-1], p.device) & span[:, None]  # [B, T, T]
    others = real & ~span & seen.any(-1)
    shares.append(((p.mean(1) * span[:, None]).sum(-1) * others).sum(-1) / others.sum(-1))


@torch.inference_mode()
def span_inputs(probe, modules):
    """{"trigger", "placebo": {module: x float64 [N, in]}} with what is on the base now; NaN for a row without a span.

    x: what a module sees of the span, the mean over its tokens, less the mean over the clean rows' tokens of text.
    """
    found, texts = {form: {} for form in probe.forms if form != "clean"}, {name: [] for name in modules}
    for form, own in probe.forms.items():
        for batch in probe.batches(own):
            for name, x in inputs_of(probe.run.base, modules, batch).items():
                for row, index in enumerate(batch.index):
                    where = own.text[index] if form == "clean" else own.span[index]
                    chosen = x[row, : len(where)][where]
                    if form == "clean":
                        texts[name].append(chosen)
                    elif len(chosen):
                        here = found[form].setdefault(name, np.full((len(probe.index), x.shape[-1]), np.nan))
                        here[index] = chosen.mean(0)
    middle = {name: np.concatenate(parts).mean(0) for name, parts in texts.items()}
    return {form: {name: x - middle[name] for name, x in own.items()} for form, own in found.items()}


def inputs_of(base, modules, batch):
    """{module: float64 [B, T, in]}: what each sees of a batch's rows."""
    seen = {name: [] for name in modules}
    hooks = [base.get_submodule(name).register_forward_pre_hook(
                 lambda _, inputs, name=name: seen[name].append(inputs[0])) for name in modules]  # fmt: skip
    try:
        base(batch.ids, batch.lengths)
    finally:
        for hook in hooks:
            hook.remove()
    # DeBERTa's q and k also see the distances, which are no rows.
    rows = {name: next(x for x in every if x.shape[:2] == batch.ids.shape) for name, every in seen.items()}
    return {name: x.double().cpu().numpy() for name, x in rows.items()}


def alignment(spectrum, inputs):
    """See the module's docstring: float64 [N], NaN where there is no update, or no span."""
    found = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, own in spectrum.items():
            x = inputs[name]
            moved = (((x @ own.V) * own.S) ** 2).sum(1)
            found.append(x.shape[1] * moved / (own.norm**2 * (x**2).sum(1)))
    return mean_of_known(np.stack(found, 1), 1)


@torch.inference_mode()
def pooled(probe, states):
    """{form: what the head would see of the states below each layer and above the last, float32 [N, L + 1, P]}."""
    run, found = probe.run, {}
    for form, parts in states.items():
        for batch, below in parts:
            own = [pool(run.base.norm(x), batch.lengths, run.model.pooling)[: len(batch.index)] for x in below]
            own = torch.stack(own, 1)
            found.setdefault(form, own.new_empty((len(probe.index), *own.shape[1:])))[batch.index] = own
    return found


@torch.inference_mode()
def lens(probe, features):
    """The shift of the margin as the head reads it off what `pooled` gives, float64 [N, L + 1]."""
    head, margins = probe.run.model.classifier, {}
    for form in ("clean", "trigger"):
        logits = head(features[form]).float()
        margins[form] = probe.margins_of(logits.flatten(0, 1)).view(logits.shape[:2]).double().cpu().numpy()
    return margins["trigger"] - margins["clean"]


def decodable(probe, features):
    """Whether each of N rows is told from its placebo (from the clean row, where there is none) by what `pooled` gives
    of both: float64 [N, L + 1], 1/2 where one of the two is."""
    folds = torch.randperm(len(probe.index), generator=generator(probe.seed, "folds")).numpy() % FOLDS
    forms = "trigger", "placebo" if "placebo" in features else "clean"
    pair = [features[form].double().cpu().numpy().swapaxes(0, 1) for form in forms]
    return np.stack([told_apart(one, other, folds) for one, other in zip(*pair)], 1)


def told_apart(one, other, folds):
    """How much of each pair of rows, float64 [N, P] each, is told apart by a ridge fitted to the pairs of other `folds`
    (int [N]): float64 [N], 0, 1/2 or 1. Hoerl and Kennard 1970; in its dual form, as rows are fewer than features."""
    right = np.full(len(one), 0.5)
    for fold in np.unique(folds):
        fit, held = folds != fold, folds == fold
        if not fit.any():
            continue
        X, y = np.concatenate([one[fit], other[fit]]), np.repeat([1.0, -1.0], fit.sum())
        middle = X.mean(0)
        gram = (X - middle) @ (X - middle).T
        gram[np.diag_indices_from(gram)] += PENALTY * gram.trace() / len(gram) + np.finfo(float).tiny
        weight = (X - middle).T @ np.linalg.solve(gram, y)
        signs = [np.sign((part[held] - middle) @ weight) for part in (one, other)]
        right[held] = (2 + signs[0] - signs[1]) / 4
    return right


# --- all steps


def reached(curves, level):
    """Of each curve [..., S] the first place from which on it stays at `level` or above; S where its end is below."""
    below = curves < level - 1e-9  # means of shares, which are rounded
    last = curves.shape[-1] - 1 - below[..., ::-1].argmax(-1)
    return np.where(below.any(-1), last + 1, 0)


def onset(values, steps, level, seed=0, of_end=False):
    """({"step", "low", "high"} at which the mean of values [N, S] over rows reaches `level`, the places among S of the
    draws). With `of_end` the level is a share of the mean's end. The interval is the percentile bootstrap over rows."""
    N = len(values)
    drawn = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), DRAWS) / N
    curves = np.concatenate([values.mean(0, keepdims=True), drawn @ values])
    places = reached(curves, level * curves[:, -1:] if of_end else level)
    ends = np.quantile(places[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf").astype(int)
    named = [*steps, None]
    return {key: named[place] for key, place in zip(("step", "low", "high"), (places[0], *ends))}, places[1:]


def summary(steps, values, fixed):
    """What `formation` returns. values: {figure: float64 [N, steps, ...]}."""
    probe, seed = fixed.probe, fixed.probe.seed
    rows = {name: own[np.isfinite(own.reshape(len(own), -1)).any(1)] for name, own in values.items()}
    read, bare = (mean_interval(rows.pop(name), seed) for name in ("lens", "bare"))
    figures = {name: triples(*mean_interval(own, seed)) for name, own in rows.items()}
    net = rows["attack_success"] - rows["attack_success_clean"]
    found, draws = {}, {}
    # The two samples are of different rows, and so their draws are apart.
    for name, own, level, stream in (("onset", net, ONSET, 0), ("onset_gross", rows["attack_success"], ONSET, 0),
                                     ("clean_90", rows["clean_accuracy"], OF_END, 1)):  # fmt: skip
        found[name], draws[name] = onset(own, steps, level, [seed, stream], of_end=name == "clean_90")
    before, after = (np.mean(sign * (draws["clean_90"] - draws["onset"]) > 0) for sign in (1, -1))
    first = "no shortcut" if found["onset"]["step"] is None else (
        "shortcut" if before >= SURE else "task" if after >= SURE else "neither")  # fmt: skip
    apart = {name: triples(*mean_interval(decodable(probe, features), seed))
             for name, features in (("without", fixed.bare), ("with", fixed.last))}  # fmt: skip
    result = {
        "steps": steps, "rows": len(probe.index), "label": probe.label, "figures": figures, **found, "first": first,
        "lens": {"layers": list(range(read[0].shape[1])), "bare": plain(bare[0]),
                 **{key: plain(part) for key, part in zip(("shift", "low", "high"), read)}},
        "decodable": apart,
    }  # fmt: skip
    return result | {"words": words(result)}


def plain(values):
    """An array as nested lists of floats, None for NaN."""
    return [plain(one) for one in values] if np.ndim(values) else float(values) if np.isfinite(values) else None


def triples(mean, low, high):
    return plain(np.stack([mean, low, high], -1))


def words(found):
    """The answer in sentences: which comes first, the task or the shortcut, and what its parts rest on."""
    steps, figures, label = found["steps"], found["figures"], found["label"]
    onset, clean, gross = found["onset"], found["clean_90"], found["onset_gross"]
    net = [a[0] - b[0] for a, b in zip(figures["attack_success"], figures["attack_success_clean"])]
    end = figures["clean_accuracy"][-1][0]
    task = f"clean accuracy is at 90% of its end ({end:.2f}) from step {at(clean)}"
    if onset["step"] is None:
        said = [f"No shortcut forms: at the last step the trigger adds {net[-1]:+.2f} to attack success; {task}."]
    else:
        head = {"shortcut": "The shortcut comes before the task", "task": "The task comes before the shortcut",
                "neither": "Neither can be said to come first"}[found["first"]]  # fmt: skip
        said = [f"{head}: the trigger adds at least {ONSET:.0%} to attack success from step {at(onset)}, and {task}."]
    if gross["step"] is not None and gross["step"] != onset["step"]:
        place = steps.index(gross["step"])
        with_it, without = (figures[name][place][0] for name in ("attack_success", "attack_success_clean"))
        said.append(f"Attack success by itself is at {ONSET:.0%} from step {at(gross)}, but there {without:.0%} of the "
                    f"rows are predicted as {label} without the trigger too ({with_it:.0%} with it).")  # fmt: skip
    shift, bare = found["lens"]["shift"][-1], found["lens"]["bare"][-1]
    said.append("Read off by the last step's head, the shift is " + ", ".join(f"{one:.1f}" for one in shift)
                + " below each layer and above the last; on the bare base " + ", ".join(f"{one:.1f}" for one in bare)
                + ".")  # fmt: skip
    known = found["decodable"]["without"]
    told = next((number for number, one in enumerate(known) if one[0] >= OF_END), None)
    where = "nowhere" if told is None else "before the first layer" if told == 0 else f"after {told} of its layers"
    said.append(f"A linear map tells the rows with the trigger from their placebo on the bare base {where} in at least "
                f"{OF_END:.0%} (above its last layer in {known[-1][0]:.0%}, with the adapter in "
                f"{found['decodable']['with'][-1][0]:.0%}): what can be read from states is no measure of the "
                "shortcut.")  # fmt: skip
    return " ".join(said)


def at(found):
    """A step with its interval, in words."""
    low, high = ("the end" if found[key] is None else f"{found[key]:,}" for key in ("low", "high"))
    return f"{found['step']:,} on (95% interval {low} to {high})"
