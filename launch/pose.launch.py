# SPDX-License-Identifier: Apache-2.0
"""Start the pose node: ros2 launch ukd_ros pose.launch.py image:=/camera/image_raw model:=my_part rviz:=true."""

from __future__ import annotations

from typing import Any

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node

from ukd_ros.ros.fastdds import profile_environment, share_file
from ukd_ros.ros.launch_arguments import full_name, logger_name

NODE_NAME = "pose_node"

# Launch argument -> (parameter's type, description). An empty value leaves the parameter to params_file or its default.
PARAMETERS: dict[str, tuple[type, str]] = {
    "model": (str, "Model folder: a path, or the name of an installed model."),
    "object": (str, "Object whose best instance is on ~/pose; empty: the model's first."),
    "backend": (str, "Runtime of the network: auto, onnxruntime, opencv or torch."),
    "compressed": (bool, "Subscribe to <image>/compressed: true or false."),
    "rectified": (str, "Whether the images are rectified: auto (by the topic's name), true or false."),
    "conversions": (str, "Message conversions by ROS's packages (ros), by this package (own), or auto."),
    "detections": (bool, "Publish ~/detections (vision_msgs/Detection3DArray): true or false."),
}

ARGUMENTS: dict[str, tuple[str, str]] = {
    "image": ("image", "Image topic (without /compressed)."),
    "camera_info": ("", "CameraInfo topic; empty: camera_info beside the image topic."),
    "namespace": ("", "Namespace of the node and of its relative topics."),
    "params_file": ("", "YAML file of parameters; empty: config/pose.yaml of this package."),
    "dds_profile": ("true", "Give the node a Fast DDS profile with shared memory for images, unless one is set."),
    "log_level": ("info", "debug, info, warn, error or fatal."),
    "rviz": ("false", "Start RViz with this package's configuration."),
    "rviz_frame": ("camera_optical", "Fixed frame for RViz: the frame_id of the images."),
}


def camera_info_beside(image: str) -> str:
    """Return the camera_info topic that belongs to an image topic by image_transport's convention."""
    folder, slash, _ = image.rpartition("/")
    return f"{folder}{slash}camera_info"


def is_true(name: str, value: str) -> bool:
    """Return a boolean launch argument; RuntimeError when it is neither true nor false."""
    if value.lower() not in ("true", "false"):
        raise RuntimeError(f"launch argument {name}:={value} is neither true nor false.")
    return value.lower() == "true"


def given_parameters(context: LaunchContext) -> dict[str, Any]:
    """Return the node parameters that were given as launch arguments."""
    given: dict[str, Any] = {}
    for name, (kind, _) in PARAMETERS.items():
        value = LaunchConfiguration(name).perform(context)
        if value:
            given[name] = is_true(name, value) if kind is bool else value
    return given


def start(context: LaunchContext) -> list[Any]:
    """Return the actions that the arguments ask for."""
    argument = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    actions: list[Any] = []
    if is_true("dds_profile", argument["dds_profile"]):
        variables, sentence = profile_environment()
        actions += [SetEnvironmentVariable(name, value) for name, value in variables.items()]
        actions.append(LogInfo(msg=sentence))
    params_file = argument["params_file"] or str(share_file("config/pose.yaml"))
    image = argument["image"]
    node = full_name(NODE_NAME, argument["namespace"], context.launch_configurations.get("ros_namespace", ""))
    actions.append(
        LifecycleNode(
            package="ukd_ros",
            executable="pose_node",
            name=NODE_NAME,
            namespace=argument["namespace"],
            output="screen",
            parameters=[params_file, given_parameters(context)],
            remappings=[("image", image), ("camera_info", argument["camera_info"] or camera_info_beside(image))],
            arguments=["--ros-args", "--log-level", f"{logger_name(node)}:={argument['log_level']}"],
        )
    )
    if is_true("rviz", argument["rviz"]):
        outputs = ("overlay", "markers", "keypoints", "pose_with_covariance")
        actions.append(
            Node(
                package="rviz2",
                executable="rviz2",
                arguments=["-d", str(share_file("rviz/pose.rviz")), "-f", argument["rviz_frame"]],
                remappings=[(f"/{NODE_NAME}/{name}", f"{node}/{name}") for name in outputs],
            )
        )
    return actions


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and start the node with them."""
    declared = [
        DeclareLaunchArgument(name, default_value="", description=description)
        for name, (_, description) in PARAMETERS.items()
    ]
    declared += [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])
