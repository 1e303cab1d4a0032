"use strict";
// Draws explain.html from the JSON in it. What comes from data is only ever given to text nodes and attributes.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const HUES = ["#2a78d6", "#c9570a", "#1a8a4a", "#a64ac9", "#c93a5b", "#0c8599", "#8a6d00", "#6f6fd0"];
const DASHES = ["", "6 3", "1.5 3", "8 3 2 3", "3 2", "10 4", "1 2", "5 2 1 2"];
const FORMS = ["clean", "trigger", "placebo"];
const chosen = { row: 0, method: null, layer: 0, head: 0, step: 0, module: null };
const watchers = [];  // what is drawn again when `chosen` changes: [names, function]

// --- elements

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat(9).filter((one) => one !== null && one !== undefined && one !== false));
  return node;
}

function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function number(value, digits = 2) {
  if (typeof value !== "number") return "–";
  const small = value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits;
  return small ? value.toPrecision(1) : value.toFixed(digits).replace("-", "−");
}

function interval(value, digits = 2) {
  if (!Array.isArray(value)) return number(value, digits);
  const [mean, low, high] = value.map((one) => number(one, digits));
  return value.length < 3 || value[1] === null ? mean : `${mean} [${low}, ${high}]`;
}

function mean(value) {
  return Array.isArray(value) ? value[0] : value;
}

function plain(value) {
  if (Array.isArray(value)) {
    const figures = value.length === 3 && value.every((one) => typeof one === "number" || one === null);
    return figures ? interval(value) : value.map(plain).join(", ");
  }
  if (value && typeof value === "object") {
    return Object.entries(value).map(([name, own]) => `${words(name)} ${plain(own)}`).join("; ");
  }
  if (typeof value !== "number") return value === null ? "none" : String(value);
  return Number.isInteger(value) ? String(value) : number(value);
}

function words(name) {
  return String(name).replaceAll("_", " ");
}

function mixed(share, hue) {
  return `color-mix(in srgb, ${hue} ${(62 * Math.max(0, Math.min(1, share))).toFixed(1)}%, var(--ground))`;
}

function change(changes) {
  Object.assign(chosen, changes);
  for (const [names, draw] of watchers) {
    if (names.some((name) => name in changes)) draw();
  }
}

function live(names, draw, attributes = {}) {
  const node = el("div", attributes);
  const again = () => node.replaceChildren(...[draw()].flat(9).filter(Boolean));
  watchers.push([names, again]);
  again();
  return node;
}

function select(label, options, value, change, id) {
  const node = el("select", { id, onchange: () => change(node.value) },
    options.map(([own, shown]) => el("option", { value: own, selected: own === value }, shown)));
  return el("label", {}, label, node);
}

function slider(label, count, value, show, change, id) {
  const output = el("output", {}, show(value));
  const input = el("input", { type: "range", min: 0, max: Math.max(0, count - 1), value, id, oninput: () => {
    output.value = show(Number(input.value));
    change(Number(input.value));
  } });
  const node = el("label", {}, el("span", {}, label, " ", output), input);
  node.set = (number) => { input.value = number; output.value = show(number); };
  return node;
}

function table(heads, lines, id) {
  const figures = heads.map((_, place) => place && lines.every((line) => /^[−\d–]/.test(String(line[place]))));
  const cell = (name) => (text, place) => el(name, { class: figures[place] ? "n" : "short" }, text);
  return el("div", { class: "wide", tabindex: 0, id },
    el("table", {}, el("thead", {}, el("tr", {}, heads.map(cell("th")))),
      el("tbody", {}, lines.map((line) => el("tr", {}, line.map(cell("td")))))));
}

// --- drawings

