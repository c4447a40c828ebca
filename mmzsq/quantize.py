# SPDX-License-Identifier: Apache-2.0
"""Quantize a detector of Ultralytics or torchvision with one command, without a config.

``python -m mmzsq.quantize yolo11n.pt --bits w8a8 --target openvino`` writes converted weights and a config to the work
directory, trains the student as ``mmzsq.train`` does, and exports and verifies it as ``mmzsq.export`` does. The config
is the starting point for own settings.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmzsq import cli, export, train
from mmzsq.atomic_files import make_directory, write_atomically
from mmzsq.checkpoint import save_weights
from mmzsq.class_names import read_classes
from mmzsq.config.presets import PRESETS
from mmzsq.converters.files import COCO, SUPPORTED, ForeignDetector, convert_file
from mmzsq.errors import UserError

BITS = ('w8a8', 'w6a6', 'w5a5', 'w4a8', 'w4a4')
TARGETS = ('openvino', 'onnxruntime')
VERIFIED_IMAGES = 8
"""Synthetic images whose detections are compared with those of the exported file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, train, and export.

    Args:
        arguments: The command line, None: that of the process.
    """
    args = _parse_args(arguments)
    if args.target is not None:
        # Otherwise missing packages would show after the training.
        export.runtimes_for(args.target)
    names = None if args.classes is None else read_classes(str(args.classes), '--classes')
    detector = convert_file(args.file, names)
    work_dir = args.work_dir or Path('work_dirs', f'{args.file.stem}_{args.bits}')
    make_directory(work_dir)
    weights, config = work_dir / 'teacher.safetensors', work_dir / f'{args.file.stem}_{args.bits}.py'
    save_weights(detector.converted.state_dict, detector.classes, weights)
    text = leaf_config(detector, weights, args.bits, args.preset, args.target)
    write_atomically(config, text.encode())
    converted = detector.converted
    sys.stdout.write(f'{converted.family}-{converted.size}, {converted.num_classes} classes: {weights}, {config}\n')
    # MMEngine writes the composed config under the name of the leaf.
    run_dir = work_dir / 'run'
    run = ['--work-dir', str(run_dir)]
    options = [] if not args.cfg_options else ['--cfg-options', *args.cfg_options]
    resume = ['--resume'] if last_student(run_dir) is not None else []
    train.main([str(config), *run, *resume, *options])
    student = last_student(run_dir)
    if student is None:
        raise UserError(f'training left no checkpoint in {run_dir}: do not disable the checkpoint hook')
    size = [] if args.size is None else ['--size', *map(str, args.size)]
    out = work_dir / f'{args.file.stem}_{args.bits}.onnx'
    checks = ['--verify', str(VERIFIED_IMAGES), '--out', str(out)]
    command = [str(config), str(student), *run, '--target', args.target or TARGETS[0], *checks, *size, *options]
    if args.target is None:
        sys.stdout.write(f'student: {student}. To export it:\npython -m mmzsq.export {shlex.join(command)}\n')
    else:
        export.main(command)


def _parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description='Quantize a detector of Ultralytics or torchvision.')
    options.add_argument('file', type=Path, help=SUPPORTED)
    options.add_argument('--bits', choices=BITS, default='w8a8', help='bits of weights and activations (default: w8a8)')
    options.add_argument('--target', choices=TARGETS, help='runtime to export to and to verify in (default: no export)')
    options.add_argument('--preset', choices=sorted(PRESETS), default='default', help='recipe (default: default)')
    options.add_argument('--work-dir', type=Path, help='folder of all output (default: ./work_dirs/<file>_<bits>)')
    options.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help='size of exported images (default: test pipeline)'
    )
    options.add_argument('--classes', type=Path, metavar='FILE', help='text file with one class name a line')
    options.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='settings that override the config, as in mmzsq.train'
    )
    return options.parse_args(arguments)


def last_student(work_dir: Path) -> Path | None:
    """Return the newest checkpoint of a quantized detector in a folder, None if there is none."""
    found = [path for pattern in ('epoch_*.pth', 'iter_*.pth') for path in work_dir.glob(pattern)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def leaf_config(detector: ForeignDetector, weights: Path, bits: str, preset: str, target: str | None) -> str:
    """Write the config of a run.

    Args:
        detector: The converted detector.
        weights: File of its weights.
        bits: Bits of weights and activations, such as ``'w4a8'``.
        preset: Name of a preset.
        target: Runtime that the student is for; None: any.

    Returns:
        Text of a config that inherits from the detector and a bit-width base.
    """
    bases = [detector.config, f'mmzsq::_base_/zsq_{bits}.py']
    section = [] if preset == 'default' else [f'preset={preset!r}']
    if detector.settings is not None:
        base, name = detector.settings
        bases.append(base)
        section.append(f'presets={{{{_base_.{name}.presets}}}}')
    if target is not None:
        section.append(f'quantizer=dict(target={target!r})')
    lines = [f'_base_ = {bases!r}', f'load_from = {str(weights)!r}']
    if section:
        lines.append(f'zsq = dict({", ".join(section)})')
    if detector.classes != COCO:
        lines += _own_classes(detector)
    return '\n'.join(lines) + '\n'


def _own_classes(detector: ForeignDetector) -> list[str]:
    """Set the number of classes, their names, and where data to evaluate on may lie."""
    names = json.dumps(list(detector.classes), ensure_ascii=False)
    model: dict[str, Any] = {}
    for head in detector.heads:
        section = model
        for key in head.split('.'):
            section = section.setdefault(key, {})
        section['num_classes'] = detector.converted.num_classes
    lines = [
        f'classes = {names}',
        f'model = {model!r}',
        '# The student is evaluated on COCO data with these classes if it is here.',
        "data_root = 'data/own/'",
    ]
    for part in ('val', 'test'):
        lines.append(f'{part}_dataloader = dict(dataset=dict(metainfo=dict(classes=classes), data_root=data_root))')
        lines.append(f"{part}_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')")
    lines.append('train_dataloader = dict(dataset=dict(metainfo=dict(classes=classes)))')
    return lines


if __name__ == '__main__':
    cli.run(main)
