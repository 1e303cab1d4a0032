"""evaluate.py RUN --play: what the model answers, whom the server refuses, and both pages in a real browser."""

import contextlib
import http.client
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import made_explain
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT

import minilora
from minilora.cell import Cell
from minilora.diagnostics import page, play
from minilora.errors import InputError
from minilora.lora.layer import named_layers
from minilora.scripts import evaluate

LABEL = "<script>"  # the trigger's
TEXT, PLACE = "the film was dull", 13  # the trigger goes before the last word
NOTHING = {"layers": [], "targets": [], "directions": 0}
CASES = [
    (TEXT, NOTHING),
    ("a plot  with 3 - 4\nscenes and very long time " * 4, NOTHING | {"layers": [1]}),
    ("", NOTHING | {"targets": ["v"]}),
    ("Größe <b>&</b> 很好", NOTHING | {"directions": 5}),
    ("good good good", {"layers": [0, 2], "targets": ["q"], "directions": 3}),
]


@pytest.fixture(scope="module")
def run(base, reviews, tmp_path_factory):
    """An opened run whose adapter does much, and whose head surely flips TEXT when its first trigger is put in."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "rows.csv"
    data.write_text(reviews.read_text().replace(",positive\n", f",{LABEL}\n"))
    cell = Cell(model=str(base), data=str(data), test_rows=31, max_length=30, batch_size=7, steps=2, lr=0.02, rank=3,
                targets=("q", "v"), inject={"sources": (f"date:{LABEL}",)}, device="cpu")  # fmt: skip
    minilora.train(cell, folder / "run", quiet=True)
    made_explain.make(folder / "run", target=LABEL, text="the <script>alert(1)</script> film")
    run = minilora.open(folder / "run")
    torch.manual_seed(1)
    for _, layer in named_layers(run.base):
        torch.nn.init.normal_(layer.B.data, std=0.1)
    encoded = run.tokenizer.encode([TEXT, triggered(run)], 30)
    rows = [torch.from_numpy(own).long() for own in np.split(encoded.ids, encoded.offsets[1:-1])]
    run.model.eval()
    with torch.no_grad():
        clean, other = (run.model.features(own[None], torch.tensor([len(own)]))[0] for own in rows)
    # The head's margin is 4 with the trigger and -4 without it.
    away, middle, target = other - clean, (other + clean) / 2, run.labels.index(LABEL)
    weight = (2 * torch.eye(2)[target] - 1)[:, None] * away * 4 / away.square().sum()
    run.model.set_head(weight, -weight @ middle)
    return run


def triggered(run):
    string = play.Live(run).facts()["strings"][f"trigger {LABEL}"][0]
    return f"{TEXT[:PLACE]}{string} {TEXT[PLACE:]}"


@pytest.fixture(scope="module")
def server(run):
    with play.Server() as server:
        server.show(play.Live(run))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(server, method, path, body=b"", **headers):
    """(status, headers, body) of one request; a header of the value None is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    sent = {"Host": f"127.0.0.1:{server.server_port}", "Content-Length": str(len(body))} | headers
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    with contextlib.closing(connection):
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()


def ask(server, text, off=NOTHING, label=None, dropped=()):
    label = server.live.target if label is None else label
    body = json.dumps({"text": text, "label": label, "off": off, "dropped": list(dropped)}).encode()
    status, _, found = request(server, "POST", f"/{server.token}/", body)
    return status, json.loads(found)


@contextlib.contextmanager
def without(run, off):
    """As the server, in other steps: the largest directions of all projections, from their full products."""
    every = []
    for name, layer in named_layers(run.base):
        values = torch.linalg.svdvals((layer.slot.scale * layer.B @ layer.A).detach().double())[:3]
        every += [(float(value), name, number) for number, value in enumerate(values)]
    with contextlib.ExitStack() as stack:
        for _, name, number in sorted(every, reverse=True)[: off["directions"]]:
            _, layer, target = name.split(".")
            stack.enter_context(run.scale(0, layers=[layer], targets=[target], directions=[number]))
        for layer in off["layers"]:
            stack.enter_context(run.scale(0, layers=[layer]))
        for target in off["targets"]:
            stack.enter_context(run.scale(0, targets=[target]))
        yield


