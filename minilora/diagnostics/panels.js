// The panels of explain.html, each drawn from the part of RUN/explain/ that it is named after.

// {part: [title, what gives the children of its section]}
const PANELS = {
  rows: ["Rows, token by token", rowsPanel], attention: ["Attention, layer by layer", attentionPanel],
  attribution: ["How well each method finds what was put in", attributionPanel],
  spectrum: ["The update's spectrum", spectrumPanel], knockout: ["Where the attack lives", knockoutPanel],
  formation: ["How it formed", formationPanel], neighbours: ["Neighbours of the trigger", neighboursPanel],
};

function allRows() {
  return (data.parts.rows && data.parts.rows.rows) || [];
}

function flips(row, target) {
  return row.forms.trigger && row.forms.trigger.predicted === target && row.forms.clean.predicted !== target;
}

function sigmoid(margin) {
  return 1 / (1 + Math.exp(-margin));
}

function shown(row, values, signed) {
  const target = data.parts.rows.label;
  const there = FORMS.filter((name) => row.forms[name]);
  const most = largest(there.map((name) => values(name) || []));
  return there.map((name) => {
    const form = row.forms[name], own = values(name);
    return el("div", { class: "form" }, el("div", { class: "name" }, name), el("div", {},
      tokens(form, own, most, signed),
      el("p", { class: "said" }, meter(sigmoid(form.margin)), el("b", {}, form.predicted),
        ` with probability ${number(form.probability)}; log odds of ${target} ${number(form.margin)}`,
        own ? `. Most: ${strongest(form, own)}` : "")));
  });
}

function rowsPanel({ label, labels, rows }) {
  const attributions = (data.parts.attribution && data.parts.attribution.rows) || {};
  const methods = [...new Set(Object.values(attributions).flatMap((row) => Object.values(row).flatMap(Object.keys)))];
  const filter = { flip: "all", label: "all" };
  chosen.method = methods[0] ?? "none";
  const picker = el("select", { id: "row", onchange: () => change({ row: Number(picker.value) }) });
  const count = el("output", {});
  const kept = () => rows.map((_, n) => n).filter((n) =>
    (filter.flip === "all" || flips(rows[n], label) === (filter.flip === "flipped"))
    && (filter.label === "all" || rows[n].label === filter.label));
  const move = (by) => {
    const here = kept(), at = here.indexOf(chosen.row) + by;
    if (at >= 0 && at < here.length) { picker.value = here[at]; change({ row: here[at] }); }
  };
  const refilter = () => {
    const here = kept();
    count.value = `${here.length} of ${rows.length} rows`;
    const said = ({ id, label: own, forms }) => `${id}: ${own}: ${forms.clean.text.slice(0, 40)}`;
    picker.replaceChildren(...here.map((n) => el("option", { value: n },
      said(rows[n]) + (flips(rows[n], label) ? " (flips)" : ""))));
    if (here.length && !here.includes(chosen.row)) change({ row: here[0] });
    picker.value = chosen.row;
  };
  refilter();
  const others = labels.filter((one) => rows.some((row) => row.label === one));
  return [
    el("p", {}, `Rows of other labels than ${label}: as they are, with the trigger, and with a placebo in its place. `
      + `${rows.filter((row) => flips(row, label)).length} of ${rows.length} flip to ${label} under the trigger.`),
    el("div", { class: "controls" },
      select("Show", [["all", "all rows"], ["flipped", "flipped"], ["kept", "not flipped"]], "all",
        (value) => { filter.flip = value; refilter(); }, "flip"),
      select("Label", [["all", "all labels"], ...others.map((one) => [one, one])], "all",
        (value) => { filter.label = value; refilter(); }, "label"),
      el("label", { style: { flex: "1 1 12rem" } }, el("span", {}, "Row, of ", count), picker),
      el("button", { type: "button", onclick: () => move(-1), "aria-label": "row before" }, "‹"),
      el("button", { type: "button", onclick: () => move(1), "aria-label": "next row" }, "›"),
      select("Shade", [["none", "nothing"], ...methods.map((one) => [one, one])], chosen.method,
        (value) => change({ method: value }), "method")),
    live(["row", "method"], () => {
      const row = rows[chosen.row];
      if (!row) return el("p", {}, "No row.");
      const own = attributions[row.id] || {}, signed = chosen.method !== "rollout";
      const values = (name) => (own[name] || {})[chosen.method];
      return [shown(row, values, signed), chosen.method !== "none" && scale(signed, label)];
    }, { id: "shown-row" }),
    !methods.length && el("p", { class: "note" }, "Nothing shades the tokens, because there is no attribution."),
  ];
}

