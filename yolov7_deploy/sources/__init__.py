"""Image sources: files, folders, glob patterns, lists, arrays, videos, cameras and streams."""

from yolov7_deploy.sources.files import Skipped
from yolov7_deploy.sources.resolve import VIDEO_SUFFIXES, OnError, check_on_error
from yolov7_deploy.sources.source import Frame, OneSource, Source, SourceLike, open_source, read_each

__all__ = [
    "VIDEO_SUFFIXES",
    "Frame",
    "OnError",
    "OneSource",
    "Skipped",
    "Source",
    "SourceLike",
    "check_on_error",
    "open_source",
    "read_each",
]
