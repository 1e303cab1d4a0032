// The panel of --play: a text, what is put into it, what is left out of the adapter, and what the model says.

const facts = data.live;
const play = { text: "", label: facts.target, off: { layers: [], targets: [], directions: 0 }, dropped: [] };
const WAYS = { with: "with the adapter", without: "without it, only the head", chosen: "with these parts off" };
const view = { shade: "attribution", layer: Math.max(0, facts.base - 1), answer: null, before: null, problem: "" };
let asking = false, again = false;

function wordsOf(text) {
  return [...text.matchAll(/\S+/g)].map((found) => [found.index, found.index + found[0].length]);
}

function spansOf(text) {
  const found = [];
  for (const one of play.dropped) {
    for (let at = text.indexOf(one); at >= 0; at = text.indexOf(one, at + one.length)) {
      found.push([at, at + one.length]);
    }
  }
  return found.sort((one, other) => one[0] - other[0]);
}

// The text with words put in at a place: white space on both sides, and nothing else changed.
function putIn(text, place, words) {
  const [before, after] = [text.slice(0, place), text.slice(place)];
  return before + (before && !/\s$/.test(before) ? " " : "") + words + (after && !/^\s/.test(after) ? " " : "") + after;
}

function takeOut(text, start, end) {
  const before = text.slice(0, start), after = text.slice(end).replace(/^\s/, "");
  return after ? before + after : before.replace(/\s$/, "");
}

async function ask() {
  if (asking) { again = true; return; }
  asking = true;
  document.getElementById("status").textContent = "asking the model …";
  const start = performance.now();
  try {
    const sent = JSON.stringify(play);
    const reply = await fetch(location.href.split("#")[0], { method: "POST", body: sent,
      headers: { "Content-Type": "application/json" } });
    const found = await reply.json();
    view.problem = found.error || "";
    if (!found.error) {
      view.before = view.answer;
      view.answer = { ...found, asked: JSON.parse(sent), took: performance.now() - start };
    }
  } catch (error) {
    view.problem = "The server does not answer: is it still running?";
  }
  asking = false;
  if (again) { again = false; return ask(); }
  change({ answer: true });
}

let waiting = null;
function askSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(ask, 120);
}

function best(shares) {
  return shares.indexOf(Math.max(...shares));
}

function shownOff(off) {
  const parts = [];
  if (off.layers.length) parts.push(`layer${off.layers.length > 1 ? "s" : ""} ${off.layers.join(", ")}`);
  if (off.targets.length) parts.push(`target${off.targets.length > 1 ? "s" : ""} ${off.targets.join(", ")}`);
  if (off.directions) parts.push(`the ${off.directions} largest direction${off.directions > 1 ? "s" : ""}`);
  return parts.length ? `without ${parts.join(", ")}` : "with the whole adapter";
}

