"""The far side of the network: a small server of chat completions, and replies that it can give."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from popen.params import JudgeParams
from popen.preference.sources import known, things
from popen.preference.text import Correction, correct
from popen.samples import Sample

SOON = {"retry-after-ms": "1"}  # the client would wait half a second and more
Reply = tuple[int, dict[str, str], bytes]


def completion(content: object, tokens: int = 10, finish: str = "stop", **message: Any) -> Reply:
    """A chat completion whose message has this content."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [choice | {"finish_reason": finish}],
        "usage": {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens},
    }
    return 200, {}, json.dumps(body).encode()


def judged(answer: str, *targets: int) -> Reply:
    return completion(json.dumps({"answer": answer, "targets": targets}))


def failed(status: int, message: str = "no") -> Reply:
    return status, SOON, json.dumps({"error": {"message": message}}).encode()


def asked(request: dict[str, Any]) -> dict[str, Any]:
    """What the request tells about the question."""
    found: dict[str, Any] = json.loads(request["messages"][1]["content"][0]["text"])
    return found


def numbers(correction: Correction, sample: Sample) -> list[int]:
    return [things(sample).index(target) + 1 for target in correction.targets]


def by_words(samples: Sequence[Sample]) -> Callable[[dict[str, Any]], Reply]:
    """A judge that knows the rule, by words alone."""

    def reply(request: dict[str, Any]) -> Reply:
        told = asked(request)
        (sample,) = [s for s in samples if known(s) == told["annotated"] and s.question == told["question"]]
        correction = correct(told["model's answer"], sample)
        return judged(correction.answer, *numbers(correction, sample))

    return reply


@dataclass
class Endpoint:
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)  # as they came
    keys: list[str | None] = field(default_factory=list)

    def params(self, **changes: Any) -> JudgeParams:
        values = {"model": "judge", "base_url": self.url, "requests": 100, "tokens": 10_000}
        return JudgeParams.model_validate(values | {"retries": 3, "timeout": 30.0} | changes)


@contextmanager
def serving(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[Endpoint]:
    """A server on loopback that answers each request by `reply`."""
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.keys.append(self.headers["Authorization"])
            endpoint.requests.append(request)
            status, headers, body = (
                reply(request) if self.path == "/v1/chat/completions" else failed(404, self.path)
            )
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
