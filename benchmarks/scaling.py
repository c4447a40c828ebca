# SPDX-License-Identifier: Apache-2.0
"""Time a whole run with one and with several processes, and check that they make the same calibration set.

    python benchmarks/scaling.py configs/zsq/yolov5-s_w4a4.py --gpus 1 2 \
        --out benchmarks/results/benchmarks/scaling.json

Each run does what ``python -m mmzsq.train`` does: the set, training, and evaluation if its data is available. Weights
are random unless ``--checkpoint`` names a file. The default sizes take a few minutes; ``--cfg-options`` change them.
Every process uses its own GPU, or the shared CPU without GPUs. The images do not depend on the number of processes. In
training the batch size of each process stays the same, so several processes see more images per second.
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
from contextlib import ExitStack, contextmanager
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
from mmzsq.patching import patched
from mmzsq.synthesis import CalibrationSet, CalibrationSetGenerator

ROOT = Path(__file__).resolve().parents[1]

SIZE = {
    'zsq.calibration_set.num_images': 256,
    'zsq.synthesis.relabel.batch_size': 32,
    'zsq.train.max_epochs': 4,
    'default_hooks.checkpoint.interval': 1000,
}
"""Settings of a run of a few minutes: a few shards with all of their iterations."""
WARM_UP_ITERATIONS = 6
"""Steps of each stage before timing starts: kernels are compiled and chosen, and the step is captured."""
WARM_UP_STEPS = 10
"""Training steps before timing starts."""
EXCHANGES = 20
"""Number of timed all-reductions of the gradients."""
SERIAL_PARTS = ('claim', 'merge', 'verification')
"""Serial parts of generation, whose time grows with the set."""
RUN_SECONDS = 1800
"""Time limit of a run."""
STARTED = 'SCALING_STARTED'
"""Environment variable with the start time of the command, in seconds since 1970."""


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
        UserError: If ``--gpus`` is not 1 followed by increasing numbers, or a run fails.
    """
    if len(args.gpus) < 2 or args.gpus[0] != 1 or sorted(set(args.gpus)) != args.gpus:
        raise UserError(f'--gpus must be 1 followed by increasing numbers, not {" ".join(map(str, args.gpus))}')
    if torch.cuda.is_available() and torch.cuda.device_count() < args.gpus[-1]:
        raise UserError(f'--gpus {args.gpus[-1]}: this machine has {torch.cuda.device_count()} GPUs')
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
    """Return the seconds from claiming the folder to a verified set, without start-up of the processes."""
    return sum(content['seconds'][part] for part in ('synthesis', *SERIAL_PARTS))


def share_by_amdahl(speedup: float, processes: int) -> float:
    """Return the serial share of the time of one process that explains a speedup by Amdahl's law.

    Args:
        speedup: Speedup of several processes over one.
        processes: Number of processes, at least 2.

    Example:
        >>> share_by_amdahl(5.0, 9)
        0.1
    """
    return max((processes / speedup - 1) / (processes - 1), 0.0)


def random_weights(config: str, path: Path) -> str:
    """Write a checkpoint of the detector of ``config`` with random weights."""
    register_all_modules()
    torch.manual_seed(0)
    torch.save(dict(state_dict=MODELS.build(Config.fromfile(config).model).state_dict()), path)
    return str(path)


def run(args: argparse.Namespace, checkpoint: str, count: int, folder: Path) -> dict[str, Any]:
    """Run ``count`` processes and join their measurements.

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
            failure = f'did not finish within {RUN_SECONDS} s'
        finally:
            if process.poll() is None:
                # torchrun stops its workers on SIGTERM; SIGKILL would leave them running.
                process.terminate()
                process.wait()
    if failure is not None:
        end = (folder / 'log.txt').read_text(errors='replace')[-3000:]
        raise UserError(f'the run of {processes} {failure}:\n{end}')
    sys.stderr.write(f'{processes}: {time.perf_counter() - start:.0f} s\n')
    return join([json.loads((folder / f'rank_{rank}.json').read_text()) for rank in range(count)])


def join(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the measurements of all ranks: the seconds of a part are those of the slowest rank."""
    parts = {part for rank in ranks for part in rank['seconds']}
    seconds = {part: round(max(rank['seconds'].get(part, 0.0) for rank in ranks), 4) for part in sorted(parts)}
    return dict(
        ranks[0],
        seconds=seconds,
        synthesis_seconds=[round(rank['seconds']['synthesis'], 4) for rank in ranks],
        train_images_per_second=round(len(ranks) * ranks[0]['batch_size'] / seconds['training_step'], 3),
    )


