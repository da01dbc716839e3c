"""An OpenAI-compatible stub with known delays, run as a process of its own: ``python stub_server.py --ttft 0.05 ...``.

It prints its port and serves until its standard input closes. Tokens leave at the request's arrival + queueing +
``ttft`` + k * ``itl``, from a schedule that does not drift.
"""

import argparse
import asyncio
import json
import sys
import time

from aiohttp import web


class Stub:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.free_at = 0.0
        self.num_seen = 0
        self.active = 0

    async def models(self, _request: web.Request) -> web.Response:
        entry = {"id": "stub", "object": "model"}
        if self.options.vocab_size:
            entry |= {"vocab_size": self.options.vocab_size, "max_model_len": 4096}
        return web.json_response({"object": "list", "data": [entry]})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self.stream(request)
        except ConnectionResetError:
            return web.Response(status=499)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        arrived = time.perf_counter()
        options = self.options
        body = await request.json()
        chat = request.path.endswith("chat/completions")
        if options.strict and "ignore_eos" in body:
            return web.json_response({"error": {"message": "unknown field ignore_eos"}}, status=400)
        self.num_seen += 1
        if options.shed_every and self.num_seen % options.shed_every == 0:
            return web.json_response({"error": {"message": "busy"}}, status=429, headers={"Retry-After": "1"})
        if chat:
            prompt_tokens = len(body["messages"][0]["content"].split()) + options.template_tokens
        else:
            prompt = body["prompt"]
            prompt_tokens = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
            if not isinstance(prompt, str) and options.vocab_size:
                assert max(prompt) < options.vocab_size
        start = arrived
        if options.service:
            start = max(arrived, self.free_at)
            self.free_at = start + options.service
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def say(value: object) -> None:
            await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")

        if chat:
            await say({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        total = body["max_tokens"]
        sent = 0
        event = 0
        while sent < total:
            await asyncio.sleep(start + options.ttft + event * options.itl - time.perf_counter())
            num = min(options.tokens_per_event, total - sent)
            sent += num
            event += 1
            choice: dict[str, object] = {"index": 0, "finish_reason": "length" if sent == total else None}
            choice |= {"delta": {"content": "x" * num}} if chat else {"text": "x" * num}
            if body.get("return_token_ids") and not options.no_token_ids:
                choice["token_ids"] = list(range(num))
            if options.break_every and self.num_seen % options.break_every == 0:
                assert request.transport is not None
                request.transport.close()
                return response
            await say({"choices": [choice]})
        if not options.no_usage:
            final: dict[str, object] = {
                "choices": [],
                "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": total},
            }
            if body.get("return_timeline"):
                final["timeline"] = {"arrival": 0.0, "first_token": options.ttft}
            await say(final)
        await response.write(b"data: [DONE]\n\n")
        return response


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ttft", type=float, default=0.02)
    parser.add_argument("--itl", type=float, default=0.005)
    parser.add_argument("--service", type=float, default=0.0, help="seconds one request keeps the single server busy")
    parser.add_argument("--tokens-per-event", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=0)
    parser.add_argument("--template-tokens", type=int, default=0)
    parser.add_argument("--shed-every", type=int, default=0)
    parser.add_argument("--break-every", type=int, default=0)
    parser.add_argument("--no-usage", action="store_true")
    parser.add_argument("--no-token-ids", action="store_true")
    parser.add_argument("--strict", action="store_true")
    stub = Stub(parser.parse_args())
    app = web.Application(client_max_size=2**26)
    app.router.add_get("/v1/models", stub.models)
    app.router.add_post("/v1/completions", stub.generate)
    app.router.add_post("/v1/chat/completions", stub.generate)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


asyncio.run(main())
