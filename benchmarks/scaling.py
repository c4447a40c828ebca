# SPDX-License-Identifier: Apache-2.0
"""Time a whole run by one process and by several on one machine, and see that they make the same calibration set.

    python benchmarks/scaling.py configs/zsq/yolov5-s_w4a4.py --gpus 1 2 \
        --out benchmarks/results/benchmarks/scaling.json

Runs one after the other what ``python -m mmzsq.train`` does: the set, training, and the evaluation where its data is
there. Weights are random unless ``--checkpoint`` names some, and the default sizes are for a few minutes;
``--cfg-options`` change them. Every process has a GPU of its own, or shares the CPU where there is none. Any number of
processes make the same images. In training each takes batches as large as one alone does, so that several see more
images a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmark_meter import describe_device, describe_versions
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook

from mmzsq import cli
from mmzsq.engine import QuantizerInitHook, ZeroShotRunner
from mmzsq.engine.distributed import average_gradients
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet, CalibrationSetGenerator

ROOT = Path(__file__).resolve().parents[1]

SIZE = {
    'zsq.calibration_set.num_images': 256,
    'zsq.synthesis.relabel.batch_size': 32,
    'zsq.train.max_epochs': 4,
    'default_hooks.checkpoint.interval': 1000,
}
"""What makes a run a benchmark of minutes: a few shards, all iterations of each."""
WARM_UP_ITERATIONS = 6
"""Of each stage, before the clock starts: kernels are compiled and chosen, and the step is captured."""
WARM_UP_STEPS = 10
"""The same of training."""
EXCHANGES = 20
"""Averages of the gradients that are timed."""
SERIAL_PARTS = ('claim', 'merge', 'verification')
"""Parts of making a set that do not become shorter with more processes, and grow with the set."""
RUN_SECONDS = 1800
"""After which a run is given up."""
STARTED = 'SCALING_STARTED'
"""Environment variable: when the command began, in seconds since 1970."""


def main() -> None:
    """Parse the command line, run each number of processes, compare, write."""
    parser = cli.parser((__doc__ or '').split('\n')[0])
    parser.add_argument('--gpus', type=int, nargs='+', default=[1, 2], help='numbers of processes (default: 1 2)')
    parser.add_argument('--checkpoint', help='of the float detector (default: random weights)')
    parser.add_argument('--out', type=Path, help='JSON file to write (default: standard output)')
    parser.add_argument('--worker', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.worker is not None:
            work(args)
            cli.leave_processes()
        else:
            cli.write_json(measure(args), args.out)
    except UserError as error:
        raise SystemExit(f'error: {error}') from None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run each number of processes and compare the first with the last.

    Raises:
        UserError: If the numbers of processes are not at least two that rise from 1, or a run fails.
    """
    if len(args.gpus) < 2 or args.gpus[0] != 1 or sorted(set(args.gpus)) != args.gpus:
        raise UserError(f'--gpus is 1 and then rising numbers, not {" ".join(map(str, args.gpus))}')
    if torch.cuda.is_available() and torch.cuda.device_count() < args.gpus[-1]:
        raise UserError(f'--gpus {args.gpus[-1]} needs as many GPUs, and here are {torch.cuda.device_count()}')
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or random_weights(args.config, Path(folder, 'random.pth'))
        runs = {count: run(args, checkpoint, count, Path(folder, str(count))) for count in args.gpus}
    last = args.gpus[-1]
    one, several = runs[1], runs[last]
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    speedup = dict(
        generation=round(generation_seconds(one) / generation_seconds(several), 3),
        training=round(several['train_images_per_second'] / one['train_images_per_second'], 3),
    )
    serial = sum(one['seconds'][part] for part in SERIAL_PARTS)
    return dict(
        config=args.config,
        command=shlex.join(['python', 'benchmarks/scaling.py', *sys.argv[1:]]),
        weights=args.checkpoint or 'random',
        processes=args.gpus,
        runs=runs,
        same_set=len({content['set_sha256'] for content in runs.values()}) == 1,
        speedup=speedup,
        serial_share=dict(
            generation=round(serial / (serial + one['seconds']['synthesis']), 5),
            training=round(share_by_amdahl(speedup['training'], last), 5),
        ),
        device=describe_device(device),
        versions=describe_versions(device),
    )