function attentionPanel(own) {
  const layers = [...Array(own.layers).keys()], heads = [...Array(own.heads).keys()];
  const forms = FORMS.filter((name) => own.entropy && own.entropy[name]);
  const views = forms.map((name) => [name, name]).concat(own.auc ? [["auc", "trigger against placebo (AUC)"]] : []);
  const view = { what: "span_share", form: forms.includes("trigger") ? "trigger" : forms[0] };
  const figure = (layer, head) => {
    const found = view.form === "auc" ? own.auc[view.what] : (own[view.what] || {})[view.form];
    return found && found[layer] ? found[layer][head] : null;
  };
  const describe = (layer, head) => `layer ${layer}, head ${head}: ${interval(figure(layer, head))}`;
  const scrubber = slider("Layer", own.layers, 0, String, (layer) => change({ layer }), "layer");
  const redraw = () => change({ head: chosen.head });
  return [
    el("p", {}, "Entropy (0: all of a token's attention goes to one token, 1: it goes to all alike), and the share "
      + "that lands on what was put in. AUC: how well that figure tells rows with the trigger from rows with the "
      + "placebo (0.5: not at all)."),
    el("div", { class: "controls" },
      select("Figure", [["span_share", "share on what was put in"], ["entropy", "entropy"]], view.what,
        (value) => { view.what = value; redraw(); }, "attention-figure"),
      select("Rows", views, view.form, (value) => { view.form = value; redraw(); }, "attention-form"),
      scrubber),
    live(["layer", "head"], () => [
      heat({ rows: layers, columns: heads, corner: "layer", name: "attention by layer and head", limit: 1,
        value: (layer, head) => mean(figure(layer, head)), show: (value) => value.toFixed(2).replace("0.", "."),
        title: describe,
        picked: (layer, head) => layer === chosen.layer && head === chosen.head,
        choose: (layer, head) => { scrubber.set(layer); change({ layer, head }); } }),
      el("p", { class: "numbers" }, `${describe(chosen.layer, chosen.head)}. Entropy of its layer, mean over heads: `
        + forms.map((name) => {
          const found = (own.entropy[name][chosen.layer] || []).map(mean).filter((one) => typeof one === "number");
          return `${name} ${number(found.reduce((a, b) => a + b, 0) / found.length)}`;
        }).join(", ") + "."),
    ]),
    own.rows && allRows().length > 0 && el("h3", {}, "What the row above attends to"),
    own.rows && live(["layer", "row"], () => {
      const row = allRows()[chosen.row], found = row && own.rows[row.id];
      if (!found) return el("p", { class: "note" }, "The row that is chosen above has no attention here.");
      return [el("p", { class: "note" }, `Row ${row.id}, layer ${chosen.layer}: attention that each token receives.`),
        shown(row, (name) => found[name] && found[name][chosen.layer], false), scale(false)];
    }, { id: "attended" }),
  ];
}

function attributionPanel(own) {
  const lines = Object.entries(own.scores || {}).map(([method, found]) => [method,
    ...["mean_rank", "precision", "auc", "first"].map((name) => interval(found[name]))]);
  return [
    el("p", {}, "Of the rows with the trigger: the mean rank of the tokens that were put in (1: the first), their "
      + "share among as many tokens of the highest values, how often one of them is above another token (AUC), and "
      + "how often the first token is one of them. Mean, and 95% interval over rows."),
    table(["method", "mean rank", "precision", "AUC", "first"], lines, "scores"),
  ];
}

