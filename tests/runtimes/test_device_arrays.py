"""Images on the GPU: both protocols, whose stream waits for whom, what is refused, and that nothing is copied."""

import ctypes
import gc
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from tests.support.trt_kit import assert_found, infer, make_image, setting, toy
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, ImageError, UsageError
from yolov7_deploy.image import fit_evaluation_letterbox
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.cuda import DeviceBuffer, Stream
from yolov7_deploy.runtimes.device_arrays import _Tensor, _Versioned, gpu_hw, gpu_image, is_gpu_array

__all__ = ["setting"]


class OnGpu:
    """An image in memory of the fake GPU, with rows `pitch` bytes apart."""

    def __init__(self, setting, image, pitch=None):
        height, width = image.shape[:2]
        self.shape, self.pitch = image.shape, pitch or 3 * width
        self.buffer = DeviceBuffer(setting.cuda, (height * self.pitch,), np.uint8)
        memory = (ctypes.c_uint8 * self.buffer.nbytes).from_address(self.buffer.pointer)
        rows = np.ndarray(image.shape, np.uint8, memory, strides=(self.pitch, 3, 1))
        rows[...] = image


class CudaArray(OnGpu):
    """As pycuda, numba and cupy describe themselves."""

    def __init__(self, setting, image, pitch=None, **changes):
        super().__init__(setting, image, pitch)
        self.__cuda_array_interface__ = {
            "shape": self.shape, "typestr": "|u1", "data": (self.buffer.pointer, True), "version": 3,
            "strides": None if pitch is None else (pitch, 3, 1), "stream": None,
        } | changes  # fmt: skip


class Dlpack(OnGpu):
    """As torch describes itself; `versioned` as DLPack 1.0 does."""

    def __init__(self, setting, image, pitch=None, *, versioned=False, device=0, code=1, strides=True):
        super().__init__(setting, image, pitch)
        self.versioned, self.device, self.streams, self.deleted = versioned, device, [], 0
        self.sides = (ctypes.c_int64 * 3)(*self.shape)
        self.steps = (ctypes.c_int64 * 3)(self.pitch, 3, 1)
        at = 16  # what lies before the first pixel, for the byte offset
        tensor = _Tensor(
            data=self.buffer.pointer - at, device_type=2, device_id=device, ndim=3, code=code, bits=8, lanes=1,
            shape=self.sides, strides=self.steps if strides else None, byte_offset=at,
        )  # fmt: skip
        self.managed = _Versioned(major=1, minor=0, tensor=tensor) if versioned else tensor

        def destruct(capsule):
            self.deleted += 1

        self.destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(destruct)

    def __dlpack_device__(self):
        return (2, self.device)

    def __dlpack__(self, *, stream, **newer):
        if newer and not self.versioned:
            raise TypeError("unexpected keyword argument")
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return new(ctypes.addressof(self.managed), self.name, ctypes.cast(self.destructor, ctypes.c_void_p))


@pytest.mark.parametrize("pitch", [None, 512])
@pytest.mark.parametrize("kind", ["interface", "dlpack", "versioned", "without strides"])
def test_a_image_on_the_gpu_is_read_where_it_is(setting, kind, pitch):
    if kind == "without strides" and pitch:
        pytest.skip("without strides rows have no pitch")
    backend, image = setting.backend(), make_image(3, 100, 150)
    options = {"versioned": {"versioned": True}, "without strides": {"strides": False}}.get(kind, {})
    given = CudaArray(setting, image, pitch) if kind == "interface" else Dlpack(setting, image, pitch, **options)
    assert is_gpu_array(given)
    calls = setting.calls()
    for _ in range(3):
        assert_found(infer(backend, [given]).found[0], image)
    names = Counter(calls())
    assert not {"cudaMalloc", "cudaHostAlloc"} & set(names), "no room was made for its pixels"
    if kind != "interface":
        gc.collect()
        assert given.deleted == 3, "the memory goes back after every call"
        assert all(stream > 2 for stream in given.streams), "our stream, so that theirs is waited for"


def test_host_and_gpu_images_mix(setting):
    backend = setting.backend(toy(None))
    images = [make_image(seed, 30 + seed, 50) for seed in range(4)]
    for _ in range(3):
        mixed = [images[0], CudaArray(setting, images[1], 200), images[2], Dlpack(setting, images[3])]
        for found, image in zip(infer(backend, mixed).found, images, strict=True):
            assert_found(found, image)


def test_the_detector_takes_them_too(setting):
    image = make_image(7, 90, 60)
    with Detector(setting.engine()) as detector:
        found = detector(CudaArray(setting, image))
        np.testing.assert_array_equal(found.boxes, detector(image).boxes)
        assert found.image_hw == (90, 60)
        with pytest.raises(ImageError, match=r"\[H, W, 3\]"):
            detector(Shaped((3, 90, 60)))


class Shaped:
    """Says its shape and no more."""

    def __init__(self, shape):
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (16, True), "version": 3}


@pytest.mark.parametrize("stream", ["theirs", "default"])
def test_what_the_producer_still_has_to_do_comes_first(setting, stream):
    backend, image = setting.backend(), make_image(5)
    infer(backend, [image])
    with Stream(setting.cuda) as theirs:
        given = CudaArray(setting, make_image(6), stream=theirs.handle if stream == "theirs" else 1)
        if stream == "theirs":  # the image is still on its way
            source = CudaArray(setting, image)
            theirs.copy(given.buffer.pointer, source.buffer.pointer, source.buffer.nbytes)
        calls = setting.calls()
        assert_found(infer(backend, [given]).found[0], image if stream == "theirs" else make_image(6))
        assert "cudaStreamWaitEvent" in calls()


