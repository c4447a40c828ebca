# SPDX-License-Identifier: Apache-2.0
"""Losses, images and histograms of steps in the visualizer backends of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.registry import VISBACKENDS
from mmengine.visualization import BaseVisBackend

from mmzsq.engine.backends import Backends, open_backends
from mmzsq.visualization.steps import draw_steps, steps_by_kind

SCALARS: list[tuple[str, int, float]] = []
IMAGES: dict[tuple[str, int], np.ndarray] = {}


@VISBACKENDS.register_module(force=True)
class RecordingVisBackend(BaseVisBackend):
    """Keeps what a tracker such as TensorBoard, W&B or MLflow would show, and takes what they take."""

    closed = 0

    def _init_env(self) -> None:
        pass

    def close(self) -> None:
        type(self).closed += 1

    @property
    def experiment(self) -> RecordingVisBackend:
        return self

    def add_scalars(
        self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        assert 'step' not in scalar_dict, 'TensorboardVisBackend refuses this'
        assert not self.closed, 'WandbVisBackend takes nothing after wandb.finish()'
        SCALARS.extend((name, step, float(value)) for name, value in scalar_dict.items())

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        assert not self.closed
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        IMAGES[name, step] = image


def test_a_run_fills_the_backends_of_its_config(make_runner: Any) -> None:
    SCALARS.clear()
    IMAGES.clear()
    RecordingVisBackend.closed = 0
    backends = [dict(type='LocalVisBackend'), dict(type='RecordingVisBackend')]
    runner = make_runner(
        vis_backends=backends, visualizer=dict(type='DetLocalVisualizer', name='recording', vis_backends=backends)
    )
    runner.train()
    assert runner.not_evaluated is None and RecordingVisBackend.closed == 1
    curves: dict[str, list[int]] = {}
    for name, step, value in SCALARS:
        # Classes without an object have no accuracy.
        assert np.isfinite(value) or name.startswith('coco/')
        curves.setdefault(name, []).append(step)
    # Three images are two batches of a stage, and their iterations add up.
    assert curves['synthesis/relabel_detection'] == [1, 2, 3, 4]
    assert curves['synthesis/synthesize_BNStatisticsPrior'] == [1, 2]
    # Two epochs of two batches, by MMEngine's hook.
    assert max(curves['loss']) == 4 and 'lr' in curves and 'coco/bbox_mAP' in curves
    # Before the training, and after each epoch.
    assert {('steps', 0), ('steps', 2), ('steps', 4)} <= IMAGES.keys()
    assert {('synthesis_relabel', 2), ('synthesis_synthesize', 1), ('calibration_set', 0)} <= IMAGES.keys()
    assert not np.array_equal(IMAGES['steps', 0], IMAGES['steps', 4])
    names = {path.name for path in Path('out').rglob('vis_image/*.png')}
    assert {'steps_4.png', 'synthesis_relabel_2.png', 'calibration_set_0.png'} <= names
    _check_steps(runner.detector.student)


def _check_steps(student: Any) -> None:
    steps = steps_by_kind(student)
    layers = [module for module in student.modules() if hasattr(module, 'weight_quantizer')]
    expected = np.concatenate([layer.weight_quantizer.step.detach().numpy().ravel() for layer in layers])
    assert np.array_equal(np.sort(steps['weights']), np.sort(expected))
    assert len(steps['activations']) == sum(layer.input_quantizer.step.numel() for layer in layers)
    assert draw_steps(student).shape == (300, 800, 3)


def test_a_backend_that_fails_is_a_warning() -> None:
    class Offline:
        calls = 0

        def add_scalars(self, values: dict[str, float], step: int) -> None:
            self.calls += 1
            raise ConnectionError('no route to the tracker')

    warnings: list[str] = []
    logger = type('Logger', (), dict(warning=lambda self, text: warnings.append(text)))()
    runner: Any = type('Runner', (), dict(visualizer=Offline(), logger=logger))
    backends = Backends(runner)
    for step in range(3):
        backends.add_scalars(dict(loss=1.0), step)
    assert runner.visualizer.calls == 1
    assert warnings == ['no more losses and images in vis_backends: ConnectionError: no route to the tracker']


def test_a_backend_that_does_not_close_is_a_warning() -> None:
    class Offline:
        def close(self) -> None:
            raise ConnectionError('no route to the tracker')

    warnings: list[str] = []
    logger = type('Logger', (), dict(warning=lambda self, text: warnings.append(text)))()
    runner: Any = type('Runner', (), dict(visualizer=Offline(), logger=logger))
    with open_backends(runner):
        runner.visualizer.close()
    assert warnings == ['vis_backends did not close: ConnectionError: no route to the tracker']


def test_other_processes_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmzsq.engine.backends.is_main_process', lambda: False)
    runner: Any = type('Runner', (), dict(visualizer=None, logger=None))
    Backends(runner).add_image('steps', lambda: pytest.fail('an image is drawn'), 0)
