# SPDX-License-Identifier: Apache-2.0
"""Write the tables of a README from the ``results.json`` of the runs, or check that they are up to date.

    python tools/analysis_tools/results_table.py configs/zsq/README.md
    python tools/analysis_tools/results_table.py configs/zsq/README.md --check

A run writes ``results.json`` into its work_dir; what is reported is kept as ``results/NAME/CONFIG_PRESET.json``, or, of
several seeds, as ``results/NAME/CONFIG_PRESET_seedSEED.json``. The tables stand between two lines of the markdown file,
the first of which names the folder:

    <!-- table of results/NAME -->
    <!-- end of table -->

What a run printed at its end stands between two other lines, which name its file:

    <!-- printed by results/NAME/CONFIG_PRESET.json -->
    <!-- end of print -->

Zero-shot quantization beside quantization on real images, with a row for every leaf of ``configs/NAME`` and runs of
several seeds, kept as ``results/NAME/CONFIG_seedSEED.json``, stands between

    <!-- comparison of results/NAME -->
    <!-- end of comparison -->

In the other tables there is a row for every leaf of a detector with results, and preset. What was not run stays empty.
A command is what sets a run's recorded settings on top of its leaf, with the presets as they are now.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmzsq.config import complete_section
from mmzsq.engine.report import format_table
from mmzsq.errors import UserError
from mmzsq.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'(<!-- table of (\S+) -->\n).*?(<!-- end of table -->)', re.DOTALL)
PRINTED = re.compile(r'(<!-- printed by (\S+) -->\n).*?(<!-- end of print -->)', re.DOTALL)
COMPARISON = re.compile(r'(<!-- comparison of (\S+) -->\n).*?(<!-- end of comparison -->)', re.DOTALL)
EXPECTED_PRESETS = ('default', 'paper')
"""Presets under which every leaf has a row, run or not."""
LEAF = re.compile(r'(?P<detector>.+)_w(?P<w_bits>\d)a(?P<a_bits>\d)')
COMPARED = {
    'PTQ on synthetic': ('', 'ptq'),
    'zero-shot QAT': ('', 'zero_shot'),
    'LSQ on real': ('_lsq-real', 'zero_shot'),
    'LSQ on real + distillation': ('_lsq-real-distil', 'zero_shot'),
}
"""Columns of a comparison: what the name of a leaf ends in, which is then in ``comparison/``, and the accuracy read."""
COMPARED_METRICS = ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP')
SAME_TEACHER = 0.005
"""The most that the accuracy of one teacher differs between evaluations: a GPU does not add in a fixed order."""
OF_SYNTHETIC_IMAGES = ('label_sampler', 'synthesis')
"""Parts of the settings that real images have no use for."""
OTHER_SEEDS = (
    'The commands are those of the first seed in the table; another is `zsq.calibration_set.seed=1`, with a '
    '`zsq.calibration_set.dir` of its own.'
)
RELATIVE_DIR = 'work_dirs/'
"""What the folder of a set starts with to be named in a command: other places are of somebody's machine."""


@dataclass(frozen=True)
class Row:
    """One leaf under one preset.

    Attributes:
        leaf: Path of its config in the repository.
        preset: Name of the preset.
        runs: What its runs wrote, by rising seed; none if it was not run.
    """

    leaf: str
    preset: str
    runs: tuple[dict[str, Any], ...] = ()

    @property
    def results(self) -> dict[str, Any] | None:
        """What the first run wrote."""
        return self.runs[0] if self.runs else None

    @property
    def bits(self) -> str:
        """Bits of weights and activations, as ``W4A8``."""
        match = _leaf_name(self.leaf)
        return f'W{match["w_bits"]}A{match["a_bits"]}'

    @property
    def settings(self) -> dict[str, Any]:
        """The ``zsq`` section that a run recorded."""
        assert self.results is not None
        return dict(self.results['settings'], quantizer=self.results['quantizer'], preset=self.preset)


