# SPDX-License-Identifier: Apache-2.0
"""Read the ``results.json`` of runs kept in the repository, and format the commands that repeat them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_pages import read_text
from mmengine.config import Config

from mmzsq.config.compose import complete_section
from mmzsq.errors import UserError

LEAF = re.compile(r'(?P<detector>.+)_w(?P<w_bits>\d)a(?P<a_bits>\d)')
BOX_METRICS = ('coco/bbox_mAP', 'coco/bbox_mAP_50')
SAME_TEACHER = 0.005
"""Largest difference in AP of one teacher between evaluations, as sums on a GPU have no fixed order."""
OF_SYNTHETIC_IMAGES = ('label_sampler', 'synthesis')
"""Sections without effect on runs with real images."""
OTHER_SEEDS = (
    'The commands are for the first seed in the table. For another seed set `zsq.calibration_set.seed` and a new '
    '`zsq.calibration_set.dir`.'
)
RELATIVE_DIR = 'work_dirs/'
"""Prefix of the folders of sets that commands may name; other folders are specific to one machine."""


@dataclass(frozen=True)
class Row:
    """A leaf config with one preset.

    Attributes:
        leaf: Path of the config in the repository.
        preset: Name of the preset.
        runs: Results of its runs in order of their seeds; empty without a run.
    """

    leaf: str
    preset: str
    runs: tuple[dict[str, Any], ...] = ()

    @property
    def seeds(self) -> str:
        """Seeds of the runs, as text."""
        return ', '.join(str(seed_of(run)) for run in self.runs)

    @property
    def devices(self) -> str:
        """Devices of the runs without duplicates, as text."""
        return ', '.join(dict.fromkeys(run['device'] for run in self.runs))


def read_results(path: Path) -> dict[str, Any]:
    """Read the ``results.json`` of a run.

    Raises:
        UserError: If the file is missing or damaged, or is not a ``results.json``.
    """
    try:
        results = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f'{path} is damaged: {error}') from error
    wanted = ('config', 'preset', 'quantizer', 'metrics', 'model_mb', 'calibration_set', 'settings', 'train', 'device')
    lacking = [key for key in wanted if key not in results]
    if lacking:
        raise UserError(f'{path} is not the results.json of a run: {", ".join(lacking)} missing')
    return results


def repository_path(config: str, root: Path) -> str:
    """Return the path of a config relative to the repository.

    Args:
        config: Path that a run recorded, absolute or relative to any folder.
        root: Folder with ``configs/``.

    Raises:
        UserError: If there is no such config.
    """
    parts = Path(config).parts
    for start in [index for index, part in enumerate(parts) if part == 'configs']:
        path = Path(*parts[start:])
        if (root / path).is_file():
            return path.as_posix()
    raise UserError(f'{config} is not a config in {root / "configs"}: only runs of configs in it are reported')


def leaf_name(leaf: str) -> re.Match[str]:
    """Match detector and bits in the name of a leaf config.

    Raises:
        UserError: If the name does not have this form.
    """
    match = LEAF.fullmatch(Path(leaf).stem)
    if match is None:
        raise UserError(f'{leaf} is not named DETECTOR_wBITSaBITS.py')
    return match


def bits_of(leaf: str) -> str:
    """Return the bits in the name of a leaf config, such as ``W4A8``."""
    match = leaf_name(leaf)
    return f'W{match["w_bits"]}A{match["a_bits"]}'


def order(leaf: str) -> tuple[str, int, int]:
    """Sort key of leaf configs: detector, then decreasing bits."""
    match = leaf_name(leaf)
    return match['detector'], -int(match['w_bits']), -int(match['a_bits'])


def seed_of(results: Mapping[str, Any]) -> int:
    """Return the seed of a run."""
    return results['settings']['calibration_set']['seed']


def settings_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``zsq`` section that a run recorded."""
    return dict(results['settings'], quantizer=results['quantizer'], preset=results['preset'])


def row_of(leaf: str, runs: Iterable[dict[str, Any]], place: Path | str) -> Row:
    """Join the runs of a leaf config.

    Args:
        leaf: Path of the config in the repository.
        runs: Their results, at least one, in any order.
        place: Folder of the results, for messages.

    Raises:
        UserError: If the runs differ in more than the seed, or two share a seed.
    """
    by_seed = tuple(sorted(runs, key=seed_of))
    seeds = [seed_of(run) for run in by_seed]
    if len(set(seeds)) < len(seeds):
        raise UserError(f'{place} has two runs of {leaf} with the same seed (seeds: {seeds}): keep one')
    if len({json.dumps(_beside_the_seed(run), sort_keys=True) for run in by_seed}) > 1:
        raise UserError(f'the runs of {leaf} in {place} differ in more than the seed: keep runs with the same settings')
    return Row(leaf, by_seed[0]['preset'], by_seed)


