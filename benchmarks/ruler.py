# SPDX-License-Identifier: Apache-2.0
"""Compare two recipes by pairs of runs that share their sets, the order of their images and their seeds.

    python benchmarks/ruler.py configs/zsq/yolov5-n_w4a4.py --work-dir work_dirs/ruler/equalize \
        --b zsq.quantizer.equalize=0.5 --pairs 6
    python benchmarks/ruler.py --work-dir work_dirs/ruler/equalize --read

Pair k takes seed k for both sides. Both train on one calibration set, unless a recipe changes how sets are made; then
each side has its own, of the same seed. Pairs run one after another, or ``--jobs`` processes on ``--gpus`` devices at
once. After an interruption, the same command continues. ``--read`` evaluates the pairs that are finished.

The difference is B minus A. Its interval is that of the paired t test. With few pairs, the exact sign-flip test needs
no normal distribution: if the recipes were equal, each difference could as well have the other sign. Its interval lies
between means of subsets of the differences (Hartigan, "Using subsample values as typical values", 1969). A difference
counts only if both intervals lie on one side of zero. Six pairs are the fewest with which the exact test can reach 5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jobs import ROOT, Job, lock, run, tool
from scipy.stats import t as student_t

from mmzsq.atomic_files import to_json, write_atomically
from mmzsq.errors import UserError
from mmzsq.report.runs import Run

SIDES = ('a', 'b')
MIN_PAIRS = 6
MAX_FLIPPED = 16
"""Pairs up to which all sign flips are tried."""

CONFIDENCE = 0.95
RECIPE_FILE = 'recipe.json'
RESULT_FILE = 'ruler.json'
SET_SECTIONS = ('zsq.synthesis', 'zsq.label_sampler', 'zsq.calibration_set', 'zsq.preset', 'load_from', 'model.')
"""Settings that change a calibration set."""

EQUAL = 1e-9
"""Sums of differences in another order are equal up to this."""


def paired_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the confidence interval of the mean difference by the paired t test.

    Args:
        differences: One for each pair, at least two.
        confidence: Probability that the interval covers the mean.
    """
    count = len(differences)
    quantile = float(student_t.ppf((1 + confidence) / 2, count - 1))
    half = quantile * statistics.stdev(differences) / math.sqrt(count)
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the exact sign-flip test of a mean of zero.

    Args:
        differences: One for each pair, at most :data:`MAX_FLIPPED`.
    """
    values = np.asarray(differences, float)
    bits = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
    sums = np.abs((1 - 2 * bits) @ values)
    return float((sums >= abs(values.sum()) - EQUAL).mean())


def sign_flip_interval(
    differences: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | tuple[None, None]:
    """Return the exact confidence interval of the mean difference, the values that the sign-flip test does not reject.

    Args:
        differences: One for each pair, at most :data:`MAX_FLIPPED`.
        confidence: Least probability that the interval covers the mean.

    Returns:
        Both ends; None if so few pairs cannot reach the confidence.
    """
    values = np.asarray(differences, float)
    chosen = np.arange(1, 2 ** len(values))[:, None] >> np.arange(len(values)) & 1
    means = np.sort(chosen @ values / chosen.sum(1))
    outside = math.floor((1 - confidence) / 2 * 2 ** len(values))
    if outside < 1:
        return None, None
    return float(means[outside - 1]), float(means[-outside])


def compare(differences: Sequence[float]) -> dict[str, Any]:
    """Summarize the differences of pairs.

    Args:
        differences: B minus A of each pair, in percent points, at least two.

    Returns:
        ``mean``, ``interval`` (paired t), ``flip_interval`` and ``flip_p`` (exact; None for many pairs), and
        ``verdict``: ``'B is better'``, ``'A is better'``, ``'no difference shown'`` or ``'too few pairs'``.
    """
    interval = paired_interval(differences)
    exact: tuple[float | None, float | None] = (None, None)
    p = None
    if len(differences) <= MAX_FLIPPED:
        exact, p = sign_flip_interval(differences), sign_flip_p(differences)
    ends = [end for end in (*interval, *exact) if end is not None]
    verdict = 'no difference shown'
    if len(differences) < MIN_PAIRS:
        verdict = 'too few pairs'
    elif min(ends) > 0:
        verdict = 'B is better'
    elif max(ends) < 0:
        verdict = 'A is better'
    return dict(mean=statistics.fmean(differences), interval=interval, flip_interval=exact, flip_p=p, verdict=verdict)


def plan(recipe: dict[str, Any], work: Path) -> list[Job]:
    """List the jobs of all pairs, pair by pair.

    Args:
        recipe: ``config``, ``common``, ``a`` and ``b`` (lists of ``KEY=VALUE``), ``sets`` (a path with ``{seed}`` or
            None) and ``seeds``.
        work: Folder of sets and students.
    """
    config = Path(recipe['config'])
    own_sets = any(option.startswith(SET_SECTIONS) for side in SIDES for option in recipe[side])
    jobs = []
    for seed in recipe['seeds']:
        for side in SIDES:
            options = [f'zsq.calibration_set.seed={seed}', *recipe['common'], *recipe[side]]
            needs: tuple[str, ...] = ()
            name = f'set_{side}_seed{seed}' if own_sets else f'set_seed{seed}'
            folder = work / name / 'calibration_set'
            if recipe['sets'] is not None:
                folder = Path(recipe['sets'].format(seed=seed)).resolve()
            else:
                needs = (name,)
                if own_sets or side == SIDES[0]:
                    command = tool('generate', config, folder.parent, [f'zsq.calibration_set.dir={folder}', *options])
                    jobs.append(Job(name, command, folder.parent, folder / 'manifest.json', kind='set'))
            student = work / f'{side}_seed{seed}'
            command = tool('train', config, student, [f'zsq.calibration_set.dir={folder}', *options])
            jobs.append(
                Job(student.name, command, student, student / 'results.json', needs, resumes=True, kind='student')
            )
    return jobs


def read(recipe: dict[str, Any], work: Path, row: str = 'zero_shot') -> dict[str, Any]:
    """Evaluate the pairs that are finished.

    Args:
        recipe: See :func:`plan`.
        work: Folder of sets and students.
        row: ``'zero_shot'`` or ``'ptq'``, the row of the results.

    Returns:
        The recipe, ``pairs`` with seed and both values in percent, what :func:`compare` says, and ``minutes``, the mean
        time of a pair.

    Raises:
        UserError: If fewer than two pairs are finished, or a run has no accuracy.
    """
    pairs: list[dict[str, float]] = []
    minutes: list[float] = []
    devices: set[str] = set()
    metric = None
    for seed in recipe['seeds']:
        folders = [work / f'{side}_seed{seed}' for side in SIDES]
        if not all((folder / 'results.json').is_file() for folder in folders):
            continue
        runs = [Run.load(folder) for folder in folders]
        metric = metric or runs[0].metric
        pairs.append(dict(seed=seed, a=_percent(runs[0], row, metric), b=_percent(runs[1], row, metric)))
        minutes.append(pair_minutes(runs))
        devices |= {one.results['device'] for one in runs}
    if len(pairs) < 2:
        raise UserError(f'{work} has {len(pairs)} finished pairs: two are the least, {MIN_PAIRS} say something')
    return dict(
        recipe,
        row=row,
        metric=metric,
        evaluation_images=runs[0].results['evaluation_images'],
        pairs=pairs,
        **compare([pair['b'] - pair['a'] for pair in pairs]),
        minutes=round(statistics.fmean(minutes), 2),
        devices=sorted(devices),
        versions=runs[0].results['versions'],
    )


def _percent(of: Run, row: str, metric: str | None) -> float:
    value = of.value(row, metric)
    if value is None:
        raise UserError(f'{of.path} has no accuracy of the row {row}: evaluate it, or choose another --row')
    return 100 * value


def pair_minutes(runs: Sequence[Run]) -> float:
    """Return the time of a pair: training and evaluation of both runs, and synthesis of their sets, in minutes."""
    sets = {}
    seconds = 0.0
    for one in runs:
        stages = (one.results['calibration_set'].get('stages') or {}).values()
        sets[one.results['settings']['calibration_set']['dir']] = sum(stage['seconds'] for stage in stages)
        seconds += sum(one.results['seconds'].values())
    return (seconds + sum(sets.values())) / 60


def describe(result: dict[str, Any]) -> str:
    """Describe a result in a few lines."""
    lines = [f'A: {" ".join(result["a"]) or "as in the config"}', f'B: {" ".join(result["b"]) or "as in the config"}']
    lines += [f'seed {p["seed"]}: A {p["a"]:.2f}, B {p["b"]:.2f}, {p["b"] - p["a"]:+.2f}' for p in result['pairs']]
    low, high = result['interval']
    text = f'B - A: {result["mean"]:+.2f} {result["metric"]}, 95 % interval {low:+.2f} to {high:+.2f} (paired t)'
    if result['flip_p'] is not None:
        low, high = result['flip_interval']
        exact = '' if low is None else f'{low:+.2f} to {high:+.2f}, '
        text += f', {exact}p = {result["flip_p"]:.3f} (exact sign flips)'
    lines.append(f'{text}: {result["verdict"]}')
    lines.append(
        f'{len(result["pairs"])} pairs, {result["evaluation_images"]} images; a pair takes {result["minutes"]:.1f} '
        f'minutes on {", ".join(result["devices"])}'
    )
    return '\n'.join([*lines, ''])


def kept_recipe(recipe: dict[str, Any] | None, work: Path) -> dict[str, Any]:
    """Return the recipe of a folder; write it on first use.

    Args:
        recipe: The recipe of the command line; None reads the one that is there.
        work: Folder of sets and students.

    Raises:
        UserError: If the folder has no recipe, or another one. More pairs are no other recipe.
    """
    path = work / RECIPE_FILE
    kept: dict[str, Any] | None = json.loads(path.read_bytes()) if path.is_file() else None
    if recipe is None:
        if kept is None:
            raise UserError(f'{work} has no {RECIPE_FILE}: give the config and the recipes, and leave out --read')
        return kept
    if kept is not None and dict(kept, seeds=recipe['seeds']) != recipe:
        raise UserError(f'{work} holds runs of other recipes ({path}): give another --work-dir')
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(recipe, indent=2))
    return recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run the pairs that are missing, and describe the difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('config', nargs='?', help='config of both sides, relative to the repository')
    parser.add_argument('--work-dir', type=Path, required=True, help='folder of this comparison')
    for side in SIDES:
        parser.add_argument(f'--{side}', nargs='+', default=[], metavar='KEY=VALUE', help=f'settings of {side.upper()}')
    parser.add_argument('--common', nargs='+', default=[], metavar='KEY=VALUE', help='settings of both sides')
    parser.add_argument('--sets', metavar='PATH', help='finished calibration sets, with {seed} in the path')
    parser.add_argument('--pairs', type=int, default=MIN_PAIRS, help=f'number of pairs (default: {MIN_PAIRS})')
    parser.add_argument('--first-seed', type=int, default=0, help='seed of the first pair (default: 0)')
    parser.add_argument('--row', choices=('zero_shot', 'ptq'), default='zero_shot', help='row that is compared')
    parser.add_argument('--jobs', type=int, default=1, help='processes at once (default: 1)')
    parser.add_argument('--gpus', type=int, default=1, help='GPUs to spread them over (default: 1)')
    parser.add_argument('--read', action='store_true', help='evaluate the finished pairs, and run nothing')
    parser.add_argument('--out', type=Path, help=f'copy of the result, beside {RESULT_FILE} in the work_dir')
    args = parser.parse_args(arguments)
    work, out = args.work_dir.resolve(), args.out and args.out.resolve()
    if not args.read and args.config is None:
        parser.error('give the config of the runs, or --read')
    recipe = None
    if not args.read:
        seeds = list(range(args.first_seed, args.first_seed + args.pairs))
        recipe = dict(config=args.config, common=args.common, a=args.a, b=args.b, sets=args.sets, seeds=seeds)
    try:
        recipe = kept_recipe(recipe, work)
        if not args.read:
            _run(plan(recipe, work), args.jobs, args.gpus, work)
        result = read(recipe, work, args.row)
        for path in filter(None, (work / RESULT_FILE, out)):
            write_atomically(path, to_json(result, indent=2))
    except UserError as error:
        sys.exit(f'error: {error}')
    sys.stdout.write(describe(result))


def _run(jobs: Sequence[Job], processes: int, gpus: int, work: Path) -> None:
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with lock(work) as held:
        failed = run(jobs, max(processes, 1), work, held.fileno(), lambda job: '', max(gpus, 1))
    if failed:
        raise UserError(f'{len(failed)} of {len(jobs)} jobs failed or could not start: {", ".join(failed)}')


if __name__ == '__main__':
    main()
