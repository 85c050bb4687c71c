"""The web page and its routes in a plain HTTP server of the standard library: the application without Ray."""

import asyncio
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from yolov7_deploy._console import json_text
from yolov7_deploy.errors import Y7Error
from yolov7_deploy.serving.batches import DetectRequest, answer_batch
from yolov7_deploy.serving.requests import (
    HTML,
    PAGE_POLICY,
    Answer,
    HttpError,
    check_route,
    error_answer,
    parse_thresholds,
    read_body,
    read_page,
)

MAX_BYTES = 1_000_000


@contextmanager
def serve_page(detector):
    """Serve a detector on a free port of 127.0.0.1; yield the address and the list of requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def answer(self):
            address = urlsplit(self.path)
            try:
                check_route(self.command, address.path)
                self.send_answer(self.answer_route(address))
            except (HttpError, Y7Error) as error:
                self.send_answer(error_answer(error))

        do_GET = do_POST = answer  # noqa: N815

        def answer_route(self, address):
            if address.path == "/":
                return Answer(
                    status=200, body=read_page(), media_type=HTML, headers={"content-security-policy": PAGE_POLICY}
                )
            if address.path == "/detect":
                requests.append(address.query)
                thresholds = parse_thresholds(parse_qsl(address.query))
                headers = {name.lower(): value for name, value in self.headers.items()}
                image = asyncio.run(read_body(headers, self.parts(), max_bytes=MAX_BYTES))
                return answer_batch(detector, [DetectRequest(image=image, thresholds=thresholds)])[0]
            return Answer(status=200, body=json_text(describe(detector)))

        async def parts(self):
            yield self.rfile.read(int(self.headers["content-length"]))

        def send_answer(self, answer):
            body = answer.body.encode()
            self.send_response(answer.status)
            headers = {"content-type": answer.media_type, "content-length": str(len(body)), **answer.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def describe(detector):
    """Return what `/model` says."""
    return {
        "weights": detector.path.name,
        "device": detector.device,
        "input_hw": list(detector.input_hw),
        "class_names": list(detector.class_names),
        "thresholds": {name: getattr(detector.thresholds, name) for name in ("conf", "iou", "max_det")},
    }