@dataclass(frozen=True)
class Comparison:
    """One leaf of a comparison and what else its detector was quantized on.

    Attributes:
        leaf: Path of the zero-shot config in the repository.
        runs: By the end of the config's name, see :data:`COMPARED`; one a seed, by rising seed.
    """

    leaf: str
    runs: dict[str, list[Row]]

    @property
    def name(self) -> list[str]:
        """Detector and bits."""
        return [_leaf_name(self.leaf)['detector'], Row(self.leaf, '').bits]


def main() -> None:
    """Parse the command line; write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('markdown', type=Path, help='the file with the tables')
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if the file is not up to date')
    parser.add_argument(
        '--root', type=Path, default=ROOT, help='folder with configs/ and results/ (default: of this file)'
    )
    args = parser.parse_args()
    try:
        text = read_text(args.markdown)
        updated = update(text, args.root)
    except UserError as error:
        raise SystemExit(f'error: {error}') from None
    renew(args.markdown, text, updated, args.check, f'{Path(__file__).name} {args.markdown}')


def renew(page: Path, current: str, updated: str, check: bool, command: str) -> None:
    """Write a page that has changed, or only say that it has.

    Args:
        page: The file; its folder is made.
        current: What it holds.
        updated: What it should hold.
        check: Write nothing, and exit with 1 if the two differ.
        command: What brings the page up to date, for the message.
    """
    if updated == current:
        return
    if check:
        sys.stderr.write(f'{page} is not up to date: run {command}\n')
        sys.exit(1)
    page.parent.mkdir(exist_ok=True)
    page.write_text(updated, encoding='utf-8')


def update(text: str, root: Path) -> str:
    """Renew every table of a markdown text.

    Args:
        text: With at least one pair of markers.
        root: Folder with ``configs/`` and ``results/``.

    Raises:
        UserError: If there are no markers, or results cannot be read.
    """
    if not any(kind.search(text) for kind in (BLOCK, PRINTED, COMPARISON)):
        raise UserError('no table to write: add the lines <!-- table of results/NAME --> and <!-- end of table -->')
    text = PRINTED.sub(lambda match: f'{match[1]}{render_print(read_results(root / match[2]))}{match[3]}', text)
    text = COMPARISON.sub(
        lambda match: f'{match[1]}{render_comparison(read_comparison(root / match[2], root), root)}{match[3]}', text
    )
    return BLOCK.sub(lambda match: f'{match[1]}{render(read_rows(root / match[2], root), root)}{match[3]}', text)


def render_print(results: Mapping[str, Any]) -> str:
    """What a run printed, and how long it took, as markdown."""
    stages = {name: stage['seconds'] for name, stage in results['calibration_set']['stages'].items()}
    seconds = {**stages, **results['seconds']}
    times = ', '.join(f'{name} {value:.0f} s' for name, value in seconds.items())
    return f'\n```text\n{format_table(results).rstrip()}\n```\n\n{results["device"]}: {times}.\n\n'


def read_rows(folder: Path, root: Path) -> list[Row]:
    """Read the results in a folder and add the leaves that were not run.

    Args:
        folder: With one JSON file a run.
        root: Folder with ``configs/``.

    Returns:
        One row for each leaf and each of :data:`EXPECTED_PRESETS`, or another that its detector ran with; by detector,
        preset and falling bits.

    Raises:
        UserError: If there are no results, a file is not named after its config, preset and seed, or the runs of a leaf
            differ in more than the seed.
    """
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob('*.json')):
        results = read_results(path)
        leaf = repository_path(results['config'], root)
        name = f'{Path(leaf).stem}_{results["preset"]}'
        if path.stem not in (name, f'{name}_seed{_seed(results)}'):
            raise UserError(
                f'{path} holds {leaf} under the preset {results["preset"]} with the seed {_seed(results)}: name it so'
            )
        runs.setdefault((leaf, results['preset']), []).append(results)
    for (leaf, preset), found in runs.items():
        found.sort(key=_seed)
        _refuse_other_settings([Row(leaf, preset, (run,)) for run in found], folder)
    if not runs:
        raise UserError(f'no results in {folder}: copy the results.json of a run there, as CONFIG_PRESET.json')
    leaves = sorted({leaf for ran, _ in runs for leaf in _leaves_of_one_detector(ran, root)}, key=_order)
    detectors = dict.fromkeys(_order(leaf)[0] for leaf in leaves)
    tried = {(_order(leaf)[0], preset) for leaf, preset in runs}
    return [
        Row(leaf, preset, tuple(runs.get((leaf, preset), ())))
        for detector in detectors
        for preset in PRESETS
        if preset in EXPECTED_PRESETS or (detector, preset) in tried
        for leaf in leaves
        if _order(leaf)[0] == detector
    ]


def read_comparison(folder: Path, root: Path) -> list[Comparison]:
    """Read the results in a folder, which may be missing: then nothing was run.

    Args:
        folder: ``results/NAME`` with one JSON file a run of a config in ``configs/NAME``.
        root: Folder with ``configs/``.

    Returns:
        One entry for each zero-shot leaf of ``configs/NAME``, by detector and falling bits.

    Raises:
        UserError: If there are no leaves; if a file is not named after its config and seed, or the config is not one of
            :data:`COMPARED`; if the runs of a config differ in more than the seed, or those of a detector in the
            teacher.
    """
    configs = root / 'configs' / folder.name
    leaves = sorted(
        (path.relative_to(root).as_posix() for path in configs.glob('*_w?a?.py') if LEAF.fullmatch(path.stem)),
        key=_order,
    )
    if not leaves:
        raise UserError(f'no config to compare in {configs}: they are named DETECTOR_wBITSaBITS.py')
    kept: dict[str, list[Row]] = {}
    for path in sorted(folder.glob('*.json')):
        results = read_results(path)
        leaf, seed = repository_path(results['config'], root), _seed(results)
        if path.stem != f'{Path(leaf).stem}_seed{seed}':
            raise UserError(f'{path} holds {leaf} with the seed {seed}: name it so')
        kept.setdefault(leaf, []).append(Row(leaf, results['preset'], (results,)))
    for runs in kept.values():
        runs.sort(key=lambda row: _seed(row.results))
        _refuse_other_settings(runs, folder)
    suffixes = dict.fromkeys(suffix for suffix, _ in COMPARED.values())
    found = [
        Comparison(leaf, {suffix: kept.pop(_compared_leaf(leaf, suffix), []) for suffix in suffixes}) for leaf in leaves
    ]
    if kept:
        raise UserError(f'{", ".join(kept)} is not part of the comparison: move its results out of {folder}')
    _refuse_other_teachers(found, folder)
    return found


def render_comparison(comparisons: Sequence[Comparison], root: Path) -> str:
    """Write a comparison as markdown: accuracy, what was not run, how it was run, a command for each config."""
    ran = [runs for entry in comparisons for runs in entry.runs.values() if runs]
    parts = [
        markdown_table(['detector', 'bits', 'FP', *COMPARED], [_comparison_cells(entry) for entry in comparisons]),
        'Box AP / box AP50 / mask AP in percent, mean over the seeds in brackets; PTQ is the student as initialised on '
        'the synthetic images, before QAT.',
    ]
    if not ran:
        return '\n' + '\n\n'.join([*parts, 'Nothing has been run yet, therefore all is empty.']) + '\n\n'
    missing = [text for entry in comparisons if (text := _missing_columns(entry))]
    if missing:
        parts.append(f'Not run, therefore empty: {"; ".join(missing)}.')
    parts.append(
        markdown_table(
            ['config', 'images', 'synthesis: side x iterations', 'QAT steps x batch', 'seeds', 'device'],
            [_compared_run_cells(runs) for runs in ran],
        )
    )
    parts.append(OTHER_SEEDS)
    parts.append('```bash\n' + '\n'.join(command(runs[0], root) for runs in ran) + '\n```')
    return '\n' + '\n\n'.join(parts) + '\n\n'


def repository_path(config: str, root: Path) -> str:
    """Path of a config in the repository, however a run was given it.

    Args:
        config: A path, absolute, or relative to any folder.
        root: Folder with ``configs/``.

    Raises:
        UserError: If there is no such config.
    """
    parts = Path(config).parts
    for start in [index for index, part in enumerate(parts) if part == 'configs']:
        path = Path(*parts[start:])
        if (root / path).is_file():
            return path.as_posix()
    raise UserError(f'{config} is no config in {root / "configs"}: only runs of configs kept there are reported')


def render(rows: Sequence[Row], root: Path) -> str:
    """Write rows as markdown: accuracy, what was not run, how it was run, commands."""
    ran = [row for row in rows if row.results is not None]
    missing = [row for row in rows if row.results is None]
    parts = [
        markdown_table(
            ['detector', 'preset', 'bits', 'FP', 'PTQ', 'zero-shot QAT', 'model MB, FP', 'model MB, quantized'],
            [_accuracy_cells(row) for row in rows],
        ),
        'AP / AP50 in percent, of several seeds their mean ± half the range between them; PTQ is the student as '
        'initialised on the synthetic images, before QAT.',
    ]
    if missing:
        parts.append(f'Not run, therefore empty: {_enumerate_missing(missing)}.')
    parts.append(
        markdown_table(
            [
                *('detector', 'preset', 'bits', 'images', 'synthesis: side x iterations', 'ms per image-iteration'),
                *('QAT steps x batch', 'seeds', 'device'),
            ],
            [_run_cells(row) for row in ran],
        )
    )
    if any(len(row.runs) > 1 for row in ran):
        parts.append(OTHER_SEEDS)
    parts.append('```bash\n' + '\n'.join(command(row, root) for row in ran) + '\n```')
    return '\n' + '\n\n'.join(parts) + '\n\n'


def command(row: Row, root: Path) -> str:
    """Command that repeats a run with the leaf and the presets as they are now.

    Raises:
        UserError: If a setting cannot be given on a command line.
    """
    recorded = row.settings
    if recorded['calibration_set'].get('real') is not None:
        # No set is made.
        recorded['calibration_set'] = dict(recorded['calibration_set'], dir=None)
        recorded = {key: value for key, value in recorded.items() if key not in OF_SYNTHETIC_IMAGES}
    leaf = Config.fromfile(root / row.leaf).zsq.to_dict()
    current = complete_section(dict(leaf, preset=row.preset))
    changed = dict(differences(recorded, json.loads(json.dumps(current)), 'zsq'))
    for key in changed:
        _refuse_lists_of_presets(key, {'zsq': leaf})
    if leaf.get('preset', 'default') != row.preset:
        changed = {'zsq.preset': row.preset, **changed}
    options = [
        f'{key}={shlex.quote(_option(key, value))}'
        for section, content in changed.items()
        for key, value in _assignments(section, content)
    ]
    return ' \\\n    '.join([f'python tools/train.py {row.leaf}', *(['--cfg-options', *options] if options else [])])


def differences(recorded: Any, current: Any, key: str) -> Iterator[tuple[str, Any]]:
    """What a run recorded that is otherwise now.

    Args:
        recorded: Settings of the run.
        current: Those of today, in JSON's types.
        key: Of both.

    Yields:
        Dotted keys with the recorded values. Folders outside :data:`RELATIVE_DIR` are left out.
    """
    if isinstance(recorded, Mapping) and isinstance(current, Mapping):
        if recorded.get('type') != current.get('type'):
            # Another type replaces the section as a whole.
            current = {}
        for name, value in recorded.items():
            yield from differences(value, current.get(name), f'{key}.{name}')
    elif _alike(recorded, current):
        for index, pair in enumerate(zip(recorded, current, strict=True)):
            yield from differences(*pair, f'{key}.{index}')
    elif key == 'zsq.calibration_set.dir' and not str(recorded).startswith(RELATIVE_DIR):
        return
    elif recorded != current:
        yield key, recorded


def _alike(recorded: Any, current: Any) -> bool:
    """Whether both are lists of sections of the same types, so that a setting of one is set by its place."""
    return (
        isinstance(recorded, list)
        and isinstance(current, list)
        and all(isinstance(section, Mapping) and 'type' in section for section in (*recorded, *current))
        and [section['type'] for section in recorded] == [section['type'] for section in current]
    )


def _refuse_lists_of_presets(key: str, leaf: Any) -> None:
    """A place in a list can be given on a command line where the config itself has that list."""
    content = leaf
    for name in key.split('.'):
        if name.isdigit() and not isinstance(content, list):
            raise UserError(
                f'{key} differs from the preset and cannot be given on a command line: keep a config that sets it'
            )
        content = content[int(name)] if isinstance(content, list) else content.get(name, {})


def _assignments(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A section that is switched off now is given setting by setting."""
    if isinstance(value, Mapping) and value:
        for name, setting in value.items():
            yield from _assignments(f'{key}.{name}', setting)
    else:
        yield key, value


