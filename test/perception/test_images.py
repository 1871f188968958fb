# SPDX-License-Identifier: Apache-2.0
"""What drivers send, rightly and wrongly, becomes a view or a sentence."""

from __future__ import annotations

import array
import struct
import zlib
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from ukd_ros.geometry.camera import DistortionModel
from ukd_ros.perception.images import (
    MAX_PIXELS,
    CameraInfoError,
    ImageError,
    camera_from_message,
    image_from_message,
    rectified_topic,
    view_from_messages,
)

Pixels = npt.NDArray[np.uint8]


def picture(width: int = 24, height: int = 16) -> Pixels:
    """Return a smooth RGB picture whose channels differ everywhere (smooth: chroma and Bayer sampling keep it)."""
    v, u = np.mgrid[:height, :width]
    return np.stack([40 + 4 * u, 200 - 5 * v, 90 + u + 2 * v], -1).astype(np.uint8)


def message(data: Any, width: int, height: int, encoding: str, step: int, big: int = 0) -> SimpleNamespace:
    """Return a plain object with the attributes of sensor_msgs/Image."""
    return SimpleNamespace(
        data=data,
        width=width,
        height=height,
        encoding=encoding,
        step=step,
        is_bigendian=big,
        header=SimpleNamespace(frame_id="camera", stamp=SimpleNamespace(sec=3, nanosec=5)),
    )


def raw(pixels: Pixels, encoding: str, pad: int = 0, big: int = 0) -> SimpleNamespace:
    """Return the message of an array [H,W] or [H,W,n], its rows padded by ``pad`` bytes of 255."""
    rows = pixels.reshape(len(pixels), -1).view(np.uint8)
    padded = np.pad(rows, ((0, 0), (0, pad)), constant_values=255)
    return message(padded.tobytes(), pixels.shape[1], pixels.shape[0], encoding, padded.shape[1], big)


def mosaic(rgb: Pixels, pattern: str) -> Pixels:
    """Return what a sensor with the 2x2 colour ``pattern`` (rows one after the other, e.g. "rggb") would read."""
    out = np.empty(rgb.shape[:2], np.uint8)
    for index, letter in enumerate(pattern):
        i, j = divmod(index, 2)
        out[i::2, j::2] = rgb[i::2, j::2, "rgb".index(letter)]
    return out


@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize(
    ("encoding", "order"),
    [("rgb8", [0, 1, 2]), ("bgr8", [2, 1, 0]), ("8UC3", [2, 1, 0]), ("rgba8", [0, 1, 2, 0]), ("bgra8", [2, 1, 0, 0])],
)
def test_colour_orders_survive_exactly(encoding: str, order: list[int], pad: int) -> None:
    rgb = picture()
    assert np.array_equal(image_from_message(raw(np.ascontiguousarray(rgb[..., order]), encoding, pad)), rgb)


@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_grey_becomes_three_equal_channels(encoding: str) -> None:
    grey = picture()[..., 0]
    out = image_from_message(raw(np.ascontiguousarray(grey), encoding, pad=3))
    assert np.array_equal(out, np.repeat(grey[..., None], 3, -1))


@pytest.mark.parametrize("big", [0, 1])
@pytest.mark.parametrize("encoding", ["mono16", "rgb16"])
def test_sixteen_bits_keep_the_upper_byte_in_either_byte_order(encoding: str, big: int) -> None:
    rgb = picture() if encoding == "rgb16" else np.repeat(picture()[..., :1], 3, -1)
    values = (rgb if encoding == "rgb16" else rgb[..., 0]).astype(np.uint16) * 256 + 17
    stored = np.ascontiguousarray(values.astype(">u2" if big else "<u2"))
    step = stored.shape[1] * 2 * (3 if encoding == "rgb16" else 1)
    out = image_from_message(message(stored.tobytes(), 24, 16, encoding, step, big))
    assert np.array_equal(out, rgb)


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
@pytest.mark.parametrize("depth", [8, 16])
def test_bayer_patterns_give_the_colours_back(pattern: str, depth: int) -> None:
    rgb = picture()
    sensor = mosaic(rgb, pattern)
    if depth == 16:
        sensor = (sensor.astype("<u2") << 8).view(np.uint8).reshape(16, 48)
    msg = message(sensor.tobytes(), 24, 16, f"bayer_{pattern}{depth}", 24 * depth // 8)
    error = np.abs(image_from_message(msg).astype(int) - rgb)[2:-2, 2:-2]
    # A slope of 5 per pixel is what interpolation may miss by; exchanged channels differ by 50 and more.
    assert error.max() <= 6


@pytest.mark.parametrize("encoding", ["yuv422", "uyvy", "yuv422_yuy2", "yuyv", "nv12", "nv21"])
def test_yuv_layouts_give_the_colours_back(encoding: str) -> None:
    rgb = picture()
    yuv = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)  # rows: 16 of Y, then 4 of U, 4 of V (12 samples per chroma row)
    y, u, v = yuv[:16], yuv[16:20].reshape(8, 12), yuv[20:].reshape(8, 12)
    if encoding.startswith("nv"):
        first, second = (u, v) if encoding == "nv12" else (v, u)
        data = np.concatenate([y, np.stack([first, second], -1).reshape(8, 24)])
        msg = message(data.tobytes(), 24, 16, encoding, 24)
    else:
        chroma = np.stack([u, v], -1).repeat(2, axis=0).reshape(16, 24)
        pair = [y, chroma] if encoding in ("yuv422_yuy2", "yuyv") else [chroma, y]
        msg = message(np.stack(pair, -1).tobytes(), 24, 16, encoding, 48)
    error = np.abs(image_from_message(msg).astype(int) - rgb)
    assert np.median(error) <= 3
    assert error.max() <= 14