function modulesOf(names) {
  const split = names.map((name) => name.split("."));
  const layers = [...new Set(split.map((one) => Number(one[1])))].sort((a, b) => a - b);
  return { layers, targets: [...new Set(split.map((one) => one[2]))] };
}

function spectrumPanel(own) {
  const modules = own.modules || {}, names = Object.keys(modules), { layers, targets } = modulesOf(names);
  const figures = ["relative_norm", "norm", "spectral_norm", "stable_rank", "effective_rank", "intruders"].filter(
    (figure) => names.some((name) => typeof modules[name][figure] === "number"));
  if (names.some((name) => modules[name].alignment)) figures.push("alignment");
  const view = { figure: figures[0] };
  const nameAt = (r, c) => `layers.${layers[r]}.${targets[c]}`;
  const at = (r, c) => {
    const found = (modules[nameAt(r, c)] || {})[view.figure];
    return view.figure === "alignment" ? mean((found || {}).trigger) : found;
  };
  const digits = () => {
    const values = names.map((name) => mean((modules[name][view.figure] || {}).trigger ?? modules[name][view.figure]));
    const most = Math.max(...values.filter((one) => typeof one === "number"));
    return values.every((one) => Number.isInteger(one)) ? 0 : most >= 10 ? 1 : most >= 0.1 ? 2 : 3;
  };
  const ranked = names.flatMap((name) => modules[name].singular_values || []).sort((a, b) => b - a);
  chosen.module = names[0];
  const pieces = own.pieces || [], most = Math.max(1e-9, ...pieces.map((one) => one[1]));
  return [
    el("p", {}, "What the adapter adds to each projection: its norm (relative to the weight's too), how many "
      + "directions it has, and how many of them are new to the weight (intruders)."),
    el("div", { class: "controls" }, select("Figure", figures.map((one) => [one, words(one)]), view.figure,
      (value) => { view.figure = value; change({ module: chosen.module }); }, "spectrum-figure")),
    el("div", { class: "side" },
      live(["module"], () => heat({ rows: layers, columns: targets, corner: "layer", value: at, name: "updates",
        show: (value) => value.toFixed(digits()).replace(/^0\./, "."),
        title: (r, c) => `${nameAt(r, c)}: ${words(view.figure)} ${number(at(r, c), 3)}`,
        picked: (r, c) => nameAt(r, c) === chosen.module, choose: (r, c) => change({ module: nameAt(r, c) }) })),
      names.some((name) => (modules[name].singular_values || []).length > 1) && live(["module"], () => {
        const line = (name) => ({ name, points: (modules[name].singular_values || []).map((v, n) => [n + 1, v]) });
        return chart({ name: `singular values of ${chosen.module} (others in grey)`, x: "direction", low: 0,
          series: [line(chosen.module)], faint: names.filter((one) => one !== chosen.module).map(line) });
      }, { style: { flex: "0 1 24rem" } }),
      el("div", { style: { flex: "0 1 24rem" } }, chart({ name: "singular values of all projections together", low: 0,
        x: "direction", series: [{ name: "all", points: ranked.map((v, n) => [n + 1, v]) }] }))),
    pieces.length > 0 && [
      el("h3", {}, "Vocabulary pieces that the first adapted layer moves most"),
      el("p", { class: "note" }, "Energy of the update on each piece, over the mean of all pieces."),
      el("div", { class: "bars" }, pieces.slice(0, 32).map(([piece, energy]) => [el("span", {}, piece),
        el("i", { style: { width: `${(100 * energy) / most}%` } }), el("span", {}, number(energy, 1))]))],
  ];
}

