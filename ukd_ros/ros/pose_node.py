# SPDX-License-Identifier: Apache-2.0
"""The pose node: images and camera_info in, poses with covariance out, on a robot.

A lifecycle node: configure loads and warms up the model, activate subscribes; ``autostart`` (default) does both alone.
Callbacks only store the newest message; a worker thread answers it (``worker.py``) and ``outputs.py`` publishes.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header
from std_srvs.srv import SetBool

from ukd_ros.geometry.estimate import PoseEstimate, Rejection
from ukd_ros.geometry.view import View
from ukd_ros.perception.backends import BackendError
from ukd_ros.perception.bundle import BundleError
from ukd_ros.perception.images import camera_from_message
from ukd_ros.ros.diagnostics import (
    FrameStatistics,
    Input,
    ProblemLog,
    diagnostic_array,
    silence,
    statistics_values,
)
from ukd_ros.ros.inputs import CameraInfoCache, rectified_from
from ukd_ros.ros.interop import Conversions, Detections, InteropError, open_conversions
from ukd_ros.ros.loading import EstimatorFactory, LoadedModel, load_model
from ukd_ros.ros.messages import KnownObjects
from ukd_ros.ros.node_options import NodeOptions, check_object
from ukd_ros.ros.outputs import PoseOutputs
from ukd_ros.ros.parameter_file import pose_node_groups
from ukd_ros.ros.parameters import OptionParameters
from ukd_ros.ros.worker import FrameTools, FrameWorker, Job, Result

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble keeps it elsewhere
    from rclpy.qos_event import SubscriptionEventCallbacks

TICK_S = 1.0
"""Period of /diagnostics and of the watch over the inputs."""

INPUT_DEPTH = 5
"""As sensor data's profile has it: a burst waits for the callback, which drops and counts all but the newest."""

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


@dataclass
class Session:
    """What lives from configure to cleanup."""

    options: NodeOptions
    model: LoadedModel
    objects: KnownObjects
    conversions: Conversions
    outputs: PoseOutputs


