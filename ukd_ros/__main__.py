# SPDX-License-Identifier: Apache-2.0
"""`python -m ukd_ros` is `ukd`."""

from __future__ import annotations

import sys

from ukd_ros.cli import main

if __name__ == "__main__":
    sys.exit(main())
