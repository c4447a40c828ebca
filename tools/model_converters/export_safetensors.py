# SPDX-License-Identifier: Apache-2.0
"""Export the weights of a training checkpoint to one ``.safetensors`` file with its class names.

    python tools/model_converters/export_safetensors.py work_dirs/NAME/epoch_12.pth NAME.safetensors

The output holds the ``state_dict`` of the checkpoint, which is averaged with MMEngine's EMA hook, but no optimizer,
schedules or logs. ``load_from`` reads the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from mmzsq import cli
from mmzsq.checkpoint import check_suffix, read_checkpoint, save_weights
from mmzsq.class_names import checkpoint_classes
from mmzsq.errors import UserError


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('checkpoint', type=Path, help='checkpoint written by training')
    parser.add_argument('out', type=Path, help='the .safetensors file to write')
    return parser.parse_args()


def main() -> None:
    """Parse the command line and export."""
    args = parse_args()
    export(args.checkpoint, args.out)


def export(checkpoint: Path, out: Path) -> None:
    """Write the weights and class names of a checkpoint atomically.

    Args:
        checkpoint: A checkpoint of MMEngine's Runner.
        out: File to write: ``.safetensors``, or ``.pth`` in the format of ``torch.save``.

    Raises:
        UserError: If the checkpoint has no weights or no class names, or ``out`` has another suffix.
    """
    check_suffix(out)
    loaded = read_checkpoint(checkpoint)
    if 'state_dict' not in loaded:
        raise UserError(f'{checkpoint} has no state_dict: give a checkpoint written by training')
    classes = checkpoint_classes(loaded['meta'])
    if classes is None:
        raise UserError(
            f'{checkpoint} does not name its classes (meta.dataset_meta.classes): give a checkpoint written by training'
        )
    weights = {name: value for name, value in loaded['state_dict'].items() if isinstance(value, Tensor)}
    save_weights(weights, classes, out)


if __name__ == '__main__':
    cli.run(main)
