# SPDX-License-Identifier: Apache-2.0
"""Any head can provide a label prior: by implementing the protocol or through an adapter."""

import torch
from mmdet.models.dense_heads import YOLOV3Head
from torch import Tensor, nn

from mmzsq.tasks.label_prior import LabelPriorHead, label_prior, label_prior_head


class Head(nn.Module):
    """A head that predicts two categories and implements the protocol."""

    def anchor_sizes(self) -> Tensor:
        return torch.tensor([[10.0, 20.0]])

    def class_biases(self) -> list[Tensor]:
        return [torch.zeros(1, 2), torch.full((1, 2), 100.0)]


def test_a_head_with_the_protocol_gives_its_anchors_and_mean_probabilities() -> None:
    detector = nn.Module()
    detector.bbox_head = Head()
    prior = label_prior(detector, 2)
    assert prior.sizes is not None and prior.sizes.tolist() == [[10.0, 20.0]]
    assert prior.categories is not None
    torch.testing.assert_close(prior.categories, torch.tensor([0.75, 0.75]))


def test_an_adapter_serves_subclasses_of_its_head() -> None:
    class Other(YOLOV3Head):
        pass

    head = Other(num_classes=3, in_channels=(8, 8, 8), out_channels=(8, 8, 8), train_cfg=None)
    adapted = label_prior_head(head)
    assert isinstance(adapted, LabelPriorHead)
    assert adapted.anchor_sizes().shape == (9, 2)
    assert [biases.shape for biases in adapted.class_biases()] == [(3, 3)] * 3


def test_other_heads_have_no_label_prior_interface() -> None:
    assert label_prior_head(nn.Linear(2, 2)) is None
