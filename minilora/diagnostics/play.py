"""python evaluate.py RUN --play: the page of `page.py` with the live model behind it, for this machine's user only.

Type a text, put the trigger anywhere into it, leave parts of the adapter out: the page asks the server after each
change, and shows what is predicted, and what that rests on.

The server listens on 127.0.0.1. It answers only at an address with a random token, which other users of the machine do
not know, and only where Host and Origin are its own: a page from elsewhere that had its name point here (DNS rebinding)
gets nothing. Requests are limited in size, and nothing is written.
"""

import contextlib
import errno
import json
import secrets
import socketserver
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import minilora
from minilora import files
from minilora.cell import Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.console import quiet
from minilora.errors import InputError, shown, to_type
from minilora.fields import marked

LOOPBACK = "127.0.0.1"
MOST = 1 << 16  # bytes of a request
WAIT = 10  # seconds for the bytes of a request
PUT_IN = 100  # different words of a text that are marked as put in
DRAWN = 20  # triggers, placebos and rows that the page offers
DIGITS = 9  # of each number of an answer
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page's own policy has the rest
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def main(argv):
    """evaluate.py RUN --play"""
    about = "Look at a finished run, and play with it: a page in the browser, with the live model behind it."
    parser = Parser(prog=to_type("evaluate"), description=about)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, or of a PEFT adapter (with its --model)")
    parser.add_argument("--play", action="store_true", required=True, help="serve the page on this machine")
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="of the page's address (default: one that is free)"
    )
    parser.add_argument("--data", dest="rows", metavar="FILE", help="other test rows: a file (default: the run's own)")
    parser.add_argument(
        "--seed", dest="draw", type=int, default=0, metavar="N", help="of the triggers that are drawn (default: 0)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the address: no progress")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(parser, Cell, only=marked(Cell, "test"), default="the run's")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.port < 1 << 16:
        raise InputError(f"--port is {arguments.port}, but must be from 0 to 65535 (0: one that is free)")
    with Server(arguments.port) as server:  # before the model is read: a port in use is known at once
        with quiet(arguments.quiet):
            run = minilora.open(arguments.run, data=arguments.rows, **given_flags(arguments, Cell))
            server.show(Live(run, arguments.draw))
        print(f"{server.address}  (the page of {run.folder}; Ctrl-C ends it)", flush=True)
        server.serve_forever()