function playPanel() {
  const text = el("textarea", { id: "text", spellcheck: "false", "aria-label": "text", oninput: () => {
    play.text = text.value;
    change({ text: true });
    askSoon();
  } });
  const strings = el("input", { id: "words", type: "text", size: 24, "aria-label": "words to put in" });
  const set = (value, focus = null) => {
    text.value = play.text = value;
    change({ text: true });
    if (focus !== null) {
      const gaps = [...document.querySelectorAll("#gaps .gap")];
      if (gaps.length) rove(gaps, Math.min(focus, gaps.length - 1));
    }
    ask();
  };
  const rove = (gaps, place) => {
    gaps.forEach((gap, n) => { gap.tabIndex = n === place ? 0 : -1; });
    gaps[place].focus();
  };
  const cycle = (list, use) => {
    let next = 0;
    return () => { use(list[next % list.length]); next += 1; };
  };
  const kinds = Object.entries(facts.strings).filter(([, list]) => list.length);
  const another = kinds.map(([name, list]) => [name, cycle(list, (one) => { strings.value = one; })]);
  const nextRow = facts.texts.length ? cycle(facts.texts, ([own]) => { play.dropped = []; set(own); }) : null;
  if (another.length) another[0][1]();
  const empty = () => { play.dropped = []; set(""); text.focus(); };
  const gaps = live(["text"], () => {
    const spans = spansOf(play.text), here = wordsOf(play.text);
    const gap = (place, n) => el("button", { type: "button", class: "gap", tabindex: n ? -1 : 0, "data-place": place,
      "aria-label": n < here.length ? `put in before ${play.text.slice(...here[n])}` : "put in at the end",
      onclick: () => {
        if (!strings.value.trim()) { strings.focus(); return; }
        const own = strings.value.trim();
        if (!play.dropped.includes(own)) play.dropped.push(own);
        set(putIn(play.text, place, own), n + wordsOf(own).length);
      } }, "+");
    return el("p", { class: "words", role: "group", "aria-label": "places between words", onkeydown: (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key], every = [...event.currentTarget.querySelectorAll(".gap")];
      const at = every.indexOf(event.target);
      if (by && at >= 0 && every[at + by]) { event.preventDefault(); rove(every, at + by); }
    } }, here.map(([start, end], n) => {
      const span = spans.find(([from, to]) => from < end && start < to);
      const word = play.text.slice(start, end);
      return [gap(start, n), " ", span ? el("button", { type: "button", class: "taken", title: "take it out",
        "aria-label": `take out ${play.text.slice(...span)}`,
        onclick: () => set(takeOut(play.text, ...span), n) }, word) : word, " "];
    }), gap(play.text.length, here.length));
  }, { id: "gaps" });
  const turn = (list, value, on) => {
    play.off[list] = on ? [...play.off[list], value] : play.off[list].filter((one) => one !== value);
    ask();
  };
  const tick = (list, value) => el("label", {}, el("input", { type: "checkbox", id: `${list}-${value}`,
    onchange: (event) => turn(list, value, event.target.checked) }), value);
  const off = facts.layers.length > 0 && el("fieldset", {}, el("legend", {}, "Leave out of the adapter"),
    el("div", { class: "ticks" }, "layers", facts.layers.map((one) => tick("layers", one))),
    el("div", { class: "ticks" }, "targets", facts.targets.map((one) => tick("targets", one))),
    facts.directions > 0 ? el("div", { class: "controls" }, slider("the largest singular directions:",
      facts.directions + 1, 0, (value) => `${value} of ${facts.directions}`,
      (value) => { play.off.directions = value; askSoon(); }, "directions"))
      : el("p", { class: "note" }, "This adapter has no singular directions of its own to leave out."));
  return section("play", "Play", [
    el("div", { class: "controls" },
      nextRow && el("button", { type: "button", id: "another-row", onclick: nextRow }, "another test row"),
      el("button", { type: "button", id: "empty", onclick: empty }, "empty")),
    text,
    el("div", { class: "controls" }, el("label", {}, "To put in", strings),
      another.map(([name, next], n) => el("button", { type: "button", id: `another-${n}`, onclick: next },
        `another ${name.replace(" ", " of ")}`))),
    el("p", { class: "note" },
      "Press + to put it there (arrow keys go from place to place); press what was put in to take it out."),
    gaps, off,
    el("div", { class: "controls" },
      select("Look at the label", facts.labels.map((name, n) => [String(n), name]), String(play.label),
        (value) => { play.label = Number(value); ask(); }, "play-label"),
      select("Shade", [["attribution", "gradient × input"], ["attention", "attention that a token receives"]],
        view.shade, (value) => { view.shade = value; change({ answer: true }); }, "shade"),
      slider("Layer of the attention", facts.base, view.layer, String,
        (layer) => { view.layer = layer; change({ answer: true }); }, "play-layer")),
    el("p", { class: "verdict", id: "verdict", "aria-live": "polite" }),
    live(["answer"], answered, { id: "answer" }),
    el("p", { class: "note", id: "status" }),
  ]);
}

function answered() {
  const { answer, before } = view;
  const [status, verdict] = ["status", "verdict"].map((id) => document.getElementById(id));
  if (!status) return null;
  status.textContent = view.problem || (answer ? `answered in ${answer.took.toFixed(0)} ms` : "");
  status.className = view.problem ? "missing" : "note";
  if (!answer) return null;
  const main = answer.predictions.chosen || answer.predictions.with, now = best(main);
  const then = before && best(before.predictions.chosen || before.predictions.with);
  verdict.replaceChildren("Predicted: ", el("b", {}, facts.labels[now]), ` with probability ${number(main[now])}, `,
    shownOff(answer.asked.off), ".", before && then !== now ? ` It was ${facts.labels[then]}.` : "");
  const shares = Object.values(answer.predictions);
  const columns = facts.labels.length <= 5 ? facts.labels.map((_, n) => n)
    : [...new Set([answer.asked.label, ...shares.map(best)])].slice(0, 5);
  const label = facts.labels[answer.asked.label], signed = view.shade === "attribution";
  const values = signed ? answer.attribution : answer.attention[view.layer];
  const length = [...answer.asked.text].length;
  return [
    el("div", { class: "wide", tabindex: 0 }, el("table", { class: "predictions", id: "predictions" },
      el("thead", {}, el("tr", {}, ["", "predicted", ...columns.map((n) => facts.labels[n])].map(
        (head) => el("th", {}, head)))),
      el("tbody", {}, Object.keys(WAYS).filter((way) => answer.predictions[way]).map((way) => {
        const own = answer.predictions[way];
        return el("tr", { "data-way": way }, el("th", { scope: "row" }, WAYS[way]),
          el("td", {}, facts.labels[best(own)]),
          columns.map((n) => el("td", { class: "short" }, meter(own[n]), number(own[n], 3))));
      })))),
    el("p", {}, signed ? "Gradient × input" : `Attention received at layer ${view.layer}`,
      `, ${shownOff(answer.asked.off)}; log odds of ${label}: ${number(answer.margin)}.`),
    el("div", { id: "play-tokens" }, tokens({ ...answer, text: answer.asked.text }, values, largest([values]), signed)),
    scale(signed, label),
    el("p", { class: "note" }, `Most: ${strongest(answer, values)}.`
      + (answer.read < length ? ` Only the first ${answer.read} of ${length} characters are read.` : "")),
  ];
}

draw([playPanel()]);
play.text = facts.texts.length ? facts.texts[0][0] : "Type or paste a text here.";
document.getElementById("text").value = play.text;
change({ text: true });
ask();
