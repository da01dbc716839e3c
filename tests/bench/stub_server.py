"""An OpenAI-compatible stub with known delays, run as a process of its own: ``python stub_server.py --ttft 0.05 ...``.

It prints its port and serves until its standard input closes. Token event k leaves at arrival + queueing + ``ttft`` +
k * ``itl``. A thread per connection and plain sleeps: the kernel wakes a thread within a tenth of a millisecond, where
an event loop's timers are whole milliseconds late.
"""

import argparse
import contextlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("--ttft", type=float, default=0.02)
parser.add_argument("--itl", type=float, default=0.005)
parser.add_argument("--service", type=float, default=0.0, help="seconds that a request keeps the single server busy")
parser.add_argument("--tokens-per-event", type=int, default=1)
parser.add_argument("--vocab-size", type=int, default=0)
parser.add_argument("--template-tokens", type=int, default=0)
parser.add_argument("--shed-every", type=int, default=0)
parser.add_argument("--break-every", type=int, default=0)
parser.add_argument("--no-usage", action="store_true")
parser.add_argument("--no-token-ids", action="store_true")
parser.add_argument("--strict", action="store_true")
options = parser.parse_args()


class Shared:
    lock = threading.Lock()
    free_at = 0.0
    num_seen = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, value: object, **headers: str) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        entry: dict[str, object] = {"id": "stub", "object": "model", "num_seen": Shared.num_seen}
        if options.vocab_size:
            entry |= {"vocab_size": options.vocab_size}
        self.answer(200, {"object": "list", "data": [entry]})

    def do_POST(self) -> None:
        arrived = time.perf_counter()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if options.strict and "ignore_eos" in body:
            self.answer(400, {"error": {"message": "unknown field ignore_eos"}})
            return
        with Shared.lock:
            Shared.num_seen += 1
            number = Shared.num_seen
            start = max(arrived, Shared.free_at) if options.service else arrived
            if options.shed_every and number % options.shed_every == 0:
                self.answer(429, {"error": {"message": "busy"}}, Retry_After="1")
                return
            Shared.free_at = start + options.service
        with contextlib.suppress(ConnectionError):
            self.stream(body, start, number)

    def stream(self, body: dict[str, Any], start: float, number: int) -> None:
        chat = self.path.endswith("chat/completions")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if chat:
            self.say({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        total, sent, event = body["max_tokens"], 0, 0
        while sent < total:
            num = min(options.tokens_per_event, total - sent)
            choice: dict[str, object] = {"index": 0, "finish_reason": "length" if sent + num == total else None}
            choice |= {"delta": {"content": "x" * num}} if chat else {"text": "x" * num}
            if body.get("return_token_ids") and not options.no_token_ids:
                choice["token_ids"] = list(range(num))
            time.sleep(max(start + options.ttft + event * options.itl - time.perf_counter(), 0))
            if options.break_every and number % options.break_every == 0:
                self.close_connection = True
                return
            self.say({"choices": [choice]})
            sent += num
            event += 1
        if not options.no_usage:
            final: dict[str, object] = {
                "choices": [],
                "usage": {"prompt_tokens": prompt_tokens(body, chat=chat), "completion_tokens": total},
            }
            if body.get("return_timeline"):
                final["timeline"] = {"arrival": 0.0, "first_token": options.ttft}
            self.say(final)
        self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def say(self, value: object) -> None:
        self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def prompt_tokens(body: dict[str, Any], *, chat: bool) -> int:
    if chat:
        return len(body["messages"][0]["content"].split()) + int(options.template_tokens)
    prompt = body["prompt"]
    if isinstance(prompt, str):
        return len(prompt.split())
    assert not options.vocab_size or max(prompt) < options.vocab_size
    return len(prompt)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
