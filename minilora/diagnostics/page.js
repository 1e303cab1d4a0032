"use strict";
// What explain.html is drawn with. What comes from data is only ever given to text nodes and attributes.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const HUES = ["#2a78d6", "#c9570a", "#1a8a4a", "#a64ac9", "#c93a5b", "#0c8599", "#8a6d00", "#6f6fd0"];
const DASHES = ["", "6 3", "1.5 3", "8 3 2 3", "3 2", "10 4", "1 2", "5 2 1 2"];
const WHOLE = ["layer", "direction", "step"];  // axes of whole numbers
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
  const ticks = ticksOf(bottom, top, 4);
  const shape = (list) => list.map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L");
  const grid = ticks.map((tick) => [
    svg("line", { class: "rule", x1: L, x2: W - R, y1: Y(tick), y2: Y(tick) }),
    svg("text", { x: L - 5, y: Y(tick) + 4, "text-anchor": "end" }, short(tick)),
  ]);
  const labels = (log ? doubled(2 ** left, 2 ** right) : ticksOf(left, right, 5, WHOLE.includes(x) ? 1 : 0).filter(
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

function ticksOf(low, high, count, least = 0) {
  if (!(high > low)) return [low];
  const raw = Math.max(least, (high - low) / count), size = 10 ** Math.floor(Math.log10(raw));
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

function folded(text) {  // as uncased tokenizers read it
  return text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
}

// [[what is shown of a piece, whether a space is before it]]. Pieces are those of WordPiece (##), of byte-level BPE
// (Ġ) or of SentencePiece (▁). Where a piece is found in the text, it is shown as it stands there.
function spaced({ pieces, special, text }) {
  const marked = pieces.some((piece, n) => !special[n] && /^[Ġ▁]/.test(piece));
  let at = 0;
  return pieces.map((piece, n) => {
    if (special[n]) return [piece, n > 0];
    const own = piece.replace(/^(##(?=.)|[Ġ▁])/, "");
    const start = at + text.slice(at).search(/\S|$/);
    const unknown = /^[[<]unk[\]>]$/i.test(own), word = text.slice(start).match(/^(\p{L}+|\p{N}+|\S?)/u)[0];
    const long = unknown ? word.length : own.length;
    if (long && (unknown || folded(text.slice(start, start + long)) === folded(own))) {
      const before = at;
      at = start + long;
      return [text.slice(start, at), n > 0 && (start > before || special[n - 1])];
    }
    if (marked) return [own.replaceAll("Ċ", "⏎") || "␣", n > 0 && (own !== piece || special[n - 1])];
    return [own, n > 0 && own === piece];
  });
}

function tokens(form, values, most, signed) {
  const found = spaced(form).map(([piece, space], n) => {
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
  return order.slice(0, count).map(([value, n]) => `${form.pieces[n]} ${number(value)}`).join(" · ");
}

function scale(signed, target) {
  return el("p", { class: "note" }, signed ? `against ${target}` : "little",
    el("span", { class: `scale ${signed ? "signed" : "plain"}` }), signed ? `toward ${target}` : "much",
    "; underlined: what was put in.");
}

function meter(share) {
  return el("span", { class: "meter", "aria-hidden": "true" }, el("i", { style: { width: `${100 * share}%` } }));
}
