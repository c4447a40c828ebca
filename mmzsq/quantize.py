# SPDX-License-Identifier: Apache-2.0
"""Quantize a detector of Ultralytics or torchvision with one command, without a config.

``python -m mmzsq.quantize yolo11n.pt --bits w8a8 --target openvino`` writes converted weights and a config to the work
directory, trains the student as ``mmzsq.train`` does, and exports and verifies it as ``mmzsq.export`` does. The config
is the starting point for own settings. The same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from mmzsq import cli, export, train
from mmzsq.atomic_files import make_directory, to_json, write_atomically
from mmzsq.checkpoint import file_sha256, save_weights
from mmzsq.class_names import read_classes
from mmzsq.config.presets import PRESETS
from mmzsq.converters.files import COCO, SUPPORTED, ForeignDetector, convert_file
from mmzsq.errors import NotEvaluatedError, UserError

BITS = ('w8a8', 'w6a6', 'w5a5', 'w4a8', 'w4a4')
TARGETS = ('openvino', 'onnxruntime')
VERIFIED_IMAGES = 4
"""Synthetic images whose detections are compared with those of the exported file."""
SIZE_DIVISOR = 32
"""Divisor of both sides of images of all supported detectors, in pixels."""
STATE_FILE = 'quantize.json'
"""File in the work directory with the settings of its run and the files of finished steps."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, train, and export.

    Args:
        arguments: The command line, None: that of the process.
    """
    args = _parse_args(arguments)
    if args.benchmark and args.target is None:
        raise UserError('--benchmark measures the exported file: give a runtime by --target.')
    if args.target is not None:
        # Otherwise missing packages would show after the training.
        export.runtimes_for(args.target)
    if args.size is not None and any(side < 1 or side % SIZE_DIVISOR for side in args.size):
        raise UserError(f'--size is {args.size[0]} {args.size[1]}, but both must be multiples of {SIZE_DIVISOR} pixels')
    names = None if args.classes is None else read_classes(str(args.classes), '--classes')
    detector = convert_file(args.file, names, args.batch_norm_eps)
    name = f'{args.file.stem}_{args.bits}'
    work_dir = args.work_dir or Path('work_dirs', name)
    run_dir, out = work_dir / 'run', work_dir / f'{name}.onnx'
    state = _State.open(work_dir, _settings(args, detector))
    goal = f'{args.target} --benchmark' if args.benchmark else args.target
    if goal is not None and (state.is_done('export', goal) or state.is_done('export', f'{goal} --benchmark')):
        sys.stdout.write(f'{out} is finished and verified. To make it again, delete it.\n')
        return
    weights, config = work_dir / 'teacher.safetensors', work_dir / f'{name}.py'
    converted = detector.converted
    summary = f'{converted.family}-{converted.size}, {converted.num_classes} classes: {weights}, {config}'
    sys.stdout.write('\n'.join([summary, *([converted.note] if converted.note else [])]) + '\n')
    save_weights(converted.state_dict, detector.classes, weights)
    text = leaf_config(detector, weights, args.bits, args.preset, args.target, args.size)
    write_atomically(config, text.encode())
    not_evaluated = None
    if not state.is_done('training', None):
        not_evaluated = _train(config, run_dir, _options(args))
        student = last_student(run_dir)
        if student is None:
            raise UserError(f'training left no checkpoint in {run_dir}: do not disable the checkpoint hook')
        state.finish('training', None, [student])
    command = _export_command(args, config, run_dir, out)
    if args.target is None:
        sys.stdout.write(f'The student is {last_student(run_dir)}. To export it:\npython -m mmzsq.export {command}\n')
    else:
        export.main(shlex.split(command))
        state.finish('export', goal, sorted(work_dir.glob(f'{out.stem}*.onnx')))
    if not_evaluated is not None:
        raise not_evaluated


def _parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description='Quantize a detector of Ultralytics or torchvision.')
    options.add_argument('file', type=Path, help=SUPPORTED)
    options.add_argument('--bits', choices=BITS, default='w8a8', help='bits of weights and activations (default: w8a8)')
    options.add_argument('--target', choices=TARGETS, help='runtime to export to and to verify in (default: no export)')
    options.add_argument(
        '--benchmark',
        action='store_true',
        help='with --target: also export the float detector as NAME.float.onnx, and compare the speed on this CPU',
    )
    options.add_argument('--preset', choices=sorted(PRESETS), default='default', help='recipe (default: default)')
    options.add_argument('--work-dir', type=Path, help='folder of all output (default: ./work_dirs/<file>_<bits>)')
    options.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help='size of images in pixels (default: test pipeline)'
    )
    options.add_argument('--classes', type=Path, metavar='FILE', help='text file with one class name a line')
    options.add_argument(
        '--batch-norm-eps',
        type=float,
        metavar='EPS',
        help='epsilon of the batch norms of a detector of torchvision (default: derived from the file)',
    )
    options.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='settings that override the config, as in mmzsq.train'
    )
    return options.parse_args(arguments)


def _settings(args: argparse.Namespace, detector: ForeignDetector) -> dict[str, Any]:
    """Return what determines the student of a work directory."""
    return dict(
        file=args.file.name,
        sha256=file_sha256(str(args.file)),
        bits=args.bits,
        preset=args.preset,
        target=_trained_target(args.target),
        size=args.size,
        classes=list(detector.classes),
        batch_norm_eps=args.batch_norm_eps,
        cfg_options=sorted(args.cfg_options or []),
    )


@dataclass
class _State:
    """The settings of a work directory, and the files of its finished steps.

    Attributes:
        path: File that holds them.
        settings: Settings of the run.
        steps: Of each finished step its target and the SHA-256 of its files by their path in the work directory.
    """

    path: Path
    settings: dict[str, Any]
    steps: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, work_dir: Path, settings: dict[str, Any]) -> _State:
        """Read the state of a work directory, or begin it.

        Raises:
            UserError: If the directory is not writable, or holds a run with other settings.
        """
        make_directory(work_dir)
        path = work_dir / STATE_FILE
        advice = 'choose another folder by --work-dir, or delete this one'
        if not path.exists():
            if (work_dir / 'run').exists():
                raise UserError(f'{work_dir} holds a run of another command: {advice}')
            state = cls(path, settings)
            state._save()
            return state
        try:
            content = json.loads(path.read_bytes())
            state = cls(path, dict(content['settings']), dict(content['steps']))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path} is damaged: {advice}') from error
        # The same file under another name is the same detector.
        changed = [key for key in settings if key != 'file' and settings[key] != state.settings.get(key)]
        if changed:
            shown = '; '.join(
                f'{key} is {shorten(str(state.settings.get(key)), 60)} there, {shorten(str(settings[key]), 60)} now'
                for key in changed
            )
            raise UserError(f'{work_dir} holds another run ({shown}): {advice}')
        return state

    def is_done(self, step: str, target: str | None) -> bool:
        """Whether a step is finished for a target, and its files are those that it wrote."""
        entry = self.steps.get(step)
        return entry is not None and entry['target'] == target and entry['files'] == self._digests(entry['files'])

    def finish(self, step: str, target: str | None, files: Iterable[Path]) -> None:
        """Enter a finished step with its files."""
        names = [str(file.relative_to(self.path.parent)) for file in files]
        self.steps[step] = dict(target=target, files=self._digests(names))
        self._save()

    def _digests(self, names: Iterable[str]) -> dict[str, str | None]:
        return {name: file_sha256(str(self.path.parent / name)) for name in names}

    def _save(self) -> None:
        write_atomically(self.path, to_json(dict(settings=self.settings, steps=self.steps), indent=2))


def _train(config: Path, run_dir: Path, options: Sequence[str]) -> NotEvaluatedError | None:
    """Train, or continue a training that was stopped.

    Returns:
        The error of an evaluation that failed; the student is whole then.
    """
    resume = ['--resume'] if last_student(run_dir) is not None else []
    try:
        train.main([str(config), '--work-dir', str(run_dir), *resume, *options])
    except NotEvaluatedError as error:
        return error
    return None


def _export_command(args: argparse.Namespace, config: Path, run_dir: Path, out: Path) -> str:
    """Write the arguments of ``mmzsq.export``, as in a shell."""
    size = [] if args.size is None else ['--size', *map(str, args.size)]
    checks = ['--verify', str(VERIFIED_IMAGES), *(['--benchmark'] if args.benchmark else []), '--out', str(out)]
    files = [str(config), str(last_student(run_dir)), '--work-dir', str(run_dir)]
    return shlex.join([*files, '--target', args.target or TARGETS[0], *checks, *size, *_options(args)])


def _options(args: argparse.Namespace) -> list[str]:
    return ['--cfg-options', *args.cfg_options] if args.cfg_options else []


def _trained_target(target: str | None) -> str | None:
    """Return the target if training depends on it."""
    return target if target == 'onnxruntime' else None


def last_student(work_dir: Path) -> Path | None:
    """Return the newest checkpoint of a quantized detector in a folder, None if there is none."""
    found = [path for pattern in ('epoch_*.pth', 'iter_*.pth') for path in work_dir.glob(pattern)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def leaf_config(
    detector: ForeignDetector,
    weights: Path,
    bits: str,
    preset: str,
    target: str | None,
    size: Sequence[int] | None = None,
) -> str:
    """Write the config of a run.

    Args:
        detector: The converted detector.
        weights: File of its weights.
        bits: Bits of weights and activations, such as ``'w4a8'``.
        preset: Name of a preset.
        target: Runtime that the student is for; None: any.
        size: Height and width of the images, None: as in the detector's config.

    Returns:
        Text of a config that inherits from the detector and a bit-width base.
    """
    bases = [detector.config, f'mmzsq::_base_/zsq_{bits}.py']
    section = [] if preset == 'default' else [f'preset={preset!r}']
    if detector.settings is not None:
        base, name = detector.settings
        bases.append(base)
        section.append(f'presets={{{{_base_.{name}.presets}}}}')
    if _trained_target(target) is not None:
        section.append(f'quantizer=dict(target={target!r})')
    lines = [f'_base_ = {bases!r}', f'load_from = {str(weights)!r}']
    if section:
        lines.append(f'zsq = dict({", ".join(section)})')
    if size is not None:
        lines += _own_size(detector, size)
    if detector.classes != COCO:
        lines += _own_classes(detector)
    return '\n'.join(lines) + '\n'


def _own_size(detector: ForeignDetector, size: Sequence[int]) -> list[str]:
    """Set the size to which images are resized; synthesis and training follow it."""
    height, width = size
    # Images that keep their aspect ratio may stand upright, and must fit into the exported size too.
    scale = (width, height) if detector.letterbox else (min(size), min(size))
    return [
        f'scale = {scale}',
        'test_pipeline = [',
        "    dict(step, scale=scale) if 'scale' in step else step",
        '    for step in _base_.test_pipeline',
        ']',
        'val_dataloader = dict(dataset=dict(pipeline=test_pipeline))',
        'test_dataloader = dict(dataset=dict(pipeline=test_pipeline))',
    ]


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
