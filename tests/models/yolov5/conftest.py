# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of YOLOv5."""

from __future__ import annotations

import pytest
from plain_yolov5 import PlainYOLOv5


@pytest.fixture
def plain() -> type[PlainYOLOv5]:
    """The plain YOLOv5."""
    return PlainYOLOv5
