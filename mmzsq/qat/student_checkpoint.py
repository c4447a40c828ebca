# SPDX-License-Identifier: Apache-2.0
"""Checks that a checkpoint holds a student of the given settings, and loading of the student alone."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from torch import Tensor, nn

from mmzsq.checkpoint import read_checkpoint
from mmzsq.errors import UserError
from mmzsq.qat.zero_shot_detector import ZeroShotDetector, trained_quantization
from mmzsq.quantization import quantizers
from mmzsq.weights import fitting_weights, is_quantized, unwrapped_weights

INPUT_SCALES = ('.input_scale', '.log_input_scale')
"""Ends of the names of fixed and learned input factors."""
SHOWN_LENGTH = 100
"""Length to which a message shortens a setting. The bits of all layers would fill a page."""


def load_student(detector: ZeroShotDetector, checkpoint: str) -> dict[str, Any]:
    """Load a quantized checkpoint into the student. The teacher is not needed.

    Args:
        detector: Built from the config that the checkpoint was trained with.
        checkpoint: A file (.pth or .safetensors), a URL or ``mmzsq://NAME``.

    Returns:
        The ``meta`` of the checkpoint; empty if it has none.

    Raises:
        UserError: If the checkpoint cannot be read, is a float checkpoint, was trained with other settings, or belongs
            to another detector.
    """
    loaded = read_checkpoint(checkpoint)
    detector.load_bits_from(loaded)
    detector.load_state_dict(check_student(detector, loaded, checkpoint), strict=False)
    check_initialized(detector.student)
    return dict(loaded.get('meta') or {})


def check_student(detector: ZeroShotDetector, loaded: Mapping[str, Any], checkpoint: str) -> dict[str, Tensor]:
    """Check that a checkpoint is one of this student: its settings, and every tensor.

    Args:
        detector: The model; its bits are those of the checkpoint already if they are allocated.
        loaded: Content of the checkpoint.
        checkpoint: Its name, for messages.

    Returns:
        The weights under the names of the model.

    Raises:
        UserError: If it is a float checkpoint, was trained with other settings, or belongs to another detector.
    """
    own = detector.state_dict()
    if not is_quantized(loaded):
        raise UserError(_is_float([name for name in own if '_quantizer.' in name], checkpoint))
    check_settings(detector, loaded)
    check_input_scales(detector, unwrapped_weights(own, loaded))
    remedy = 'Give the config that it was trained with'
    if 'ema_state_dict' in loaded:
        # Resumed training continues from these.
        fitting_weights(own, dict(state_dict=loaded['ema_state_dict']), f'ema_state_dict of {checkpoint}', remedy)
    return fitting_weights(own, loaded, checkpoint, remedy)


def check_settings(detector: ZeroShotDetector, checkpoint: Mapping[str, Any]) -> None:
    """Reject a checkpoint with other quantization settings, which would load without an error.

    Args:
        detector: The model; its bits are those of the checkpoint already if they are allocated.
        checkpoint: Content of the file. One without settings passes.

    Raises:
        UserError: If settings of integers differ.
    """
    trained = trained_quantization(checkpoint)
    if trained is None:
        return
    before, now = trained.integers(), detector.quantization_config.integers()
    differing = [
        f'{key} {shorten(repr(before[key]), SHOWN_LENGTH)}, not {shorten(repr(now[key]), SHOWN_LENGTH)}'
        for key in before
        if before[key] != now[key]
    ]
    if differing:
        raise UserError(
            f'the checkpoint was trained with other settings of zsq.quantizer: {"; ".join(differing)}. Give the '
            'config that it was trained with, which its run keeps in the work directory'
        )


def check_input_scales(detector: nn.Module, state: Mapping[str, Any]) -> None:
    """Reject a checkpoint with input scales (``zsq.quantizer.equalize``) in other layers than the model has.

    The weights of the checkpoint compensate for its input scales.

    Args:
        detector: The model.
        state: State dict of the checkpoint. A float one passes.

    Raises:
        UserError: Names a layer with an input scale in only one of the two.
    """
    if not any('_quantizer.' in name for name in state):
        return
    loaded, own = ({name for name in names if name.endswith(INPUT_SCALES)} for names in (state, detector.state_dict()))
    if loaded != own:
        raise UserError(
            'the checkpoint has input scales in other layers than the model (zsq.quantizer.equalize), such as '
            f'{min(loaded ^ own).rpartition(".")[0]} in only one of the two, and its weights compensate for '
            'them. Give the config that it was trained with, or train again'
        )


def check_initialized(student: nn.Module) -> None:
    """Reject a student whose quantizers have no steps.

    Raises:
        UserError: If quantizers are not initialized.
    """
    names = uninitialized(student)
    if names:
        raise UserError(_is_float(names, 'this checkpoint'))


def uninitialized(student: nn.Module) -> list[str]:
    """Return the names of the quantizers without steps."""
    return [name for name, quantizer in quantizers(student) if not quantizer.ready]


def _is_float(names: list[str], checkpoint: str) -> str:
    return (
        f'{checkpoint} holds no quantizer steps ({len(names)} are missing, such as {names[0]}): it is a '
        "float checkpoint. Test it with the detector's own config, or use the checkpoint that training wrote"
    )
