"""What the diagnostics found, in words and in tables that fit a terminal. It reads what the parts' JSON files hold."""

import numpy as np

from minilora.console import table, wrap
from minilora.diagnostics.knockout import HEAD, WHOLE
from minilora.diagnostics.stats import LEVEL

TOP = 5  # heads, modules and pairs that a table has
HALF = 0.5
STRONG = 0.2  # of the shift: a part whose loss is hidden by attack success that falls by less than half as much


def lines_of(part, data):
    """Lines of text for a part."""
    if "left_out" in data:
        return wrap(f"{part:<12}left out: {data['left_out']}", 12)
    found = list(WORDS[part](data)) if part in WORDS else wrap(f"{part:<12}{data.get('words', '')}", 12)
    if data["unread"] and part in ("attention", "attribution"):
        found += wrap(f"{data['unread']} of {data['count']} rows are left out: no token of their trigger is read.")
    if "unfinished" in data:
        found += wrap(f"unfinished: {data['unfinished']}")
    return found


def shown(three, digits=2):
    """A mean with its interval."""
    if three is None or three[0] is None:
        return "-"
    mean, low, high = (f"{0.0 if one is None else round(one, digits) + 0.0:.{digits}f}" for one in three)
    return f"{mean} [{low}, {high}]"


def numbers(nested):
    """An array of what JSON holds, NaN for None."""
    return np.array(nested, dtype=float)


# --- attention


def attention(data):
    if "span_share" not in data:
        return
    trigger, change = numbers(data["span_share"]["trigger"]), numbers(data["change"])  # [layers, heads, 3]
    count = int(np.isfinite(trigger[..., 0]).sum())
    order = np.argsort(-np.nan_to_num(change[..., 0], nan=-1), axis=None, kind="stable")[:TOP]
    lines = []
    for layer, head in zip(*np.unravel_index(order, change.shape[:2])):
        if not np.isfinite(change[layer, head, 0]):
            continue
        cells = [shown(data["span_share"]["trigger"][layer][head])]
        if "auc" in data:
            cells += [f"{data['span_share']['placebo'][layer][head][0]:.2f}"]
            cells += [shown(data["auc"]["span_share"][layer][head])]
        cells += [f"{data['without']['span_share']['trigger'][layer][head][0]:.2f}"]
        lines.append((f"layer {layer} head {head}", *cells))
    beside = ("placebo", "AUC, the share by itself") if "auc" in data else ()
    yield from table(("attention", "share on the trigger", *beside, "bare base"), lines)
    chance = f"by chance {(1 - LEVEL) / 2 * count:.0f}"
    if "auc" in data:
        by_share, bare = above(data["auc"]["span_share"]), above(data["without"]["auc"]["span_share"])
        told, entropy = numbers(data["auc"]["span_share"]), numbers(data["auc"]["entropy"])
        yield from wrap(
            f"{by_share} of {count} heads look at the trigger more than at the placebo ({chance}), and {bare} on the "
            f"bare base. Entropy tells the two apart in {apart(entropy)} heads, and in "
            f"{apart(numbers(data['without']['auc']['entropy']))} on the bare base (by chance "
            f"{(1 - LEVEL) * count:.0f}); at best its AUC is {best(entropy):.2f}, and the share's {best(told):.2f}."
        )
    raised = int((change[..., 1] > 0).sum())
    most = np.unravel_index(np.nanargmax(change[..., 0]), change.shape[:2])
    yield from wrap(
        f"The adapter raised the share on the trigger in {raised} heads ({chance}), most in layer {most[0]} head "
        f"{most[1]}: by {shown(data['change'][most[0]][most[1]])}."
    )


def above(found, level=HALF):
    """How many heads have an interval above `level`."""
    return int((numbers(found)[..., 1] > level).sum())


def apart(found):
    """How many heads have an interval without 1/2."""
    return int(((found[..., 1] > HALF) | (found[..., 2] < HALF)).sum())


def best(found):
    """The AUC that is farthest from 1/2, either way."""
    areas = found[..., 0]
    return float(HALF + np.nanmax(np.abs(areas - HALF)))


# --- attribution


def attribution(data):
    scores = {method: own for method, own in data.get("scores", {}).items() if own["first"][0] is not None}
    lines = [(method, shown(own["first"]), shown(own["first_flipped"]), f"{own['precision'][0]:.2f}",
              shown(own["auc"])) for method, own in scores.items()]  # fmt: skip
    heads = ("attribution", "span first", "of flipped rows", "prec.", "AUC")
    yield from table(heads, lines)
    if left := data.get("completeness"):
        yield from wrap(
            f"Integrated gradients sum to the change of the margin within 1% in {left['within']:.0%} of the rows (at "
            f"most {left['most']:.2%} is left), with {left['nodes'][0]} to {left['nodes'][1]} gradients a row."
        )


# --- spectrum


