"""Images on the GPU: both protocols, the order of streams, what is refused, and that nothing is copied."""

import ctypes
import gc
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from tests.support.trt_kit import assert_detected, environment, infer, make_image, toy
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError, UsageError
from yolov7_deploy.image import fit_evaluation_letterbox
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.cuda import DeviceBuffer, Stream
from yolov7_deploy.runtimes.device_arrays import _Tensor, _type_name, _Versioned, gpu_hw, gpu_image, is_gpu_array

__all__ = ["environment"]


class OnGpu:
    """An image in memory of the fake GPU, with rows `pitch` bytes apart."""

    def __init__(self, environment, image, pitch=None):
        height, width = image.shape[:2]
        self.shape, self.pitch = image.shape, pitch or 3 * width
        self.buffer = DeviceBuffer(environment.cuda, (height * self.pitch,), np.uint8)
        memory = (ctypes.c_uint8 * self.buffer.nbytes).from_address(self.buffer.pointer)
        rows = np.ndarray(image.shape, np.uint8, memory, strides=(self.pitch, 3, 1))
        rows[...] = image


class CudaArray(OnGpu):
    """An array with the protocol of pycuda, numba and cupy."""

    def __init__(self, environment, image, pitch=None, **changes):
        super().__init__(environment, image, pitch)
        self.__cuda_array_interface__ = {
            "shape": self.shape, "typestr": "|u1", "data": (self.buffer.pointer, True), "version": 3,
            "strides": None if pitch is None else (pitch, 3, 1), "stream": None,
        } | changes  # fmt: skip


class Dlpack(OnGpu):
    """An array with the protocol of torch; `versioned` is that of DLPack 1.0."""

    def __init__(self, environment, image, pitch=None, *, versioned=False, device=0, code=1, strides=True):
        super().__init__(environment, image, pitch)
        self.versioned, self.device, self.streams, self.deleted = versioned, device, [], 0
        self.sides = (ctypes.c_int64 * 3)(*self.shape)
        self.steps = (ctypes.c_int64 * 3)(self.pitch, 3, 1)
        at = 16  # bytes before the first pixel, for the byte offset
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
def test_an_image_on_the_gpu_is_not_copied(environment, kind, pitch):
    if kind == "without strides" and pitch:
        pytest.skip("without strides rows have no pitch")
    runtime, image = environment.open(), make_image(3, 100, 150)
    options = {"versioned": {"versioned": True}, "without strides": {"strides": False}}.get(kind, {})
    given = (
        CudaArray(environment, image, pitch) if kind == "interface" else Dlpack(environment, image, pitch, **options)
    )
    assert is_gpu_array(given)
    calls = environment.calls()
    for _ in range(3):
        assert_detected(infer(runtime, [given]).detections[0], image)
    names = Counter(calls())
    assert not {"cudaMalloc", "cudaHostAlloc"} & set(names), "no memory was allocated for its pixels"
    if kind != "interface":
        gc.collect()
        assert given.deleted == 3, "the memory is released after every call"
        assert all(stream > 2 for stream in given.streams), (
            "our stream, so that the producer orders its work before ours"
        )


def test_host_and_gpu_images_mix(environment):
    runtime = environment.open(toy(None))
    images = [make_image(seed, 30 + seed, 50) for seed in range(4)]
    for _ in range(3):
        mixed = [images[0], CudaArray(environment, images[1], 200), images[2], Dlpack(environment, images[3])]
        for found, image in zip(infer(runtime, mixed).detections, images, strict=True):
            assert_detected(found, image)


def test_the_detector_accepts_images_on_the_gpu(environment):
    image = make_image(7, 90, 60)
    with Detector(environment.engine()) as detector:
        found = detector(CudaArray(environment, image))
        np.testing.assert_array_equal(found.boxes, detector(image).boxes)
        assert found.image_hw == (90, 60)
        with pytest.raises(ImageError, match=r"\[H, W, 3\]"):
            detector(Shaped((3, 90, 60)))


class Shaped:
    """An array with a shape and nothing else."""

    def __init__(self, shape):
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (16, True), "version": 3}


@pytest.mark.parametrize("stream", ["theirs", "default"])
def test_pending_work_of_the_producer_is_done_first(environment, stream):
    runtime, image = environment.open(), make_image(5)
    infer(runtime, [image])
    with Stream(environment.cuda) as theirs:
        given = CudaArray(environment, make_image(6), stream=theirs.handle if stream == "theirs" else 1)
        if stream == "theirs":  # the image is still being written
            source = CudaArray(environment, image)
            theirs.copy(given.buffer.pointer, source.buffer.pointer, source.buffer.nbytes)
        calls = environment.calls()
        assert_detected(infer(runtime, [given]).detections[0], image if stream == "theirs" else make_image(6))
        assert "cudaStreamWaitEvent" in calls()


