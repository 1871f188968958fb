# SPDX-License-Identifier: Apache-2.0
"""How does one image become poses? Crops, the network, its votes, PnP and the estimator."""