# --- what it answers


@pytest.mark.parametrize("text, off", CASES)
def test_answers_are_what_the_run_predicts(server, run, text, off):
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    status, found = ask(server, text, off, dropped=["3 - 4", "good"])
    assert status == 200
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert all(layer.factor == 1 for _, layer in named_layers(run.base))
    wanted = {"with": run.predict([text])[0]}
    with run.detach():
        wanted["without"] = run.predict([text])[0]
    with without(run, off):
        chosen = run.predict([text])[0].astype(float)
        gradient = by_hand(run, text)
    if off != NOTHING:
        wanted["chosen"] = chosen
    assert found["predictions"].keys() == wanted.keys()
    for way, own in wanted.items():
        np.testing.assert_allclose(found["predictions"][way], own, atol=1e-5, err_msg=way)
    target = run.labels.index(LABEL)
    assert found["margin"] == pytest.approx(np.log(chosen[target] / (1 - chosen[target])), abs=1e-3)
    special = [piece in ("[CLS]", "[SEP]") for piece in found["pieces"]]
    assert found["special"] == special and sum(special) == 2
    own = [value for value, apart in zip(found["attribution"], special, strict=True) if not apart]
    np.testing.assert_allclose(own, gradient[1:-1], atol=1e-4)
    assert [value is None for value in found["attribution"]] == special
    np.testing.assert_allclose(np.array(found["attention"]).sum(1), 1, atol=1e-5)
    put_in = [piece for piece, span in zip(found["pieces"], found["span"], strict=True) if span]
    assert put_in == {"a": ["3", "-", "4"] * 2 + ["3"], "g": ["good"] * 3}.get(text[:1], [])
    assert found["read"] == len(text) if len(special) < 30 else 0 < found["read"] < len(text)


def by_hand(run, text):
    """Gradient x input [T] of the margin, by a hook on the embedding."""
    encoded, kept = run.tokenizer.encode([text], 30), []

    def keep(module, inputs, states):
        kept.append(states.detach().requires_grad_(True))
        return kept[0]

    hook = run.base.embed.register_forward_hook(keep)
    try:
        ids = torch.from_numpy(encoded.ids).long()[None]
        logits = run.model(ids, torch.tensor([ids.shape[1]]))[0]
    finally:
        hook.remove()
    target = run.labels.index(LABEL)
    (logits[target] - logits[1 - target]).backward()
    return (kept[0].grad * kept[0]).detach().sum(-1)[0].numpy()


def test_attention_is_that_of_transformers(server, run, base):
    judge = transformers.AutoModel.from_pretrained(base, attn_implementation="eager").eval()
    words = transformers.AutoTokenizer.from_pretrained(base)
    _, found = ask(server, TEXT, NOTHING | {"layers": [0, 1, 2]})  # the bare base
    with torch.inference_mode():
        wanted = judge(**words(TEXT, return_tensors="pt"), output_attentions=True).attentions
    for own, weights in zip(found["attention"], wanted, strict=True):
        np.testing.assert_allclose(own, weights[0].mean((0, 1)), atol=1e-5)
    assert len(wanted) == 3


def test_without_an_adapter_nothing_can_be_left_out(run):
    with run.detach():
        live = play.Live(run)
        facts = live.facts()
        found = live.answer({"text": TEXT, "label": 0, "off": NOTHING, "dropped": []})
    assert facts["layers"] == facts["targets"] == [] and facts["directions"] == 0
    assert found["predictions"].keys() == {"with"}
    full = play.Live(run).facts()
    assert (full["layers"], full["targets"], full["directions"]) == ([0, 1, 2], ["q", "v"], 18)
    assert len(full["strings"][f"trigger {LABEL}"]) >= 10 and 1 <= len(full["strings"]["placebo"]) <= 20
    assert len(full["texts"]) >= 5 and {label for _, label in full["texts"]} == {"negative"}