def test_nobody_waits_where_the_producer_says_so_and_everybody_where_it_says_nothing(setting):
    backend, calls = setting.backend(), setting.calls()
    infer(backend, [CudaArray(setting, make_image(1))])
    assert "cudaStreamWaitEvent" not in calls()
    silent = CudaArray(setting, make_image(1))
    del silent.__cuda_array_interface__["stream"]
    infer(backend, [silent])
    assert "cudaStreamWaitEvent" in calls()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"typestr": "<f4"}, ImageError, "must be uint8; this one is <f4"),
        ({"strides": (240, 6, 2)}, ImageError, "bytes apart"),
        ({"strides": (-240, 3, 1)}, ImageError, "bytes apart"),
        ({"strides": (240, 3, -1)}, ImageError, "bytes apart"),
    ],
)
def test_pixels_of_another_kind_are_refused(setting, changes, error, words):
    backend = setting.backend()
    with pytest.raises(error, match=words) as caught:
        infer(backend, [CudaArray(setting, make_image(0), **changes)])
    assert "uint8 BGR" in caught.value.fix
    assert_found(infer(backend, [make_image(0)]).found[0], make_image(0))


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 5), (5, 5, 4), (1, 5, 5, 3)])
def test_shapes_that_are_no_image_are_refused(shape):
    with pytest.raises(ImageError):
        gpu_hw(Shaped(shape))


def test_a_image_on_another_gpu_names_both(setting):
    setting.monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    backend = setting.backend()
    with setting.cuda.working_on(1):
        given = [CudaArray(setting, make_image(0)), Dlpack(setting, make_image(0), device=1)]
    for one in given:
        with pytest.raises(DeviceError, match=r"is on cuda:1, the detector on cuda:0") as caught:
            infer(backend, [one])
        assert "device='cuda:1'" in caught.value.fix
    assert given[1].streams == [], "its library was not asked to copy it"


def test_an_address_of_host_memory_is_no_image_on_a_gpu(setting):
    backend, image = setting.backend(), make_image(0)
    given = CudaArray(setting, image, data=(image.ctypes.data, True))
    with pytest.raises(DeviceError, match="is not on a GPU"):
        infer(backend, [given])


def test_a_library_that_does_not_give_its_pixels_away_is_quoted(setting):
    class Trained(Dlpack):
        def __dlpack__(self, *, stream, **newer):
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

    with pytest.raises(DeviceError, match="A Trained does not give its pixels away: Can't export") as caught:
        infer(setting.backend(), [Trained(setting, make_image(0))])
    assert "detach" in caught.value.fix
    with pytest.raises(ImageError, match="this one is float8"):
        infer(setting.backend(name="b.engine"), [Dlpack(setting, make_image(0), code=2)])


def test_the_owner_is_held_until_the_work_is_done(setting):
    with Stream(setting.cuda) as stream:
        given = CudaArray(setting, make_image(0))
        died = weakref.ref(given)
        taken = gpu_image(given, stream, device=0)
        del given
        assert died() is taken.owner
        del taken
        assert died() is None


def test_arrays_in_main_memory_are_none(setting):
    image = make_image(0)
    for given in (image, torch.from_numpy(image), "path", setting.folder, 3):
        assert not is_gpu_array(given)
    with Detector(setting.engine()) as detector:
        np.testing.assert_array_equal(detector(torch.from_numpy(image)).boxes, detector(image).boxes)


def test_without_our_kernels_the_detector_says_what_to_type(setting):
    setting.without_kernels()
    words = r"toy\.engine takes images in main memory here; this CudaArray"
    with Detector(setting.engine()) as detector, pytest.raises(UsageError, match=words) as caught:
        detector(CudaArray(setting, make_image(0)))
    assert ".cpu().numpy()" in caught.value.fix


def test_a_gpu_image_for_a_letterbox_of_the_host_is_refused_and_leaves_no_trace(setting):
    backend, image = setting.backend(), make_image(1, 128, 192)
    area = fit_evaluation_letterbox((128, 192), (64, 96), size=96)
    for _ in range(2):
        with pytest.raises(UsageError, match="made on the host"):
            backend.infer([CudaArray(setting, image)], [area], Thresholds(conf=0.25, multi_label=True))
        for seed in range(3):
            assert_found(infer(backend, [make_image(seed)]).found[0], make_image(seed))


def test_a_stream_follows_what_another_still_has_to_do(setting):
    cuda, data, found = setting.cuda, np.arange(4, dtype=np.uint8), np.zeros(4, np.uint8)
    with Stream(cuda) as theirs, Stream(cuda) as ours, DeviceBuffer(cuda, (6,), np.uint8) as buffer:
        theirs.upload(buffer, data, offset=2)
        ours.follow(theirs.handle)
        ours.copy(buffer.pointer, buffer.pointer + 2, 4)
        ours.download(found, buffer)
        ours.synchronize()
        assert found.tolist() == [0, 1, 2, 3]
        assert (cuda.gpu_of(buffer.pointer + 5), cuda.gpu_of(data.ctypes.data)) == (0, None)
