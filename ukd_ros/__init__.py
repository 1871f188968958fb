# SPDX-License-Identifier: Apache-2.0
"""Pose estimation from RGB images with a covariance that can be trusted, for ROS 2."""