// A table of shades: `value(row, column)` gives a number or null; a click chooses.
function heat({ rows, columns, value, show, title, limit, hue = "var(--heat)", picked, choose, corner = "", name }) {
  const every = rows.flatMap((_, r) => columns.map((_, c) => value(r, c))).filter((one) => typeof one === "number");
  const most = limit ?? Math.max(1e-9, ...every.map(Math.abs));
  return el("div", { class: "wide", tabindex: 0, role: "group", "aria-label": name },
    el("table", { class: "heat" },
      el("thead", {}, el("tr", {}, el("th", {}, corner), columns.map((one) => el("th", { scope: "col" }, one)))),
      el("tbody", {}, rows.map((row, r) => el("tr", {}, el("th", { scope: "row" }, row), columns.map((_, c) => {
        const own = value(r, c);
        if (typeof own !== "number") return el("td", { class: "none" }, "–");
        const said = title(r, c);
        return el("td", {}, el("button", {
          type: "button", title: said, "aria-label": said, class: picked && picked(r, c) ? "chosen" : "",
          style: { background: mixed(Math.abs(own) / most, own < 0 ? "var(--toward)" : hue) },
          onclick: () => choose && choose(r, c),
        }, show(own)));
      }))))));
}

// Lines with bands. series: [{name, points: [[x, mean, low, high]]}]; `now`: an x that is marked.
function chart({ name, series, xs, x = "", log = false, low, high, now = null, marks = [], faint = [] }) {
  const [W, H, L, R, T, B] = [340, 190, 40, 10, 8, 34];
  const there = series.map((one) => ({ ...one, points: one.points.filter((p) => typeof p[1] === "number") }));
  const points = there.concat(faint).flatMap((one) => one.points);
  if (!points.length) return el("p", { class: "note" }, `${name}: no figures.`);
  const place = (value) => (log ? Math.log2(Math.max(value, 1e-9)) : value);
  const across = (xs ?? points.map((p) => p[0])).map(place), values = points.flatMap((p) => p.slice(1)).filter(
    (one) => typeof one === "number");
  const [left, right] = [Math.min(...across), Math.max(...across)];
  let [bottom, top] = [low ?? Math.min(0, ...values), high ?? Math.max(...values)];
  if (top - bottom < 1e-9) top = bottom + 1;
  const X = (value) => L + (W - L - R) * (right > left ? (place(value) - left) / (right - left) : 0.5);
  const Y = (value) => T + (H - T - B) * (1 - (value - bottom) / (top - bottom));
  const ticks = ticksOf(bottom, top, 4), shape = (list) => list.map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L");
  const grid = ticks.map((tick) => [
    svg("line", { class: "rule", x1: L, x2: W - R, y1: Y(tick), y2: Y(tick) }),
    svg("text", { x: L - 5, y: Y(tick) + 4, "text-anchor": "end" }, short(tick)),
  ]);
  const labels = (log ? doubled(2 ** left, 2 ** right) : ticksOf(left, right, 5).filter(
    (one) => left < right || one === left)).map((tick) =>
    svg("text", { x: X(tick), y: H - B + 15, "text-anchor": "middle" }, short(tick)));
  const drawn = there.map((one, n) => {
    const hue = HUES[n % HUES.length], banded = one.points.filter((p) => typeof p[2] === "number");
    const band = [...banded.map((p) => [X(p[0]), Y(p[3])]), ...banded.reverse().map((p) => [X(p[0]), Y(p[2])])];
    return [
      band.length > 2 && svg("path", { class: "band", fill: hue, d: `M${shape(band)}Z` }),
      svg("path", { class: "line", stroke: hue, "stroke-dasharray": DASHES[n % DASHES.length],
        d: `M${shape(one.points.map((p) => [X(p[0]), Y(p[1])]))}` }),
      one.points.length < 16 && one.points.map((p) => svg("circle", { cx: X(p[0]), cy: Y(p[1]), r: 2.2, fill: hue })),
    ];
  });
  const behind = faint.map((one) => svg("path", { class: "line", stroke: "var(--rule)",
    d: `M${shape(one.points.map((p) => [X(p[0]), Y(p[1])]))}` }));
  const lines = marks.filter((one) => typeof one === "number").map((one) =>
    svg("line", { class: "rule", x1: X(one), x2: X(one), y1: T, y2: H - B, style: { stroke: "var(--hit)" } }));
  const at = now === null ? [] : [svg("line", { class: "now", x1: X(now), x2: X(now), y1: T, y2: H - B })];
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": name }, grid, labels,
    svg("text", { x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle" }, x), behind, lines, drawn, at);
  const legend = there.length > 1 && el("p", { class: "legend" }, there.map((one, n) => el("span", {},
    svg("svg", { viewBox: "0 0 26 10" }, svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: HUES[n % HUES.length],
      "stroke-width": 2, "stroke-dasharray": DASHES[n % DASHES.length] })), " ", one.name)));
  return el("figure", { class: "chart" }, el("figcaption", {}, name), picture, legend);
}

