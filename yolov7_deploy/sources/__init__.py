"""Image sources: files, folders, glob patterns, lists, arrays, videos, cameras and streams."""

from yolov7_deploy.sources.files import Skipped
from yolov7_deploy.sources.resolve import VIDEO_SUFFIXES
from yolov7_deploy.sources.source import Frame, Source, SourceLike, open_source

__all__ = ["VIDEO_SUFFIXES", "Frame", "Skipped", "Source", "SourceLike", "open_source"]
