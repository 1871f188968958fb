# SPDX-License-Identifier: Apache-2.0
"""How does it live on the robot? Nodes, messages, parameters and diagnostics; rclpy is needed from here on."""