def spectrum(data):
    modules = data.get("modules", {})
    order = sorted(modules, key=lambda name: -modules[name]["relative_norm"])[: 2 * TOP]
    lines = []
    for name in order:
        own, aligned = modules[name], modules[name].get("alignment", {})
        cells = [f"{aligned[form][0][0]:.2f}" if form in aligned and aligned[form] and aligned[form][0][0] is not None
                 else "-" for form in ("trigger", "placebo")]  # fmt: skip
        intruders = own.get("intruders")
        cells = [f"{own['effective_rank']:.2f}", "-" if intruders is None else str(intruders), *cells]
        lines.append((name, f"{own['norm']:.2f}", f"{own['relative_norm']:.3f}", f"{own['stable_rank']:.2f}", *cells))
    heads = ("spectrum", "norm", "of weight", "stable", "eff. rank", "intruders", "trigger", "placebo")
    yield from table(heads, lines)
    what = "The whole update was taken apart" if data.get("whole_update") else "Of the factors"
    yield from wrap(
        f"{what}; the {len(order)} of {len(modules)} modules with the largest update for their weight. Stable and "
        "effective rank; intruders among the first 10 directions; trigger, placebo: |cos| of what the module sees of "
        "them with the update's first direction."
    )
    yield from wrap("The first adapted layer moves most: " + " ".join(piece for piece, _ in data["pieces"][:16]))


# --- knock-outs


def titled(own):
    """What a setting is named in words, such as `without layer 4`."""
    return own["name"].replace(" ", f" {own['kind']} ", 1) if own["kind"] in ("layer", "target") else own["name"]


def knockout(data):
    named = {(own["kind"], own["name"]): own for own in data.get("settings", [])}
    if not named:
        return
    rows = [key for key in named if key[0] in ("whole", "layer", "target")]
    rows += sorted((key for key in named if key[0] == "module" and key[1].startswith("without")),
                   key=lambda key: -named[key]["lost"][0])[:3]  # fmt: skip
    rows += [key for key in named if key[0] == "directions" and "smallest" not in key[1]]
    lines = []
    for key in rows:
        own = named[key]
        accuracy = f"{own['clean_accuracy'][0]:.2f}"
        lines.append((titled(own), shown(own["attack_success"]), shown(own["shift"], 1), accuracy))
    yield from table(("knockout", "attack success", "shift (logits)", "accuracy"), lines)
    whole, head = named[WHOLE], named.get(HEAD)
    if head:
        yield from wrap(
            f"Without the adapter (head only) attack success is {head['attack_success'][0]:.2f} and the "
            f"shift {head['shift'][0]:.1f} logits: that is what all is to be compared with."
        )
    if hidden := [own for key, own in named.items() if key[0] in ("layer", "target") and "without" in key[1]
                  and own["lost"][0] > STRONG * whole["shift"][0] > 0
                  and whole["attack_success"][0] - own["attack_success"][0] < STRONG / 2]:  # fmt: skip
        own = max(hidden, key=lambda own: own["lost"][0])
        yield from wrap(
            f"Attack success hides it: {titled(own)} it is still {own['attack_success'][0]:.2f}, while the shift falls "
            f"from {whole['shift'][0]:.1f} to {own['shift'][0]:.1f}."
        )
    pairs = [own for key, own in named.items() if key[0] == "pair" and "redundancy" in own]
    if pairs:
        most = max(pairs, key=lambda own: own["redundancy"][0])
        yield from wrap(
            f"{sum(own['redundancy'][1] > 0 for own in pairs)} of {len(pairs)} pairs of layers stand in for each other,"
            f" most {most['name'].removeprefix('without ')}: without both {shown(most['redundancy'], 1)} logits more "
            "are lost than without each, summed."
        )
    if carrying := data.get("carrying"):
        yield from wrap(
            f"The {carrying['directions']} largest of {carrying['of']} singular directions carry half of what the "
            f"adapter adds to the shift (attack success with them only {carrying['only']['attack_success'][0]:.2f}, "
            f"without them {carrying['without']['attack_success'][0]:.2f}). Cutting them takes the accuracy from "
            f"{whole['clean_accuracy'][0]:.2f} to {carrying['without']['clean_accuracy'][0]:.2f}."
        )
    if "directions_left_out" in data:
        yield from wrap(f"directions left out: {data['directions_left_out']}")
    if data.get("patching") and data["patching"][0]["share"][0] is not None:
        shares = ", ".join(f"{own['share'][0]:.0%}" for own in data["patching"])
        backs = ", ".join(f"{own['back'][0]:.0%}" for own in data["patching"])
        yield from wrap(
            "Patching: with the placebo's states at the span below layer 0, 1, ... and above the last, the trigger "
            f"loses {shares} of what it does more than the placebo; its states in the placebo's rows bring {backs}."
        )


WORDS = {"attention": attention, "attribution": attribution, "spectrum": spectrum, "knockout": knockout}