def generation_seconds(content: Mapping[str, Any]) -> float:
    """Seconds of a run from its claim of the folder to a verified set, without the start of the processes."""
    return sum(content['seconds'][part] for part in ('synthesis', *SERIAL_PARTS))


def share_by_amdahl(speedup: float, processes: int) -> float:
    """The part of the time of one process that explains, by Amdahl's law, how many times as fast several are.

    Args:
        speedup: How many times as fast.
        processes: How many there are, at least 2.

    Example:
        >>> share_by_amdahl(5.0, 9)
        0.1
    """
    return max((processes / speedup - 1) / (processes - 1), 0.0)


def random_weights(config: str, path: Path) -> str:
    """Write a checkpoint of the detector of ``config`` with weights that no training has seen."""
    register_all_modules()
    torch.manual_seed(0)
    torch.save(dict(state_dict=MODELS.build(Config.fromfile(config).model).state_dict()), path)
    return str(path)


def run(args: argparse.Namespace, checkpoint: str, count: int, folder: Path) -> dict[str, Any]:
    """Run ``count`` processes to their end and join what they measured.

    Raises:
        UserError: If one of them fails.
    """
    folder.mkdir()
    script = [str(Path(__file__).resolve()), *sys.argv[1:], '--checkpoint', checkpoint, '--worker', str(folder)]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}']
    command = [sys.executable, *(torchrun if count > 1 else []), *script]
    if count > 1:
        command += ['--launcher', 'pytorch']
    env = dict(os.environ, **{STARTED: str(time.time())})
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    start = time.perf_counter()
    processes = f'{count} process{"es" * (count > 1)}'
    failure = None
    with (folder / 'log.txt').open('w') as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            if code := process.wait(RUN_SECONDS):
                failure = f'ended with code {code}'
        except subprocess.TimeoutExpired:
            failure = f'had not ended after {RUN_SECONDS} s'
        finally:
            if process.poll() is None:
                # Asked to, torchrun ends its workers, which a kill would leave behind.
                process.terminate()
                process.wait()
    if failure is not None:
        end = (folder / 'log.txt').read_text(errors='replace')[-3000:]
        raise UserError(f'the run of {processes} {failure}:\n{end}')
    sys.stderr.write(f'{processes}: {time.perf_counter() - start:.0f} s\n')
    return join([json.loads((folder / f'rank_{rank}.json').read_text()) for rank in range(count)])


