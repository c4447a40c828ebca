# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints of other projects to the detectors of this package."""
