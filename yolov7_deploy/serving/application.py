"""The Ray Serve application: one deployment that speaks HTTP, and one with the models, which detects in batches.

The first one decodes nothing and computes nothing. If a replica of the second one dies, its requests are sent to
another one, so that a crash loses no request.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Ray reads this variable when it starts, and would send usage statistics to its authors otherwise.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray.exceptions
from ray import serve
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import Response

from yolov7_deploy._console import json_text
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy._text import get_logger
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import LoadError, Y7Error
from yolov7_deploy.hardware.system import limit_cores
from yolov7_deploy.hub import find_weights
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
    unavailable,
)
from yolov7_deploy.serving.settings import ModelFile, ServeSettings, read_settings

logger = get_logger(__name__)

HEALTH_TIMEOUT_S = 5.0
ATTEMPTS = 4  # of a request whose replica dies
RETRY_WAIT_S = 0.5  # before the second attempt, doubled for each further one
BATCHES_AHEAD = 2  # of requests at a replica: one batch runs, and the next one is collected
_MAX_REQUESTS = 10_000  # of the first deployment at a time; `max_queued` is the limit that matters


class Model:
    """A replica with a model.

    Args:
        settings: The settings of the application.
        weights: Absolute path of the model file.
        sha256: Digest of the model file when the application was started.
    """

    def __init__(self, settings: ServeSettings, weights: str, sha256: str) -> None:
        self._settings = settings
        limit_cores(settings.cpus)
        self._file = ModelFile(Path(weights), sha256=sha256)
        self._detector = Detector(weights, **settings.detector_options)
        self._detector.warmup()
        self._detect_batch = serve.batch(
            self._answer,
            max_batch_size=settings.max_batch_size,
            batch_wait_timeout_s=settings.batch_wait_ms / 1e3,
        )

    async def detect(self, request: DetectRequest) -> Answer:
        """Return the answer to a request, together with others that arrive in time."""
        answer: Answer = await self._detect_batch(request)
        return answer

    async def _answer(self, requests: list[DetectRequest]) -> list[Answer]:
        return await asyncio.to_thread(answer_batch, self._detector, requests)

    def describe(self) -> dict[str, Any]:
        """Return the model as plain data, for the web page and other clients."""
        detector = self._detector
        return {
            "weights": self._file.path.name,
            "sha256": self._file.sha256,
            "file": self._file.state(),
            "device": detector.device,
            "runtime": detector.runtime,
            "precision": detector.metadata.precision,
            "input_hw": list(detector.input_hw),
            "class_names": list(detector.class_names),
            "thresholds": {name: getattr(detector.thresholds, name) for name in ("conf", "iou", "max_det")},
            "max_batch_size": self._settings.max_batch_size,
            "max_body_bytes": self._settings.max_body_bytes,
        }

    def check_health(self) -> None:
        """Look whether the model file was replaced; Serve calls this every ten seconds."""
        self._file.state()


class Frontend:
    """The HTTP side: the web page, and requests for detections.

    Args:
        model: Handle of the deployment with the models.
        max_body_bytes: Maximum size of an image file.
    """

    def __init__(self, model: Any, max_body_bytes: int) -> None:  # noqa: ANN401 - a handle of Ray Serve
        self._model, self._max_body_bytes = model, max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "").rstrip("/")) or "/"
        try:
            check_route(request.method, path)
            answer = await self._answer(path, request)
        except (HttpError, Y7Error) as error:
            answer = error_answer(error)
        headers = {"cache-control": "no-store", "x-content-type-options": "nosniff", **answer.headers}
        return Response(answer.body, status_code=answer.status, media_type=answer.media_type, headers=headers)

    async def _answer(self, path: str, request: Request) -> Answer:
        if path == "/":
            return Answer(
                status=200, body=read_page(), media_type=HTML, headers={"content-security-policy": PAGE_POLICY}
            )
        if path == "/detect":
            thresholds = parse_thresholds(request.query_params.multi_items())
            image = await read_body(request.headers, request.stream(), max_bytes=self._max_body_bytes)
            return await self._detect(DetectRequest(image=image, thresholds=thresholds))
        described = await self._describe()
        if path == "/model":
            return Answer(status=200, body=json_text(described))
        health = {"status": "ok", "weights": described["weights"], "sha256": described["sha256"]}
        return Answer(status=200, body=json_text({**health, "file": described["file"]}))

    async def _detect(self, request: DetectRequest) -> Answer:
        """Send a request to a replica, and to another one if that dies.

        Raises:
            HttpError: Too many requests wait, or no replica lives (503).
        """
        for attempt in range(ATTEMPTS):
            try:
                answer: Answer = await self._model.detect.remote(request)
                return answer
            except BackPressureError as error:
                raise unavailable("Too many requests wait.") from error
            except ray.exceptions.RayActorError:
                logger.warning("a replica died; attempt %d of %d", attempt + 1, ATTEMPTS)
                await asyncio.sleep(RETRY_WAIT_S * 2**attempt)
        raise unavailable(f"The replica died in {ATTEMPTS} attempts.")

    async def _describe(self) -> Mapping[str, Any]:
        try:
            described: Mapping[str, Any] = await asyncio.wait_for(self._model.describe.remote(), HEALTH_TIMEOUT_S)
            return described
        except (TimeoutError, asyncio.TimeoutError, BackPressureError, ray.exceptions.RayError) as error:
            raise unavailable("No replica answers.") from error


def app(arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - an application of Ray Serve
    """Build the application; `serve run yolov7_deploy.serving:app weights=yolov7.onnx` calls this.

    Args:
        arguments: See `ServeSettings`; environment variables such as `Y7_SERVE_WEIGHTS` have the same effect.

    Raises:
        UsageError: A setting is unknown or invalid, or there are no weights.
        LoadError: There is no such model file.
    """
    settings = read_settings(arguments)
    weights = find_weights(settings.weights).absolute()
    try:
        digest = sha256_hex(weights)
    except OSError as error:
        raise LoadError(f"{weights} cannot be read: {error.strerror or error}.", fix="Check the file.") from error
    model = serve.deployment(
        Model,
        num_replicas=settings.replicas,
        max_ongoing_requests=BATCHES_AHEAD * settings.max_batch_size,
        max_queued_requests=settings.max_queued,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    frontend = serve.deployment(Frontend, max_ongoing_requests=_MAX_REQUESTS, ray_actor_options={"num_cpus": 0})
    return frontend.bind(model.bind(settings, str(weights), digest), settings.max_body_bytes)