def work(args: argparse.Namespace) -> None:
    """Run one process and write its seconds for each part to a file."""
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
        # An existing set is verified before it is used.
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
    """Sums up the seconds of the parts of a run; the device is idle before and after each part.

    Attributes:
        seconds: Seconds by part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def taking(self, part: str) -> Iterator[None]:
        """Count the time of the block as that of ``part``."""
        start = now()
        yield
        self.seconds[part] += now() - start

    @contextmanager
    def wrapping(self) -> Iterator[None]:
        """Time the methods that make a set inside the block, and warm up before the first shard."""
        generate = CalibrationSetGenerator.generate

        def warm(generator: CalibrationSetGenerator, calibration_set: CalibrationSet, shards: Any, *rest: Any) -> None:
            with self.taking('warm_up'):
                warm_up(generator, calibration_set.shard_length(0))
            with self.taking('synthesis'):
                generate(generator, calibration_set, shards, *rest)

        places: list[tuple[Any, str, Any]] = [
            (CalibrationSet, 'open', classmethod(self._timed('claim', CalibrationSet.open.__func__))),  # type: ignore[attr-defined]
            (CalibrationSet, 'missing_shards', self._timed('claim', CalibrationSet.missing_shards)),
            (CalibrationSet, 'merge', self._timed('merge', CalibrationSet.merge)),
            (CalibrationSet, 'verify', self._timed('verification', CalibrationSet.verify)),
            (QuantizerInitHook, 'before_train', self._timed('initialization', QuantizerInitHook.before_train)),
            (CalibrationSetGenerator, 'generate', warm),
        ]
        with ExitStack() as stack:
            for owner, name, function in places:
                stack.enter_context(patched(owner, name, function))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.taking(part):
                return function(*args, **kwargs)

        return timed


class StepsHook(Hook):
    """Measures the mean time of a training step after warm-up, including data loading, and the time of loading.

    The first step of an epoch is left out, since it waits for restarted workers. Epochs of this benchmark have a few
    steps only, and with several processes even fewer.

    Args:
        clock: Receives ``training_step`` and ``loading``.
    """

    priority = 'LOWEST'

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.start: float | None = None
        self.seconds = 0.0
        self.loading = 0.0
        self.steps = 0

    def before_train_epoch(self, runner: Any) -> None:
        """Stop timing until the first step of the epoch is done."""
        self.start = None

    def before_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Add the time spent waiting for the batch, with the device idle."""
        if self.start is not None:
            self.loading += now() - self.start

    def after_train_iter(self, runner: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Add the time of the step and restart the clock."""
        if self.start is None and runner.iter + 1 < min(WARM_UP_STEPS, max(runner.max_iters // 2, 1)):
            return
        end = now()
        if self.start is not None:
            self.seconds += end - self.start
            self.steps += 1
        self.start = end

    def after_train(self, runner: Any) -> None:
        """Store the means.

        Raises:
            UserError: If no step was timed.
        """
        if not self.steps:
            raise UserError(
                f'no training step was timed: epochs of {len(runner.train_dataloader)} steps are too short. Make more '
                'images with --cfg-options zsq.calibration_set.num_images=N'
            )
        self.clock.seconds['training_step'] = self.seconds / self.steps
        self.clock.seconds['loading'] = self.loading / self.steps


def warm_up(generator: CalibrationSetGenerator, count: int) -> None:
    """Run a few steps of every stage on a batch of the size of a shard, and one prediction as in relabeling.

    Args:
        generator: Generator to warm up.
        count: Images per shard.
    """
    for stage in generator.stages:
        random = torch.Generator().manual_seed(0)
        size = min(stage.batch_size, count)
        labels = generator.sampler.sample(size, stage.image_size, generator.task.num_classes, random)
        result = generator.synthesizer.run(labels, stage.image_size, WARM_UP_ITERATIONS, seed=0, lr=stage.lr)
        if generator.sampler.adaptive:
            generator.synthesizer.predict(result.images)


def now() -> float:
    """Return the time in seconds, after waiting for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _time_exchange(runner: ZeroShotRunner, clock: Clock) -> None:
    """Time the all-reduction of the gradients alone."""
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
