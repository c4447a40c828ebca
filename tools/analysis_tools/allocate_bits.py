# SPDX-License-Identifier: Apache-2.0
"""Allocate bits to the layers of a detector by their sensitivity within a budget, from synthetic images only.

    python tools/analysis_tools/allocate_bits.py my_detector_w4a8.py --average-bits 4 --out my_detector_mixed.py
    python tools/train.py my_detector_mixed.py

The tool makes the calibration set of the config if it is missing. On some of its batches it measures how much the
student's training loss grows if a single layer has few bits. It then chooses the bits of all layers that minimize the
sum (:mod:`mmzsq.qat.sensitivity`, :mod:`mmzsq.quantization.allocation`). The budget is one of

* ``--average-bits``: total size of the allocated weights, given as average bits per weight;
* ``--budget-size-mb``: size of the whole model in MB (10^6 bytes);
* ``--budget-gbops``: bit operations of the whole model in 10^9, for one image of the size in
  ``quantization_report.json`` (``bops_image_size``: 64x64 px, or the smallest that the detector takes).

The first two allocate bits to weights only. The last allocates bits to weights and inputs. First and last layers with
their own bits, layers with overrides and float layers are not changed but count in the budget. The output is a config
that trains: the given config with the options of the command line, the calibration set and the bits.
"""

from __future__ import annotations

import argparse
import keyword
import os
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmzsq import cli
from mmzsq.engine.bit_allocation import MEASURING, allocate_within_budget
from mmzsq.engine.console import PhaseProgress
from mmzsq.errors import UserError
from mmzsq.quantization.allocation import Budget, overrides_for, overrides_to_dict, size_and_operations
from mmzsq.quantization.config import AllocationSettings, Bits
from mmzsq.quantization.quantizers import check_bits

WIDTH = 120
"""Width of the table in characters."""


def main() -> None:
    """Parse the command line, measure, allocate, print, write."""
    args = _parse_args()
    candidates = sorted(set(args.candidates))
    _check(args, candidates)
    cfg = cli.load_config(args)
    if 'zsq' not in cfg:
        raise UserError(
            f'config {args.config} has no zsq section: add a base such as '
            "'mmzsq::_base_/zsq_w4a8.py' beside the detector's config"
        )
    runner: Any = cli.build_runner(cfg)
    detector = runner.detector
    budget = _budget(args, detector.report, candidates)
    # Checked before synthesis, which takes longest.
    budget.check()
    runner.generate()
    detector.init_weights()
    console = Console(width=WIDTH)
    with PhaseProgress(runner.logger, MEASURING, 'steps') as progress:
        bits, sensitivity = allocate_within_budget(runner, budget, args.batches, progress.update)
    uniform = budget.uniform()
    same = {layer.name: budget.bits_of(layer, uniform) for layer in budget.layers}
    summary = (
        f'Model size and {detector.report.bops_name} {_amounts(size_and_operations(detector.report, bits))}. '
        f'With {uniform} bits in each of these layers {_amounts(size_and_operations(detector.report, same))}.'
    )
    console.print(_table(budget, sensitivity, [*bits.values()]))
    console.print(summary, highlight=False)
    settings = _given(cfg, args.cfg_options or {})
    quantizer = settings.setdefault('zsq', {}).setdefault('quantizer', {})
    quantizer['overrides'] = overrides_to_dict(overrides_for(detector.report, bits))
    if runner.cfg.zsq.calibration_set.real is None:
        settings['zsq'].setdefault('calibration_set', {})['dir'] = runner.cfg.zsq.calibration_set.dir
    args.out.write_text(leaf(args.config, args.out, settings, _docstring(summary, len(bits))), encoding='utf-8')
    console.print(f'written: {args.out}', highlight=False)


def _parse_args() -> argparse.Namespace:
    options = cli.parser((__doc__ or '').split('\n')[0])
    budget = options.add_mutually_exclusive_group(required=True)
    budget.add_argument('--average-bits', type=float, help='average bits of the allocated weights')
    budget.add_argument('--budget-size-mb', type=float, help='size of the quantized model in MB (10^6 bytes)')
    budget.add_argument(
        '--budget-gbops',
        type=float,
        help='bit operations in 10^9, for one image of the size in quantization_report.json (bops_image_size)',
    )
    candidates = AllocationSettings().candidates
    text = f'bits to choose from (default: {" ".join(map(str, candidates))})'
    options.add_argument('--candidates', type=int, nargs='+', default=candidates, help=text)
    options.add_argument('--batches', type=int, default=2, help='batches to measure losses on (default: 2)')
    options.add_argument('--out', type=Path, required=True, help='config to write, .py')
    return options.parse_args()


