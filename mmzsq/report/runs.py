# SPDX-License-Identifier: Apache-2.0
"""What is read of a finished run: results, details, previews and the calibration set."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmzsq.atomic_files import sha256
from mmzsq.errors import UserError
from mmzsq.report.boxes_of_sets import set_labels

RESULTS_FILE = 'results.json'
DEPLOY_FILE = 'deploy.json'
"""File beside exported ones with the numbers of their verification."""
SENSITIVITY_FILE = 'sensitivity.json'
"""File in the work_dir with how much the loss grows with each number of bits of each layer, if bits were allocated."""
FOLDER = 'report'
DETAILS_FILE = 'details.json'
ROWS = dict(float='Full precision', ptq='PTQ', zero_shot='Student')
HEADLINES = ('bbox_mAP', 'mAP', 'pascal_voc/mAP')


@dataclass
class Run:
    """A finished run.

    Attributes:
        path: Its work_dir.
        results: Content of ``results.json``.
    """

    path: Path
    results: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a work_dir.

        Raises:
            UserError: If it has no results, or they are damaged.
        """
        file = Path(path) / RESULTS_FILE
        if not file.is_file():
            raise UserError(f'{path} has no {RESULTS_FILE}: give the work_dir of a finished run of mmzsq.train')
        try:
            results = json.loads(file.read_bytes())
            missing = {'metrics', 'quantizer', 'model_mb', 'settings', 'seconds', 'versions'} - results.keys()
        except (ValueError, AttributeError) as error:
            raise UserError(f'{file} is damaged: run the same command with --resume to write it again') from error
        if missing:
            raise UserError(f'{file} lacks {", ".join(sorted(missing))}: it is not one of mmzsq.train')
        return cls(Path(path), results)

    @cached_property
    def details(self) -> dict[str, Any]:
        """Content of ``report/details.json``; empty if the run wrote none."""
        return _read(self.path / FOLDER / DETAILS_FILE)

    @cached_property
    def set_dir(self) -> Path | None:
        """Folder of the calibration set, None if it is not here."""
        for folder in (self.path / str(self.details.get('set_dir', 'calibration_set')), self.path / 'calibration_set'):
            if (folder / 'annotations' / 'instances.json').is_file():
                return folder
        return None

    @cached_property
    def labels(self) -> dict[str, Any]:
        """Classes and box sizes of the calibration set, empty if it is not here."""
        if self.set_dir is None:
            return {}
        try:
            return set_labels(self.set_dir)
        except (AttributeError, KeyError, OSError, TypeError, ValueError):
            return {}

    @property
    def classes(self) -> list[str]:
        """Names of the classes, as far as they are known."""
        return list(self.labels.get('classes', []))

    @property
    def bits(self) -> str:
        """Such as ``W4A8``."""
        quantizer = self.results['quantizer']
        return f'W{quantizer["w_bits"]}A{quantizer["a_bits"]}'

    @property
    def name(self) -> str:
        """Name of the work_dir."""
        return self.path.resolve().name

    @property
    def trained_on_real(self) -> bool:
        """Whether the run learned from real images, as a comparison."""
        return bool((self.results.get('calibration_set') or {}).get('statistics', {}).get('real', False))

    @property
    def metric(self) -> str | None:
        """The metric that the verdict is about; None without an evaluation."""
        names = list(dict.fromkeys(name for row in self.results['metrics'].values() for name in row))
        found = [name for ending in HEADLINES for name in names if name.endswith(ending)]
        return (found or names or [None])[0]

    def value(self, row: str, metric: str | None) -> float | None:
        """Return a metric of a row; None if it was not measured."""
        metrics = self.results['metrics'].get(row)
        if metrics is None or metric is None:
            return None
        # COCO's evaluator omits metrics if nothing was detected.
        return float(metrics.get(metric, 0.0))

    @property
    def class_ap(self) -> dict[str, dict[str, float]]:
        """AP by class, for each row; from the metrics if COCO's evaluator reports classes anyway."""
        rows = {row: dict(values) for row, values in (self.details.get('class_ap') or {}).items()}
        for row, metrics in self.results['metrics'].items():
            for name, value in metrics.items():
                if name.endswith('_precision') and not math.isnan(value):
                    rows.setdefault(row, {})[name.rpartition('/')[2].removesuffix('_precision')] = value
        return rows

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Layers of the student; without measurements if the run made none.

        Layers whose sensitivity was measured, to allocate bits, have ``sensitivity``: growth of the loss by bits.
        """
        rows = [dict(row) for row in self.details.get('layers') or []]
        if not rows:
            report = _read(self.path / 'quantization_report.json').get('layers', [])
            rows = [{key: row[key] for key in row if key not in ('weight', 'input', 'output')} for row in report]
        measured = _read(self.path / SENSITIVITY_FILE).get('layers', {})
        for row in rows:
            if row['name'] in measured:
                row['sensitivity'] = measured[row['name']]
        return rows

    @cached_property
    def speed(self) -> dict[str, Any] | None:
        """Speed of an exported file of the final model, see :class:`mmzsq.deploy.latency.Speed`; None if not measured.

        A file counts only as long as it is the one that was measured. It lies in the work_dir or the folder above.
        """
        for folder in (self.path, self.path.resolve().parent):
            for name, entry in (_read(folder / DEPLOY_FILE).get('models') or {}).items():
                if entry.get('speed') and self._is_final(entry) and _digest(folder / name) == entry.get('sha256'):
                    return dict(entry['speed'], file=name)
        return None

    def _is_final(self, entry: Mapping[str, Any]) -> bool:
        """Return whether a file was exported from the checkpoint of the results."""
        checkpoint = Path(str(entry.get('checkpoint')))
        same_folder = checkpoint.resolve().parent == self.path.resolve()
        return same_folder and checkpoint.name == self.results.get('checkpoint')

    @property
    def last_row(self) -> str:
        """The row of the final model: the student or, without training, PTQ."""
        trained = (self.results.get('train') or {}).get('iterations', 1)
        return 'zero_shot' if trained else 'ptq'

    @property
    def shrunk(self) -> float:
        """Size of the float model divided by that of the quantized one."""
        sizes = self.results['model_mb']
        return float(sizes['float'] / sizes['quantized'])

    def stages(self) -> dict[str, dict[str, Any]]:
        """Return the stages of the synthesis: iterations and losses, averaged over the shards, of each."""
        stages: dict[str, list[dict[str, list[float]]]] = {}
        for path in sorted((self.set_dir / 'previews').glob('shard_*.json')) if self.set_dir else ():
            match = re.fullmatch(r'shard_\d+_(.+)', path.stem)
            curves = _read(path)
            if match and curves.get('iteration'):
                stages.setdefault(match[1], []).append(curves)
        averaged = {}
        for name, shards in stages.items():
            same = [shard for shard in shards if shard['iteration'] == shards[0]['iteration']]
            averaged[name] = {
                loss: [statistics.fmean(values) for values in zip(*(s[loss] for s in same if loss in s), strict=False)]
                for loss in shards[0]
            }
        return averaged

    def forming(self) -> list[tuple[str, int, Path]]:
        """Return stage, iteration and file of the states of some images, in order."""
        if self.set_dir is None:
            return []
        order = {name: place for place, name in enumerate(('relabel', 'synthesize', 'refine'))}
        known = list((self.results.get('calibration_set') or {}).get('stages', {}))
        found = []
        for path in (self.set_dir / 'previews' / 'forming').glob('*.jpg'):
            stage, _, iteration = path.stem.rpartition('_')
            place = known.index(stage) if stage in known else 10 + order.get(stage, 9)
            found.append((place, int(iteration), stage, path))
        return [(stage, iteration, path) for _, iteration, stage, path in sorted(found)]


def _digest(path: Path) -> str | None:
    return sha256(path.read_bytes()) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass
class Group:
    """Runs that differ in nothing but their seeds.

    Attributes:
        runs: At least one.
    """

    runs: list[Run]

    def spread(self, row: str, metric: str | None) -> tuple[float, float | None] | None:
        """Return mean and standard deviation of a metric; the latter is None for one run.

        Args:
            row: ``'float'``, ``'ptq'`` or ``'zero_shot'``.
            metric: Its name.
        """
        values = [value for run in self.runs if (value := run.value(row, metric)) is not None]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs whose teacher and settings agree but for seeds and folders."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        results = run.results
        key = dict(
            teacher=results.get('teacher_sha256') or results.get('teacher'),
            quantizer=results['quantizer'],
            settings=_without(results['settings'], {'seed', 'dir'}),
        )
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    return [Group(members) for members in groups.values()]


def _without(node: Any, names: set[str]) -> Any:
    if isinstance(node, Mapping):
        return {key: _without(value, names) for key, value in node.items() if key not in names}
    return node


def flatten(node: Any, prefix: str = '') -> dict[str, Any]:
    """Return the leaves of nested dicts under dotted names."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node}
    return {
        name: leaf
        for key, value in node.items()
        for name, leaf in flatten(value, f'{prefix}.{key}' if prefix else str(key)).items()
    }


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ, with the value of each."""
    flat = [flatten(dict(quantizer=run.results['quantizer'], **run.results['settings'])) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = {name: [settings.get(name) for settings in flat] for name in names if name != 'calibration_set.dir'}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}
