# SPDX-License-Identifier: Apache-2.0
"""Load the full-precision teacher from a checkpoint, check it against its config, and compute its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmzsq.checkpoint import file_sha256, read_checkpoint
from mmzsq.errors import UserError
from mmzsq.weights import fitting_weights, is_quantized

REMEDY = (
    'Check that the config and its number of classes, num_classes of every head, match the training of the detector'
)


def load_teacher(detector: nn.Module, checkpoint: str | None, expected_sha256: str | None = None) -> dict[str, Any]:
    """Load the weights of a trained detector. The checkpoint must have every weight in the right shape, and no other.

    Args:
        detector: The detector that its config builds.
        checkpoint: A file (.pth or .safetensors) or a URL.
        expected_sha256: SHA-256 of the file, see :func:`check_sha256`.

    Returns:
        The ``meta`` of the checkpoint; empty if it has none.

    Raises:
        UserError: If no checkpoint is given, it cannot be read, has another SHA-256, belongs to another detector, or is
            the checkpoint of a quantized student.
    """
    if not checkpoint:
        raise UserError(
            'zero-shot quantization starts from a trained detector: set load_from in the config, or add '
            '--cfg-options load_from=PATH_OR_URL'
        )
    loaded = read_checkpoint(checkpoint)
    check_sha256(checkpoint, expected_sha256)
    meta = loaded['meta'] if 'state_dict' in loaded else {}
    teacher = (meta.get('mmzsq') or {}).get('teacher')
    remedy = f'Set load_from or zsq.teacher to the teacher of that student{f", {teacher}" if teacher else ""}'
    detector.load_state_dict(full_precision_weights(detector, loaded, checkpoint, remedy), strict=False)
    return meta


def full_precision_weights(
    detector: nn.Module, loaded: Mapping[str, Any], checkpoint: str, remedy: str
) -> dict[str, Tensor]:
    """Check that a checkpoint is one of a float detector: every tensor, and none of a quantizer.

    Args:
        detector: The detector.
        loaded: Content of the checkpoint.
        checkpoint: Its name, for messages.
        remedy: What to do if it is quantized.

    Returns:
        The weights under the names of the detector.

    Raises:
        UserError: If it is the checkpoint of a quantized student or of another detector.
    """
    if is_quantized(loaded):
        raise UserError(
            f'{checkpoint} is the checkpoint of a quantized student, but a full-precision detector is needed. {remedy}'
        )
    return fitting_weights(detector.state_dict(), loaded, checkpoint, REMEDY)


def check_sha256(checkpoint: str, expected: str | None) -> None:
    """Check the SHA-256 of the bytes of a checkpoint's file, after it was read.

    Args:
        checkpoint: A file or a URL.
        expected: 64 hexadecimal digits, as ``sha256sum`` prints them. None: nothing is checked.

    Raises:
        UserError: If the file has another SHA-256, or the checkpoint has no local file.
    """
    if expected is None:
        return
    found = file_sha256(checkpoint)
    if found is None:
        raise UserError(
            f'zsq.teacher_sha256 cannot be checked for {checkpoint}: download the file and set its path as zsq.teacher'
        )
    if found != expected.lower():
        raise UserError(
            f'the file of the teacher, {checkpoint}, has the SHA-256 {found}, but zsq.teacher_sha256 is {expected}. '
            'Give the file that the config was written for, or correct zsq.teacher_sha256 (sha256sum FILE)'
        )


def digest(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers of ``module``, independent of device and file format."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if name.endswith('num_batches_tracked'):
            continue
        sha.update(f'{name} {tuple(value.shape)} '.encode())
        sha.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