def test_rgb8_is_a_read_only_window_and_every_container_is_read_alike() -> None:
    rgb = picture()
    data = array.array("B", rgb.tobytes())
    out = image_from_message(message(data, 24, 16, "rgb8", 72))
    assert not out.flags.writeable
    data[0] = 99
    assert out[0, 0, 0] == 99
    for container in (rgb.tobytes(), bytearray(rgb.tobytes()), rgb.reshape(-1), rgb.reshape(-1).tolist()):
        assert np.array_equal(image_from_message(message(container, 24, 16, "rgb8", 72)), rgb)


def test_the_last_row_may_lack_its_padding() -> None:
    msg = raw(picture(), "rgb8", pad=5)
    msg.data = msg.data[:-5]
    assert np.array_equal(image_from_message(msg), picture())
    msg.data = msg.data[:-1]
    with pytest.raises(ImageError, match="needs 1227 bytes, but it carries 1226"):
        image_from_message(msg)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoding": "jpeg2000"}, "jpeg2000.*rgb8"),
        ({"encoding": "16UC1"}, "depth image"),
        ({"encoding": ""}, "not understood"),
        ({"width": 0}, "no pixels"),
        ({"height": 0, "data": b""}, "no pixels"),
        ({"step": 71}, "step is 71"),
        ({"step": 0}, "step is 0"),
        ({"data": b""}, "needs 1152 bytes, but it carries 0"),
        ({"data": b"\x00" * 100}, "carries 100"),
        ({"width": 100_000, "height": 100_000, "step": 300_000}, "10000 megapixels"),
        ({"data": [300] * 1152}, "not bytes"),
        ({"data": "text"}, "not bytes"),
        ({"encoding": "nv12", "width": 23}, "multiple of 2"),
    ],
)
def test_bad_images_are_refused_with_a_sentence(changes: dict[str, Any], words: str) -> None:
    msg = raw(picture(), "rgb8")
    vars(msg).update(changes)
    with pytest.raises(ImageError, match=words):
        image_from_message(msg)


def compressed(data: bytes, layout: str = "jpeg") -> SimpleNamespace:
    """Return a plain object with the attributes of sensor_msgs/CompressedImage."""
    return SimpleNamespace(data=data, format=layout, header=raw(picture(), "rgb8").header)


def encoded(suffix: str, image: Pixels | None = None) -> bytes:
    """Return a BGR image as a file."""
    ok, data = cv2.imencode(suffix, picture()[..., ::-1] if image is None else image)
    assert ok
    return bytes(data.tobytes())


def test_png_is_exact_and_jpeg_close() -> None:
    assert np.array_equal(image_from_message(compressed(encoded(".png"), "png")), picture())
    jpeg = image_from_message(compressed(encoded(".jpg"), "rgb8; jpeg compressed bgr8"))
    assert np.abs(jpeg.astype(int) - picture()).max() <= 12


def test_a_file_written_without_channel_swap_is_read_in_the_order_its_format_names() -> None:
    swapped = encoded(".png", picture())  # an RGB array handed to a BGR codec
    assert np.array_equal(image_from_message(compressed(swapped, "rgb8; png compressed ")), picture())


def with_exif_rotation(jpeg: bytes) -> bytes:
    """Return the file with an EXIF block that asks the viewer to turn it by 90 degrees."""
    tiff = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    body = b"Exif\x00\x00" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def test_exif_rotation_is_ignored_because_the_camera_matrix_is_the_sensors() -> None:
    turned = with_exif_rotation(encoded(".jpg"))
    shown = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR)
    assert shown is not None and shown.shape[:2] == (24, 16)
    assert image_from_message(compressed(turned)).shape == (16, 24, 3)


