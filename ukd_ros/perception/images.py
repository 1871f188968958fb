# SPDX-License-Identifier: Apache-2.0
"""From sensor messages to a `View`: the same functions for a live topic and for a bag.

A message is read by plain attribute access, so rclpy's and rosbags' message classes serve alike, ROS 1's too. Whatever
a driver may send wrong is an `ImageError` or a `CameraInfoError`: a sentence that says what is wrong and what cures
it. The caller adds the topic's name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.view import View

MAX_PIXELS = 50_000_000
"""Larger images are refused before anything is decoded: no camera on a robot makes them, but a broken header does."""

DEPTH_ENCODINGS = ("16UC1", "32FC1")

_TRANSPORTS = ("compressed", "compressedDepth", "theora", "ffmpeg", "zstd")
"""What image_transport appends to the name of an image topic."""

_Image = npt.NDArray[np.uint8]


class ImageError(ValueError):
    """An image message that cannot be read; the text says why and what to do."""


class CameraInfoError(ValueError):
    """A CameraInfo message that describes no usable camera; the text says why and what to do."""


def rectified_topic(topic: str) -> bool:
    """Return whether a topic's name says that its images are rectified.

    image_proc names them image_rect, image_rect_color or image_rect_mono, some drivers put them below /rect/. The
    letters elsewhere (/direct, /correction, /unrectified) say nothing.
    """
    parts = topic.strip("/").split("/")
    if len(parts) > 1 and parts[-1] in _TRANSPORTS:
        parts.pop()
    return not {"rect", "rectified"}.isdisjoint([*parts, *parts[-1].split("_")])


def is_depth(message: Any) -> bool:
    """Return whether an image message (raw or compressed) says of itself that it is one of depth."""
    if hasattr(message, "encoding"):
        return str(message.encoding) in DEPTH_ENCODINGS
    # compressed_image_transport writes "<encoding>; <codec> compressed <order>"
    layout = str(message.format)
    return "compresseddepth" in layout.lower() or layout.partition(";")[0].strip() in DEPTH_ENCODINGS


class _Encoding(NamedTuple):
    """How one value of sensor_msgs/Image.encoding is laid out and how it becomes RGB."""

    channels: int
    bytes_per_channel: int
    to_rgb: int | None  # a code of cv2.cvtColor; None: it is RGB
    rows: float = 1.0  # rows of data per image row (chroma planes follow the luma plane)
    even: tuple[int, int] = (1, 1)  # width and height must be multiples of these


def _encodings() -> dict[str, _Encoding]:
    """Return every encoding that is understood (sensor_msgs/image_encodings.hpp, and what drivers send besides)."""
    colors: dict[str, tuple[int, int | None]] = {
        "rgb": (3, None),
        "bgr": (3, cv2.COLOR_BGR2RGB),
        "rgba": (4, cv2.COLOR_RGBA2RGB),
        "bgra": (4, cv2.COLOR_BGRA2RGB),
        "mono": (1, cv2.COLOR_GRAY2RGB),
        # ROS names a Bayer pattern by its first two rows, OpenCV's constants by the second row and column.
        "bayer_rggb": (1, cv2.COLOR_BayerBG2RGB),
        "bayer_bggr": (1, cv2.COLOR_BayerRG2RGB),
        "bayer_gbrg": (1, cv2.COLOR_BayerGR2RGB),
        "bayer_grbg": (1, cv2.COLOR_BayerGB2RGB),
    }
    table: dict[str, _Encoding] = {}
    for name, (channels, code) in colors.items():
        even = (2, 2) if name.startswith("bayer") else (1, 1)
        table[f"{name}8"] = _Encoding(channels, 1, code, even=even)
        table[f"{name}16"] = _Encoding(channels, 2, code, even=even)
    # Nameless channels are taken in OpenCV's order, as cv_bridge produces them.
    table["8UC1"], table["8UC3"], table["8UC4"] = table["mono8"], table["bgr8"], table["bgra8"]
    uyvy, yuyv = (_Encoding(2, 1, code, even=(2, 1)) for code in (cv2.COLOR_YUV2RGB_UYVY, cv2.COLOR_YUV2RGB_YUY2))
    table.update({"yuv422": uyvy, "uyvy": uyvy, "yuv422_yuy2": yuyv, "yuyv": yuyv})
    table["nv12"] = _Encoding(1, 1, cv2.COLOR_YUV2RGB_NV12, 1.5, (2, 2))
    table["nv21"] = _Encoding(1, 1, cv2.COLOR_YUV2RGB_NV21, 1.5, (2, 2))
    return table


ENCODINGS = _encodings()


def image_from_message(message: Any) -> _Image:
    """Return the RGB image [H,W,3] uint8 of a sensor_msgs/Image or sensor_msgs/CompressedImage.

    An rgb8 image without padding is a read-only window on the message's data, not a copy. 16-bit channels keep their
    upper eight bits. Raises ImageError.
    """
    if hasattr(message, "format") and not hasattr(message, "encoding"):
        return _decompress(message)
    return _from_raw(message)


def _buffer(message: Any) -> npt.NDArray[np.uint8]:
    """Return the message's data as bytes [n] without copying (array.array, numpy, bytes; a list is copied)."""
    data = message.data
    try:
        raw = np.frombuffer(bytes(data) if isinstance(data, list | tuple) else data, dtype=np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise ImageError(f"The image's data is {type(data).__name__}, not bytes ({error}).") from error
    return raw


def _from_raw(message: Any) -> _Image:
    """Return the RGB image of a sensor_msgs/Image."""
    width, height, step = int(message.width), int(message.height), int(message.step)
    name = str(message.encoding)
    encoding = ENCODINGS.get(name) or ENCODINGS.get(name.lower())
    if encoding is None:
        raise ImageError(_unknown_encoding(name))
    _check_size(width, height, encoding, name)
    row = width * encoding.channels * encoding.bytes_per_channel
    if step < row:
        raise ImageError(
            f"The image is {width}x{height} {name}, which needs rows of {row} bytes, but its step is {step}. "
            "The driver fills the message wrongly: update it, or correct the encoding that it is configured to send."
        )
    rows = int(height * encoding.rows)
    data = _buffer(message)
    # The last row may come without its padding.
    needed = step * (rows - 1) + row
    if data.size < needed:
        raise ImageError(
            f"The image is {width}x{height} {name} with a step of {step}, which needs {needed} bytes, but it carries "
            f"{data.size}. It was cut off on its way or the driver fills the message wrongly; it is dropped."
        )
    pixels = np.lib.stride_tricks.as_strided(data, (rows, row), (step, 1), writeable=False)
    return _to_rgb(pixels, width, encoding, big_endian=bool(message.is_bigendian))


def _check_size(width: int, height: int, encoding: _Encoding, name: str) -> None:
    """Raise ImageError for a size that no image of this encoding has."""
    if width < 1 or height < 1:
        raise ImageError(f"The image is {width}x{height}: it has no pixels. Check the driver's resolution setting.")
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(width, height))
    if width % encoding.even[0] or height % encoding.even[1]:
        raise ImageError(
            f"The image is {width}x{height}, but {name} needs a width that is a multiple of {encoding.even[0]} and a "
            f"height that is a multiple of {encoding.even[1]}. Choose another resolution in the driver."
        )


