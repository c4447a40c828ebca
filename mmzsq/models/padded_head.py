# SPDX-License-Identifier: Apache-2.0
"""Base class of heads whose loss takes padded targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.models.padded_targets import PaddedTargets, pad_targets


class PaddedTargetsHead(BaseDenseHead):
    """A dense head whose loss :meth:`loss_by_targets` takes the labels of a batch as padded tensors."""

    def loss(self, x: Sequence[Tensor], batch_data_samples: Any) -> dict[str, Tensor]:
        """Compute the loss of features.

        Args:
            x: Features of each scale, (N, C, H, W).
            batch_data_samples: One ``DetDataSample`` per image, or :class:`PaddedTargets`, whose shape does not depend
                on the number of objects.

        Returns:
            See :meth:`loss_by_targets`.
        """
        if isinstance(batch_data_samples, PaddedTargets):
            (maps,) = self(x)
            return self.loss_by_targets(maps, batch_data_samples)
        losses: dict[str, Tensor] = super().loss(x, batch_data_samples)
        return losses

    def loss_by_feat(
        self,
        maps: Sequence[Tensor],
        batch_gt_instances: Sequence[InstanceData],
        batch_img_metas: Sequence[dict[str, Any]],
        batch_gt_instances_ignore: Sequence[InstanceData] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of raw outputs. As in the original implementation, ignored instances count as background.

        Args:
            maps: Raw outputs in the order of ``forward``.
            batch_gt_instances: Targets of each image.
            batch_img_metas: Unused.
            batch_gt_instances_ignore: Unused.

        Returns:
            See :meth:`loss_by_targets`.
        """
        return self.loss_by_targets(maps, pad_targets(batch_gt_instances))

    def loss_by_targets(self, maps: Sequence[Tensor], targets: PaddedTargets) -> dict[str, Tensor]:
        """Compute the loss of raw outputs for padded targets, with fixed shapes and without synchronization.

        Args:
            maps: Raw outputs in the order of ``forward``.
            targets: Targets of the batch.

        Returns:
            Weighted loss terms: scalars, averaged over the batch.
        """
        raise NotImplementedError
