# SPDX-License-Identifier: Apache-2.0
"""The ament_python way to install: colcon and pip alike put launch, config, rviz and models under share/ukd_ros."""

import os

from setuptools import find_packages, setup

NAME = "ukd_ros"
SHARE = os.path.join("share", NAME)


def shared(folder, without=()):
    """List every file below `folder` for data_files, in the same folder below share/ukd_ros, `without` some folders."""
    return [
        (os.path.join(SHARE, root), [os.path.join(root, name) for name in sorted(names)])
        for root, _, names in sorted(os.walk(folder))
        if names and "__pycache__" not in root and not any(root.startswith(left_out) for left_out in without)
    ]


ONNXRUNTIME = ["onnxruntime>=1.15"]
# lz4 and zstd come with rosbags; named because the chunks of bags are unpacked here, within limits.
BAGS = ["rosbags>=0.11", "lz4>=4.0", 'backports.zstd>=1.0; python_version < "3.14"']
DEMO = [*BAGS]  # the demo runs on OpenCV alone, and faster with onnxruntime
TRAIN = [
    *ONNXRUNTIME,
    "torch>=2.2",
    "POT>=0.9.5",
    "onnx>=1.14",
    "onnxslim>=0.1.40",
    "safetensors>=0.4",
    "scipy>=1.10",
    "matplotlib>=3.7",
    "tqdm>=4.60",
    "moderngl>=5.8",
    "trimesh>=4.0",
    "pillow>=9.0",
    *BAGS,
]
# ROS 2 Jazzy as wheels, for machines without a ROS 2 installation (x86-64 Linux, CPython 3.10 to 3.13).
ROS_WHEELS = [
    "ros-rclpy[fastrtps]==7.1.6",
    "ros-jazzy-common-interfaces",
    "ros-jazzy-diagnostic-msgs",
    "ros-jazzy-lifecycle-msgs",
    "ros-jazzy-std-srvs",
    "ros-jazzy-visualization-msgs",
]
TEST = ["pytest>=7", "pytest-xdist>=3", "mypy>=1.8", "ruff>=0.5", "types-PyYAML"]

setup(
    name=NAME,
    version="0.1.0",
    description="6D pose of known objects from one RGB camera, on a CPU, with a calibrated covariance, for ROS 2",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    maintainer="The ukd_ros developers",
    maintainer_email="maintainers@ukd-ros.example",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["numpy>=1.22", "opencv-python-headless>=4.5.4", "PyYAML>=5.4"],
    extras_require={
        "onnxruntime": ONNXRUNTIME,
        "demo": DEMO,
        "train": TRAIN,
        "ros-wheels": ROS_WHEELS,
        "test": TEST,
    },
    data_files=[
        (os.path.join("share", "ament_index", "resource_index", "packages"), [os.path.join("resource", NAME)]),
        (SHARE, ["package.xml"]),
        *shared("launch"),
        *shared("config"),
        *shared("rviz"),
        *shared("models", without=[os.path.join("models", "teachers")]),
    ],
    entry_points={
        "console_scripts": [
            "pose_node = ukd_ros.ros.pose_node:main",
            "distill_node = ukd_ros.ros.distill_node:main",
            "ukd = ukd_ros.cli:main",
        ],
    },
    zip_safe=True,
)
