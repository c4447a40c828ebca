# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/extending.md run and do what the page says."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_detectors import shipped_detector
from torch import nn

from mmzsq.deploy import export
from mmzsq.deploy.runtime import Session
from mmzsq.registry import LABEL_SAMPLERS, MODELS, PRIORS, build_part


@pytest.fixture
def example(repo: Path) -> Iterator[Any]:
    """Run the block of the page with a name, and return its names."""
    page = (repo / 'docs' / 'extending.md').read_text(encoding='utf-8')
    registered = []

    def run(name: str) -> dict[str, Any]:
        (code,) = re.findall(rf'<!-- example: {name} -->\n```python\n(.*?)```', page, re.DOTALL)
        names: dict[str, Any] = {'__name__': 'my_parts'}
        exec(code, names)
        registered.extend(names)
        return names

    yield run
    for registry in (PRIORS, LABEL_SAMPLERS, MODELS):
        for name in registered:
            if registry.module_dict.get(name) is not None and registry.module_dict[name].__module__ == 'my_parts':
                registry.module_dict.pop(name)


def test_a_prior_is_the_distance_from_gray(example: Any) -> None:
    example('prior')
    prior = build_part(PRIORS, dict(type='GrayPrior', weight=2.0), 'zsq.synthesis.priors.0')
    images = torch.full((2, 3, 4, 4), 0.5)
    assert float(prior(images)) == 0
    images[0, 1] = 0.75
    assert float(prior(images)) == pytest.approx(2.0 * 0.25**2)


def test_a_sampler_draws_a_row_inside_the_image_from_the_generator_alone(example: Any) -> None:
    example('sampler')
    sampler = build_part(LABEL_SAMPLERS, dict(type='RowSampler', count=4), 'zsq.label_sampler')
    first, again = (sampler.sample(3, (40, 80), 7, torch.Generator().manual_seed(5)) for _ in range(2))
    for labels, repeated in zip(first, again, strict=True):
        assert labels.bboxes.tolist() == [[0, 10, 20, 30], [20, 10, 40, 30], [40, 10, 60, 30], [60, 10, 80, 30]]
        assert len(set(labels.labels.tolist())) == 1 and int(labels.labels.max()) < 7
        assert torch.equal(labels.labels, repeated.labels)


def test_a_loss_compares_directions(example: Any) -> None:
    example('loss')
    loss = MODELS.build(dict(type='mmzsq.DirectionLoss', loss_weight=3.0))
    features = [torch.randn(2, 4, 3, 3) for _ in range(2)]
    taps = loss.taps(nn.Module())
    teacher = {taps[0]: features}
    assert float(loss({taps[0]: [2 * f for f in features]}, teacher, nn.Module())) == pytest.approx(0, abs=1e-5)
    assert float(loss({taps[0]: [-f for f in features]}, teacher, nn.Module())) == pytest.approx(6)


def test_a_detector_tells_its_float_layers(example: Any) -> None:
    names = example('detector')
    detector = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Bilinear(4, 4, 2), nn.Linear(8, 2))
    assert set(names['float_layers'](copy.deepcopy(detector))) == {'1'}


def test_a_runtime_runs_an_exported_file(example: Any, repo: Path, tmp_path: Path) -> None:
    pytest.importorskip('onnxruntime')
    names = example('runtime')
    detector, _, _ = shipped_detector(repo, 8)
    export(detector, tmp_path / 'model.onnx', size=(64, 64), classes=list('abcdefgh'))
    runtime = names['ProviderRuntime'](tmp_path / 'model.onnx')
    images = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    boxes, scores = runtime(images)
    assert runtime.classes == list('abcdefgh')
    expected = Session(tmp_path / 'model.onnx', 'openvino')(images)
    # Two engines round a few values differently.
    np.testing.assert_allclose(boxes, expected[0], atol=1)
    np.testing.assert_allclose(scores, expected[1], atol=0.02)