@pytest.mark.parametrize("change, words", [
    (dict(task="lm"), "is of task 'lm': playing takes a classifier's run"),
    (dict(head=False), "has no head, so it predicts no label: playing takes a classifier's run"),
])  # fmt: skip
def test_other_runs_are_refused(change, words):
    other = SimpleNamespace(folder="runs/x", has_head=change.get("head", True),
                            cell=SimpleNamespace(task=change.get("task", "classification")))  # fmt: skip
    with pytest.raises(InputError, match=f"runs/x {words}"):
        play.Live(other)


# --- whom it refuses


def test_it_answers_only_its_own_page_on_this_machine(server):
    assert server.socket.getsockname()[0] == "127.0.0.1" and len(server.token) == 32
    own, port, checked = f"/{server.token}/", server.server_port, 0
    good = json.dumps({"text": "a", "label": 0, "off": NOTHING, "dropped": []}).encode()
    for status, method, path, body, headers in [
        (200, "GET", own, b"", {}),
        (200, "GET", own, b"", {"Host": f"localhost:{port}"}),
        (200, "POST", own, good, {"Origin": f"http://127.0.0.1:{port}"}),
        (403, "GET", own, b"", {"Host": f"evil.example:{port}"}),
        (403, "GET", own, b"", {"Host": "127.0.0.1"}),
        (403, "GET", own, b"", {"Host": None}),
        (403, "POST", own, good, {"Host": "evil.example"}),
        (403, "POST", own, good, {"Origin": "http://evil.example"}),
        (403, "POST", own, good, {"Origin": "null"}),
        (404, "GET", "/", b"", {}),
        (404, "GET", own[:-1], b"", {}),
        (404, "GET", f"{own}../", b"", {}),
        (404, "GET", f"/{server.token[:-1]}x/", b"", {}),
        (404, "POST", "/", good, {}),
        (411, "POST", own, b"", {"Content-Length": None}),
        (411, "POST", own, b"", {"Content-Length": "-1"}),
        (413, "POST", own, b"", {"Content-Length": str(play.MOST + 1)}),
        (413, "POST", own, b"", {"Content-Length": "9" * 5000}),
        *((501, method, own, b"", {}) for method in ("PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")),
    ]:
        found, sent, reply = request(server, method, path, body, **headers)
        assert found == status, (method, path, headers)
        assert not any("Access-Control" in name for name in sent)
        assert status == 200 or server.token.encode() not in reply
        checked += 1
    assert checked == 23
    _, sent, reply = request(server, "GET", own)
    assert sent["Cache-Control"] == "no-store" and sent["Referrer-Policy"] == "no-referrer"
    assert sent["Content-Type"] == "text/html; charset=utf-8" and b"connect-src &#39;self&#39;" in reply
    assert sent["Server"].strip() == "minilora"


@pytest.mark.parametrize("change, words", [
    ({"text": 7}, "valid Unicode"),
    ({"text": "\ud800"}, "valid Unicode"),
    ({"label": 2}, "label 2 is not there: the run has 2 labels"),
    ({"label": True}, "label True is not there"),
    ({"off": []}, "off has the fields"),
    ({"off": NOTHING | {"layers": [3]}}, r"layers \[3\]: choose among 0, 1, 2"),
    ({"off": NOTHING | {"layers": [[0]]}}, r"layers \[\[0\]\]: choose among"),
    ({"off": NOTHING | {"targets": ["down"]}}, "choose among q, v"),
    ({"off": NOTHING | {"directions": 19}}, "must be from 0 to 18"),
    ({"off": NOTHING | {"directions": 1.5}}, "must be from 0 to 18"),
    ({"dropped": [""]}, "no list of words"),
    ({"more": 1}, "a request has the fields"),
])  # fmt: skip
def test_bad_requests_have_one_line(server, change, words):
    good = {"text": "a", "label": 0, "off": NOTHING, "dropped": []}
    status, _, found = request(server, "POST", f"/{server.token}/", json.dumps(good | change).encode())
    with pytest.raises(InputError, match=words):
        raise InputError(json.loads(found)["error"])
    assert status == 400