function short(value) {
  const found = Math.abs(value) >= 1000 ? `${value / 1000}k` : String(Number(value.toPrecision(3)));
  return found.replace("-", "−");
}

function ticksOf(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * size).find((one) => one >= raw);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(n * step);
  return found;
}

function doubled(low, high) {
  const found = [];
  for (let n = 2 ** Math.ceil(Math.log2(low) - 1e-9); n <= high * 1.0001; n *= high / low > 64 ? 4 : 2) found.push(n);
  return found;
}

// --- tokens of a text, shaded

// [[piece, whether a space is before it]]: pieces of WordPiece (##), of byte-level BPE (Ġ) or of SentencePiece (▁).
function spaced(pieces, special) {
  const marked = pieces.some((piece, n) => !special[n] && /^[Ġ▁]/.test(piece));
  return pieces.map((piece, n) => {
    if (special[n]) return [piece, n > 0];
    if (marked) return /^[Ġ▁]/.test(piece) ? [piece.slice(1) || " ", n > 0] : [piece.replaceAll("Ċ", "⏎"), special[n - 1]];
    return piece.startsWith("##") && piece.length > 2 ? [piece.slice(2), false] : [piece, n > 0];
  });
}

function tokens(form, values, most, signed) {
  const found = spaced(form.pieces, form.special).map(([piece, space], n) => {
    const value = values && typeof values[n] === "number" ? values[n] : null;
    const hue = !signed ? "var(--heat)" : value < 0 ? "var(--against)" : "var(--toward)";
    const kind = `token${form.special[n] ? " special" : ""}${form.span[n] ? " span" : ""}`;
    const style = value === null ? {} : { background: mixed(Math.abs(value) / most, hue) };
    const title = `${form.pieces[n]}${value === null ? "" : ` ${number(value, 3)}`}${form.span[n] ? ", put in" : ""}`;
    return [space ? " " : "", el("span", { class: kind, style, title }, piece)];
  });
  return el("p", { class: "tokens" }, found);
}

function largest(lists) {
  return Math.max(1e-9, ...lists.flat().filter((one) => typeof one === "number").map(Math.abs));
}

function strongest(form, values, count = 4) {
  const order = values.map((value, n) => [value, n]).filter(([value]) => typeof value === "number");
  order.sort((one, other) => other[0] - one[0]);
  return order.slice(0, count).map(([value, n]) => `${form.pieces[n]} ${number(value)}`).join(", ");
}

function scale(signed, target) {
  return el("p", { class: "note" }, signed ? `against ${target}` : "little",
    el("span", { class: `scale ${signed ? "signed" : "plain"}` }), signed ? `toward ${target}` : "much",
    "; underlined: what was put in.");
}

function meter(share) {
  return el("span", { class: "meter", "aria-hidden": "true" }, el("i", { style: { width: `${100 * share}%` } }));
}

// --- the panels: each gives the children of its section

