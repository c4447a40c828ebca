# SPDX-License-Identifier: Apache-2.0
"""Print versions and devices of this machine, for a bug report.

``python -m mmzsq.env`` prints what MMEngine collects (Python, PyTorch, CUDA, GPUs), the versions of the packages that
this one builds on, and the processor. It reads no config, image or weight.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform

from mmengine.utils.dl_utils import collect_env

from mmzsq.version import __version__

PACKAGES = (
    'mmdet',
    'mmengine',
    'mmcv',
    'mmcv-lite',
    'mmyolo',
    'onedl-mmdetection',
    'onedl-mmengine',
    'onedl-mmcv',
    'torch',
    'torchvision',
    'triton',
    'numpy',
    'pycocotools',
    'pydantic',
    'onnx',
    'onnxruntime',
    'openvino',
)
"""Distributions whose versions are printed."""


def environment() -> dict[str, str]:
    """Collect versions and devices.

    Returns:
        Texts by name. Distributions that are not installed have the text ``'not installed'``.
    """
    found = {'mmzsq': __version__, 'Platform': platform.platform(), 'Processor': _processor()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = 'not installed'
    collected = {name: str(value) for name, value in collect_env().items()}
    # The build settings take two pages.
    collected.pop('PyTorch compiling details', None)
    return {**found, **collected}


def _processor() -> str:
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
    except OSError:
        names = []
    return f'{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} threads'


def main() -> None:
    """Print a line for each entry."""
    for name, text in environment().items():
        print(f'{name}: {text}')  # noqa: T201  the output of the tool


if __name__ == '__main__':
    main()
