# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/performance.md from what benchmarks measured, or check that they are up to date.

    python benchmarks/performance_page.py benchmarks/results/benchmarks/*.json docs/performance.md
    python benchmarks/performance_page.py benchmarks/results/benchmarks/*.json docs/performance.md --check

Files are those of ``benchmarks/speed.py``, one a case, and of ``benchmarks/scaling.py``; without any, every
row is empty. A table stands between two lines of the page, the first of which names one of :data:`TABLES`:

    <!-- speed: goals -->
    <!-- end of speed -->

What was not measured stays empty, and is named below the table.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_pages import markdown_table, renew
from speed_cases import CASES, Case, Goal, lookup

from mmzsq import cli
from mmzsq.errors import UserError

BLOCK = re.compile(r'(<!-- speed: (\w+) -->\n).*?(<!-- end of speed -->)', re.DOTALL)
IMAGES, ITERATIONS, EPOCHS = 2000, 2500, 20
"""Of the whole method: the paper's set, at each of two sizes, and the training of the preset ``default``."""
WHOLE_GOAL = 40.0
"""Minutes."""
SCALING = 'scaling'
"""Name of the file that ``scaling.py`` writes."""
GENERAL_GOAL = 3.0
"""How many times as long a step may take by PyTorch's operators alone."""
TWO_PROCESS_GOALS = dict(generation=1.9, training=1.8)
"""How many times as fast two GPUs are to be."""
PROCESSES = (2, 4, 8, 16, 64)
TRAINING_STEPS = ('float', 'quantized', 'distilled')


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        cases: By the name of the case.
        scaling: Of one process beside several, if that was measured.
    """

    cases: Mapping[str, dict[str, Any]]
    scaling: dict[str, Any] | None

    def having(self, *parts: str) -> list[tuple[Case, dict[str, Any] | None]]:
        """Cases that measure one of ``parts``, in their order, each with its result or None."""
        return [(case, self.cases.get(case.name)) for case in CASES if set(parts) & set(case.what)]


def main() -> None:
    """Parse the command line; write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('results', type=Path, nargs='*', help='JSON files of benchmarks')
    parser.add_argument('page', type=Path, help='the markdown file with the tables')
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if the page is not up to date')
    args = parser.parse_args()
    if not args.page.is_file():
        raise UserError(f'page {args.page} does not exist')
    text = args.page.read_text(encoding='utf-8')
    updated = update(text, read_results(args.results))
    renew(args.page, text, updated, args.check, f'{Path(__file__).name} {args.page} with its results')


def read_results(paths: Iterable[Path]) -> Results:
    """Read result files.

    Args:
        paths: One JSON file a case, named after it, and perhaps ``scaling.json``.

    Raises:
        UserError: If a file is missing, is no result, or is of no case.
    """
    known = {case.name for case in CASES}
    cases: dict[str, dict[str, Any]] = {}
    scaling = None
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise UserError(f'{path} is no result of a benchmark ({error})') from error
        if path.stem == SCALING:
            scaling = content
        elif content.get('case') not in known:
            raise UserError(f'{path} is of no case in benchmarks/speed_cases.py: {content.get("case")!r}')
        elif path.stem != content['case']:
            raise UserError(f'{path} holds the case {content["case"]}: name it so')
        else:
            cases[path.stem] = content
    return Results(cases, scaling)


def update(text: str, results: Results) -> str:
    """Renew every table of a markdown text.

    Args:
        text: With at least one pair of markers.
        results: What was measured.

    Raises:
        UserError: If there are no markers, or a table has an unknown name.
    """
    names = [match[2] for match in BLOCK.finditer(text)]
    if not names:
        raise UserError('no table to write: add the lines <!-- speed: goals --> and <!-- end of speed -->')
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise UserError(f'there is no table {unknown[0]!r}: a page may have {", ".join(TABLES)}')
    return BLOCK.sub(lambda match: f'{match[1]}\n{TABLES[match[2]](results)}\n\n{match[3]}', text)


def render_goals(results: Results) -> str:
    """Goals of the synthesis step, of training, of the whole method and of two GPUs, beside what was measured."""
    header = ['', 'authors', 'prototype', 'goal', 'measured', 'lowest to highest', 'x authors', 'x prototype', 'met']
    rows = [
        _goal_cells(f'{case.title}{_goal_suffix(goal)}', goal, goal.measured(result), _spread(result, goal.key))
        for case, result in results.having('synthesis', 'training')
        for goal in case.goals
    ]
    minutes = whole_method_minutes(results, labels=False)
    rows.append(_goal_cells('YOLOv5-s, images and training, minutes', Goal('', WHOLE_GOAL, 660.0), minutes, ''))
    minutes = whole_method_minutes(results, labels=True)
    rows.append(['YOLOv5-s, labels, images and training, minutes', *[''] * 3, _number(minutes, 1), *[''] * 4])
    ratio = general_ratio(results)
    rows.append(_goal_cells('YOLOv5-s, 640 px, batch 32: general path / fused', Goal('', GENERAL_GOAL), ratio, ''))
    for part, goal in TWO_PROCESS_GOALS.items():
        two = lookup(results.scaling, 'processes') == [1, 2]
        speedup = lookup(results.scaling, f'speedup.{part}') if two else None
        met = '' if speedup is None else _yes(speedup >= goal)
        rows.append(
            [f'two GPUs, {part}, times as fast as one', '', '', f'>= {goal}', _number(speedup, 2), *[''] * 3, met]
        )
    parts = [
        markdown_table(header, rows),
        'Milliseconds per image and iteration of the whole synthesis step, unless a row says otherwise. The times of '
        "the authors' code and of the prototype, a first version of this package, were taken on one H100; those marked "
        'with * had nothing done for their speed. Where ours are of another card, that is in the factors, too.',
        f'Minutes are extrapolated: {IMAGES} images with {ITERATIONS} iterations at 640 px and {EPOCHS} epochs of '
        "training at batch 32, from the rates of yolov5-s_640_b32; the authors' 660 minutes are the images alone. "
        f'Labels take another {ITERATIONS} iterations at 160 px, corrections included, at the batch that is fastest.',
    ]
    return _join(
        [
            *parts,
            _missing(rows, slice(4, 5)),
            _provenance(result for _, result in results.having('synthesis', 'training')),
        ]
    )


def render_synthesis(results: Results) -> str:
    """What a synthesis step is made of, and the proof of what runs."""
    header = ['', 'task', 'ms', 'graph', 'launches', 'graphs launched', 'kernels', 'kernel ms', 'busy', 'NVML %', 'GiB']
    rows = []
    for case, result in results.having('synthesis'):
        step = lookup(result, 'synthesis') or {}
        rows.append(
            [
                case.title,
                step.get('task', ''),
                _number(step.get('ms_per_image_iteration'), 3),
                _yes(step.get('cuda_graph')),
                *(_number(step.get(key), 1) for key in ('launches', 'graph_launches', 'kernels', 'kernel_ms')),
                _percent(step.get('busy')),
                _number(step.get('utilization'), 0),
                _number(step.get('peak_memory_gib'), 2),
            ]
        )
    reasons = [
        f'{case.title} runs eagerly: {reason}.'
        for case, result in results.having('synthesis')
        if (reason := lookup(result, 'synthesis.eager_reason'))
    ]
    legend = (
        'Launches by the host, kernels and milliseconds with a kernel at work are of one step of the batch; busy is '
        'the share of the step that these are, NVML the utilization that the driver reports.'
    )
    return _join(
        [
            markdown_table(header, rows),
            legend,
            *reasons,
            _missing(rows),
            _provenance(r for _, r in results.having('synthesis')),
        ]
    )


def render_relabeling(results: Results) -> str:
    """What correcting the labels costs."""
    header = ['', 'step', 'one correction, ms an image', 'lowest to highest', 'stage', 'boxes changed', 'captured anew']
    rows = []
    for case, result in results.having('relabel'):
        part = lookup(result, 'relabel') or {}
        changed = part['added'] + part['removed'] if part else None
        rows.append(
            [
                case.title,
                _number(part.get('ms_per_image_step'), 4),
                _number(part.get('ms_per_image_correction'), 3),
                _range(part.get('correction_spread'), 3),
                _number(part.get('ms_per_image_iteration'), 4),
                _number(changed, 0),
                _number(part.get('captures_lost'), 0),
            ]
        )
    legend = (
        'Step and stage in ms per image and iteration: a step alone, and with the share of the corrections that the '
        'stage of the config makes.'
    )
    return _join(
        [markdown_table(header, rows), legend, _missing(rows), _provenance(r for _, r in results.having('relabel'))]
    )


def render_training(results: Results) -> str:
    """Steps of the float detector, the quantized student, and the student with its teacher."""
    header = ['', *(f'{name}, ms' for name in TRAINING_STEPS), *(f'{name}, images/s' for name in TRAINING_STEPS)]
    header += [*(f'{name}, kernel ms' for name in TRAINING_STEPS)]
    header += ['quantized / float', 'distilled / float', 'graph: quantized', 'graph: distilled', 'busy']
    rows = []
    for case, result in results.having('training'):
        part = lookup(result, 'training') or {}
        rows.append(
            [
                case.title,
                *(_number(lookup(part, f'steps.{name}.ms'), 1) for name in TRAINING_STEPS),
                *(_number(lookup(part, f'steps.{name}.images_per_second'), 0) for name in TRAINING_STEPS),
                *(_number(lookup(part, f'steps.{name}.kernel_ms'), 1) for name in TRAINING_STEPS),
                *(_ratio_cell(part, name) for name in TRAINING_STEPS[1:]),
                *(_yes(lookup(part, f'steps.{name}.cuda_graph')) for name in TRAINING_STEPS[1:]),
                _percent(lookup(part, 'steps.distilled.busy')),
            ]
        )
    legend = (
        'All three learn in bf16, as with `--amp`; `default` itself trains in fp32, which was not timed here. The '
        'float detector takes the step of MMEngine, whose kernels the host launches one by one: part of the ratios '
        "below 1. Quantized is the student that learns by the detector's own loss, distilled the student with its "
        'teacher; both steps are one CUDA graph where they can be. Kernel ms is the time with a kernel at work, which '
        'no launch adds to. Lowest and highest of a ratio in brackets; busy is of the distilled step.'
    )
    return _join(
        [markdown_table(header, rows), legend, _missing(rows), _provenance(r for _, r in results.having('training'))]
    )


def render_memory(results: Results) -> str:
    """Peak memory of everything measured."""
    kinds = dict(
        synthesis='synthesis', relabel='relabel', **{name: f'training.steps.{name}' for name in TRAINING_STEPS}
    )
    measured = results.having('synthesis', 'relabel', 'training')
    rows = [[case.title, *(_memory_cell(lookup(result, key)) for key in kinds.values())] for case, result in measured]
    return _join(
        [markdown_table(['', *kinds], rows), 'Peak GiB that tensors held / that PyTorch had reserved.', _missing(rows)]
    )


def render_costs(results: Results) -> str:
    """The ten dearest kernels of each synthesis step and of each training step with a teacher."""
    parts = []
    for case, result in results.having('synthesis', 'training'):
        for title, key in (('synthesis', 'synthesis.top'), ('training, distilled', 'training.steps.distilled.top')):
            top = lookup(result, key)
            if top:
                rows = [
                    [f'`{cost["name"]}`', _number(cost['ms'], 3), _number(cost['count'], 1), _percent(cost['share'])]
                    for cost in top
                ]
                parts.append(f'**{case.title}: {title}**')
                parts.append(markdown_table(['kernel', 'ms a step', 'calls', 'share'], rows))
    return _join(parts or ['Nothing was measured yet.'])


def render_scaling(results: Results) -> str:
    """What several processes give, by Amdahl's law from the measured serial part."""
    shares = {part: lookup(results.scaling, f'serial_share.{part}') for part in TWO_PROCESS_GOALS}
    processes = lookup(results.scaling, 'processes')
    measured = 'measured' if processes is None else f'measured, {processes[-1]} GPUs'
    rows = [
        [
            *(part, _number(lookup(results.scaling, f'speedup.{part}'), 2), _percent(share, 2)),
            *('' if share is None else _number(amdahl(share, n), 1) for n in PROCESSES),
        ]
        for part, share in shares.items()
    ]
    header = ['', measured, 'serial part', *(f'{n} GPUs' for n in PROCESSES)]
    legend = (
        'Times as fast as one GPU: 1 / (s + (1 - s) / n) for a serial part s of the time of one GPU and n of them. For '
        'training s is what explains the measured number. For generation it is the claim of its place, the merge and '
        'the check of the set, which alone grow with a set, so that its row is the most that there is to be had: the '
        'measured number has what a process does once too, which weighs less the more shards it makes. All leave out '
        'that rounds of shards or batches may not divide evenly, and, for machines, the network.'
    )
    same = lookup(results.scaling, 'same_set')
    sets = '' if same is None else f'All runs made the same set, by its SHA-256 sums: {_yes(same)}.'
    return _join([markdown_table(header, rows), legend, sets, _missing(rows), _provenance([results.scaling])])


def amdahl(serial_share: float, processes: int) -> float:
    """How many times as fast several processes are as one.

    Args:
        serial_share: Share of the time of one process that does not become less, in [0, 1].
        processes: How many.

    Example:
        >>> round(amdahl(0.1, 9), 6)
        5.0
    """
    return 1 / (serial_share + (1 - serial_share) / processes)


def whole_method_minutes(results: Results, labels: bool) -> float | None:
    """Minutes of the paper's set and training for YOLOv5-s from measured rates; None if one of them is missing.

    Args:
        results: What was measured.
        labels: Whether the iterations that correct labels count too.
    """
    coarse = [
        rate
        for name, result in results.cases.items()
        if name.startswith('yolov5-s_160_') and (rate := lookup(result, 'relabel.ms_per_image_iteration')) is not None
    ]
    fine = lookup(results.cases.get('yolov5-s_640_b32'), 'synthesis.ms_per_image_iteration')
    training = lookup(results.cases.get('yolov5-s_640_b32'), 'training.steps.distilled.images_per_second')
    if fine is None or training is None or (labels and not coarse):
        return None
    iteration = fine + (min(coarse) if labels else 0)
    return IMAGES * (ITERATIONS * iteration / 1000 + EPOCHS / training) / 60


def general_ratio(results: Results) -> float | None:
    """Time of a synthesis step of YOLOv5-s by PyTorch's operators alone over that of the fused one, or None."""
    general, fused = (
        lookup(results.cases.get(name), 'synthesis.ms_per_image_iteration')
        for name in ('yolov5-s_640_b32_general', 'yolov5-s_640_b32')
    )
    return None if general is None or fused is None else general / fused


TABLES: dict[str, Callable[[Results], str]] = dict(
    goals=render_goals,
    synthesis=render_synthesis,
    relabeling=render_relabeling,
    training=render_training,
    memory=render_memory,
    costs=render_costs,
    scaling=render_scaling,
)


def _goal_cells(title: str, goal: Goal, measured: float | None, spread: str) -> list[str]:
    digits = 1 if goal.limit >= 10 else 3
    return [
        title,
        _number(goal.authors, 2),
        _number(goal.prototype, 3) + '*' * goal.naive,
        f'<= {goal.limit:g}',
        _number(measured, digits),
        spread,
        *('' if measured is None or before is None else _number(before / measured, 1) for before in _before(goal)),
        '' if measured is None else _yes(measured <= goal.limit),
    ]


def _before(goal: Goal) -> tuple[float | None, float | None]:
    return goal.authors, goal.prototype


def _goal_suffix(goal: Goal) -> str:
    ratio = goal.key.removeprefix('training.ratio_')
    return '' if ratio == goal.key else f': training step, {ratio} / float'


def _spread(result: Mapping[str, Any] | None, key: str) -> str:
    """Lowest to highest of what a result has at ``key``."""
    part, _, name = key.rpartition('.')
    return _range(lookup(result, f'{part}.spread' if name.startswith('ms') else f'{key}_spread'), 3)


def _ratio_cell(part: Mapping[str, Any], name: str) -> str:
    ratio = part.get(f'ratio_{name}')
    return '' if ratio is None else f'{ratio:.2f} ({_range(part[f"ratio_{name}_spread"], 2)})'


def _memory_cell(part: Mapping[str, Any] | None) -> str:
    if part is None or part.get('peak_memory_gib') is None:
        return ''
    return f'{part["peak_memory_gib"]:.2f} / {part["peak_reserved_gib"]:.2f}'


def _range(bounds: Sequence[float] | None, digits: int) -> str:
    return '' if bounds is None else ' to '.join(_number(bound, digits) for bound in bounds)


def _number(value: float | None, digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def _percent(share: float | None, digits: int = 0) -> str:
    return '' if share is None else f'{100 * share:.{digits}f} %'


def _yes(value: bool | None) -> str:
    return '' if value is None else 'yes' if value else 'no'


def _missing(rows: Sequence[Sequence[str]], measured: slice = slice(1, None)) -> str:
    """Which rows have nothing in the columns of what is measured, by default all but the first."""
    names = [row[0] for row in rows if not any(row[measured])]
    if not names:
        return ''
    return 'Nothing was measured yet.' if len(names) == len(rows) else f'Not measured: {"; ".join(names)}.'


def _provenance(results: Iterable[Mapping[str, Any] | None]) -> str:
    """Device, versions and commands of results."""
    commands: dict[str, list[str]] = {}
    for result in results:
        if result is not None:
            versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items())
            commands.setdefault(f'{result["device"]}; {versions}', []).append(result['command'])
    return '\n\n'.join(
        f'Measured on {where}:\n\n```bash\n' + '\n'.join(lines) + '\n```' for where, lines in commands.items()
    )


def _join(parts: Iterable[str]) -> str:
    return '\n\n'.join(part for part in parts if part)


if __name__ == '__main__':
    cli.run(main)
