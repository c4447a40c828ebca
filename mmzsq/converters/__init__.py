# SPDX-License-Identifier: Apache-2.0
"""Converters of foreign checkpoints into the detectors of this project."""
