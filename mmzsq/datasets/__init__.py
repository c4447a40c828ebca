# SPDX-License-Identifier: Apache-2.0
"""Data sets, transforms and the collate function."""

from mmzsq.datasets.calibration import CalibrationDataset
from mmzsq.datasets.collate import stack_images
from mmzsq.datasets.first_images import FirstImages
from mmzsq.datasets.seeded import SeededDataset, SeededSampler
from mmzsq.datasets.shapes import ShapesDataset

__all__ = ['CalibrationDataset', 'FirstImages', 'SeededDataset', 'SeededSampler', 'ShapesDataset', 'stack_images']
