"""Serve one model by HTTP with FastAPI: the bytes of an image in, JSON out.

    pip install 'yolov7-deploy[cpu]' fastapi uvicorn
    python fastapi_service.py --weights yolov7.onnx --port 8000
    curl --data-binary @street.jpg 'http://127.0.0.1:8000/detect?conf=0.4&classes=person&classes=dog'

Requests run at the same time on the threads of the Detector. The service answers after its first run of the network, so
a probe of `/health` succeeds when it is ready. On SIGTERM it takes no more requests, finishes those that it has, and
closes the model. A wrong threshold is answered with status 400, a body that is not an image with 422, a body that is
too large with 413, and requests above the limit with 503.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse

from yolov7_deploy import Detector, Y7Error
from yolov7_deploy.errors import DeviceError, ImageError, UsageError

MAX_BODY_BYTES = 32 * 2**20
MAX_REQUESTS = 64  # at the same time; each holds its image in memory
SHUTDOWN_TIMEOUT_S = 30
STATUS = {UsageError: 400, ImageError: 422, DeviceError: 503}  # any other error of ours is a fault of the server


def create_app(detector: Detector) -> FastAPI:
    """Return the application, which closes the detector when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        detector.warmup()
        yield
        detector.close()

    app = FastAPI(title="yolov7-deploy", lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ready", "model": detector.metadata.variant, "device": detector.device}

    @app.post("/detect")
    async def detect(
        request: Request,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        classes: Annotated[list[str] | None, Query()] = None,
    ) -> Response:
        image = await read_body(request)
        future = detector.submit(image, conf=conf, iou=iou, max_det=max_det, classes=classes)
        detections = await asyncio.wrap_future(future)
        return Response(detections.to_json(), media_type="application/json")

    @app.exception_handler(Y7Error)
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=STATUS.get(type(error), 500))

    return app


async def read_body(request: Request) -> bytes:
    """Return the body of a request; reading stops when it is larger than `MAX_BODY_BYTES`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"The image has more than {MAX_BODY_BYTES // 2**20} MiB.")
    return bytes(body)


def main() -> None:
    """Open the model and serve it until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="a .onnx, .engine, .pt or .safetensors file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 accepts requests of other machines")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    try:
        detector = Detector(options.weights, device=options.device)
    except Y7Error as error:
        sys.exit(str(error))
    uvicorn.run(
        create_app(detector),
        host=options.host,
        port=options.port,
        limit_concurrency=MAX_REQUESTS,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
    )


if __name__ == "__main__":
    main()
