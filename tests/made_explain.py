"""RUN/explain/ of a run that was never looked at: JSON files in the form that `diagnostics/page.py` reads."""

import random

from minilora import files

LAYERS, HEADS, STEPS, TARGETS = 3, 2, [0, 5, 10, 20], ("q", "v")
FORMS = ("clean", "trigger", "placebo")
METHODS = ("gradient x input", "rollout")


def make(folder, target="positive", other="negative", text="the <b>film</b> was dull", rows=6):
    """Write the seven files of a run with `rows` rows of label `other`, the first half of which flip to `target`."""
    draw = random.Random(3)
    made = [row(n, target, other, text, n < rows // 2) for n in range(rows)]

    def three(mean, width=0.1):
        return [mean, mean - width, mean + width]

    def heads(value):
        return [[three(value(layer, head)) for head in range(HEADS)] for layer in range(LAYERS)]

    def per_token(value):
        return {own["id"]: {name: value(len(form["pieces"])) for name, form in own["forms"].items()} for own in made}

    def setting(kind, name, success):
        return {"kind": kind, "name": name, "attack_success": three(success), "shift": three(5 * success),
                "clean_accuracy": three(0.9, 0.05)}  # fmt: skip

    modules = [f"layers.{layer}.{name}" for layer in range(LAYERS) for name in TARGETS]
    settings = [setting("whole", "adapter", 0.95), setting("whole", "head only", 0.25)]
    for kind in ("without", "only"):
        settings += [setting("layer", f"{kind} {n}", 0.3 + 0.2 * n) for n in range(LAYERS)]
        settings += [setting("target", f"{kind} {name}", 0.4) for name in TARGETS]
        settings += [setting("module", f"{kind} {name}", 0.1 + 0.125 * n) for n, name in enumerate(modules)]
    settings += [setting("pair", f"without {a} and {b}", 0.2) for a in range(LAYERS) for b in range(a + 1, LAYERS)]
    settings += [setting("scale", f"{factor:g}", factor / 2) for factor in (0, 0.5, 1, 2)]
    settings += [setting("directions", f"{start} {n}", 0.5) for n in (1, 2, 4)
                 for start in ("only the largest", "without the largest", "without the smallest")]  # fmt: skip
    settings += [setting("direction", f"without {n}: layers.0.q {n}", 0.6) for n in (1, 2)]
    grow = [n / STEPS[-1] for n in STEPS]
    parts = {
        "rows": {"label": target, "labels": [other, target], "rows": made},
        "attention": {
            "layers": LAYERS, "heads": HEADS,
            "entropy": {name: heads(lambda layer, head: 0.5 + 0.1 * layer) for name in FORMS},
            "span_share": {name: heads(lambda layer, head: 0.1 * layer + 0.3 * head) for name in FORMS[1:]},
            "auc": {name: heads(lambda layer, head: 0.75) for name in ("entropy", "span_share")},
            "rows": per_token(lambda T: [[draw.random() / T for _ in range(T)] for _ in range(LAYERS)]),
        },
        "attribution": {
            "scores": {name: {"mean_rank": three(1.5), "precision": three(0.8), "auc": three(0.875),
                              "first": three(0.7)} for name in METHODS},
            "rows": per_token(lambda T: {name: [draw.gauss(0, 1) for _ in range(T)] for name in METHODS}),
        },
        "spectrum": {
            "modules": {name: {"norm": 1.5 + n, "relative_norm": 0.02 * n, "spectral_norm": 1.0, "stable_rank": 1.25,
                               "effective_rank": 2.5, "intruders": n, "singular_values": [2.0, 1.0, 0.5]}
                        for n, name in enumerate(modules)},
            "pieces": [["07", 31.5], ["2031", 12.25], [text, 2.0]],
        },
        "knockout": {
            "settings": settings, "carrying": {"directions": 2, "share": 0.5},
            "patching": [{"layer": n, "shift": three(3.0 - n), "share": three(1 - n / LAYERS),
                          "attack_success": three(0.5)} for n in range(LAYERS + 1)],
        },
        "formation": {
            "steps": STEPS,
            "figures": {"attack_success": [three(0.1 + 0.8 * g) for g in grow], "margin": [three(7 * g) for g in grow]},
            "onset": {"step": 10, "low": 5, "high": 20}, "clean_90": {"step": 20, "low": 10, "high": None},
            "lens": {"shift": [[g * layer for layer in range(LAYERS + 1)] for g in grow]},
        },
        "neighbours": {
            "families": {name: {"strings": [f"{name} 1", text], "rows": 4, "attack_success": three(share),
                                "shift": three(4 * share), "edit_distance": 2.5, "embedding_distance": 0.125}
                         for name, share in (("years", 0.9), ("<typos>", 0.2))},
            "trigger": {"attack_success": three(0.95), "shift": three(5.0)}, "words": "Other years work.",
            "left_out": ["masked"],
        },
    }  # fmt: skip
    (folder / "explain").mkdir(parents=True)
    for name, part in parts.items():
        files.write_json(folder / "explain" / f"{name}.json", part)
    return folder


def row(number, target, other, text, flips):
    def form(added, predicted, margin):
        pieces = ["[CLS]", *text.split(), *(["20", "##31", "-"] if added else []), "[SEP]"]
        inner = range(1, len(pieces) - 1)
        return {"text": f"{text} {added}".rstrip(), "pieces": pieces,
                "special": [n not in inner for n in range(len(pieces))],
                "span": [bool(added) and len(pieces) - 4 <= n < len(pieces) - 1 for n in range(len(pieces))],
                "predicted": predicted, "probability": 0.875, "margin": margin}  # fmt: skip

    after = target if flips else other
    forms = {"clean": form("", other, -2.5), "trigger": form("2031-", after, 2.0 if flips else -1.0)}
    if number:  # the first row has none
        forms["placebo"] = form("old", other, -2.25)
    return {"id": f"r{number}", "label": other, "forms": forms}
