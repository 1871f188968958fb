# SPDX-License-Identifier: Apache-2.0
"""Run exported models through this interpreter's OpenCV and compare with stored torch votes; 0 when all agree.

Usage: python opencv_versions.py FOLDER, which holds model folders and beside them `<model>_<graph>.npz`. It is run by
test_opencv_versions.py in environments that hold an old OpenCV, numpy and PyYAML, and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

from ukd_ros.perception.backends import open_backend
from ukd_ros.perception.bundle import load_bundle


def main(folder: Path) -> int:
    """Compare every model in a folder; return how many graphs differ."""
    wrong = seen = 0
    for manifest in sorted(folder.glob("*/model.yaml")):
        bundle = load_bundle(manifest.parent)
        for graph in bundle.graphs:
            expected = np.load(folder / f"{bundle.name}_{graph}.npz")
            votes = open_backend("opencv", bundle, graph).run(expected["image"])
            score = float(np.abs(votes.score - expected["score"]).max())
            xy = float((np.abs(votes.xy - expected["xy"]) - 1e-4 * np.abs(expected["xy"])).max())
            scale = float((np.abs(votes.scale - expected["scale"]) - 1e-3 * np.abs(expected["scale"])).max())
            agrees = score <= 1e-4 and xy <= 1e-2 and scale <= 1e-3
            print(f"{cv2.__version__} {bundle.name} {graph}: {score:.1e} {xy:.1e} px {scale:.1e} {agrees}")
            wrong += not agrees
            seen += 1
    return wrong if seen else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