def join(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One account of a run: seconds of the process that a part took longest."""
    parts = {part for rank in ranks for part in rank['seconds']}
    seconds = {part: round(max(rank['seconds'].get(part, 0.0) for rank in ranks), 4) for part in sorted(parts)}
    return dict(
        ranks[0],
        seconds=seconds,
        synthesis_seconds=[round(rank['seconds']['synthesis'], 4) for rank in ranks],
        train_images_per_second=round(len(ranks) * ranks[0]['batch_size'] / seconds['training_step'], 3),
    )


def work(args: argparse.Namespace) -> None:
    """One process of a run: what it takes for each part goes to a file of its own."""
    clock = Clock()
    cfg = cli.load_config(args)
    cfg.merge_from_dict({**SIZE, **(args.cfg_options or {})})
    cfg.load_from = args.checkpoint
    cfg.work_dir = str(args.worker / 'work')
    with clock.wrapping():
        runner: Any = cli.build_runner(cfg)
        runner.register_hook(StepsHook(clock))
        clock.seconds['start_up'] = time.time() - float(os.environ[STARTED])
        runner.train()
        # A set that is there is verified before it is used.
        runner.generate()
        _time_exchange(runner, clock)
    results = json.loads((Path(runner.work_dir) / 'results.json').read_text())
    clock.seconds.update({part: value for part, value in results['seconds'].items() if part.startswith('evaluate')})
    manifest = CalibrationSet.load(runner.cfg.zsq.calibration_set.dir).manifest or {}
    digests = [image['sha256'] for shard in manifest['shards'] for image in shard['images']]
    content = dict(
        seconds=clock.seconds,
        images=len(digests),
        shards=len(manifest['shards']),
        batch_size=runner.cfg.train_dataloader.batch_size,
        train_steps=runner.max_iters,
        set_sha256=hashlib.sha256(''.join([*digests, manifest['annotations_sha256']]).encode()).hexdigest(),
    )
    (args.worker / f'rank_{get_rank()}.json').write_text(json.dumps(content))


class Clock:
    """Adds up the seconds of the parts of a run, with the device at rest before and after each.

    Attributes:
        seconds: Of each part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def taking(self, part: str) -> Iterator[None]:
        """Inside the block time is that of ``part``."""
        start = now()
        yield
        self.seconds[part] += now() - start

    @contextmanager
    def wrapping(self) -> Iterator[None]:
        """Inside the block the methods that make a set are timed, and the first shards are made by a warm process."""
        generate = CalibrationSetGenerator.generate

        def warm(generator: CalibrationSetGenerator, calibration_set: CalibrationSet, shards: Any, *rest: Any) -> None:
            with self.taking('warm_up'):
                warm_up(generator, calibration_set.shard_length(0))
            with self.taking('synthesis'):
                generate(generator, calibration_set, shards, *rest)

        places = [
            (CalibrationSet, 'open', classmethod(self._timed('claim', CalibrationSet.open.__func__))),  # type: ignore[attr-defined]
            (CalibrationSet, 'missing_shards', self._timed('claim', CalibrationSet.missing_shards)),
            (CalibrationSet, 'merge', self._timed('merge', CalibrationSet.merge)),
            (CalibrationSet, 'verify', self._timed('verification', CalibrationSet.verify)),
            (QuantizerInitHook, 'before_train', self._timed('initialization', QuantizerInitHook.before_train)),
            (CalibrationSetGenerator, 'generate', warm),
        ]
        before = [(owner, name, vars(owner)[name]) for owner, name, _ in places]
        for owner, name, function in places:
            setattr(owner, name, function)
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.taking(part):
                return function(*args, **kwargs)

        return timed


class StepsHook(Hook):
    """Takes the mean time of a training step after a warm-up, loading included, and how much of it is loading.

    The first step of an epoch, which waits for workers to begin anew, is left out: epochs of this benchmark are a few
    steps long, and those of several processes shorter than those of one.
    """

    priority = 'LOWEST'

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.start: float | None = None
        self.seconds = 0.0
        self.loading = 0.0
        self.steps = 0

    def before_train_epoch(self, runner: Any) -> None:
        """Stop the clock until a step of the epoch is done."""
        self.start = None

    def before_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Note how long the batch was waited for, the device being at rest."""
        if self.start is not None:
            self.loading += now() - self.start

    def after_train_iter(self, runner: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Read the clock, and start it again."""
        if self.start is None and runner.iter + 1 < min(WARM_UP_STEPS, max(runner.max_iters // 2, 1)):
            return
        end = now()
        if self.start is not None:
            self.seconds += end - self.start
            self.steps += 1
        self.start = end

    def after_train(self, runner: Any) -> None:
        """Write down the mean."""
        if not self.steps:
            raise UserError(
                f'no step of training was timed: epochs of {len(runner.train_dataloader)} steps are too short. Make '
                'more images by --cfg-options zsq.calibration_set.num_images=N'
            )
        self.clock.seconds['training_step'] = self.seconds / self.steps
        self.clock.seconds['loading'] = self.loading / self.steps


def warm_up(generator: CalibrationSetGenerator, count: int) -> None:
    """Take a few steps of every stage with as many images as a shard has, and a look at them as corrections take.

    Args:
        generator: What makes the images.
        count: Images of a shard.
    """
    for stage in generator.stages:
        random = torch.Generator().manual_seed(0)
        size = min(stage.batch_size, count)
        labels = generator.sampler.sample(size, stage.image_size, generator.task.num_classes, random)
        result = generator.synthesizer.run(labels, stage.image_size, WARM_UP_ITERATIONS, seed=0, lr=stage.lr)
        if generator.sampler.adaptive:
            generator.synthesizer.predict(result.images)


def now() -> float:
    """Seconds, once the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _time_exchange(runner: ZeroShotRunner, clock: Clock) -> None:
    """Average the gradients of all processes, alone."""
    clock.seconds['all_reduce'] = 0.0
    if get_world_size() == 1:
        return
    for parameter in runner.detector.parameters():
        parameter.grad = torch.zeros_like(parameter)
    average_gradients(runner.detector)
    start = now()
    for _ in range(EXCHANGES):
        average_gradients(runner.detector)
    clock.seconds['all_reduce'] = (now() - start) / EXCHANGES


if __name__ == '__main__':
    main()
