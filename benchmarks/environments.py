# SPDX-License-Identifier: Apache-2.0
"""Install and rehearse the package in a matrix of environments: Python, PyTorch, stock OpenMMLab, OneDL, MMYOLO.

Each environment is a virtual environment of its own. There, the package is installed as the README says, imported,
composes its configs, and runs small detectors from synthesis to the results. The student of the demo's detector is also
tested. ``--suite`` then runs all tests. Environments whose Python is not on this machine are skipped with a line::

    python benchmarks/environments.py                     # all, a few GB of disk and ten minutes each
    python benchmarks/environments.py stock-3.12 onedl    # these only
    python benchmarks/environments.py --no-install onedl  # an environment of ROOT/onedl as it is
    python benchmarks/environments.py --suite onedl       # all tests, too: half an hour more

The last lines are a table in Markdown. The exit code is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[1]
DEMO = 'mmzsq::zsq/yolov5-p_shapes_w4a4.py'
STOCK_DETECTORS = (DEMO, 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
MMYOLO_DETECTORS = (
    'mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py',
    'mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py',
)
SMALL_RUN = (
    *('zsq.calibration_set.num_images=2', 'zsq.calibration_set.batch_size=2'),
    *('zsq.label_sampler.warmup=1', 'zsq.label_sampler.interval=1'),
    *('zsq.synthesis.relabel.image_size=64', 'zsq.synthesis.relabel.iterations=2', 'zsq.synthesis.refine=None'),
    *('zsq.synthesis.synthesize.image_size=64', 'zsq.synthesis.synthesize.iterations=2'),
    *('zsq.train.max_epochs=1', 'zsq.train.batch_size=2', 'zsq.train.num_workers=0', 'zsq.train.init_batches=1'),
    # Reads the labels of the set, too.
    'zsq.distillation.detection_weight=1.0',
    *('zsq.quantizer.weight.init=lsq', 'zsq.quantizer.activation.init=lsq'),
)
SMALL_SHAPES = tuple(
    f'{loader}_dataloader.{option}'
    for loader in ('val', 'test')
    for option in ('dataset.num_images=2', 'dataset.image_size=64', 'num_workers=0', 'persistent_workers=False')
)


class Environment(NamedTuple):
    """One row of the matrix.

    Attributes:
        python: Version of the interpreter, such as ``'3.10'``.
        packages: Requirements for pip, in one call. ``{repo}`` is the source tree.
        alone: Requirements that pip then installs without their dependencies.
        detectors: Configs that are rehearsed.
    """

    python: str
    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    detectors: tuple[str, ...] = STOCK_DETECTORS


# PyTorch 2.1 and 2.2 were built for NumPy 1, and OpenCV has required NumPy 2 since 4.12.
NUMPY_1 = ('numpy<2', 'opencv-python<4.12')
MATRIX = {
    'oldest': Environment('3.10', ('torch==2.1.0', 'torchvision==0.16.0', *NUMPY_1, '{repo}[lite]')),
    # The oldest torchvision for these versions of Python, and its PyTorch.
    'oldest-3.12': Environment('3.12', ('torch==2.2.0', 'torchvision==0.17.0', *NUMPY_1, '{repo}[lite]')),
    'oldest-3.13': Environment('3.13', ('torch==2.6.0', 'torchvision==0.21.0', '{repo}[lite]')),
    'stock-3.10': Environment('3.10', ('{repo}[lite]',)),
    'stock-3.11': Environment('3.11', ('{repo}[lite]',)),
    'stock-3.12': Environment('3.12', ('{repo}[lite]',)),
    'stock-3.13': Environment('3.13', ('{repo}[lite]',)),
    'onedl': Environment('3.11', ('{repo}[onedl]',), ('mmcv-lite==2.1.0',)),
    'mmyolo': Environment('3.11', ('{repo}[stock]', 'mmcv-lite==2.0.1', 'mmyolo==0.6.0'), detectors=MMYOLO_DETECTORS),
}


class StepFailed(Exception):
    """A command of an environment failed. The message is the last line that it printed."""


def find_python(version: str) -> str | None:
    """Find an interpreter: this one, one on the path, or one of pyenv's.

    Args:
        version: Such as ``'3.10'``.

    Returns:
        Its path, or None.
    """
    if version == f'{sys.version_info.major}.{sys.version_info.minor}':
        return sys.executable
    root = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv')) / 'versions'
    # A shim of pyenv on the path may be there without the version.
    for path in (*sorted(root.glob(f'{version}.*/bin/python')), shutil.which(f'python{version}')):
        if path is not None and subprocess.run([path, '-c', ''], capture_output=True, check=False).returncode == 0:
            return str(path)
    return None


def call(command: Sequence[str | Path], log: Path, **options: Any) -> str:
    """Run a command, append its output to a log, and return its output.

    Raises:
        StepFailed: If its exit code is not 0.
    """
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    with log.open('a', encoding='utf-8') as file:
        file.write(f'$ {" ".join(str(word) for word in command)}\n{result.stdout}\n')
    if result.returncode:
        # The line before those of make says more.
        lines = [line for line in result.stdout.splitlines() if line.strip() and not line.startswith('make')]
        lines = lines or ['no output']
        raise StepFailed(f'exit code {result.returncode}: {lines[-1].strip()}')
    return result.stdout


def install(environment: Environment, folder: Path, python: str, log: Path, extras: Sequence[str] = ()) -> None:
    """Make the virtual environment and install its packages, and those of more extras of this package."""
    call([python, '-m', 'venv', folder], log)
    pip: list[str | Path] = [folder / 'bin' / 'python', '-m', 'pip', 'install', '--disable-pip-version-check', '-q']
    packages = [package.format(repo=REPO) for package in environment.packages]
    call([*pip, *packages, *(f'{REPO}[{extra}]' for extra in extras)], log)
    if environment.alone:
        call([*pip, '--no-deps', *environment.alone], log)


def count_tests(output: str) -> dict[str, int]:
    """Add up the last lines of several runs of pytest.

    >>> count_tests('2 failed, 7 passed, 4 deselected, 1 warning in 61.50s (0:01:01)')
    {'failed': 2, 'passed': 7}
    """
    counts: Counter[str] = Counter()
    for line in re.findall(r'^(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s', output, re.MULTILINE):
        for number, outcome in re.findall(r'(\d+) (passed|failed|errors?|skipped)', line):
            counts[outcome] += int(number)
    return dict(counts)


def check(name: str, environment: Environment, root: Path, installs: bool, suite: bool = False) -> dict[str, Any]:
    """Run all steps of an environment.

    Args:
        name: Key in :data:`MATRIX`.
        environment: Its row.
        root: Folder of the virtual environments.
        installs: Whether to install. If not, the environment is used as it is, with this source tree.
        suite: Whether to run all tests, too.

    Returns:
        ``name``; ``skipped``, the reason, or the results: ``versions``, ``composed`` (number of configs), ``rehearsed``
        (seconds by detector), ``tests`` (their number by outcome), and ``failed``, the first error, if any.
    """
    folder = root / name
    python = folder / 'bin' / 'python'
    if not installs and not python.is_file():
        return dict(name=name, skipped=f'no environment in {folder}')
    interpreter = find_python(environment.python)
    if installs and interpreter is None:
        return dict(name=name, skipped=f'no Python {environment.python} on this machine')
    work_dir = root / f'{name}_runs'
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    log = work_dir / 'log.txt'
    variables = dict(os.environ, OMP_NUM_THREADS='1')
    variables.pop('PYTHONPATH', None)
    if not installs:
        variables['PYTHONPATH'] = str(REPO)
    row: dict[str, Any] = dict(name=name, rehearsed={})
    inside: list[str | Path] = [python, Path(__file__).resolve(), '--inside']
    try:
        if interpreter is not None and installs:
            install(environment, folder, interpreter, log, ('deploy', 'tests') if suite else ())
        options: dict[str, Any] = dict(cwd=work_dir, env=variables)
        row['versions'] = json.loads(call([*inside, 'versions'], log, **options).splitlines()[-1])
        row['composed'] = int(call([*inside, 'compose'], log, **options).splitlines()[-1])
        for detector in environment.detectors:
            started = time.perf_counter()
            leaf = Path(detector).name
            call([*inside, 'leaf', detector, leaf], log, **options)
            changes = [*SMALL_RUN, *(SMALL_SHAPES if detector == DEMO else ())]
            out = f'work_dirs/{Path(leaf).stem}'
            train: list[str | Path] = [python, '-m', 'mmzsq.train', leaf, '--work-dir', out, '--cfg-options', *changes]
            call(train, log, **options)
            if detector == DEMO:
                test: list[str | Path] = [
                    python,
                    '-m',
                    'mmzsq.test',
                    leaf,
                    f'{out}/epoch_1.pth',
                    '--cfg-options',
                    *SMALL_SHAPES,
                ]
                call(test, log, **options)
            results = json.loads((work_dir / out / 'results.json').read_text(encoding='utf-8'))
            if not results.get('model_mb'):
                raise StepFailed(f'{detector}: results.json has no model sizes')
            row['rehearsed'][leaf] = round(time.perf_counter() - started, 1)
        if suite:
            started = time.perf_counter()
            row['tests'] = count_tests(call(['make', '-C', REPO, 'suite', f'VENV={folder}'], log, env=variables))
            row['tests']['seconds'] = round(time.perf_counter() - started)
    except StepFailed as error:
        row['failed'] = str(error)
    return row


def versions() -> str:
    """Import the package and all that it stands on, and return the versions as JSON."""
    import mmcv
    import mmdet
    import mmengine
    import numpy
    import torch

    import mmzsq.models

    modules = (torch, numpy, mmdet, mmengine, mmcv)
    found = {module.__name__: module.__version__ for module in modules}
    return json.dumps(dict(python=sys.version.split()[0], **found, mmzsq=mmzsq.__version__))


def compose_all() -> int:
    """Compose every leaf of the package whose base packages are installed, and return their number."""
    from mmengine.config import Config

    from mmzsq.compat import package_configs
    from mmzsq.config.compose import compose

    folder = package_configs('mmzsq')
    if folder is None:
        raise FileNotFoundError('the package has no configs')
    leaves = sorted((folder / 'zsq').glob('*.py'))
    for path in leaves:
        compose(Config.fromfile(path))
    return len(leaves)


def write_leaf(base: str, path: str) -> None:
    """Write a leaf that quantizes a detector with random weights to W4A8. The demo has a teacher of its own."""
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    import mmzsq.models  # noqa: F401

    if base == DEMO:
        Path(path).write_text(f'_base_ = [{base!r}]\n', encoding='utf-8')
        return
    text = f"_base_ = [{base!r}, 'mmzsq::_base_/zsq_w4a8.py']\nload_from = 'teacher.pth'\n"
    Path(path).write_text(text, encoding='utf-8')
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    cfg.model.backbone.pop('init_cfg', None)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), 'teacher.pth')


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the results as a table in Markdown."""
    packages = ('python', 'torch', 'numpy', 'mmdet', 'mmengine', 'mmcv')
    lines = [f'| environment | {" | ".join(packages)} | configs composed | rehearsed | tests |']
    lines.append(f'| {" | ".join(["---"] * (len(packages) + 4))} |')
    for row in rows:
        found = row.get('versions', {})
        rehearsed = ', '.join(
            f'{Path(leaf).stem} ({seconds:.0f} s)' for leaf, seconds in row.get('rehearsed', {}).items()
        )
        if 'skipped' in row:
            rehearsed = f'skipped: {row["skipped"]}'
        if 'failed' in row:
            rehearsed = f'{rehearsed}; **failed**: {row["failed"]}'.removeprefix('; ')
        cells = [
            row['name'],
            *(found.get(package, '') for package in packages),
            str(row.get('composed', '')),
            rehearsed,
            ', '.join(f'{number} {outcome}' for outcome, number in row.get('tests', {}).items()),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'environments: {", ".join(MATRIX)}')
    parser.add_argument('--root', type=Path, default=REPO / 'work_dirs' / 'environments', help='folder for them')
    parser.add_argument('--no-install', action='store_true', help='use the environments of ROOT as they are')
    parser.add_argument('--suite', action='store_true', help='run all tests, too')
    parser.add_argument('--out', type=Path, help='JSON file for the results')
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in MATRIX]
    if unknown:
        parser.error(f'unknown environments {", ".join(unknown)}: choose from {", ".join(MATRIX)}')
    rows = []
    for name in args.names or MATRIX:
        row = check(name, MATRIX[name], args.root.resolve(), not args.no_install, args.suite)
        print(f'{name}: {row.get("skipped") or row.get("failed") or "passed"}', flush=True)  # noqa: T201
        rows.append(row)
    print(table(rows))  # noqa: T201
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=2) + '\n', encoding='utf-8')
    return int(any('failed' in row for row in rows))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--inside']:
        step, *arguments = sys.argv[2:]
        steps = dict(versions=versions, compose=compose_all, leaf=write_leaf)
        print(steps[step](*arguments))  # type: ignore[operator]  # noqa: T201
    else:
        sys.exit(main())
