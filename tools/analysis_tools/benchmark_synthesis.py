# SPDX-License-Identifier: Apache-2.0
"""Time the whole synthesis step of a config: detection loss, priors, optimizer.

    python tools/analysis_tools/benchmark_synthesis.py configs/zsq/mask-rcnn_swin-t_w4a8.py \
        --image-size 640 --batch-size 16 --iterations 200 --out benchmark.json

Weights are random unless --checkpoint names some: the time of a step does not depend on them. What is measured is the
part of one batch after the first steps, which run eagerly and are captured; memory is that of the whole batch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmzsq import cli
from mmzsq.config import complete_section
from mmzsq.detectors import detection_task
from mmzsq.detectors.teacher import load_teacher
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSetGenerator
from mmzsq.synthesis.label_samplers import fit_masks
from mmzsq.synthesis.synthesizer import EAGER_STEPS, StepProgress
from mmzsq.version import __version__

FEWEST_ITERATIONS = EAGER_STEPS + 3
"""The eager steps, the captured one, and two times to take the difference of."""


def main() -> None:
    """Parse the command line, measure, write."""
    options = cli.parser((__doc__ or '').split('\n')[0])
    options.add_argument('--image-size', type=int, nargs='+', help='side, or height and width, in pixels')
    options.add_argument('--batch-size', type=int, help='images optimised together')
    options.add_argument('--iterations', type=int, default=200, help='steps (default: 200)')
    options.add_argument('--checkpoint', help='of the float detector (default: random weights)')
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    options.add_argument('--out', type=Path, help='JSON file to write (default: standard output)')
    args = options.parse_args()
    try:
        measured = measure(cli.load_config(args), args)
    except UserError as error:
        raise SystemExit(f'error: {error}') from None
    cli.write_json(dict(config=args.config, **measured), args.out)


def measure(cfg: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Synthesise one batch and take its time.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        args: ``image_size``, ``batch_size`` (None: those of ``zsq.synthesis.synthesise``), ``iterations``,
            ``checkpoint`` and ``device``.

    Raises:
        UserError: If there is no ``zsq`` section or there are too few iterations.
    """
    if 'zsq' not in cfg:
        raise UserError(f'config {args.config} has no zsq section')
    if args.iterations < FEWEST_ITERATIONS:
        raise UserError(f'--iterations is at least {FEWEST_ITERATIONS}, not {args.iterations}')
    section = complete_section(cfg.zsq.to_dict())
    if args.image_size is not None:
        section['synthesis']['synthesise']['image_size'] = args.image_size * (2 if len(args.image_size) == 1 else 1)
    seed = section['calibration_set']['seed']
    batch_size = args.batch_size or section['synthesis']['synthesise'].get('batch_size')
    batch_size = batch_size or section['calibration_set']['batch_size']

    register_all_modules()
    torch.manual_seed(seed)
    detector = MODELS.build(cfg.model)
    if args.checkpoint is not None:
        load_teacher(detector, args.checkpoint)
    task = detection_task(detector.to(args.device))
    generator = CalibrationSetGenerator(task, section['synthesis'], section['label_sampler'], batch_size, seed)
    size = generator.stages[-1].image_size
    labels = generator.sampler.sample(batch_size, size, task.num_classes, torch.Generator().manual_seed(seed))
    labels = fit_masks(labels, size, task.needs_masks)

    on_cuda = task.device.type == 'cuda'
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[tuple[int, float]] = []

    def note_time(progress: StepProgress) -> None:
        # The losses of this step were read: the device is done with it.
        if progress.iteration > EAGER_STEPS + 1:
            times.append((progress.iteration, time.perf_counter()))

    synthesizer = generator.synthesizer
    result = synthesizer.run(labels, size, args.iterations, seed, on_progress=note_time)
    (first, start), (last, end) = times[0], times[-1]
    return dict(
        detector=type(detector).__name__,
        task=type(task).__name__,
        note=task.note,
        weights=args.checkpoint or 'random',
        image_size=list(size),
        batch_size=batch_size,
        iterations=args.iterations,
        precision=synthesizer.precision if on_cuda else 'fp32',
        priors=[type(prior).__name__ for prior in synthesizer.priors],
        boxes=sum(len(instances) for instances in labels),
        ms_per_image_iteration=round(1000 * (end - start) / ((last - first) * batch_size), 4),
        seconds_per_batch=round(result.seconds, 3),
        peak_memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_cuda else None,
        peak_reserved_gib=round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_cuda else None,
        cuda_graph=result.captured,
        eager_reason=synthesizer.eager_reason,
        losses={name: round(value, 5) for name, value in result.losses.items()},
        device=torch.cuda.get_device_name() if on_cuda else 'cpu',
        versions=dict(mmzsq=__version__, torch=torch.__version__),
    )


if __name__ == '__main__':
    main()