def _option(key: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, int | float | str) for item in value):
        return f'[{",".join(map(str, value))}]'
    if isinstance(value, Mapping | list):
        raise UserError(
            f'{key} differs from the config and cannot be given on a command line: keep a config that sets it'
        )
    return str(value)


def _compared_leaf(leaf: str, suffix: str) -> str:
    path = Path(leaf)
    return (path.parent / 'comparison' / f'{path.stem}{suffix}.py').as_posix() if suffix else leaf


def _seed(results: Mapping[str, Any] | None) -> int:
    assert results is not None
    return results['settings']['calibration_set']['seed']


def _beside_the_seed(row: Row) -> dict[str, Any]:
    """Settings of a run without its seed and the place of its set."""
    settings = row.settings
    own = settings['calibration_set'].items()
    return dict(settings, calibration_set={key: value for key, value in own if key not in ('seed', 'dir')})


def _refuse_other_settings(rows: Sequence[Row], folder: Path) -> None:
    if len({json.dumps(_beside_the_seed(row), sort_keys=True) for row in rows}) > 1:
        raise UserError(
            f'the runs of {rows[0].leaf} in {folder} differ in more than the seed: keep those that are alike'
        )


def _refuse_other_teachers(comparisons: Iterable[Comparison], folder: Path) -> None:
    accuracies: dict[str, list[float]] = {}
    for entry in comparisons:
        for suffix in entry.runs:
            of_teacher = [values[0] for values in _values(entry, suffix, 'float')]
            accuracies.setdefault(entry.name[0], []).extend(of_teacher)
    for detector, values in accuracies.items():
        if values and max(values) - min(values) > SAME_TEACHER:
            raise UserError(
                f'the runs of {detector} in {folder} had different teachers: their box AP is from {min(values):.3f} to '
                f'{max(values):.3f}; keep those of one teacher'
            )