def _to_rgb(pixels: _Image, width: int, encoding: _Encoding, big_endian: bool) -> _Image:
    """Return RGB [H,W,3] from rows of bytes [rows, bytes]."""
    if encoding.bytes_per_channel == 2:
        # The upper byte of each channel: a linear 16-to-8-bit reduction, as cv_bridge's.
        pixels = np.ascontiguousarray(pixels[:, (0 if big_endian else 1) :: 2])
    elif not pixels.flags.c_contiguous:
        pixels = np.ascontiguousarray(pixels)
    if encoding.channels > 1:
        pixels = pixels.reshape(pixels.shape[0], width, encoding.channels)
    if encoding.to_rgb is None:
        return pixels
    return np.asarray(cv2.cvtColor(pixels, encoding.to_rgb), dtype=np.uint8)


def _unknown_encoding(name: str) -> str:
    """Return the sentence for an encoding that is not understood."""
    if name in DEPTH_ENCODINGS:
        return f"The image's encoding is {name}: that is a depth image. Subscribe to the camera's colour image."
    known = ", ".join(sorted(ENCODINGS))
    return f"The image's encoding {name!r} is not understood. Set the driver to one of: {known}."


def _too_large(width: int, height: int) -> str:
    """Return the sentence for an image above the limit."""
    return (
        f"The image says it is {width}x{height} = {width * height / 1e6:.0f} megapixels; more than "
        f"{MAX_PIXELS // 1_000_000} are refused. Lower the camera's resolution, or crop or bin in the driver."
    )


