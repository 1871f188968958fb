# SPDX-License-Identifier: Apache-2.0
"""What do rosbags hold, and how do their frames become a data set?"""