def _beside_the_seed(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run without its seed and the folder of its set."""
    settings = settings_of(results)
    own = settings['calibration_set'].items()
    return dict(settings, calibration_set={key: value for key, value in own if key not in ('seed', 'dir')})


def accuracies(runs: Iterable[Mapping[str, Any]], row: str, metrics: Sequence[str]) -> list[list[float]]:
    """Read the accuracies of one detector in each run.

    Args:
        runs: Results of runs.
        row: Detector in a run: ``'float'``, ``'ptq'`` or ``'zero_shot'``.
        metrics: Names of metrics.

    Returns:
        One number per metric in [0, 1], for each run that evaluated the detector.
    """
    measured = [run['metrics'].get(row) for run in runs]
    # COCO's evaluator omits the metrics if nothing was detected, which means an accuracy of 0.
    return [[found.get(name, 0.0) for name in metrics] for found in measured if found is not None]


def synthesis_text(results: Mapping[str, Any]) -> str:
    """Format image sides and iterations of the synthesis stages of a run."""
    stages = results['calibration_set']['stages'].values()
    sides = ['x'.join(map(str, dict.fromkeys(stage['image_size']))) for stage in stages]
    return ', '.join(f'{side} px x {stage["iterations"]}' for side, stage in zip(sides, stages, strict=True))


def training_text(results: Mapping[str, Any]) -> str:
    """Format training steps and batch size of a run."""
    return f'{results["train"]["iterations"]} x {results["settings"]["train"]["batch_size"]}'


FORMER_VALUES: dict[str, Any] = {
    'calibration_set.source': 'synthesized',
    'synthesis.balance': False,
    'synthesis.detection_interval': 1,
    'synthesis.fit_batches': False,
    'train.weight_size': None,
}
"""Settings that were added after runs were kept, by key below ``zsq``, with the values of these runs."""


def command(row: Row, root: Path) -> str:
    """Return the command that repeats the first run of a row with the current leaf config and presets.

    Raises:
        UserError: If a setting cannot be given on a command line.
    """
    recorded = settings_of(row.runs[0])
    if recorded['calibration_set'].get('real') is not None:
        # Runs on real images make no calibration set.
        recorded['calibration_set'] = dict(recorded['calibration_set'], dir=None)
        recorded = {key: value for key, value in recorded.items() if key not in OF_SYNTHETIC_IMAGES}
    recorded = with_former_values(recorded)
    cfg = Config.fromfile(root / row.leaf)
    leaf = cfg.zsq.to_dict()
    current = complete_section(dict(leaf, preset=row.preset))
    changed = dict(differences(recorded, json.loads(json.dumps(current)), 'zsq'))
    lists = {_list_of_preset(key, {'zsq': leaf}) for key in changed} - {None}
    changed = {key: value for key, value in changed.items() if _list_of_preset(key, {'zsq': leaf}) not in lists}
    if leaf.get('preset', 'default') != row.preset:
        changed = {'zsq.preset': row.preset, **changed}
    options = [
        f'{key}={shlex.quote(_option(key, value))}'
        for section, content in changed.items()
        for key, value in _assignments(section, content)
    ]
    path, before = row.leaf, ''
    if lists:
        # A command line can only address lists of the config itself.
        path = 'work_dirs/leaf.py'
        lines = [f'cat > {path} <<EOF', f"_base_ = ['../{row.leaf}']", 'zsq = dict()']
        for key in sorted(filter(None, lists)):
            value: Any = {'zsq': recorded}
            for name in key.split('.'):
                value = value[name]
            lines.append(f'zsq.update({_nested(key.split(".")[1:], value)})')
        before = '\n'.join([*lines, 'EOF']) + '\n'
    arguments = [f'python tools/train.py {path}', *(['--cfg-options', *options] if options else [])]
    return before + ' \\\n    '.join(arguments)


def _nested(names: Sequence[str], value: Any) -> str:
    return repr(value) if not names else f'dict({names[0]}={_nested(names[1:], value)})'


def with_former_values(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings with those that did not exist yet, at the values that computed the same."""
    completed = {name: dict(section) if isinstance(section, Mapping) else section for name, section in recorded.items()}
    for key, value in FORMER_VALUES.items():
        section, name = key.split('.')
        if isinstance(completed.get(section), dict):
            completed[section].setdefault(name, value)
    return completed


def differences(recorded: Any, current: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield recorded settings that differ from the current ones.

    Args:
        recorded: Settings of the run.
        current: Current settings, in the types of JSON.
        key: Dotted key of both.

    Yields:
        Dotted keys with the recorded values, except for folders outside :data:`RELATIVE_DIR`.
    """
    if isinstance(recorded, Mapping) and isinstance(current, Mapping):
        removed = set(recorded) - set(current)
        if recorded.get('type') != current.get('type'):
            # A section of another type is replaced as a whole.
            current, removed = {}, set()
        for name, value in recorded.items():
            # A setting that was switched off in the run and no longer exists changes nothing.
            if value or name not in removed:
                yield from differences(value, current.get(name), f'{key}.{name}')
    elif _alike(recorded, current):
        for index, pair in enumerate(zip(recorded, current, strict=True)):
            yield from differences(*pair, f'{key}.{index}')
    elif key == 'zsq.calibration_set.dir' and not str(recorded).startswith(RELATIVE_DIR):
        return
    elif recorded != current:
        yield key, recorded


def _alike(recorded: Any, current: Any) -> bool:
    """Return whether both are lists of sections of the same types, so that settings can be addressed by index."""
    return (
        isinstance(recorded, list)
        and isinstance(current, list)
        and all(isinstance(section, Mapping) and 'type' in section for section in (*recorded, *current))
        and [section['type'] for section in recorded] == [section['type'] for section in current]
    )


def _list_of_preset(key: str, leaf: Any) -> str | None:
    """Return the key of the list that ``key`` addresses if it is in the preset and not in the leaf, or else None."""
    content = leaf
    names = key.split('.')
    for position, name in enumerate(names):
        if name.isdigit() and not isinstance(content, list):
            return '.'.join(names[:position])
        content = content[int(name)] if isinstance(content, list) else content.get(name, {})
    return None


def _assignments(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Split sections into settings, since the current section may be None."""
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
            f'{key} differs from the config and cannot be given on a command line: add a config that sets it'
        )
    return str(value)