def _values(entry: Comparison, suffix: str, metrics: str) -> list[list[float]]:
    """Accuracies of the runs that were evaluated, in the order of :data:`COMPARED_METRICS`."""
    measured = [row.results['metrics'].get(metrics) for row in entry.runs[suffix] if row.results is not None]
    # COCO's evaluator leaves metrics out when nothing was detected: the accuracy is 0 then.
    return [[found.get(name, 0.0) for name in COMPARED_METRICS] for found in measured if found is not None]


def _comparison_cells(entry: Comparison) -> list[str]:
    of_teacher = [values for suffix in entry.runs for values in _values(entry, suffix, 'float')]
    columns = [_values(entry, suffix, metrics) for suffix, metrics in COMPARED.values()]
    counted = [f'{_means(runs)} ({len(runs)})' if runs else '' for runs in columns]
    return [*entry.name, _means(of_teacher) if of_teacher else '', *counted]


def _missing_columns(entry: Comparison) -> str:
    missing = [title for title, (suffix, metrics) in COMPARED.items() if not _values(entry, suffix, metrics)]
    columns = 'all' if len(missing) == len(COMPARED) else ', '.join(missing)
    return f'{" ".join(entry.name)}: {columns}' if missing else ''


def _means(runs: Sequence[Sequence[float]]) -> str:
    return ' / '.join(f'{100 * statistics.mean(values):.1f}' for values in zip(*runs, strict=True))


