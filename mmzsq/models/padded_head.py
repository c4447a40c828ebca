# SPDX-License-Identifier: Apache-2.0
"""What heads share whose loss runs over padded targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.models.padded_targets import PaddedTargets, pad_targets


class PaddedTargetsHead(BaseDenseHead):
    """A head with :meth:`loss_by_targets`, which takes the labels of a batch as tensors of one shape."""

    def loss(self, x: Sequence[Tensor], batch_data_samples: Any) -> dict[str, Tensor]:
        """Compute the loss of features.

        Args:
            x: Features of each scale, (N, C, H, W).
            batch_data_samples: One ``DetDataSample`` an image, or the :class:`PaddedTargets` of all, whose shape does
                not depend on how many objects there are.

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
        """Compute the loss of raw outputs. Ignored instances are background, as upstream has it.

        Args:
            maps: Raw outputs as ``forward`` lists them.
            batch_gt_instances: The targets of each image.
            batch_img_metas: Not used.
            batch_gt_instances_ignore: Not used.

        Returns:
            See :meth:`loss_by_targets`.
        """
        return self.loss_by_targets(maps, pad_targets(batch_gt_instances))

    def loss_by_targets(self, maps: Sequence[Tensor], targets: PaddedTargets) -> dict[str, Tensor]:
        """Compute the loss of raw outputs for padded targets: fixed shapes, no wait for the device.

        Args:
            maps: Raw outputs as ``forward`` lists them.
            targets: The targets of the batch.

        Returns:
            Weighted terms, scalars, means over the batch.
        """
        raise NotImplementedError