def _decompress(message: Any) -> _Image:
    """Return the RGB image of a sensor_msgs/CompressedImage holding JPEG or PNG."""
    layout = str(message.format)
    if is_depth(message):
        raise ImageError(f"The image's format is {layout!r}: depth. Subscribe to the camera's compressed colour image.")
    data = _buffer(message)
    width, height = _compressed_size(data, layout)
    if width < 1 or height < 1:
        raise ImageError(f"The compressed image ({layout!r}) is {width}x{height}: it has no pixels; it is dropped.")
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(width, height))
    # EXIF rotation is ignored: CameraInfo describes the sensor as it is read out.
    try:
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageError(f"The compressed image ({layout!r}) cannot be decoded: {error}") from error
    if decoded is None or decoded.shape[:2] != (height, width):
        raise ImageError(
            f"The compressed image ({layout!r}, {data.size} bytes) is corrupt; it is dropped. If this goes on, "
            "look for a lossy link or a full disk where the bag was recorded."
        )
    if _stored_as_rgb(layout):
        return np.asarray(decoded, dtype=np.uint8)
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _stored_as_rgb(layout: str) -> bool:
    """Return whether red and blue are exchanged in the file.

    compressed_image_transport writes "<encoding>; <codec> compressed <order>" and hands the pixels to the codec in
    that order; without "compressed bgr" they went in as they were (its compressed_subscriber.cpp does the same test).
    """
    encoding, _, codec = layout.partition(";")
    return encoding.strip().startswith("rgb") and bool(codec) and "compressed bgr" not in codec


def _compressed_size(data: npt.NDArray[np.uint8], layout: str) -> tuple[int, int]:
    """Return (width, height) from the file's header, having checked that the file is complete. Raises ImageError."""
    head = data[:3].tobytes()
    reader: Callable[[bytes], tuple[int, int]]
    if head == b"\xff\xd8\xff":
        reader, codec = _jpeg_size, "JPEG"
    elif head == b"\x89PN":
        reader, codec = _png_size, "PNG"
    else:
        raise ImageError(
            f"The compressed image ({layout!r}, {data.size} bytes) is neither JPEG nor PNG. "
            "Set the publisher's format parameter to jpeg or png."
        )
    try:
        return reader(data.tobytes())
    except (IndexError, struct.error) as error:
        raise ImageError(
            f"The compressed image ({layout!r}, {data.size} bytes) is a {codec} that ends too early; it is dropped."
        ) from error


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) from a JPEG's frame header; IndexError or struct.error where the file ends too early."""
    at, size = 2, None
    while True:
        while data[at + 1] == 0xFF:  # fill bytes
            at += 1
        if data[at] != 0xFF:
            raise ImageError("The compressed image is a damaged JPEG (a marker is missing); it is dropped.")
        marker = data[at + 1]
        length = struct.unpack_from(">H", data, at + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = (width, height)
        at += 2 + length
        if marker == 0xDA:
            break
    # libjpeg fills what is missing with grey and says so on stderr only: look for the end marker behind the scan.
    if size is None or data.rfind(b"\xff\xd9") < at:
        raise IndexError("no frame header or no end")
    return size


def _png_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) from a PNG's first chunk; IndexError or struct.error where the file ends too early."""
    if data[12:16] != b"IHDR" or data.rfind(b"IEND") < 0:
        raise IndexError("no header or no end")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _field(info: Any, name: str) -> npt.NDArray[np.float64]:
    """Return a CameraInfo array; ROS 2 names it in lower case, ROS 1 in upper case."""
    value = getattr(info, name) if hasattr(info, name) else getattr(info, name.upper())
    return np.asarray(value, dtype=np.float64)


def camera_from_message(info: Any, rectified: bool) -> Camera:
    """Return the camera of the images that belong to a sensor_msgs/CameraInfo.

    ``rectified`` says which image is meant: True takes P[:3,:3] and no distortion, False K and D. The region of
    interest and the binning are applied, so the camera has the size of the published image; binned pixels keep their
    centres ((c + 0.5) / b - 0.5). Raises CameraInfoError.
    """
    width, height = int(info.width), int(info.height)
    if width < 1 or height < 1:
        raise CameraInfoError(
            f"CameraInfo says the camera is {width}x{height}. Set image_width and image_height in the camera's "
            "calibration file (run camera_calibration to make one)."
        )
    matrix = _projection(info, rectified)
    model, distortion = (DistortionModel.NONE, np.zeros(0)) if rectified else _distortion(info)
    try:
        camera = Camera(width, height, matrix, model, distortion)
    except ValueError as error:
        raise CameraInfoError(f"CameraInfo describes no usable camera: {error} Calibrate it again.") from error
    return _windowed(camera, info)