def huge_png(width: int, height: int) -> bytes:
    """Return a tiny PNG whose header claims a huge size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    """Return a small JPEG whose frame header claims 65535x65535."""
    data = bytearray(encoded(".jpg"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "layout", "words"),
    [
        (encoded(".jpg")[:-40], "jpeg", "ends too early"),
        (encoded(".jpg")[:100], "jpeg", "ends too early"),
        (encoded(".jpg")[:3], "jpeg", "ends too early"),
        (encoded(".png")[:-30], "png", "ends too early"),
        (encoded(".png")[:60] + b"\x00" * 40 + encoded(".png")[100:], "png", "corrupt"),
        (b"\xff\xd8\xff" + b"\x11" * 200, "jpeg", "damaged|early"),
        (b"", "jpeg", "neither JPEG nor PNG"),
        (b"GIF89a" + b"\x00" * 50, "gif", "neither JPEG nor PNG"),
        (encoded(".png"), "16UC1; compressedDepth png", "depth"),
        (encoded(".png"), "16UC1; png compressed ", "depth"),
        (huge_png(100_000, 100_000), "png", "megapixels"),
        (huge_jpeg(), "jpeg", "megapixels"),
        (huge_png(0, 5), "png", "no pixels"),
    ],
)
def test_bad_compressed_images_are_refused_with_a_sentence(data: bytes, layout: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        image_from_message(compressed(data, layout))


@pytest.mark.parametrize(
    ("topic", "rectified"),
    [
        ("/camera/image_rect", True),
        ("image_rect", True),
        ("/camera/image_rect_color", True),
        ("/camera/image_rect_color/compressed", True),
        ("/camera/infra1/image_rect_raw", True),
        ("/zed/rgb/color/rect/image", True),
        ("/camera/image_raw", False),
        ("/direct/image_raw", False),
        ("/correction/image_raw", False),
        ("/unrectified/image_raw", False),
        ("/camera/image_unrect", False),
        ("/rectory_cam/image_raw/compressed", False),
    ],
)
def test_a_topic_says_rectified_by_a_word_of_its_own(topic: str, rectified: bool) -> None:
    assert rectified_topic(topic) is rectified


def test_the_limit_is_on_pixels_not_on_sides() -> None:
    assert 8000 * 6000 < MAX_PIXELS < 10_000 * 10_000


K = [500.0, 0.0, 320.0, 0.0, 510.0, 240.0, 0.0, 0.0, 1.0]
P = [480.0, 0.0, 315.0, -24.0, 0.0, 490.0, 235.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def info(**changes: Any) -> SimpleNamespace:
    """Return a plain object with the attributes of a calibrated sensor_msgs/CameraInfo."""
    values: dict[str, Any] = {
        "width": 640,
        "height": 480,
        "k": K,
        "p": P,
        "r": [1.0, 0, 0, 0, 1, 0, 0, 0, 1],
        "d": [0.1, -0.2, 0.001, 0.002, 0.03],
        "distortion_model": "plumb_bob",
        "binning_x": 0,
        "binning_y": 0,
        "roi": SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0, do_rectify=False),
        "header": SimpleNamespace(frame_id="camera", stamp=SimpleNamespace(sec=3, nanosec=5)),
    }
    values.update(changes)
    return SimpleNamespace(**values)


def region(x: int, y: int, width: int, height: int) -> SimpleNamespace:
    """Return a sensor_msgs/RegionOfInterest."""
    return SimpleNamespace(x_offset=x, y_offset=y, width=width, height=height, do_rectify=False)


def test_raw_takes_k_and_d_and_rectified_takes_p_without_distortion() -> None:
    camera = camera_from_message(info(), rectified=False)
    assert np.array_equal(camera.matrix, np.reshape(K, (3, 3)))
    assert camera.distortion_model is DistortionModel.PLUMB_BOB
    assert camera.distortion.tolist() == [0.1, -0.2, 0.001, 0.002, 0.03]
    flat = camera_from_message(info(), rectified=True)
    assert np.array_equal(flat.matrix, np.reshape(P, (3, 4))[:, :3])
    assert not flat.distorted


def test_ros1_messages_name_their_arrays_in_upper_case() -> None:
    msg = info()
    for name in "kpdr":
        setattr(msg, name.upper(), vars(msg).pop(name))
    assert np.array_equal(camera_from_message(msg, False).matrix, np.reshape(K, (3, 3)))


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("roi", [(0, 0, 0, 0), (0, 0, 640, 480), (100, 60, 401, 301)])
@pytest.mark.parametrize("binning", [(0, 0), (1, 1), (2, 2), (4, 2)])
def test_roi_and_binning_move_a_pixel_as_the_sensor_does(
    rectified: bool, roi: tuple[int, int, int, int], binning: tuple[int, int]
) -> None:
    """A bin averages b pixels, so its centre is the mean of theirs: (c + 0.5) / b - 0.5 after cutting the window."""
    camera = camera_from_message(info(roi=region(*roi), binning_x=binning[0], binning_y=binning[1]), rectified)
    full = camera_from_message(info(), rectified)
    points = np.array([[0.05, -0.04, 1.0], [0.0, 0.1, 1.3]])
    b = np.maximum(binning, 1)
    expected = (full.project(points) - roi[:2] + 0.5) / b - 0.5
    assert np.allclose(camera.project(points), expected, atol=1e-9)
    width, height = roi[2:] if roi[2] else (640, 480)
    assert (camera.width, camera.height) == (width // b[0], height // b[1])


@pytest.mark.parametrize(
    ("model", "d", "expected"),
    [
        ("plumb_bob", [], DistortionModel.NONE),
        ("plumb_bob", [0.0] * 5, DistortionModel.NONE),
        ("", [], DistortionModel.NONE),
        ("rational_polynomial", [0.1] * 8, DistortionModel.RATIONAL_POLYNOMIAL),
        ("equidistant", [0.0] * 4, DistortionModel.EQUIDISTANT),  # zero coefficients are still no pinhole
        ("fisheye", [0.01] * 4, DistortionModel.EQUIDISTANT),
    ],
)
def test_lens_models(model: str, d: list[float], expected: DistortionModel) -> None:
    assert camera_from_message(info(distortion_model=model, d=d), False).distortion_model is expected


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": [0.0] * 9, "p": [0.0] * 12}, "not calibrated.*camera_calibration"),
        ({"k": [float("nan")] * 9, "p": [float("nan")] * 12}, "NaN"),
        ({"width": 0, "height": 0}, "0x0"),
        ({"k": K[:8], "p": P[:11]}, "values, but"),
        ({"k": [-500.0, *K[1:]], "p": [-480.0, *P[1:]]}, "focal"),
        ({"roi": region(600, 0, 100, 100)}, "roi"),
        ({"roi": region(10, 10, 0, 0)}, "roi"),
        ({"binning_x": 2000}, "binning"),
    ],
)
def test_bad_camera_infos_are_refused_with_a_sentence(changes: dict[str, Any], words: str, rectified: bool) -> None:
    with pytest.raises(CameraInfoError, match=words):
        camera_from_message(info(**changes), rectified)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d": [float("inf")] * 5}, "D contains NaN"),
        ({"distortion_model": "thin_prism_fisheye"}, "thin_prism_fisheye.*plumb_bob"),
        ({"distortion_model": ""}, "is ''"),
        ({"d": [0.1, 0.2]}, "distortion"),
    ],
)
def test_bad_lenses_are_refused_for_raw_images_and_do_not_matter_for_rectified_ones(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CameraInfoError, match=words):
        camera_from_message(info(**changes), False)
    assert not camera_from_message(info(**changes), True).distorted


def test_rectified_without_p_says_to_use_the_raw_image() -> None:
    with pytest.raises(CameraInfoError, match="rectified: false"):
        camera_from_message(info(p=[0.0] * 12), True)


def image_640() -> SimpleNamespace:
    """Return a 640x480 image message."""
    return raw(picture(640, 480), "bgr8")


def test_a_view_carries_image_camera_stamp_and_frame() -> None:
    view = view_from_messages(image_640(), info(), rectified=False)
    assert (view.stamp_ns, view.frame_id) == (3_000_000_005, "camera")
    assert view.image.shape == (480, 640, 3)
    assert view.camera.matrix[0, 0] == 500.0


def test_a_camera_info_of_another_size_or_frame_is_refused() -> None:
    with pytest.raises(CameraInfoError, match="640x480.*1280x720"):
        view_from_messages(image_640(), info(width=1280, height=720), False)
    with pytest.raises(CameraInfoError, match="320x240"):
        view_from_messages(image_640(), info(binning_x=2, binning_y=2), False)
    other = info(header=SimpleNamespace(frame_id="left", stamp=SimpleNamespace(sec=0, nanosec=0)))
    with pytest.raises(CameraInfoError, match="'camera'.*'left'"):
        view_from_messages(image_640(), other, False)
