# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/performance.md from benchmark results, or check that they are up to date.

    python benchmarks/performance_page.py benchmarks/results/benchmarks/*.json docs/performance.md
    python benchmarks/performance_page.py benchmarks/results/benchmarks/*.json docs/performance.md --check

``speed.py`` writes one result file per case, ``scaling.py`` writes ``scaling.json``. Rows without a result are empty
and listed below the table. A table is written between two lines of the page. The first names one of :data:`TABLES`:

    <!-- speed: goals -->
    <!-- end of speed -->
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
"""Size of the whole method: images and iterations per stage of the paper, epochs of the preset ``default``."""
WHOLE_GOAL = 40.0
"""Goal for the whole method, in minutes."""
SCALING = 'scaling'
"""Stem of the result file of ``scaling.py``."""
GENERAL_GOAL = 3.0
"""Largest ratio of the time of the general path to that of the fused kernels."""
TWO_PROCESS_GOALS = dict(generation=1.9, training=1.8)
"""Speedup goals of two GPUs over one."""
PROCESSES = (2, 4, 8, 16, 64)
TRAINING_STEPS = ('float', 'quantized', 'distilled')


@dataclass(frozen=True)
class Results:
    """Results of all benchmarks.

    Attributes:
        cases: Result of each measured case, by name.
        scaling: Result of ``scaling.py``, if there is one.
    """

    cases: Mapping[str, dict[str, Any]]
    scaling: dict[str, Any] | None

    def having(self, *parts: str) -> list[tuple[Case, dict[str, Any] | None]]:
        """Return the cases that measure one of ``parts``, each with its result or None."""
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
        paths: One JSON file per case, named after it, and optionally ``scaling.json``.

    Raises:
        UserError: If a file is missing, is not a benchmark result, or belongs to an unknown case.
    """
    known = {case.name for case in CASES}
    cases: dict[str, dict[str, Any]] = {}
    scaling = None
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise UserError(f'{path} is not a benchmark result ({error})') from error
        if path.stem == SCALING:
            scaling = content
        elif content.get('case') not in known:
            raise UserError(f'{path} belongs to no case of benchmarks/speed_cases.py: {content.get("case")!r}')
        elif path.stem != content['case']:
            raise UserError(f'{path} holds the case {content["case"]}: rename it to {content["case"]}.json')
        else:
            cases[path.stem] = content
    return Results(cases, scaling)


def update(text: str, results: Results) -> str:
    """Replace every table of a Markdown text.

    Args:
        text: With at least one pair of markers.
        results: Results of all benchmarks.

    Raises:
        UserError: If there are no markers, or a table has an unknown name.
    """
    names = [match[2] for match in BLOCK.finditer(text)]
    if not names:
        raise UserError('no table to write: add the lines <!-- speed: goals --> and <!-- end of speed -->')
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise UserError(f'unknown table {unknown[0]!r}. Known tables: {", ".join(TABLES)}')
    return BLOCK.sub(lambda match: f'{match[1]}\n{TABLES[match[2]](results)}\n\n{match[3]}', text)


def render_goals(results: Results) -> str:
    """Render goals and measurements of the synthesis step, training, the whole method and two GPUs."""
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
        rows.append([f'two GPUs, {part}, speedup', '', '', f'>= {goal}', _number(speedup, 2), *[''] * 3, met])
    parts = [
        markdown_table(header, rows),
        'Milliseconds per image and iteration of the whole synthesis step, unless a row says otherwise. The times of '
        "the authors' code and of the prototype, a first version of this package, were measured on one H100. Prototype "
        'times marked * are of code that was not optimized. If our times were measured on another GPU, the factors '
        'include the difference.',
        f'Minutes are extrapolated from the rates of yolov5-s_640_b32: {IMAGES} images with {ITERATIONS} iterations at '
        f"640 px, and {EPOCHS} epochs of training at batch 32. The authors' 660 minutes cover the images only. Labels "
        f'take another {ITERATIONS} iterations at 160 px with relabeling, at the fastest batch size.',
    ]
    return _join(
        [
            *parts,
            _missing(rows, slice(4, 5)),
            _provenance(result for _, result in results.having('synthesis', 'training')),
        ]
    )


def render_synthesis(results: Results) -> str:
    """Render time, launches, kernels and memory of the synthesis steps."""
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
        'Launches by the host, kernels, and kernel ms (time in which at least one kernel runs) are per step of the '
        'batch. Busy is the share of kernel ms in the step. NVML is the utilization that the driver reports.'
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
    """Render the cost of relabeling."""
    header = [
        '',
        'step',
        'one correction, ms an image',
        'lowest to highest',
        'stage',
        'boxes changed',
        'captured again',
    ]
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
        'Step and stage are in ms per image and iteration: a step alone, and including the relabeling that the stage '
        'of the config performs.'
    )
    return _join(
        [markdown_table(header, rows), legend, _missing(rows), _provenance(r for _, r in results.having('relabel'))]
    )


def render_training(results: Results) -> str:
    """Render the training steps of the float detector, the student, and the student with its teacher."""
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
        'All three are trained in bf16, as with `--amp`. `default` itself trains in fp32, which was not timed here. '
        "The float detector is trained by MMEngine's step, whose kernels the host launches one by one; this explains "
        "part of the ratios below 1. Quantized is the student with the detector's own loss, distilled the student with "
        'its teacher. Both steps are one CUDA graph if they can be captured. Kernel ms is the time in which a kernel '
        'runs, without launch overhead. Brackets show the lowest and highest ratio. Busy refers to the distilled step.'
    )
    return _join(
        [markdown_table(header, rows), legend, _missing(rows), _provenance(r for _, r in results.having('training'))]
    )


def render_memory(results: Results) -> str:
    """Render the peak memory of every case."""
    kinds = dict(
        synthesis='synthesis', relabel='relabel', **{name: f'training.steps.{name}' for name in TRAINING_STEPS}
    )
    measured = results.having('synthesis', 'relabel', 'training')
    rows = [[case.title, *(_memory_cell(lookup(result, key)) for key in kinds.values())] for case, result in measured]
    return _join(
        [markdown_table(['', *kinds], rows), 'Peak GiB allocated by tensors / reserved by PyTorch.', _missing(rows)]
    )


def render_costs(results: Results) -> str:
    """Render the ten most expensive kernels of each synthesis step and each training step with a teacher."""
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
    """Render the measured speedup, and that of more processes by Amdahl's law."""
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
        'Speedup over one GPU: 1 / (s + (1 - s) / n) for n GPUs and a serial share s of the time of one GPU. For '
        'training, s is derived from the measured speedup. For generation, s consists of claiming the folder, merging '
        'and verifying the set, the only serial parts that grow with the set. That row is therefore an upper bound: '
        'the measured speedup also includes work that each process does once, which matters less with more shards. '
        'All rows assume that shards and batches divide evenly, and those of several machines ignore the network.'
    )
    same = lookup(results.scaling, 'same_set')
    sets = '' if same is None else f'All runs made the same set, compared by SHA-256: {_yes(same)}.'
    return _join([markdown_table(header, rows), legend, sets, _missing(rows), _provenance([results.scaling])])


def amdahl(serial_share: float, processes: int) -> float:
    """Return the speedup of several processes over one by Amdahl's law.

    Args:
        serial_share: Share of the time of one process that is not parallel, in [0, 1].
        processes: Number of processes.

    Example:
        >>> round(amdahl(0.1, 9), 6)
        5.0
    """
    return 1 / (serial_share + (1 - serial_share) / processes)


def whole_method_minutes(results: Results, labels: bool) -> float | None:
    """Extrapolate the minutes of the paper's set and training for YOLOv5-s; None if a rate was not measured.

    Args:
        results: Results of all benchmarks.
        labels: Whether to include the iterations that correct labels.
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
    """Return the time of a synthesis step on the general path over that with fused kernels, or None."""
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
    """Format the lowest and highest value of a result's ``key``."""
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
    """List the rows that are empty in the measured columns, by default all columns except the first."""
    names = [row[0] for row in rows if not any(row[measured])]
    if not names:
        return ''
    return 'Nothing was measured yet.' if len(names) == len(rows) else f'Not measured: {"; ".join(names)}.'


def _provenance(results: Iterable[Mapping[str, Any] | None]) -> str:
    """Format device, versions and commands of results."""
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