class Live:
    """What the page may ask of an opened run of task classification. Raises InputError for another one.

    `seed` is that of the triggers and placebos which `facts` offers.
    """

    def __init__(self, run, seed=0):
        if run.cell.task != "classification" or not run.has_head:
            why = f"is of task {run.cell.task!r}" if run.has_head else "has no head, so it predicts no label"
            raise InputError(f"{run.folder} {why}: playing takes a classifier's run")
        from minilora.lora.layer import named_layers

        self.run, self.seed = run, seed
        names = [name.split(".") for name in dict(named_layers(run.base))]
        self.layers = sorted({int(name[1]) for name in names})
        self.targets = list(dict.fromkeys(name[2] for name in names))
        self.directions = directions_of(run)
        self.drawn = run.tests_of(["a"] * DRAWN, seed)[1:]
        aims = [test.label for test in self.drawn if test.name == "trigger"]
        self.target = run.labels.index(aims[0]) if aims else len(run.labels) - 1

    # --- what the page begins with

    def facts(self):
        """What the page offers, as plain data: labels, parts of the adapter, and texts and words to begin with."""
        run = self.run
        strings = {test.key: list(dict.fromkeys(own.strings[0] for own in test.records if own.strings))
                   for test in self.drawn}  # fmt: skip
        return {"labels": list(run.labels), "target": self.target, "layers": self.layers, "targets": self.targets,
                "directions": len(self.directions), "strings": strings, "texts": self.examples(),
                "seed": self.seed, "base": len(run.base.layers)}  # fmt: skip

    def examples(self):
        """Up to `DRAWN` short test rows, [(text, label)], those of other labels than the target."""
        try:
            rows = self.run.tests[0].rows
        except InputError:  # an adapter from elsewhere, without rows
            return []
        found = [(text, rows.label_names[label]) for text, label in zip(rows.texts, rows.labels, strict=True)
                 if label != self.target and 0 < len(text) <= 200]  # fmt: skip
        return found[:DRAWN]

    # --- what it asks for

    def answer(self, asked):
        """What the page shows of a text.

        asked  {"text", "label": the number of the label that is looked at, "off": {"layers": numbers, "targets": names,
               "directions": how many of the largest}, "dropped": words that were put in}

        {"predictions": {"with", "without" (the adapter), and where something is off "chosen": probabilities [C]},
        "pieces", "special", "span": of each token, "margin": log odds of the label, "attribution": gradient x input,
        of each token, "attention": [layers][tokens], what each token receives, "read": characters}; the last five are
        with what is off. Raises InputError for anything else.
        """
        text, label, off, dropped = self.checked(asked)
        given = self.tokens_of(text)
        predictions = {"with": self.run.predict([text])[0]}
        if self.layers:
            with self.run.detach():
                predictions["without"] = self.run.predict([text])[0]
        with self.left_out(off):
            if any(off.values()):
                predictions["chosen"] = self.run.predict([text])[0]
            found = self.looked_at(given["ids"], label)
        predictions = {way: own.tolist() for way, own in predictions.items()}
        special = [start < 0 for start, _ in given["places"]]
        spans = spans_of(text, dropped)
        span = [any(start < end and begin < stop for start, stop in spans) for begin, end in given["places"]]
        attribution = [None if apart else value for apart, value in zip(special, found["attribution"], strict=True)]
        return {"predictions": predictions, "pieces": [self.run.tokenizer.piece(one) for one in given["ids"]],
                "special": special, "span": span, "margin": found["margin"], "attribution": attribution,
                "attention": found["attention"], "read": given["read"]}  # fmt: skip

    def checked(self, asked):
        """(text, label, off, dropped) of what was asked. Raises InputError for what `answer` does not describe."""
        wanted = {"text", "label", "off", "dropped"}
        if not isinstance(asked, dict) or set(asked) != wanted:
            raise InputError(f"a request has the fields {', '.join(sorted(wanted))}")
        text, label, off, dropped = (asked[name] for name in ("text", "label", "off", "dropped"))
        if not isinstance(text, str) or any("\ud800" <= one <= "\udfff" for one in text):
            raise InputError("the text is no valid Unicode text")
        if type(label) is not int or not 0 <= label < len(self.run.labels):
            raise InputError(f"label {shown(label)} is not there: the run has {len(self.run.labels)} labels")
        known = {"layers": self.layers, "targets": self.targets}
        if not isinstance(off, dict) or set(off) != {*known, "directions"}:
            raise InputError("off has the fields layers, targets and directions")
        for name, all_of_them in known.items():
            if not isinstance(off[name], list) or any(one not in all_of_them for one in off[name]):
                names = ", ".join(map(str, all_of_them)) or "none"
                raise InputError(f"{name} {shown(off[name])}: choose among {names}")
        if type(off["directions"]) is not int or not 0 <= off["directions"] <= len(self.directions):
            raise InputError(f"directions is {shown(off['directions'])}, but must be from 0 to {len(self.directions)}")
        if not isinstance(dropped, list) or any(not isinstance(one, str) or not one for one in dropped[:PUT_IN]):
            raise InputError("dropped is no list of words")
        return text, label, off, dropped[:PUT_IN]

    def tokens_of(self, text):
        """{"ids", "places": characters [start, end] of each token, "read": how many characters are read} of a text."""
        run = self.run
        encoded = run.tokenizer.encode([text], run.cell.max_length)
        if not len(encoded.ids):
            raise InputError("the text has no token that the base reads: write a word")
        [places] = run.tokenizer.places([text], run.cell.max_length)
        return {"ids": encoded.ids.tolist(), "places": places.tolist(), "read": int(encoded.kept[0])}

    @contextlib.contextmanager
    def left_out(self, off):
        """The adapter without some layers, some targets, and the largest directions, meanwhile."""
        run, by_module = self.run, {}
        for name, number in self.directions[: off["directions"]]:
            by_module.setdefault(name, []).append(number)
        with contextlib.ExitStack() as stack:
            for name, numbers in by_module.items():
                _, layer, target = name.split(".")
                stack.enter_context(run.scale(0, layers=[layer], targets=[target], directions=numbers))
            if off["layers"]:
                stack.enter_context(run.scale(0, layers=off["layers"]))
            if off["targets"]:
                stack.enter_context(run.scale(0, targets=off["targets"]))
            yield

    def looked_at(self, ids, label):
        """{"margin", "attribution" [T], "attention" [layers][T]} by one pass forth and back.

        Attribution is gradient x input of the margin (Shrikumar et al. 2017, arXiv 1704.02685); attention is what a
        token receives, a mean over the heads and over the tokens that look.
        """
        import torch

        from minilora.diagnostics.attention import watching
        from minilora.tasks.classification import pool

        run, received = self.run, {}
        run.model.eval()
        base, device = run.base, run.model.device
        batch = torch.tensor([ids], device=device), torch.tensor([len(ids)], device=device)  # [1, T], [1]
        with torch.no_grad():
            x = base.embed(batch[0])
        x = x.detach().requires_grad_(True)

        def see(number, p, mask):
            received[number] = p.detach().float().mean((0, 1, 2)).tolist()

        with torch.enable_grad(), watching(base, see):
            states = base.norm(base.through(x, *batch, 0, len(base.layers)))
            logits = run.model.classifier(pool(states, batch[1], run.model.pooling))[0].float()
            others = torch.arange(len(logits), device=logits.device) != label
            margin = logits[label] - logits[others].logsumexp(0)
            (gradient,) = torch.autograd.grad(margin, x)
        return {"margin": margin.item(), "attribution": (x * gradient).sum(-1)[0].tolist(),
                "attention": [received[number] for number in sorted(received)]}  # fmt: skip


