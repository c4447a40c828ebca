# SPDX-License-Identifier: Apache-2.0
"""Losses and images of a run in the visualizer backends of its config: TensorBoard, W&B, MLflow, or files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from mmzsq.patching import patched


@contextmanager
def open_backends(runner: Runner) -> Iterator[None]:
    """Keep the backends of a runner open inside the block, and close them at its end.

    MMEngine's ``LoggerHook`` closes them after the training. The evaluation that follows writes to them too, and W&B
    takes nothing after its ``finish()``.

    Args:
        runner: The runner whose visualizer is used.
    """
    visualizer = runner.visualizer
    close = visualizer.close
    try:
        with patched(visualizer, 'close', lambda: None):
            yield
    finally:
        try:
            close()
        except Exception as error:
            # The last upload of a tracker. The run itself needs none.
            runner.logger.warning(f'vis_backends did not close: {type(error).__name__}: {error}')


class Backends:
    """Writes to the backends of ``vis_backends``, on rank 0. A failure is a warning, and nothing more is written then.

    Args:
        runner: The runner whose visualizer is used.
    """

    def __init__(self, runner: Runner) -> None:
        self.logger = runner.logger
        self.visualizer = runner.visualizer
        self._works = True

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers.

        Args:
            values: Number by name.
            step: Position in their curves.
        """
        self._write(lambda: self.visualizer.add_scalars(dict(values), step=step))

    def add_image(self, name: str, draw: Callable[[], np.ndarray], step: int) -> None:
        """Add an image.

        Args:
            name: Its name, part of a file name in MMEngine's ``LocalVisBackend``.
            draw: Returns the image, RGB (H, W, 3), uint8.
            step: Its position in the series of this name.
        """
        self._write(lambda: self.visualizer.add_image(name, draw(), step=step))

    def _write(self, write: Callable[[], None]) -> None:
        if not self._works or not is_main_process():
            return
        try:
            write()
        except Exception as error:
            # A backend may need the network, and a run does not need a backend.
            self._works = False
            self.logger.warning(f'no more losses and images in vis_backends: {type(error).__name__}: {error}')