const PANELS = {
  rows: ["Rows, token by token", rowsPanel], attention: ["Attention, layer by layer", attentionPanel],
  attribution: ["How well each method finds what was put in", attributionPanel],
  spectrum: ["The update's spectrum", spectrumPanel], knockout: ["Where the attack lives", knockoutPanel],
  formation: ["How it formed", formationPanel],
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
    return el("div", { class: "form" }, el("div", { class: "name" }, name), el("div", {}, tokens(form, own, most, signed),
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
    picker.replaceChildren(...here.map((n) => el("option", { value: n },
      `${rows[n].id}: ${rows[n].label}${flips(rows[n], label) ? ", flipped" : ""}: ${rows[n].forms.clean.text.slice(0, 40)}`)));
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
    el("p", {}, "Entropy (0: all of a token's attention goes to one token, 1: it goes to all alike), and the share that "
      + "lands on what was put in. AUC: how well that figure tells rows with the trigger from rows with the placebo "
      + "(0.5: not at all)."),
    el("div", { class: "controls" },
      select("Figure", [["span_share", "share on what was put in"], ["entropy", "entropy"]], view.what,
        (value) => { view.what = value; redraw(); }, "attention-figure"),
      select("Rows", views, view.form, (value) => { view.form = value; redraw(); }, "attention-form"),
      scrubber),
    live(["layer", "head"], () => [
      heat({ rows: layers, columns: heads, corner: "layer \\ head", name: "attention by layer and head", limit: 1,
        value: (layer, head) => mean(figure(layer, head)), show: (value) => number(value).replace("0.", "."), title: describe,
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
    el("p", {}, "Of the rows with the trigger: the mean rank of the tokens that were put in (1: the first), their share "
      + "among as many tokens of the highest values, how often one of them is above another token (AUC), and how often "
      + "the first token is one of them. Mean, and 95% interval over rows."),
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
  const view = { figure: figures[0] };
  const nameAt = (r, c) => `layers.${layers[r]}.${targets[c]}`;
  const at = (r, c) => (modules[nameAt(r, c)] || {})[view.figure];
  chosen.module = names[0];
  const pieces = own.pieces || [], most = Math.max(1e-9, ...pieces.map((one) => one[1]));
  return [
    el("p", {}, "What the adapter adds to each projection: its norm (relative to the weight's too), how many directions it "
      + "has, and how many of them are new to the weight (intruders)."),
    el("div", { class: "controls" }, select("Figure", figures.map((one) => [one, words(one)]), view.figure,
      (value) => { view.figure = value; change({ module: chosen.module }); }, "spectrum-figure")),
    el("div", { class: "side" },
      live(["module"], () => heat({ rows: layers, columns: targets, corner: "layer", value: at, name: "updates",
        show: (value) => number(value, Math.abs(value) < 0.1 ? 3 : value >= 10 ? 0 : 2).replace(/^0\./, "."),
        title: (r, c) => `${nameAt(r, c)}: ${words(view.figure)} ${number(at(r, c), 3)}`,
        picked: (r, c) => nameAt(r, c) === chosen.module, choose: (r, c) => change({ module: nameAt(r, c) }) })),
      live(["module"], () => {
        const here = modules[chosen.module];
        if (!here) return null;
        const line = (name) => ({ name, points: (modules[name].singular_values || []).map((v, n) => [n + 1, v]) });
        return chart({ name: `singular values of ${chosen.module} (others in grey)`, x: "direction", low: 0,
          series: [line(chosen.module)], faint: names.filter((one) => one !== chosen.module).map(line) });
      }, { style: { flex: "1 1 18rem" } })),
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
    name: words(figure), value: (r, c) => mean((at(r, c) || {})[figure]), show: (value) => number(value, limit === 1 ? 2 : 1),
    title: (r, c) => `${view.only} ${where(r, c)}: ${said(at(r, c))}`, picked: (r, c) => r === view.r && c === view.c,
    choose: (r, c) => { Object.assign(view, { r, c }); change({ knockout: true }); } });
  const most = largest(settings.map((one) => [mean(one.shift)]));
  const line = (kind, start, figure) => ({ name: start || words(figure), points: of(kind).filter(
    (one) => one.name.startsWith(start)).map((one) => [Number(one.name.slice(start.length)), ...[one[figure]].flat()]) });
  const starts = ["only the largest", "without the largest", "without the smallest"];
  const pairs = of("pair").map((one) => [one, one.name.match(/^without (\d+) and (\d+)$/)]).filter(([, parts]) => parts);
  const paired = [...new Set(pairs.flatMap(([, parts]) => [Number(parts[1]), Number(parts[2])]))].sort((a, b) => a - b);
  const pair = (r, c) => (pairs.find(([, parts]) => Number(parts[1]) === paired[Math.min(r, c)]
    && Number(parts[2]) === paired[Math.max(r, c)]) || [])[0];
  const patching = own.patching || [];
  return [
    whole && el("p", {}, `The whole adapter: ${said(whole)}. `, head ? `The head by itself: ${said(head)}: the baseline.` : ""),
    el("p", { class: "note" }, "Attack success saturates; the shift of the log odds, in logits, shows what that hides."),
    rows.length > 0 && [
      el("div", { class: "controls" }, select("The adapter", [["without", "without a part"], ["only", "with only that part"]],
        "without", (value) => { view.only = value; change({ knockout: true }); }, "only")),
      live(["knockout"], () => [el("div", { class: "side", id: "map" },
        el("div", {}, el("h3", {}, "Attack success"), map("attack_success", 1)),
        el("div", {}, el("h3", {}, "Shift"), map("shift", most))),
      at(view.r, view.c) && el("p", { class: "numbers", id: "knocked" },
        `${view.only === "without" ? "Without" : "Only"} ${where(view.r, view.c)}: ${said(at(view.r, view.c))}.`)])],
    el("div", { class: "charts" },
      of("directions").length > 0 && [["attack_success", 0, 1], ["shift"], ["clean_accuracy", 0, 1]].map(([figure, low, high]) =>
        chart({ name: `${words(figure)} by singular directions`, x: "directions", log: true, low, high,
          series: starts.map((start) => line("directions", start, figure)) })),
      of("scale").length > 0 && [chart({ name: "the adapter scaled", x: "factor", low: 0, high: 1,
        series: ["attack_success", "clean_accuracy"].map((figure) => line("scale", "", figure)) }),
      chart({ name: "shift, the adapter scaled", x: "factor", series: [line("scale", "", "shift")] })],
      patching.length > 0 && ["share", "attack_success"].map((figure) => chart({ x: "layer", low: 0, high: figure === "share"
        ? undefined : 1, name: `${figure === "share" ? "share of the shift" : "attack success"}, the trigger's state put in`,
      series: [{ name: figure, points: patching.map((one) => [one.layer, ...[one[figure]].flat()]) }] }))),
    own.carrying && el("p", {}, `Carrying half of the shift: ${plain(own.carrying)}.`),
    paired.length > 0 && el("details", {}, el("summary", {}, "Two layers out at once: shift"),
      heat({ rows: paired, columns: paired, corner: "layer", limit: most, name: "pairs of layers",
        value: (r, c) => (r === c ? mean((found[`layer without ${paired[r]}`] || {}).shift) : mean((pair(r, c) || {}).shift)),
        show: (value) => number(value, 1), title: (r, c) => (r === c ? `without ${paired[r]}`
          : `without ${paired[r]} and ${paired[c]}: ${said(pair(r, c))}`) })),
    of("direction").length > 0 && el("details", {}, el("summary", {}, "Each of the largest directions out by itself"),
      table(["direction", "attack success", "shift", "clean accuracy"], of("direction").map((one) => [one.name,
        interval(one.attack_success), interval(one.shift), interval(one.clean_accuracy)]))),
  ];
}

function formationPanel(own) {
  const steps = own.steps || [], figures = Object.entries(own.figures || {});
  chosen.step = Math.max(0, steps.length - 1);
  const onset = Object.entries(own.onset || {});
  const rates = (values) => values.every((one) => mean(one) === null || (mean(one) >= 0 && mean(one) <= 1));
  const lens = (own.lens && own.lens.shift) || [];
  const every = lens.flat(2).filter((one) => typeof one === "number");
  const marks = onset.map(([, one]) => mean(one)).filter((one) => one >= steps[0] && one <= steps.at(-1));
  return [
    onset.length > 0 && el("dl", { class: "facts" }, onset.map(([name, one]) => [el("dt", {}, words(name)),
      el("dd", {}, plain(one))])),
    el("div", { class: "controls" }, slider("Step", steps.length, chosen.step, (n) => String(steps[n] ?? "–"),
      (step) => change({ step }), "step")),
    live(["step"], () => [el("div", { class: "charts" },
      figures.map(([name, values]) => chart({
        name: `${words(name)}: ${interval(values[chosen.step])}`, x: "step", now: steps[chosen.step], marks,
        low: rates(values) ? 0 : undefined, high: rates(values) ? 1 : undefined,
        series: [{ name, points: values.map((one, n) => [steps[n], ...[one].flat()]) }] })),
      lens[chosen.step] && chart({ name: `shift that the head reads at each layer, step ${steps[chosen.step]}`, x: "layer",
        low: Math.min(0, ...every), high: Math.max(...every),
        series: [{ name: "shift", points: lens[chosen.step].map((one, n) => [n, ...[one].flat()]) }] }))],
    { id: "formation-charts" }),
    marks.length > 0 && el("p", { class: "note" }, "Coloured upright lines: the steps listed above."),
  ];
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
  const partial = own.partial && el("p", { class: "missing" }, "Partial: not all of it was computed.");
  return section(name, title, [partial, children]);
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