def _projection(info: Any, rectified: bool) -> npt.NDArray[np.float64]:
    """Return the 3x3 matrix [px] of the rectified or the raw camera."""
    name, columns = ("P", 4) if rectified else ("K", 3)
    values = _field(info, name.lower())
    if values.size != 3 * columns:
        raise CameraInfoError(f"CameraInfo.{name} has {values.size} values, but {3 * columns} are needed.")
    if not np.isfinite(values).all():
        raise CameraInfoError(
            f"CameraInfo.{name} contains NaN or infinity. The calibration file is damaged: run camera_calibration."
        )
    matrix = values.reshape(3, columns)[:, :3]
    if matrix[0, 0] == 0.0 or matrix[1, 1] == 0.0:
        if rectified and _field(info, "k")[0] != 0.0:
            raise CameraInfoError(
                "CameraInfo.P is zero although K is not: this camera publishes no rectified image. "
                "Use the raw image (rectified: false), or run image_proc with a full calibration."
            )
        raise CameraInfoError(
            f"CameraInfo.{name}[0] is 0: the camera is not calibrated. Run camera_calibration "
            "(ros2 run camera_calibration cameracalibrator) and give the driver the file that it writes."
        )
    return matrix


def _distortion(info: Any) -> tuple[DistortionModel, npt.NDArray[np.float64]]:
    """Return the lens model and its coefficients."""
    coefficients = _field(info, "d")
    name = str(info.distortion_model)
    if not np.isfinite(coefficients).all():
        raise CameraInfoError(
            "CameraInfo.D contains NaN or infinity. The calibration file is damaged: run camera_calibration."
        )
    if name in ("", "none") and not coefficients.any():
        return DistortionModel.NONE, np.zeros(0)
    name = {"fisheye": "equidistant"}.get(name, name)
    if name not in ("plumb_bob", "rational_polynomial", "equidistant"):
        raise CameraInfoError(
            f"CameraInfo.distortion_model is {name!r}; plumb_bob, rational_polynomial and equidistant are understood. "
            "Calibrate with one of them, or use a rectified image (image_proc) with rectified: true."
        )
    if name != "equidistant" and not coefficients.any():
        return DistortionModel.NONE, np.zeros(0)
    return DistortionModel(name), coefficients


def _windowed(camera: Camera, info: Any) -> Camera:
    """Return the camera of the region of interest, binned: what sensor_msgs/CameraInfo says is published."""
    roi = info.roi
    x, y, width, height = int(roi.x_offset), int(roi.y_offset), int(roi.width), int(roi.height)
    if width == 0 and height == 0 and x == 0 and y == 0:
        width, height = camera.width, camera.height
    binning_x, binning_y = max(1, int(info.binning_x)), max(1, int(info.binning_y))
    out_width, out_height = width // binning_x, height // binning_y
    inside = x >= 0 and y >= 0 and x + width <= camera.width and y + height <= camera.height
    if not inside or out_width < 1 or out_height < 1:
        raise CameraInfoError(
            f"CameraInfo.roi is {width}x{height} at ({x}, {y}) with binning {binning_x}x{binning_y}, which does not "
            f"fit the {camera.width}x{camera.height} sensor. Correct the driver's region of interest and binning."
        )
    if (x, y, width, height) != (0, 0, camera.width, camera.height):
        # Pixels that fill no whole bin are not published.
        camera = camera.cropped(x, y, out_width * binning_x, out_height * binning_y)
    elif out_width * binning_x != width or out_height * binning_y != height:
        camera = camera.cropped(0, 0, out_width * binning_x, out_height * binning_y)
    if (binning_x, binning_y) != (1, 1):
        camera = camera.resized(out_width, out_height)
    return camera


def view_from_messages(image_message: Any, info_message: Any, rectified: bool) -> View:
    """Return the view of an image message and the CameraInfo that belongs to it.

    Raises ImageError for the image, CameraInfoError for a CameraInfo that is wrong in itself, or of another size or
    frame than the image.
    """
    image = image_from_message(image_message)
    camera = camera_from_message(info_message, rectified)
    frame, other = str(image_message.header.frame_id), str(info_message.header.frame_id)
    if frame != other:
        raise CameraInfoError(
            f"The image's frame_id is {frame!r}, its CameraInfo's {other!r}: they are not of one camera. "
            "Remap camera_info to the topic of the same camera, or set the driver's frame_id."
        )
    height, width = image.shape[:2]
    if (camera.width, camera.height) != (width, height):
        raise CameraInfoError(
            f"The image is {width}x{height}, but its CameraInfo describes {camera.width}x{camera.height} images (after "
            "region of interest and binning). Calibrate at the resolution in use, or remap camera_info to the topic "
            "that comes with this image."
        )
    return View(image, camera, _stamp_ns(image_message.header.stamp), frame)


def _stamp_ns(stamp: Any) -> int:
    """Return a builtin_interfaces/Time (or ROS 1 time) in nanoseconds."""
    if hasattr(stamp, "nanosec"):
        return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)
    return int(math.floor(stamp.secs)) * 1_000_000_000 + int(stamp.nsecs)
