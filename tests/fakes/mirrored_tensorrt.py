"""A fake TensorRT and the real Python bindings as one module: calls are made on both, and the fake's results are used.

The real bindings check the name, the number and the types of the arguments, and call `nvinfer/nvinfer.cpp`, whose
results have no meaning. A name exists if the real bindings have it. Classes and enumerations are the real ones.
"""

import ctypes
from importlib.machinery import ModuleSpec

_CREATED = ("Builder", "OnnxParser", "Runtime")  # classes that the product creates objects of
_VALUES = (type(None), bool, int, float, str, list, tuple, set)


class UnknownToFake(Exception):  # noqa: N818 - not an AttributeError, which `hasattr` would hide
    """The product uses a name that the real bindings have and the fake does not."""


class _Bytes(bytes):
    """The fake's bytes and the real object of which they are the content."""


class Mirror:
    """A fake object and the real one.

    Args:
        fake: An object of the fake module.
        real: The object of the real bindings.
        module: The fake module, which has its own values of the enumerations.
        used: Receives `Class.member` for every member of a real object that is used.
    """

    def __init__(self, fake, real, module, used):
        object.__setattr__(self, "_parts", (fake, real, module, used))

    def __getattr__(self, name):
        fake, real, module, used = self._parts
        if name == "__version__":
            return module.__version__
        if name == "__spec__":
            return ModuleSpec("tensorrt", None)
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(real, name)
        if isinstance(value, type) and name not in _CREATED:
            return value
        used.add(f"{getattr(real, '__name__', type(real).__name__)}.{name}")
        if not hasattr(fake, name):
            raise UnknownToFake(f"{type(real).__name__}.{name}")
        other = getattr(fake, name)
        return self._function(other, value) if callable(other) else self._pair(other, value)

    def __setattr__(self, name, value):
        fake, real, _, used = self._parts
        used.add(f"{type(real).__name__}.{name}")
        setattr(real, name, _real(value))
        setattr(fake, name, self._fake(value))

    def _function(self, fake, real):
        def call(*arguments):
            result = real(*map(_real, arguments))
            return self._pair(fake(*map(self._fake, arguments)), result)

        return call

    def _pair(self, fake, real):
        _, _, module, used = self._parts
        if isinstance(fake, bytes):
            content = _Bytes(fake)
            content.real = real
            return content
        return fake if isinstance(fake, _VALUES) else Mirror(fake, real, module, used)

    def _fake(self, value):
        """Return the fake's counterpart of an argument."""
        if isinstance(value, Mirror):
            return value._parts[0]
        if hasattr(type(value), "__members__"):
            return getattr(getattr(self._parts[2], type(value).__name__, None), value.name, value)
        return value


def _real(value):
    if isinstance(value, Mirror):
        return value._parts[1]
    return getattr(value, "real", value) if isinstance(value, _Bytes) else value


class Refusals:
    """While the block runs, the real bindings get false and null from the library below them."""

    def __init__(self, major):
        self._library = ctypes.CDLL(f"libnvinfer.so.{major}")

    @property
    def calls(self):
        """Number of virtual calls so far."""
        return self._library.nvinfer_calls()

    def __enter__(self):
        self._library.nvinfer_refuse(1)

    def __exit__(self, *_):
        self._library.nvinfer_refuse(0)