def test_only_a_producer_with_a_stream_or_without_the_stream_field_is_waited_for(environment):
    runtime, calls = environment.open(), environment.calls()
    infer(runtime, [CudaArray(environment, make_image(1))])
    assert "cudaStreamWaitEvent" not in calls()
    silent = CudaArray(environment, make_image(1))
    del silent.__cuda_array_interface__["stream"]
    infer(runtime, [silent])
    assert "cudaStreamWaitEvent" in calls()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"typestr": "<f4"}, ImageError, "must be uint8; this one is <f4"),
        ({"strides": (240, 6, 2)}, ImageError, "bytes apart"),
        ({"strides": (-240, 3, 1)}, ImageError, "bytes apart"),
        ({"strides": (240, 3, -1)}, ImageError, "bytes apart"),
    ],
)
def test_other_types_and_strides_are_refused(environment, changes, error, text):
    runtime = environment.open()
    with pytest.raises(error, match=text) as caught:
        infer(runtime, [CudaArray(environment, make_image(0), **changes)])
    assert "uint8 BGR" in caught.value.fix
    assert_detected(infer(runtime, [make_image(0)]).detections[0], make_image(0))


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 5), (5, 5, 4), (1, 5, 5, 3)])
def test_shapes_other_than_an_image_are_refused(shape):
    with pytest.raises(ImageError):
        gpu_hw(Shaped(shape))


def test_an_image_on_another_gpu_is_refused_with_both_gpus(environment):
    environment.monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    runtime = environment.open()
    with environment.cuda.working_on(1):
        given = [CudaArray(environment, make_image(0)), Dlpack(environment, make_image(0), device=1)]
    del given[0].__cuda_array_interface__["stream"]
    calls = environment.calls()
    for one in given:
        with pytest.raises(UsageError, match=r"is on cuda:1, the detector on cuda:0") as caught:
            infer(runtime, [one])
        assert "device='cuda:1'" in caught.value.fix
    assert "cudaStreamWaitEvent" not in calls()
    infer(runtime, [make_image(0)])
    assert "cudaStreamCreateWithFlags" not in calls(), "the executor is kept"
    assert given[1].streams == [], "its library was not requested to copy it"


def test_an_address_in_host_memory_is_refused(environment):
    runtime, image = environment.open(), make_image(0)
    given = CudaArray(environment, image, data=(image.ctypes.data, True))
    with pytest.raises(UsageError, match="is not on a GPU"):
        infer(runtime, [given])


def test_the_error_of_a_library_that_refuses_to_export_is_quoted(environment):
    class Trained(Dlpack):
        def __dlpack__(self, *, stream, **newer):
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

    with pytest.raises(UsageError, match="This Trained cannot be exported by DLPack: Can't export") as caught:
        infer(environment.open(), [Trained(environment, make_image(0))])
    assert "detach" in caught.value.fix
    with pytest.raises(ImageError, match="this one is float8"):
        infer(environment.open(name="b.engine"), [Dlpack(environment, make_image(0), code=2)])


@pytest.mark.parametrize(
    ("kind", "name"), [((5, 64, 1), "complex64"), ((1, 8, 4), "uint8x4"), ((9, 8, 1), "type 9 of DLPack with 8 bits")]
)
def test_other_types_of_dlpack_have_a_name(kind, name):
    assert _type_name(_Tensor(**dict(zip(("code", "bits", "lanes"), kind, strict=True)))) == name


def test_the_owner_is_held_until_the_work_is_done(environment):
    with Stream(environment.cuda) as stream:
        given = CudaArray(environment, make_image(0))
        reference = weakref.ref(given)
        taken = gpu_image(given, stream, device=0)
        del given
        assert reference() is taken.owner
        del taken
        assert reference() is None


def test_arrays_in_host_memory_are_not_gpu_arrays(environment):
    image = make_image(0)
    for given in (image, torch.from_numpy(image), "path", environment.folder, 3):
        assert not is_gpu_array(given)
    with Detector(environment.engine()) as detector, pytest.raises(ImageError, match="Tensor") as caught:
        detector(torch.from_numpy(image))
    assert "image.numpy()" in caught.value.fix


def test_a_tensor_on_a_device_that_dlpack_does_not_know_is_not_a_gpu_array():
    assert not is_gpu_array(torch.empty(3, 4, device="meta"))


def test_without_the_kernels_the_error_states_the_command(environment):
    environment.without_kernels()
    text = r"toy\.engine needs images in host memory here; this CudaArray"
    with Detector(environment.engine()) as detector, pytest.raises(UsageError, match=text) as caught:
        detector(CudaArray(environment, make_image(0)))
    assert ".cpu().numpy()" in caught.value.fix


def test_a_gpu_image_with_a_letterbox_on_the_host_is_refused_and_later_calls_work(environment):
    runtime, image = environment.open(), make_image(1, 128, 192)
    area = fit_evaluation_letterbox((128, 192), (64, 96), size=96)
    for _ in range(2):
        with pytest.raises(UsageError, match="applied on the host"):
            runtime.infer([CudaArray(environment, image)], [area], Thresholds(conf=0.25, multi_label=True))
        for seed in range(3):
            assert_detected(infer(runtime, [make_image(seed)]).detections[0], make_image(seed))


def test_a_stream_waits_for_the_pending_work_of_another(environment):
    cuda, data, found = environment.cuda, np.arange(4, dtype=np.uint8), np.zeros(4, np.uint8)
    with Stream(cuda) as theirs, Stream(cuda) as ours, DeviceBuffer(cuda, (6,), np.uint8) as buffer:
        theirs.upload(buffer, data, offset=2)
        ours.follow(theirs.handle)
        ours.copy(buffer.pointer, buffer.pointer + 2, 4)
        ours.download(found, buffer)
        ours.synchronize()
        assert found.tolist() == [0, 1, 2, 3]
        assert (cuda.gpu_of(buffer.pointer + 5), cuda.gpu_of(data.ctypes.data)) == (0, None)
