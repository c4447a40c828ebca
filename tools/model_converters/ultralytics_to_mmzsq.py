# SPDX-License-Identifier: Apache-2.0
"""Convert an Ultralytics YOLO checkpoint to mmzsq without executing code from the file.

    python tools/model_converters/ultralytics_to_mmzsq.py yolov5n.pt yolov5-n.safetensors

Supported are detectors of YOLOv5 v6.0 and later, YOLOv8, YOLO11 and YOLO26, of any size and with any classes. The
class names are stored with the weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmzsq import cli
from mmzsq.checkpoint import check_suffix, save_weights
from mmzsq.converters.detectors import convert_detector
from mmzsq.converters.ultralytics import read_ultralytics
from mmzsq.errors import UserError


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('checkpoint', type=Path, help="Ultralytics' .pt file")
    parser.add_argument('out', type=Path, help='the .safetensors or .pth file to write')
    return parser.parse_args()


def main() -> None:
    """Parse the command line and convert."""
    args = parse_args()
    sys.stdout.write(f'{convert(args.checkpoint, args.out)}\n')


def convert(checkpoint: Path, out: Path) -> str:
    """Convert a checkpoint.

    Args:
        checkpoint: Ultralytics' ``.pt`` file.
        out: The file to write, ``.safetensors`` or ``.pth``.

    Returns:
        A one-line summary.

    Raises:
        UserError: If the checkpoint is refused, is of no supported family, or ``out`` has another
            suffix.
    """
    check_suffix(out)
    source = read_ultralytics(checkpoint)
    converted = convert_detector(source.tensors)
    if len(source.classes) != converted.num_classes:
        raise UserError(f'{checkpoint} names {len(source.classes)} classes, but its head has {converted.num_classes}')
    save_weights(converted.state_dict, source.classes, out)
    parameters = sum(tensor.numel() for tensor in converted.state_dict.values())
    return (
        f'{out}: {converted.family}-{converted.size}, {converted.num_classes} classes, '
        f'{len(converted.state_dict)} tensors, {parameters / 1e6:.2f} M values'
    )


if __name__ == '__main__':
    cli.run(main)