def _compared_run_cells(runs: Sequence[Row]) -> list[str]:
    results = runs[0].results
    assert results is not None
    measured = results['calibration_set']['statistics']
    return [
        Path(runs[0].leaf).stem,
        f'{measured["images"]} {"real" if measured.get("real") else "synthetic"}',
        synthesis_text(results),
        training_text(results),
        ', '.join(str(_seed(row.results)) for row in runs),
        ', '.join(dict.fromkeys(row.results['device'] for row in runs if row.results is not None)),
    ]


def synthesis_text(results: Mapping[str, Any]) -> str:
    """Sides and iterations of the stages that made the images of a run."""
    stages = results['calibration_set']['stages'].values()
    sides = ['x'.join(map(str, dict.fromkeys(stage['image_size']))) for stage in stages]
    return ', '.join(f'{side} px x {stage["iterations"]}' for side, stage in zip(sides, stages, strict=True))


def training_text(results: Mapping[str, Any]) -> str:
    """Steps and batch of a run."""
    return f'{results["train"]["iterations"]} x {results["settings"]["train"]["batch_size"]}'


def _accuracy_cells(row: Row) -> list[str]:
    name = _leaf_name(row.leaf)['detector']
    if row.results is None:
        return [name, row.preset, row.bits, *[''] * 5]
    sizes = row.results['model_mb']
    accuracies = [_accuracy([run['metrics'].get(kind) for run in row.runs]) for kind in ('float', 'ptq', 'zero_shot')]
    return [name, row.preset, row.bits, *accuracies, f'{sizes["float"]:.2f}', f'{sizes["quantized"]:.2f}']


