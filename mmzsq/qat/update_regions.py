# SPDX-License-Identifier: Apache-2.0
"""LSQ's gradient scale in a RoI head, from the regions of all images of one weight update.

LSQ scales the gradient of a step by the number of quantized elements. In a RoI head this number follows from the number
of regions, which differs between images. It is averaged over the parts of the update, as divisors of losses are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from torch import Tensor, nn

from mmzsq.patching import patched_forwards
from mmzsq.quantization import quantizers
from mmzsq.update_parts import part_count, update_mean

WHOLE_IMAGE_HEADS = ('semantic_head', 'glbctx_head')
"""Children of a RoI head that see whole images."""


@contextmanager
def update_regions(detector: nn.Module) -> Iterator[None]:
    """Scale the gradients of steps in a RoI head by the regions of the whole update inside the block.

    Each call of a RoI extractor asks for one mean over all parts. Each part must call them in the same order.

    Args:
        detector: A detector, with or without quantizers. Nothing changes for one without a RoI head, and with one part.
    """
    roi_head = getattr(detector, 'roi_head', None)
    parts = part_count(in_update=True)
    if parts == 1 or not isinstance(roi_head, nn.Module):
        yield
        return
    affected = [
        (quantizer, quantizer.update_ratio)
        for name, quantizer in quantizers(roi_head)
        if not name.endswith('weight_quantizer') and name.split('.')[0] not in WHOLE_IMAGE_HEADS
    ]

    def counting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def extract(feats: Any, rois: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            own = len(rois)
            mean = update_mean(torch.full((1,), float(own), device=rois.device))
            # Without regions, no gradient is scaled.
            ratio = parts * float(mean) / own if own else 1.0
            for quantizer, _ in affected:
                quantizer.update_ratio = ratio
            return forward(feats, rois, *args, **kwargs)

        return extract

    extractors = [module for module in roi_head.modules() if isinstance(module, BaseRoIExtractor)]
    try:
        with patched_forwards({extractor: counting(extractor.forward) for extractor in extractors}):
            yield
    finally:
        for quantizer, ratio in affected:
            quantizer.update_ratio = ratio
