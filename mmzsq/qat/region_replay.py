# SPDX-License-Identifier: Apache-2.0
"""The regions that the second stage of a detector looks at: written down in one run, looked at again in another.

Stages of a cascade look where the stage before has moved its boxes to, mask and grid heads where boxes were found. Of
two detectors these places differ, and answers to different regions could not be compared. Whatever the heads are, they
see regions through MMDetection's RoI extractors; there one run is made to look where another did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from torch import Tensor, nn

from mmzsq.patching import patched_forwards

Regions = dict[str, list[Tensor]]
"""RoIs, image index and xyxy pixels, (R, 5), of every call of each extractor, by the extractor's name."""


@contextmanager
def recording_regions(roi_head: nn.Module) -> Iterator[Regions]:
    """Inside the block, write down the regions that ``roi_head`` looks at.

    Args:
        roi_head: Any RoI head of MMDetection.

    Yields:
        The regions; complete at the end of the block.
    """
    regions: Regions = {name: [] for name, _ in _extractors(roi_head)}

    def record(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def look(feats: Any, rois: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            regions[name].append(rois)
            return forward(feats, rois, *args, **kwargs)

        return look

    with _replaced(roi_head, record):
        yield regions


@contextmanager
def replaying_regions(roi_head: nn.Module, regions: Regions) -> Iterator[None]:
    """Inside the block ``roi_head`` looks at the regions of another run, call by call, in place of its own.

    Args:
        roi_head: Of the same architecture as the one that :func:`recording_regions` saw.
        regions: What it saw.
    """
    calls = {name: iter(rois) for name, rois in regions.items()}

    def replay(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def look(feats: Any, rois: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return forward(feats, next(calls[name]), *args, **kwargs)

        return look

    with _replaced(roi_head, replay):
        yield


def _extractors(roi_head: nn.Module) -> Iterator[tuple[str, BaseRoIExtractor]]:
    for name, module in roi_head.named_modules():
        if isinstance(module, BaseRoIExtractor):
            yield name, module


@contextmanager
def _replaced(
    roi_head: nn.Module, replacement: Callable[[str, Callable[..., Tensor]], Callable[..., Tensor]]
) -> Iterator[None]:
    with patched_forwards(
        {extractor: replacement(name, extractor.forward) for name, extractor in _extractors(roi_head)}
    ):
        yield