def _accuracy(runs: Sequence[Mapping[str, float] | None]) -> str:
    # COCO's evaluator leaves metrics out when nothing was detected: the accuracy is 0 then.
    names = ('coco/bbox_mAP', 'coco/bbox_mAP_50')
    return means_with_spread([[found.get(name, 0.0) for name in names] for found in runs if found is not None])


def means_with_spread(runs: Sequence[Sequence[float]]) -> str:
    """Accuracies in percent, one after the other; of several runs their means, ± half the range of what varies."""
    texts = []
    for values in zip(*runs, strict=True):
        spread = f' ± {50 * (max(values) - min(values)):.1f}' if len(values) > 1 else ''
        texts.append(f'{100 * statistics.mean(values):.1f}{spread}')
    return ' / '.join(texts)


def _run_cells(row: Row) -> list[str]:
    assert row.results is not None
    results = row.results
    stages = results['calibration_set']['stages'].values()
    return [
        *(_leaf_name(row.leaf)['detector'], row.preset, row.bits),
        str(results['calibration_set']['statistics']['images']),
        synthesis_text(results),
        ', '.join(f'{stage["ms_per_image_iteration"]:.3f}' for stage in stages),
        training_text(results),
        ', '.join(str(_seed(run)) for run in row.runs),
        ', '.join(dict.fromkeys(run['device'] for run in row.runs)),
    ]


def _enumerate_missing(rows: Iterable[Row]) -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((_leaf_name(row.leaf)['detector'], row.preset), []).append(row.bits)
    return '; '.join(f'{name}, {preset}: {", ".join(bits)}' for (name, preset), bits in groups.items())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table as markdown."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', r'\|') for cell in line) + ' |' for line in lines)


def _leaves_of_one_detector(leaf: str, root: Path) -> list[str]:
    detector = _leaf_name(leaf)['detector']
    found = (root / leaf).parent.glob(f'{detector}_w?a?.py')
    return [path.relative_to(root).as_posix() for path in found if LEAF.fullmatch(path.stem)]


def _leaf_name(leaf: str) -> re.Match[str]:
    match = LEAF.fullmatch(Path(leaf).stem)
    if match is None:
        raise UserError(f'{leaf} is not named DETECTOR_wBITSaBITS.py')
    return match


def _order(leaf: str) -> tuple[str, int, int]:
    match = _leaf_name(leaf)
    return match['detector'], -int(match['w_bits']), -int(match['a_bits'])


def read_results(path: Path) -> dict[str, Any]:
    """Read what a run wrote.

    Raises:
        UserError: If the file is missing, damaged or of another kind.
    """
    try:
        results = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f'{path} is damaged: {error}') from error
    wanted = ('config', 'preset', 'quantizer', 'metrics', 'model_mb', 'calibration_set', 'settings', 'train', 'device')
    lacking = [key for key in wanted if key not in results]
    if lacking:
        raise UserError(f'{path} is no results.json of a run: it lacks {", ".join(lacking)}')
    return results


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return path.read_text(encoding='utf-8')
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error


if __name__ == '__main__':
    main()
