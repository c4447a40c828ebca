# SPDX-License-Identifier: Apache-2.0
"""Time a training step: the float detector, its quantized student alone, and the student with its teacher.

    python tools/analysis_tools/benchmark_training.py configs/zsq/yolov5-n_w4a4.py --image-size 640 --batch-size 16 \
        --profile --out benchmark.json

All three learn by the same optimizer from the same random images and boxes: the first two by the detector's own loss,
the third as the config says. Weights are random unless --checkpoint names some: the time of a step hardly depends on
them. A step is all that MMEngine does of it: normalisation, forward, backward, clipping, optimizer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmzsq import cli
from mmzsq.config import compose
from mmzsq.detectors.task import data_samples, needs_masks, num_classes
from mmzsq.errors import UserError
from mmzsq.quantization import calibrating
from mmzsq.registry import MODELS
from mmzsq.synthesis.label_samplers import MultiBoxSampler, fit_masks
from mmzsq.version import __version__

WARMUP = 5
"""Steps before the clock starts: the first choose algorithms and compile kernels."""
BOXES = 4
"""Boxes an image."""
TOP = 10
"""Kernels that a profile names."""


def main() -> None:
    """Parse the command line, measure, write."""
    options = cli.parser((__doc__ or '').split('\n')[0])
    options.add_argument(
        '--image-size', type=int, nargs='+', default=[640], help='side, or height and width, in pixels'
    )
    options.add_argument('--batch-size', type=int, help='images a step (default: zsq.train.batch_size)')
    options.add_argument('--iterations', type=int, default=30, help='steps that are timed (default: 30)')
    options.add_argument('--checkpoint', help='of the float detector (default: random weights)')
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    options.add_argument('--profile', action='store_true', help=f'name the {TOP} dearest kernels of each step')
    options.add_argument('--out', type=Path, help='JSON file to write (default: standard output)')
    args = options.parse_args()
    try:
        measured = measure(cli.load_config(args), args)
    except UserError as error:
        raise SystemExit(f'error: {error}') from None
    cli.write_json(dict(config=args.config, **measured), args.out)


def measure(cfg: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Time the three steps one after the other.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        args: ``image_size``, ``batch_size``, ``iterations``, ``checkpoint``, ``device`` and ``profile``.

    Raises:
        UserError: If there is no ``zsq`` section or no step is to be timed.
    """
    if args.iterations < 1:
        raise UserError(f'--iterations is at least 1, not {args.iterations}')
    register_all_modules()
    torch.manual_seed(0)
    plain = MMDET_MODELS.build(cfg.model)
    with tempfile.TemporaryDirectory() as folder:
        cfg.load_from = args.checkpoint
        if args.checkpoint is None:
            cfg.load_from = str(Path(folder, 'random.pth'))
            torch.save(dict(state_dict=plain.state_dict()), cfg.load_from)
        cfg = compose(cfg)
        student, alone = (
            MODELS.build(dict(cfg.model, distillation=distillation))
            for distillation in (cfg.model.distillation, dict(detection_weight=1.0, losses=[]))
        )
        for detector in (student, alone):
            detector.init_weights()
    size = tuple(args.image_size * (2 if len(args.image_size) == 1 else 1))
    batch_size = args.batch_size or cfg.zsq.train.batch_size
    batch = make_batch(plain, batch_size, size)
    steps = {}
    for name, model in dict(float=plain, quantized=alone, distilled=student).items():
        start = time.perf_counter()
        steps[name] = time_step(model.to(args.device), batch, cfg.optim_wrapper, args)
        sys.stderr.write(f'{name}: {steps[name]["ms"]} ms, measured in {time.perf_counter() - start:.0f} s\n')
        model.cpu()
    return dict(
        image_size=list(size),
        batch_size=batch_size,
        amp=cfg.optim_wrapper.type == 'AmpOptimWrapper',
        weights=args.checkpoint or 'random',
        steps=steps,
        ratio_quantized=round(steps['quantized']['ms'] / steps['float']['ms'], 3),
        ratio_distilled=round(steps['distilled']['ms'] / steps['float']['ms'], 3),
        device=torch.cuda.get_device_name() if args.device.startswith('cuda') else 'cpu',
        versions=dict(mmzsq=__version__, torch=torch.__version__),
    )


def make_batch(detector: nn.Module, batch_size: int, size: tuple[int, int]) -> dict[str, Any]:
    """Random images and labels, as a data loader gives them."""
    generator = torch.Generator().manual_seed(0)
    labels = MultiBoxSampler((BOXES, BOXES)).sample(batch_size, size, num_classes(detector), generator)
    labels = fit_masks(labels, size, needs_masks(detector))
    images = torch.randint(0, 256, (batch_size, 3, *size), generator=generator, dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=data_samples(labels, size, torch.device('cpu')))


def time_step(model: Any, batch: dict[str, Any], optim_wrapper: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one step, peak memory, and if asked for the dearest kernels.

    Args:
        model: A detector, or teacher and student.
        batch: See :func:`make_batch`.
        optim_wrapper: Config.
        args: ``iterations``, ``device``, ``profile``.
    """
    on_cuda = args.device.startswith('cuda')
    wrapper = build_optim_wrapper(model, optim_wrapper)
    model.train()
    if hasattr(model, 'student'):
        with torch.no_grad(), calibrating(model.student):
            data = model.data_preprocessor(batch, False)
            model.student(data['inputs'], data['data_samples'], mode='tensor')

    def steps(count: int) -> float:
        if on_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            # The preprocessor writes the padded shapes into the samples.
            model.train_step(dict(inputs=list(batch['inputs']), data_samples=batch['data_samples']), wrapper)
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    steps(WARMUP)
    milliseconds = 1000 * steps(args.iterations) / args.iterations
    result: dict[str, Any] = dict(ms=round(milliseconds, 2))
    if on_cuda:
        result['peak_memory_gib'] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        result['peak_reserved_gib'] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    if args.profile:
        result.update(_profile(steps, on_cuda))
    return result


def _profile(steps: Any, on_cuda: bool) -> dict[str, Any]:
    """Run one step under torch's profiler: time and number of kernels, and the dearest of them."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * on_cuda) as profile:
        steps(1)
    key = 'self_device_time_total' if on_cuda else 'self_cpu_time_total'
    events = [event for event in profile.key_averages() if getattr(event, key) > 0]
    if on_cuda:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: -getattr(event, key))
    return dict(
        kernel_ms=round(sum(getattr(event, key) for event in events) / 1000, 2),
        kernels=sum(event.count for event in events),
        top=[
            dict(name=event.key[:120], ms=round(getattr(event, key) / 1000, 3), count=event.count)
            for event in events[:TOP]
        ],
    )


if __name__ == '__main__':
    main()
