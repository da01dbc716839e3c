"""The proxy of vLLM's own disaggregated prefill: each request goes to the prefill server, then to the decode server.

    python -m benchmarks.common.vllm_proxy --port 8100 --prefill http://127.0.0.1:8101 --decode http://127.0.0.1:8102

What travels between the two is vLLM's ``kv_transfer_params``: the prefill server is asked for one token and answers
with where its KV lies; the decode server is given that, pulls the KV and streams the answer. The protocol is that of
vLLM's ``tests/v1/kv_connector/nixl_integration/toy_proxy_server.py``.
"""

import argparse
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Proxy:
    """Forwards requests between one client and two servers."""

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill = prefill
        self._decode = decode

    def app(self) -> web.Application:
        """The application: completions, and what a benchmark asks beside them."""
        app = web.Application(client_max_size=2**24)
        app.cleanup_ctx.append(self._session)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/v1/models", self.forward)
        app.router.add_get("/health", self.forward)
        return app

    async def _session(self, _app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
            self._http = session
            yield

    async def forward(self, request: web.Request) -> web.Response:
        """What the decode server answers."""
        async with self._http.get(self._decode + request.path) as answer:
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """One request through both servers; bytes of the second pass as they come."""
        body: dict[str, Any] = msgspec.json.decode(await request.read())
        first = body | {"max_tokens": 1, "min_tokens": 1, "stream": False, "kv_transfer_params": _REMOTE_DECODE}
        first.pop("stream_options", None)
        async with self._http.post(self._prefill + request.path, json=first) as prefilled:
            if prefilled.status != 200:
                return web.Response(body=await prefilled.read(), status=prefilled.status)
            answer = msgspec.json.decode(await prefilled.read())
        second = body | {"kv_transfer_params": answer["kv_transfer_params"]}
        async with self._http.post(self._decode + request.path, json=second) as decoded:
            response = web.StreamResponse(status=decoded.status, headers={"Content-Type": decoded.content_type})
            await response.prepare(request)
            while chunk := await decoded.content.readany():
                await response.write(chunk)
            await response.write_eof()
            return response


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True, help="URL of the prefill server")
    parser.add_argument("--decode", required=True, help="URL of the decode server")
    options = parser.parse_args()
    app = Proxy(options.prefill, options.decode).app()
    # A client that leaves must take its requests to the servers with it, or they would burden the next run.
    web.run_app(app, host="127.0.0.1", port=options.port, access_log=None, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