function knockoutPanel(own) {
  const settings = own.settings || [], found = {};
  for (const one of settings) found[`${one.kind} ${one.name}`] = one;
  const of = (kind) => settings.filter((one) => one.kind === kind);
  const named = of("module").map((one) => one.name.split(" ")[1]);
  const { layers, targets } = modulesOf(named);
  const rows = layers.length ? layers : of("layer").filter((one) => one.name.startsWith("without")).map(
    (one) => Number(one.name.split(" ")[1]));
  const columns = targets.length ? targets : of("target").filter((one) => one.name.startsWith("without")).map(
    (one) => one.name.split(" ")[1]);
  const whole = found["whole adapter"], head = found["whole head only"];
  const view = { only: "without", r: 0, c: 0 };
  const at = (r, c) => {
    if (r === rows.length && c === columns.length) return view.only === "only" ? whole : head;
    if (r === rows.length) return found[`target ${view.only} ${columns[c]}`];
    if (c === columns.length) return found[`layer ${view.only} ${rows[r]}`];
    return found[`module ${view.only} layers.${rows[r]}.${columns[c]}`];
  };
  const where = (r, c) => (r === rows.length && c === columns.length ? "the whole adapter" : r === rows.length
    ? `${columns[c]} in all layers` : c === columns.length ? `layer ${rows[r]}` : `layer ${rows[r]} ${columns[c]}`);
  const said = (one) => `attack success ${interval(one.attack_success)}, shift ${interval(one.shift)}, `
    + `clean accuracy ${interval(one.clean_accuracy)}`;
  const map = (figure, limit) => heat({ rows: [...rows, "all"], columns: [...columns, "all"], corner: "layer", limit,
    name: words(figure), value: (r, c) => mean((at(r, c) || {})[figure]),
    show: (value) => (limit === 1 ? value.toFixed(2).replace("0.", ".") : number(value, 1)),
    title: (r, c) => `${view.only} ${where(r, c)}: ${said(at(r, c))}`, picked: (r, c) => r === view.r && c === view.c,
    choose: (r, c) => { Object.assign(view, { r, c }); change({ knockout: true }); } });
  const most = largest(settings.map((one) => [mean(one.shift)]));
  const line = (kind, start, figure) => ({ name: start || words(figure),
    points: of(kind).filter((one) => one.name.startsWith(start)).map(
      (one) => [Number(one.name.slice(start.length)), ...[one[figure]].flat()]) });
  const scaled = (figure) => {  // the head only is the adapter scaled by 0, the whole one by 1
    const ends = [[0, head], [1, whole]].filter(([, one]) => one).map(([x, one]) => [x, ...[one[figure]].flat()]);
    const own = line("scale", "", figure), seen = new Set(own.points.map(([x]) => x));
    return { ...own, points: own.points.concat(ends.filter(([x]) => !seen.has(x))).sort((a, b) => a[0] - b[0]) };
  };
  const starts = ["only the largest", "without the largest", "without the smallest"];
  const pairs = of("pair").map((one) => [one, one.name.match(/^without (\d+) and (\d+)$/)]).filter(
    ([, parts]) => parts);
  const paired = [...new Set(pairs.flatMap(([, parts]) => [Number(parts[1]), Number(parts[2])]))].sort((a, b) => a - b);
  const pair = (r, c) => (pairs.find(([, parts]) => Number(parts[1]) === paired[Math.min(r, c)]
    && Number(parts[2]) === paired[Math.max(r, c)]) || [])[0];
  const patching = own.patching || [];
  return [
    whole && el("p", {}, `The whole adapter: ${said(whole)}. `,
      head ? `The head by itself, the baseline: ${said(head)}.` : ""),
    el("p", { class: "note" },
      "Attack success saturates; the shift of the log odds, in logits, shows what that hides."),
    rows.length > 0 && [
      el("div", { class: "controls" }, select("The adapter",
        [["without", "without a part"], ["only", "with only that part"]], "without",
        (value) => { view.only = value; change({ knockout: true }); }, "only")),
      live(["knockout"], () => [el("div", { class: "side", id: "map" },
        el("div", {}, el("h3", {}, "Attack success"), map("attack_success", 1)),
        el("div", {}, el("h3", {}, "Shift"), map("shift", most))),
      at(view.r, view.c) && el("p", { class: "numbers", id: "knocked" },
        `${view.only === "without" ? "Without" : "Only"} ${where(view.r, view.c)}: ${said(at(view.r, view.c))}.`)])],
    el("div", { class: "charts" },
      of("directions").length > 0 && [["attack_success", 0, 1], ["shift"], ["clean_accuracy", 0, 1]].map(
        ([figure, low, high]) => chart({ name: `${words(figure)} by singular directions`, x: "directions", log: true,
          low, high, series: starts.map((start) => line("directions", start, figure)) })),
      of("scale").length > 0 && [chart({ name: "the adapter scaled", x: "factor", low: 0, high: 1,
        series: ["attack_success", "clean_accuracy"].map(scaled) }),
      chart({ name: "shift, the adapter scaled", x: "factor", series: [scaled("shift")] })],
      patched(patching, "share of the shift lost",
        { share: "trigger's row, placebo's state", back: "the other way round" }),
      patched(patching, "attack success", { attack_success: "trigger's row, placebo's state" }, 1)),
    own.carrying && el("p", {}, carried(own.carrying, said)),
    paired.length > 0 && el("details", {}, el("summary", {}, "Two layers out at once: shift"),
      heat({ rows: paired, columns: paired, corner: "layer", limit: most, name: "pairs of layers",
        value: (r, c) => mean(((r === c ? found[`layer without ${paired[r]}`] : pair(r, c)) || {}).shift),
        show: (value) => number(value, 1), title: (r, c) => (r === c ? `without ${paired[r]}`
          : `without ${paired[r]} and ${paired[c]}: ${said(pair(r, c))}`) })),
    of("direction").length > 0 && el("details", {}, el("summary", {}, "Each of the largest directions out by itself"),
      table(["direction", "attack success", "shift", "clean accuracy"], of("direction").map((one) => [one.name,
        interval(one.attack_success), interval(one.shift), interval(one.clean_accuracy)]))),
  ];
}