def directions_of(run):
    """[(module, number)] of the singular directions of all updates, the largest first; none where an update has more
    than its factors, so that `run.scale` cannot leave its directions out."""
    import torch

    from minilora.lora.layer import named_layers

    found = []
    for name, layer in named_layers(run.base):
        if layer.magnitude is not None or layer.A0 is not None:
            return []
        A, B = layer.A.detach().double(), layer.B.detach().double()
        small = torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T  # of the same singular values as B A
        values = abs(layer.slot.scale) * torch.linalg.svdvals(small)
        found += [(value, name, number) for number, value in enumerate(values.tolist()) if value > 0]
    return [(name, number) for _, name, number in sorted(found, key=lambda one: -one[0])]


def spans_of(text, dropped):
    """[(start, end)] of all places of the words `dropped` in the text."""
    found = []
    for one in dropped:
        start = text.find(one)
        while start >= 0:
            found.append((start, start + len(one)))
            start = text.find(one, start + len(one))
    return found


# --- the server


class Server(ThreadingHTTPServer):
    """Serves `show`'s page at `address`. Raises InputError for a port that cannot be used."""

    daemon_threads = True

    def __init__(self, port=0):
        self.token = secrets.token_urlsafe(24)
        self.live, self.page = None, b""
        # One thread asks the model, one question after the other: each question changes the adapter meanwhile.
        self.worker = ThreadPoolExecutor(1)
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise InputError(f"port {port} {why}: choose another --port, or none for one that is free") from None

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # the parent's also asks the network for this machine's name
        self.server_name, self.server_port = self.server_address

    def server_close(self):
        super().server_close()
        self.worker.shutdown(wait=False, cancel_futures=True)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a browser may leave before it has its answer
            super().handle_error(request, client_address)

    @property
    def address(self):
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"

    @property
    def hosts(self):
        return {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    def show(self, live):
        """Serve the page of the `Live`, which may be None while it is read."""
        from minilora.diagnostics.page import page_of

        self.live, self.page = live, page_of(live.run.folder, live=live.facts()).encode()

    def ask(self, asked):
        """The JSON that `Live.answer` gives."""
        from minilora.diagnostics.page import cleaned

        return json.dumps(cleaned(self.worker.submit(self.live.answer, asked).result(), DIGITS), allow_nan=False)


class Handler(BaseHTTPRequestHandler):
    """GET gives the page, POST asks the model. All other methods, addresses and hosts are refused."""

    server_version, sys_version, timeout = "minilora", "", WAIT

    def do_GET(self):
        if self.allowed():
            self.reply(200, self.server.page, "text/html; charset=utf-8")

    def do_POST(self):
        if not self.allowed():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            return self.refuse(411, "say how long the request is")
        if len(length) > len(str(MOST)) or int(length) > MOST:
            return self.refuse(413, f"a request is at most {MOST:,} bytes: shorten the text")
        try:
            body = self.rfile.read(int(length)).decode("utf-8")
            self.reply(200, self.server.ask(files.parse_json(body)).encode())
        except InputError as error:
            self.refuse(400, str(error))
        except (ValueError, RecursionError):
            self.refuse(400, "the request is no JSON")

    def allowed(self):
        """Whether host, origin and address are this page's; else the request is refused."""
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in self.server.hosts:
            self.refuse(403, "another host")
        elif origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            self.refuse(403, "another origin")
        elif not secrets.compare_digest(self.path.encode(), f"/{self.server.token}/".encode()):
            self.refuse(404, "no such address")
        else:
            return True

    def refuse(self, status, why):
        self.reply(status, json.dumps({"error": why}).encode())

    def reply(self, status, body, kind="application/json"):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Nothing: the address has the token."""
