# SPDX-License-Identifier: Apache-2.0
"""Where views and labels come from: meshes, renders, BOP folders and bags."""