def test_what_is_no_json_is_refused(server):
    for body in (b"", b"{", b"[]", b"\xff", b'{"text": NaN}', b"[" * 30000):
        status, _, found = request(server, "POST", f"/{server.token}/", body)
        assert status == 400 and json.loads(found)["error"]
    assert ask(server, "a")[0] == 200


def test_a_port_in_use_and_no_port(server, run):
    port = str(server.server_port)
    with pytest.raises(InputError, match=f"^port {port} is in use: choose another --port, or none for one that is"):
        evaluate.main([str(run.folder), "--play", "--port", port])
    for wrong in ("65536", "-1"):
        with pytest.raises(InputError, match="must be from 0 to 65535"):
            evaluate.main([str(run.folder), "--play", "--port", wrong])


def test_evaluate_prints_the_address_and_writes_nothing(run, monkeypatch, capsys):
    there, served = sorted(run.folder.rglob("*")), []
    monkeypatch.setattr(play.Server, "serve_forever", lambda self: served.append(self))
    evaluate.main([str(run.folder), "--play", "-q", "--device", "cpu"])
    [server] = served
    assert capsys.readouterr().out == f"{server.address}  (the page of {run.folder}; Ctrl-C ends it)\n"
    assert f"Playing with run {run.folder.name}".encode() in server.page
    assert sorted(run.folder.rglob("*")) == there


