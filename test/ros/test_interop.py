# SPDX-License-Identifier: Apache-2.0
"""ROS's own conversions and ours agree where both are there; what is missing or broken is said with its cure."""

from __future__ import annotations

import array
import importlib.util
import subprocess
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from ros.ros_graph import estimate_of, image_message, object_model, some_cov, some_pose
from std_msgs.msg import Header

from ukd_ros.geometry.camera import Camera
from ukd_ros.perception.images import ImageError
from ukd_ros.ros import interop
from ukd_ros.ros.interop import Conversions, Detections, InteropError, open_conversions
from ukd_ros.ros.messages import KnownObjects, keypoint_rows

CAMERA = Camera(640, 480, np.array([[610.0, 0.0, 318.0], [0.0, 612.0, 242.0], [0.0, 0.0, 1.0]]))


class FakeBridge:
    """Reads and writes as cv_bridge documents it: 8-bit, row by row of whole pixels, any padding cut off unseen."""

    def encoding_to_dtype_with_channels(self, encoding: str) -> tuple[str, int]:
        known = {"rgb8": 3, "bgr8": 3, "mono8": 1}
        if encoding not in known:
            raise TypeError(f"Unrecognized image encoding [{encoding}]")
        return "uint8", known[encoding]

    def imgmsg_to_cv2(self, message: Any, desired_encoding: str) -> npt.NDArray[Any]:
        assert desired_encoding == "rgb8"
        channels = self.encoding_to_dtype_with_channels(message.encoding)[1]
        shape = (message.height, message.step // channels, channels)
        image: npt.NDArray[np.uint8] = np.ndarray(shape, np.uint8, buffer=message.data)[:, : message.width]
        if message.encoding == "bgr8":
            return image[..., ::-1]
        return np.repeat(image, 3, axis=2) if channels == 1 else image

    def cv2_to_imgmsg(self, image: npt.NDArray[Any], encoding: str) -> Any:
        from sensor_msgs.msg import Image

        height, width = image.shape[:2]
        data = array.array("B", image.tobytes())
        return Image(height=height, width=width, encoding=encoding, step=3 * width, data=data)


@pytest.fixture
def fake_ros(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install stand-ins for cv_bridge, tf_transformations and sensor_msgs_py that follow their documentation."""
    bridge: Any = types.ModuleType("cv_bridge")
    bridge.CvBridge = FakeBridge
    transformations: Any = types.ModuleType("tf_transformations")

    def quaternion_from_matrix(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        from scipy.spatial.transform import Rotation

        return -np.asarray(Rotation.from_matrix(matrix[:3, :3]).as_quat())  # either sign is right

    transformations.quaternion_from_matrix = quaternion_from_matrix
    package: Any = types.ModuleType("sensor_msgs_py")
    clouds: Any = types.ModuleType("sensor_msgs_py.point_cloud2")

    def create_cloud(header: Any, fields: Any, points: npt.NDArray[Any]) -> Any:
        from sensor_msgs.msg import PointCloud2

        cloud = PointCloud2(header=header, height=1, width=len(points), fields=fields, is_dense=False)
        cloud.point_step, cloud.row_step = points.itemsize, points.itemsize * len(points)
        cloud.data = array.array("B", points.tobytes())
        return cloud

    clouds.create_cloud = create_cloud
    package.point_cloud2 = clouds
    for module in (bridge, transformations, package, clouds):
        module.__spec__ = SimpleNamespace(name=module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(interop, "_check_bridge", lambda asked_by: None)
    yield


def both() -> tuple[Conversions, Conversions]:
    """Return ROS's conversions, the real ones where installed, and ours."""
    return open_conversions("ros"), open_conversions("own")


def agree(theirs: Conversions, ours: Conversions) -> None:
    for encoding in ("rgb8", "bgr8", "mono8"):
        message = image_message()
        message.encoding = encoding
        if encoding == "mono8":
            message.step, message.data = 640, message.data[: 640 * 480]
        np.testing.assert_array_equal(theirs.image_from_message(message), ours.image_from_message(message))
    image = np.random.default_rng(2).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    header = Header(frame_id="f")
    assert theirs.image_to_message(header, image) == ours.image_to_message(header, image)
    for seed in range(20):
        np.testing.assert_allclose(theirs.quaternion(some_pose(seed)), ours.quaternion(some_pose(seed)), atol=1e-12)
    model = object_model()
    estimate = estimate_of(model, some_pose(), some_cov(), CAMERA)
    for estimates in ([estimate], []):
        rows = keypoint_rows(estimates, [], KnownObjects.of((model,)))
        assert theirs.cloud(header, rows) == ours.cloud(header, rows)


def test_their_conversions_and_ours_agree(fake_ros: None) -> None:
    theirs, ours = both()
    assert theirs.describe() == "images by cv_bridge, quaternions by tf_transformations, clouds by sensor_msgs_py"
    agree(theirs, ours)


def test_the_real_packages_agree_with_ours() -> None:
    for module in ("cv_bridge", "tf_transformations", "sensor_msgs_py"):
        pytest.importorskip(module)
    agree(*both())


def test_what_cv_bridge_would_skew_is_read_rightly(fake_ros: None) -> None:
    theirs, ours = both()
    message = image_message()
    pixels = np.frombuffer(message.data, dtype=np.uint8).reshape(480, 1920)
    padded = np.zeros((480, 1924), dtype=np.uint8)
    padded[:, :1920] = pixels
    message.step, message.data = 1924, array.array("B", padded.tobytes())
    np.testing.assert_array_equal(theirs.image_from_message(message), pixels.reshape(480, 640, 3))
    message.data = message.data[:5000]
    with pytest.raises(ImageError, match="5000"):
        theirs.image_from_message(message)
    message.encoding = "rgb7"
    with pytest.raises(ImageError, match="rgb7"):
        theirs.image_from_message(message)


def test_compressed_images_need_no_bridge(fake_ros: None) -> None:
    from sensor_msgs.msg import CompressedImage

    data = array.array("B", cv2.imencode(".png", np.full((4, 5, 3), (1, 2, 3), np.uint8))[1].tobytes())
    image = open_conversions("ros").image_from_message(CompressedImage(format="png", data=data))
    np.testing.assert_array_equal(image[0, 0], [3, 2, 1])


@pytest.mark.parametrize("package", ["cv_bridge", "tf_transformations", "sensor_msgs_py"])
def test_asked_for_and_missing_names_the_apt_line(
    fake_ros: None, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in (package, f"{package}.point_cloud2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InteropError, match=rf"sudo apt install ros-\$ROS_DISTRO-{package.replace('_', '-')}"):
        open_conversions("ros")


def test_not_asked_for_is_not_imported() -> None:
    """In a fresh Python: the node and its own conversions load none of the optional packages."""
    optional = ("cv_bridge", "tf_transformations", "sensor_msgs_py", "tf2_ros", "vision_msgs")
    script = (
        "import sys; import ukd_ros.ros.pose_node; from ukd_ros.ros.interop import open_conversions; "
        "open_conversions('own'); "
        f"loaded = [m for m in {optional + ('torch', 'ot', 'rosbags', 'moderngl', 'trimesh', 'scipy', 'matplotlib')} "
        "if m in sys.modules]; sys.exit(', '.join(loaded) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_bridge_built_for_another_numpy_is_found_out_in_a_child(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if int(np.__version__.split(".")[0]) < 2 or importlib.util.find_spec("cv_bridge") is not None:
        pytest.skip("needs NumPy 2 and no real cv_bridge")
    (tmp_path / "cv_bridge.py").write_text(
        "import os\nclass CvBridge:\n    def cv2_to_imgmsg(self, *a):\n        os._exit(139)\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InteropError, match="numpy<2"):
        open_conversions("ros")
    conversions = open_conversions("auto")
    assert conversions.describe().startswith("images by own")
    assert "numpy<2" in caplog.text
    monkeypatch.delitem(sys.modules, "cv_bridge", raising=False)


def test_detections_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vision_msgs", None)
    monkeypatch.setitem(sys.modules, "vision_msgs.msg", None)
    with pytest.raises(InteropError, match=r"ros-\$ROS_DISTRO-vision-msgs"):
        Detections()


def test_detections_carry_pose_covariance_and_a_centred_box(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(**_: Any) -> Any:
        return SimpleNamespace(
            detections=[],
            results=[],
            hypothesis=SimpleNamespace(),
            pose=SimpleNamespace(),
            bbox=SimpleNamespace(center=None, size=SimpleNamespace()),
        )

    fake: Any = types.ModuleType("vision_msgs.msg")
    for name in ("Detection3DArray", "Detection3D", "ObjectHypothesisWithPose"):
        setattr(fake, name, record)
    monkeypatch.setitem(sys.modules, "vision_msgs", types.ModuleType("vision_msgs"))
    monkeypatch.setitem(sys.modules, "vision_msgs.msg", fake)
    model = object_model()
    estimate = estimate_of(model, some_pose(), some_cov(), CAMERA, instance=3)
    message = Detections().message(Header(frame_id="f"), [estimate], KnownObjects.of((model,)))
    detection = message.detections[0]
    assert detection.id == "part/3" and detection.results[0].hypothesis.class_id == "part"
    np.testing.assert_allclose(np.reshape(detection.results[0].pose.covariance, (6, 6)), some_cov())
    low, high = model.keypoints_3d.min(axis=0), model.keypoints_3d.max(axis=0)
    size, center = detection.bbox.size, detection.bbox.center.position
    np.testing.assert_allclose([size.x, size.y, size.z], high - low)
    expected = estimate.T_camera_object.transform(0.5 * (low + high)[None])[0]
    np.testing.assert_allclose([center.x, center.y, center.z], expected)
