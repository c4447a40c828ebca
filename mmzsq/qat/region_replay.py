# SPDX-License-Identifier: Apache-2.0
"""Record the regions that the second stage of one detector sees, and replay them in another detector.

Each stage of a cascade sees the boxes that the previous stage refined; mask and grid heads see the detected boxes.
These regions differ between two detectors, and outputs for different regions cannot be compared. All heads see regions
through MMDetection's RoI extractors, so patching the extractors makes one run use the regions of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from torch import Tensor, nn

from mmzsq.patching import patched_forwards

Regions = dict[str, list[Tensor]]
"""RoIs (R, 5), image index and xyxy pixels, of every call of each extractor, by the name of the extractor."""


@contextmanager
def recording_regions(roi_head: nn.Module) -> Iterator[Regions]:
    """Record the regions that ``roi_head`` extracts inside the block.

    Args:
        roi_head: Any RoI head of MMDetection.

    Yields:
        The regions, complete at the end of the block.
    """
    regions: Regions = {name: [] for name, _ in _extractors(roi_head)}

    def record(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def extract(feats: Any, rois: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            regions[name].append(rois)
            return forward(feats, rois, *args, **kwargs)

        return extract

    with _patched_extractors(roi_head, record):
        yield regions


@contextmanager
def replaying_regions(roi_head: nn.Module, regions: Regions) -> Iterator[None]:
    """Replace the regions of each extractor call inside the block by those of another run.

    Args:
        roi_head: A RoI head of the same architecture as the recorded one.
        regions: Regions from :func:`recording_regions`.
    """
    calls = {name: iter(rois) for name, rois in regions.items()}

    def replay(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def extract(feats: Any, rois: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return forward(feats, next(calls[name]), *args, **kwargs)

        return extract

    with _patched_extractors(roi_head, replay):
        yield


def _extractors(roi_head: nn.Module) -> Iterator[tuple[str, BaseRoIExtractor]]:
    for name, module in roi_head.named_modules():
        if isinstance(module, BaseRoIExtractor):
            yield name, module


def _patched_extractors(
    roi_head: nn.Module, wrap: Callable[[str, Callable[..., Tensor]], Callable[..., Tensor]]
) -> AbstractContextManager[None]:
    """Wrap the forward of each RoI extractor inside the block.

    Args:
        roi_head: The RoI head that owns the extractors.
        wrap: Returns the new forward from the name of an extractor and its forward.
    """
    return patched_forwards({extractor: wrap(name, extractor.forward) for name, extractor in _extractors(roi_head)})
