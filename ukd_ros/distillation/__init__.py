# SPDX-License-Identifier: Apache-2.0
"""How does a small network learn what big ones know, and how sure they are? Training, calibration, evaluation."""