def _check(args: argparse.Namespace, candidates: Sequence[int]) -> None:
    for bits in candidates:
        check_bits('--candidates', bits)
    if args.batches < 1:
        raise UserError(f'--batches must be at least 1, not {args.batches}')
    if args.launcher != 'none':
        raise UserError(
            'allocate_bits.py runs in one process: leave out --launcher. To make the set with several, run '
            'tools/generate.py first'
        )
    if args.out.suffix != '.py':
        raise UserError(f'--out {args.out} must be a .py file')
    if args.out.exists() and Path(args.config).exists() and args.out.samefile(args.config):
        raise UserError(f'--out {args.out} is the input config: choose another name')
    if not args.out.parent.is_dir():
        raise UserError(f'--out {args.out}: folder {args.out.parent} does not exist')


def _budget(args: argparse.Namespace, report: Any, candidates: Sequence[int]) -> Budget:
    if args.average_bits is not None:
        return Budget.from_average_bits(report, candidates, args.average_bits)
    if args.budget_size_mb is not None:
        return Budget.from_size(report, candidates, args.budget_size_mb)
    return Budget.from_bit_operations(report, candidates, args.budget_gbops)


def _table(budget: Budget, sensitivity: Tensor, allocated: Sequence[Bits]) -> Table:
    """One row per layer: its bits, and the increase of the loss with each candidate."""
    table = Table(title=f'{budget.name}: at most {budget.limit:g} {budget.unit}')
    table.add_column('layer', overflow='fold')
    for column in ('weights', 'w', 'a', 'sensitivity', *(f'at {bits}' for bits in budget.candidates)):
        table.add_column(column, justify='right')
    for layer, bits, values in zip(budget.layers, allocated, sensitivity.tolist(), strict=True):
        of_bits = values[list(budget.candidates).index(bits.w_bits)]
        numbers = (layer.weights, bits.w_bits, bits.a_bits, *(f'{value:.2g}' for value in (of_bits, *values)))
        table.add_row(layer.name, *map(str, numbers))
    return table


def _amounts(of: tuple[float, float]) -> str:
    return f'{of[0]:.3f} MB, {of[1]:.3f} G'


def _docstring(summary: str, layers: int) -> str:
    command = shlex.join(['python', 'tools/analysis_tools/allocate_bits.py', *sys.argv[1:]])
    wrapped = textwrap.wrap(command, WIDTH - 12, break_long_words=False, break_on_hyphens=False)
    lines = ' \\\n        '.join(wrapped)
    text = f'Bits of {layers} layers, allocated by their sensitivity.\n\n    {lines}\n\n{summary}\n'
    return text.replace('"""', r'\"\"\"')


def _given(cfg: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the command line as nested dicts; a list with a changed entry is returned whole."""
    given: dict[str, Any] = {}
    for key in options:
        value: Any = cfg.to_dict()
        path: list[str] = []
        for part in key.split('.'):
            if not isinstance(value, dict):
                break
            path.append(part)
            value = value[part]
        place = given
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    return given


def leaf(config: str, out: Path, settings: Mapping[str, Any], docstring: str) -> str:
    """Return the text of a config that inherits from another one.

    Args:
        config: Path of the base config.
        out: Path of the new config.
        settings: Settings of the new config by top-level name.
        docstring: Docstring of the new config.
    """
    base = Path(os.path.relpath(os.path.abspath(config), os.path.dirname(os.path.abspath(out)))).as_posix()
    raw = 'r' if '\\' in docstring else ''
    lines = [f'{raw}"""{docstring}"""\n', f'_base_ = [{base!r}]']
    lines += [f'{name} = {_source(value)}' for name, value in settings.items()]
    return '\n'.join(lines) + '\n'


def _source(value: Any, indent: str = '') -> str:
    """Return the source of nested dicts, one entry per line; small flat dicts stay on one line."""
    if not isinstance(value, dict):
        return repr(value)
    words = all(name.isidentifier() and not keyword.iskeyword(name) for name in value)
    entries = [
        (f'{name}=' if words else f'{name!r}: ') + _source(entry, indent + '    ') for name, entry in value.items()
    ]
    start, end = ('dict(', ')') if words else ('{', '}')
    if len(value) <= 2 and not any(isinstance(entry, dict) for entry in value.values()):
        return start + ', '.join(entries) + end
    inner = ''.join(f'{indent}    {entry},\n' for entry in entries)
    return f'{start}\n{inner}{indent}{end}'


if __name__ == '__main__':
    cli.run(main)
