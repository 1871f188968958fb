# SPDX-License-Identifier: Apache-2.0
"""Where is it in space? Poses, cameras, objects, keypoints and the metrics on them (numpy only)."""