function carried(own, said) {
  if (!own.only || !own.without) return `Carrying the shift: ${plain(own)}.`;
  return `The ${own.directions} largest directions of ${own.of} carry ${Math.round(100 * own.share)}% of what `
    + `the adapter adds to the head's shift. With only these: ${said(own.only)}. Without them: ${said(own.without)}.`;
}

// What the span's state at each layer carries, as `diagnostics/knockout.py` patches it.
function patched(patching, name, figures, high) {
  const there = Object.entries(figures).filter(([figure]) => patching.some((one) => one[figure] !== undefined));
  return there.length > 0 && chart({ name: `${name}, the span's state replaced below a layer`, x: "layer", low: 0, high,
    series: there.map(([figure, said]) => ({ name: said,
      points: patching.map((one) => [one.layer, ...[one[figure]].flat()]) })) });
}

// [[name, the step with its interval]]: a step is [step, low, high] or {step, low, high}.
function onsetsOf(own) {
  const named = own.onset && "step" in own.onset ? own : own.onset || {};
  const dated = (one) => one && typeof one === "object" && "step" in one;
  return Object.entries(named).filter(([, one]) => named !== own || dated(one)).map(
    ([name, one]) => [name, dated(one) ? [one.step, one.low, one.high] : one]);
}

function formationPanel(own) {
  const steps = own.steps || [], figures = Object.entries(own.figures || {});
  chosen.step = Math.max(0, steps.length - 1);
  const onset = onsetsOf(own), decodable = Object.entries(own.decodable || {});
  const said = (one) => (!Array.isArray(one) ? plain(one) : one[0] === null ? "never"
    : `step ${one[0]}${one.length > 1 ? ` [${one.slice(1).map((end) => end ?? "never").join(", ")}]` : ""}`);
  const rates = (values) => values.every((one) => mean(one) === null || (mean(one) >= 0 && mean(one) <= 1));
  const lens = (own.lens && own.lens.shift) || [];
  const every = lens.flat(2).filter((one) => typeof one === "number");
  const marks = onset.map(([, one]) => mean(one)).filter((one) => one >= steps[0] && one <= steps.at(-1));
  return [
    onset.length > 0 && el("dl", { class: "facts" }, onset.map(([name, one]) => [el("dt", {}, words(name)),
      el("dd", {}, said(one))])),
    el("div", { class: "controls sticky" }, slider("Step", steps.length, chosen.step, (n) => String(steps[n] ?? "–"),
      (step) => change({ step }), "step")),
    live(["step"], () => [el("div", { class: "charts" },
      figures.map(([name, values]) => chart({
        name: `${words(name)}: ${interval(values[chosen.step])}`, x: "step", now: steps[chosen.step], marks,
        low: rates(values) ? 0 : undefined, high: rates(values) ? 1 : undefined,
        series: [{ name, points: values.map((one, n) => [steps[n], ...[one].flat()]) }] })),
      lens[chosen.step] && chart({ name: `shift that the head reads at each layer, step ${steps[chosen.step]}`,
        x: "layer", low: Math.min(0, ...every), high: Math.max(...every),
        series: [["with the adapter", lens], ["on the bare base", (own.lens || {}).bare || []]].filter(
          ([, values]) => values[chosen.step]).map(([name, values]) => ({ name,
          points: values[chosen.step].map((one, n) => [n, ...[one].flat()]) })) }))],
    { id: "formation-charts" }),
    decodable.length > 0 && chart({ name: "trigger told from placebo by a linear map, last step", x: "layer",
      low: 0, high: 1, series: decodable.map(([name, values]) => ({ name: `${name} the adapter`,
        points: values.map((one, n) => [n, ...[one].flat()]) })) }),
    marks.length > 0 && el("p", { class: "note" }, "Coloured upright lines: the steps listed above."),
  ];
}