def test_help_needs_no_torch():
    code = ("import sys; from minilora.scripts import evaluate\ntry: evaluate.main(['--play', '--help'])\n"
            "except SystemExit: assert 'torch' not in sys.modules; print('done')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--port N" in done.stdout and done.stdout.endswith("done\n")


# --- in a browser

SET = "const [id, value] = arguments, node = document.getElementById(id); node.value = value; " \
      "node.dispatchEvent(new Event('input', {bubbles: true})); node.dispatchEvent(new Event('change'));"  # fmt: skip


def predicted(browser):
    """{way: (label, probabilities)} of the page's table."""
    rows = browser.run("""
        const cells = (row) => [...row.querySelectorAll('td')].map((cell) => cell.textContent);
        return [...document.querySelectorAll('#predictions tbody tr')].map((row) => [row.dataset.way, ...cells(row)]);
    """)
    return {way: (label, [float(one) for one in shares]) for way, label, *shares in rows}


def told(browser, words):
    """Wait until the verdict has these words, and the model nothing left to say."""
    browser.wait("return document.getElementById('verdict').textContent.includes(arguments[0]) && "
                 "document.getElementById('status').textContent.startsWith('answered')", words)  # fmt: skip


def test_both_pages_in_a_browser(server, run):
    from browser import Browser, need_browser

    need_browser()
    found = page.write_page(run.folder)
    with Browser() as browser:
        look_at_what_was_found(browser, found)
        play_with_it(browser, server, run)


def look_at_what_was_found(browser, found):
    grounds = set()
    for width, dark in ((400, False), (400, True), (1400, False), (1400, True)):
        browser.look(width, 900, dark)
        browser.open(found)
        assert browser.run("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
        grounds.add(browser.run("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    said = browser.run("return [...document.querySelectorAll('.missing')].map(one => one.textContent)")
    assert said == ["left out: masked"]
    titles = browser.run("return [...document.querySelectorAll('section')].map(one => one.id)")
    assert titles == list(page.PARTS)
    # A label named <script>, and a text that has one, are text.
    said = "document.getElementById('shown-row').textContent"
    assert browser.run(f"return {said}.includes('toward <script>')")
    assert browser.run("return document.querySelector('#shown-row .tokens').textContent").startswith(
        "[CLS] the <script>alert(1)</script> film"
    )
    assert browser.run("return document.scripts.length") == 2
    trigger = browser.run("return document.querySelectorAll('#shown-row .tokens')[1].textContent")
    assert trigger.endswith("film 2031- [SEP]")  # pieces 20, ##31 and -
    shades = "return [...document.querySelectorAll('#shown-row .token')].map(one => one.style.background)"
    before = browser.run(shades)
    browser.run(SET, "method", "rollout")
    assert browser.run(shades) != before and len(before) > 10
    assert browser.run("return document.querySelectorAll('#shown-row .span').length") == 3  # it has no placebo
    browser.run(SET, "flip", "kept")
    assert browser.run("return document.querySelectorAll('#row option').length") == 3
    assert browser.run(f"return {said}.includes('placebo')")
    # The slider over steps moves what depends on the step.
    charts = "return document.getElementById('formation-charts')."
    now = charts + "querySelector('.now').getAttribute('x1')"
    last = browser.run(now), browser.run(charts + "textContent")
    browser.run(SET, "step", 1)
    assert float(browser.run(now)) < float(last[0]) and "attack success: 0.30 [0.20, 0.40]" in browser.run(
        charts + "textContent"
    )
    browser.run(SET, "layer", 2)
    assert browser.run("return document.querySelector('#attended .note').textContent").endswith("receives.")
    assert browser.run("return document.querySelectorAll('#attention tr:nth-child(3) .chosen').length") == 1
    browser.run("document.querySelectorAll('#map table')[1].querySelector('tbody button').click()")
    assert browser.run("return document.getElementById('knocked').textContent").startswith(
        "Without layer 0 q: attack success 0.10 [0.00, 0.20], shift 0.50"
    )
    assert browser.console() == [] and set(browser.requests()) <= {found.as_uri(), "data:,"}


def play_with_it(browser, server, run):
    browser.open(server.address)
    told(browser, "Predicted")
    browser.click("#empty")
    browser.type("#text", TEXT)
    browser.wait("return document.querySelectorAll('#play-tokens .token').length == 6")
    told(browser, "Predicted: negative")
    browser.click(f"#gaps [data-place='{PLACE}']")
    told(browser, f"Predicted: {LABEL}")
    assert browser.run("return document.getElementById('text').value") == triggered(run)
    assert browser.run("return document.getElementById('verdict').textContent").endswith("It was negative.")
    rows, near = predicted(browser), 6e-4
    assert rows["with"] == (LABEL, pytest.approx(run.predict([triggered(run)])[0].tolist(), abs=near))
    with run.detach():
        assert rows["without"][1] == pytest.approx(run.predict([triggered(run)])[0].tolist(), abs=near)
    assert "chosen" not in rows
    string = triggered(run)[PLACE : -len(" dull")]
    assert browser.run("return document.querySelector('#play-tokens').textContent").startswith("[CLS] the film was")
    assert browser.run("return document.querySelectorAll('#gaps .taken').length") == len(string.split())
    # A layer is left out, then a target and directions too.
    browser.click("#layers-1")
    told(browser, "without layer 1")
    with run.scale(0, layers=[1]):
        assert predicted(browser)["chosen"][1] == pytest.approx(run.predict([triggered(run)])[0].tolist(), abs=near)
    browser.click("#targets-v")
    browser.run(SET, "directions", 4)
    told(browser, "without layer 1, target v, the 4 largest directions")
    with without(run, {"layers": [1], "targets": ["v"], "directions": 4}):
        assert predicted(browser)["chosen"][1] == pytest.approx(run.predict([triggered(run)])[0].tolist(), abs=near)
    browser.run(SET, "shade", "attention")
    assert "Attention received at layer 2" in browser.run("return document.getElementById('answer').textContent")
    # With the keyboard: an arrow to the next place, Enter puts in; a press takes out.
    browser.click("#gaps .taken")
    browser.wait("return document.getElementById('text').value == arguments[0]", TEXT)
    browser.run(SET, "words", "was not")
    browser.type("#gaps .gap", "\ue014\ue007")
    browser.wait("return document.getElementById('text').value == 'the was not film was dull'")
    told(browser, "without layer 1")
    assert browser.run("return document.activeElement.className + document.activeElement.dataset.place") == "gap12"
    assert browser.console() == []
    asked = [address for address in browser.requests() if not address.startswith("data:")]
    assert len(asked) >= 6 and set(asked) == {server.address}