class PoseNode(LifecycleNode):
    """See the module's docstring; topics and parameters are in README.md."""

    def __init__(self, estimator_factory: EstimatorFactory = load_model, **node_arguments: Any) -> None:
        """Declare parameters, /diagnostics and ~/set_enabled; ``node_arguments`` go to rclpy's node.

        ValueError or rclpy's ParameterException when a parameter was given a value that it refuses.
        """
        super().__init__("pose_node", **node_arguments)
        self._estimator_factory = estimator_factory
        self._session: Session | None = None
        self._worker: FrameWorker | None = None
        self._image_subscription: Any = None
        self._info_subscription: Any = None
        self._cameras: CameraInfoCache | None = None
        self._enabled = True
        self._state = "unconfigured"
        self._configure_problem = ""
        self._active_since_s = 0.0
        self._applied_version = 0
        self.statistics = FrameStatistics()
        self.problems = ProblemLog(lambda text: self.get_logger().warning(text))
        self._options = OptionParameters(
            self, pose_node_groups(), lambda: self._session is not None, self._check_options
        )
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._tick_timer = self.create_timer(TICK_S, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._enable_service = self.create_service(SetBool, "~/set_enabled", self._on_set_enabled)

    # -- lifecycle -------------------------------------------------------------------------------------------------

    def autostart(self) -> None:
        """Configure and activate when the parameter says so."""
        if self._options.group("").autostart and self.trigger_configure() == SUCCESS:
            self.trigger_activate()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and warm it up; on failure stay unconfigured with the reason in the log and /diagnostics."""
        options: NodeOptions = self._options.group("")
        try:
            self._session = self._open_session(options)
        except (BundleError, BackendError, InteropError, ValueError, OSError) as error:
            self._configure_problem = f"{type(error).__name__}: {error}"
        except Exception:  # rclpy would swallow it without a word
            self._configure_problem = f"an error inside the node:\n{traceback.format_exc().strip()}"
        else:
            self._configure_problem = ""
            self._state = "inactive"
            self._publish_diagnostics()
            return SUCCESS
        self.get_logger().error(f"configure failed, the node stays unconfigured: {self._configure_problem}")
        self._publish_diagnostics()
        return FAILURE

    def _open_session(self, options: NodeOptions) -> Session:
        conversions = open_conversions(options.conversions)
        detections = Detections() if options.detections else None
        self._applied_version = self._options.version
        model = self._estimator_factory(options, self._options.group("estimator"))
        objects = KnownObjects.of(model.objects)
        check_object(options.object, objects)
        camera = model.warm_up_camera
        model.estimator.estimate(View(np.full((camera.height, camera.width, 3), 127, dtype=np.uint8), camera))
        model.estimator.reset()
        outputs = PoseOutputs(self, objects, conversions, detections)
        self.get_logger().info(
            f"model {model.description} ({', '.join(objects.numbers)}) by {model.backend}; {conversions.describe()}"
        )
        return Session(options, model, objects, conversions, outputs)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe and start answering."""
        session = self._session
        if session is None:
            return FAILURE
        image_topic = self._image_topic(session.options)
        rectified = rectified_from(session.options.rectified, image_topic)
        which = "rectified (P, no distortion)" if rectified else "not rectified (K and D)"
        self._cameras = CameraInfoCache(rectified, camera_from_message)
        self.statistics.reset()
        session.model.estimator.reset()
        self._active_since_s = time.monotonic()
        self._worker = FrameWorker(
            FrameTools(
                topic=image_topic,
                conversions=session.conversions,
                cameras=self._cameras,
                estimate=self._estimate,
                publish=self._publish,
                statistics=self.statistics,
                problems=self.problems,
                log_change=lambda text: self.get_logger().info(text),
            )
        )
        self._worker.start()
        self._info_subscription = self._subscribe(CameraInfo, "camera_info", self._on_camera_info)
        self._state = "active"
        if self._enabled:
            self._subscribe_to_images()
        info_topic = self._info_subscription.topic_name
        self.get_logger().info(f"active: images from {image_topic}, taken as {which}; camera_info from {info_topic}")
        self._publish_diagnostics()
        return SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe and finish the frame at hand."""
        self._stop_answering()
        self._state = "inactive"
        self._publish_diagnostics()
        return SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of the model and the publishers."""
        self._release()
        self._state = "unconfigured"
        self._publish_diagnostics()
        return SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and let go of everything."""
        self._stop_answering()
        self._release()
        self._state = "finalized"
        return SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Return to unconfigured with nothing left open."""
        self._stop_answering()
        self._release()
        self._state = "unconfigured"
        return SUCCESS

    def _stop_answering(self) -> None:
        for subscription in (self._image_subscription, self._info_subscription):
            if subscription is not None:
                self.destroy_subscription(subscription)
        self._image_subscription = self._info_subscription = None
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        if self._session is not None:
            self._session.outputs.clear(Header(stamp=self.get_clock().now().to_msg()))

    def _release(self) -> None:
        if self._session is not None:
            self._session.outputs.destroy()
        self._session = None

    def destroy_node(self) -> None:
        """Stop the worker before the node goes."""
        self._stop_answering()
        super().destroy_node()

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _image_topic(self, options: NodeOptions) -> str:
        topic: str = self.resolve_topic_name("image")
        # As image_transport does it: the transport's name follows the (remapped) image topic.
        return self.resolve_topic_name(f"{topic}/compressed") if options.compressed else topic

    def _subscribe(self, kind: Any, topic: str, callback: Callable[[Any], None]) -> Any:
        # Sensor data's profile, but our own object: rclpy writes the user's qos_overrides into the one it is given.
        qos = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=INPUT_DEPTH)
        events = SubscriptionEventCallbacks(incompatible_qos=lambda event: self._on_incompatible_qos(topic, event))
        options = QoSOverridingOptions.with_default_policies()
        return self.create_subscription(
            kind, topic, callback, qos, event_callbacks=events, qos_overriding_options=options
        )

    def _subscribe_to_images(self) -> None:
        if self._session is not None and self._image_subscription is None:
            options = self._session.options
            kind = CompressedImage if options.compressed else Image
            self._image_subscription = self._subscribe(kind, self._image_topic(options), self._on_image)

    def _on_image(self, message: Any) -> None:
        now_s = time.monotonic()
        worker = self._worker
        if worker is None:
            return
        stamp = message.header.stamp
        dropped = worker.slot.put(Job(message, now_s))
        self.statistics.image_arrived(stamp.sec * 10**9 + stamp.nanosec, dropped)

    def _on_camera_info(self, message: Any) -> None:
        self.statistics.info_arrived()
        if self._cameras is None:
            return
        error = self._cameras.store(message)
        if error is not None:
            self.problems.report("camera_info", f"{self.resolve_topic_name('camera_info')}: {error}")

    def _on_incompatible_qos(self, topic: str, event: Any) -> None:
        policy = str(event.last_policy_kind).rsplit(".", maxsplit=1)[-1]
        self.problems.report(
            f"qos {topic}",
            f"{self.resolve_topic_name(topic)}: a publisher offers a quality of service that this subscription does "
            f"not accept (policy {policy}); nothing will arrive from it. Adjust the publisher, or this node's "
            "qos_overrides parameters.",
        )

    def _on_set_enabled(self, request: Any, response: Any) -> Any:
        self._enabled = bool(request.data)
        if self._state == "active" and self._enabled:
            self._active_since_s = time.monotonic()
            self._subscribe_to_images()
        elif self._image_subscription is not None and not self._enabled:
            self.destroy_subscription(self._image_subscription)
            self._image_subscription = None
        when = "now" if self._state == "active" else f"when the node is activated (it is {self._state})"
        response.success = True
        response.message = f"{'answering' if self._enabled else 'ignoring'} images {when}"
        self.get_logger().info(response.message)
        return response

    # -- one frame, in the worker's thread -------------------------------------------------------------------------

    def _estimate(self, view: View) -> Result:
        session = self._session
        if session is None:
            raise ValueError("the node was cleaned up while a frame was on its way.")
        if self._applied_version != self._options.version:
            self._applied_version = self._options.version
            session.model.apply(self._options.group("estimator"))
        result: Result = session.model.estimator.estimate(view)
        return result

    def _publish(
        self,
        header: Header,
        view: View | None,
        estimates: tuple[PoseEstimate, ...],
        rejections: tuple[Rejection, ...],
    ) -> None:
        session, options = self._session, self._options.group("")
        if session is not None:
            selected = options.object or session.model.objects[0].name
            session.outputs.publish(header, view, estimates, rejections, selected, options.marker_lifetime_s)

    # -- parameters and health -------------------------------------------------------------------------------------

    def _check_options(self, groups: dict[str, Any]) -> None:
        if self._session is not None:
            check_object(groups[""].object, self._session.objects)

    def _tick(self) -> None:
        if self._state == "active" and self._enabled:
            self._watch_inputs()
        self._publish_diagnostics()

    def _watch_inputs(self) -> None:
        waited_s = time.monotonic() - self._active_since_s
        if self._session is None or waited_s < self._options.group("").input_timeout_s:
            return
        image_topic, info_topic = self._image_topic(self._session.options), self.resolve_topic_name("camera_info")
        images = Input(image_topic, self.statistics.received, self.count_publishers(image_topic))
        infos = Input(info_topic, self.statistics.camera_infos, self.count_publishers(info_topic))
        for silent, other in ((images, infos), (infos, images)):
            if silent.count == 0:
                self.problems.report(f"nothing on {silent.topic}", silence(silent, other, waited_s))
        lossy = self.statistics.lossy()
        if lossy is not None:
            self.problems.report("lossy input", f"{image_topic}: {lossy}")

    def _publish_diagnostics(self) -> None:
        level, message = DiagnosticStatus.OK, self._state
        fresh = self.problems.fresh()
        if self._state == "active" and not self._enabled:
            message = "paused by ~/set_enabled"
        if self._configure_problem:
            level, message = DiagnosticStatus.ERROR, f"configure failed: {self._configure_problem}"
        elif fresh:
            level, message = DiagnosticStatus.WARN, fresh[0].text
        values = {"state": self._state, "enabled": str(self._enabled).lower()}
        model = None if self._session is None else self._session.model
        if model is not None:
            values |= {"model": model.description, "backend": model.backend}
        if self._state == "active":
            values |= statistics_values(self.statistics, self.get_clock().now().nanoseconds)
        last = self.problems.last()
        values["last problem"] = "none" if last is None else f"{last[0]} ({last[1]:.0f} s ago)"
        values |= {f"problems: {kind}": str(count) for kind, count in self.problems.counts().items()}
        stamp = self.get_clock().now().to_msg()
        hardware_id = "" if model is None else model.description
        array = diagnostic_array(stamp, self.get_fully_qualified_name(), hardware_id, level, message, values)
        self._diagnostics_publisher.publish(array)


def main(args: list[str] | None = None) -> int:
    """Run the pose node until SIGINT or SIGTERM; return the exit status."""
    logging.basicConfig(level=logging.WARNING, format="[%(levelname)s] [%(name)s]: %(message)s")
    stop = threading.Event()
    # Our own handlers: rclpy's would pull the context away under a worker that is publishing.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    try:
        try:
            node = PoseNode()
        except (ParameterException, ValueError) as error:
            rclpy.logging.get_logger("pose_node").fatal(f"the node cannot start: {error}")
            return 2
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        node.autostart()
        while not stop.is_set() and rclpy.ok():
            executor.spin_once(timeout_sec=0.2)
        executor.shutdown()
        node.destroy_node()
        return 0
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