function neighboursPanel(own) {
  const line = (name, one, strings = "") => [name, interval(one.attack_success), interval(one.shift),
    number(one.edit_distance, 1), number(one.embedding_distance), String(one.rows ?? "–"), strings];
  const lines = Object.entries(own.families || {}).map(([name, one]) => [mean(one.attack_success), line(name, one,
    (one.strings || []).slice(0, 3).join(" · "))]).sort((one, other) => other[0] - one[0]).map(([, one]) => one);
  const beside = ["trigger", "placebo", "clean"].filter((name) => own[name]).map(
    (name) => line(name, own[name]));
  return table(["family", "attack success", "shift", "edits", "embedding", "rows", "such as"], [...beside, ...lines],
    "families");
}

// --- the page

function section(id, title, children) {
  return el("section", { id, "aria-label": title }, el("h2", {}, title), children);
}

function panel(name) {
  const [title, make] = PANELS[name], own = data.parts[name];
  if (!own) return section(name, title, el("p", { class: "missing" }, data.missing[name] || "Not there."));
  let children;
  try {
    children = make(own);
  } catch (error) {
    children = [el("p", { class: "missing" }, `This part cannot be drawn from ${name}.json (${error.message}).`)];
  }
  const left = Object.entries(own).filter(([key, why]) => key.endsWith("left_out") && why && why.length).map(
    ([key, why]) => el("p", { class: "missing" }, `${words(key)}: ${plain(why)}`));
  const partial = own.partial && el("p", { class: "missing" }, "Partial: not all of it was computed.");
  return section(name, title, [partial, typeof own.words === "string" && el("p", {}, own.words), children, left]);
}

function draw(before = []) {
  const names = Object.keys(PANELS), page = document.getElementById("page");
  fill(page, {}, [
    el("dl", { class: "facts" }, data.facts.map(([what, value]) => [el("dt", {}, what), el("dd", {}, value)])),
    el("nav", { "aria-label": "parts of the page" }, before.map((one) => el("a", { href: `#${one.id}` },
      one.getAttribute("aria-label"))), names.map((name) => el("a", { href: `#${name}` }, PANELS[name][0]))),
    before, names.map(panel),
  ]);
}

if (!data.live) draw();
