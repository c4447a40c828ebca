# SPDX-License-Identifier: Apache-2.0
"""Compare the hand-written Triton kernels with plain PyTorch operators, eager and under ``torch.compile``.

    python benchmarks/compile_comparison.py --out compile.json --markdown compile.md

Three things are timed on one GPU with random weights: a synthesis step of YOLOv5-s (640 px, batch 32, bf16), a training
step with its teacher (640 px, batch 16, fp32), and fake quantization alone, forward and backward, of a feature map.
Variants take turns in one process. Every step runs as a CUDA graph where it can be captured.

* ``fused``: the kernels of this package, the default of a run.
* ``plain``: PyTorch operators alone, as with ``MMZSQ_FUSED_KERNELS=0``.
* ``compiled``: PyTorch operators, with the detectors' forward and total variation under ``torch.compile``.
  BatchNorm and its statistics are written as formulas that the compiler can fuse.
* ``autotuned``: the same in mode ``max-autotune-no-cudagraphs``. It compiles for minutes and runs last if time is left.

A variant that fails is reported with its error, and the others go on. Results are written after each comparison.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark import fused_kernels
from benchmark_meter import PeakMemory, Stopwatch, describe_device, describe_versions, middle
from benchmark_steps import Settings, SynthesisStage, Trainee, make_batch, training_models
from markdown_pages import markdown_table
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor, nn

from mmzsq import cli
from mmzsq.errors import UserError
from mmzsq.patching import patched
from mmzsq.qat.frozen_batch_norm import FrozenBatchNorm
from mmzsq.synthesis import batch_norm, priors

# The package exports a function of the same name.
fake_quantization = importlib.import_module('mmzsq.quantization.fake_quantize')
ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'zsq' / 'yolov5-s_w4a4.py'
FEATURES = (16, 64, 160, 160)
"""Shape of the tensor that is fake-quantized alone."""
FAKE_QUANTIZE_CALLS = 50
"""Forward and backward passes in one measurement of fake quantization."""
WARM_UP_CALLS = 3


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to run a step.

    Attributes:
        name: Key in the results.
        fused: Whether the Triton kernels of this package run.
        compile: Arguments of ``torch.compile``; None runs eager operators.
    """

    name: str
    fused: bool = False
    compile: Mapping[str, Any] | None = None


FUSED = Variant('fused', fused=True)
PLAIN = Variant('plain')
COMPILED = Variant('compiled', compile={})
AUTOTUNED = Variant('autotuned', compile=dict(mode='max-autotune-no-cudagraphs'))


@dataclass
class Timings:
    """Seconds of one variant, and what else is known of it.

    Attributes:
        seconds: Of one step, or of one call, per measurement.
        facts: Entries of the report: preparation time, memory, whether a CUDA graph ran.
        error: Why the variant stopped; None if it did not.
    """

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Contender:
    """A variant that is ready to be timed. Subclasses implement :meth:`measure`."""

    def measure(self) -> list[float]:
        """Return seconds of one step for each measurement of this turn."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return entries of the report, after the last turn."""
        return {}


def main() -> None:
    """Parse the command line, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--out', type=Path, help='JSON file to write (default: standard output)')
    parser.add_argument('--markdown', type=Path, help='Markdown file for the table (default: standard output)')
    parser.add_argument('--turns', type=int, default=5, help='turns of each variant (default: 5)')
    parser.add_argument('--steps', type=int, default=10, help='steps of one measurement (default: 10)')
    parser.add_argument(
        '--budget', type=float, default=420, help='seconds after which no further comparison starts (default: 420)'
    )
    parser.add_argument('--autotune-seconds', type=float, default=150, help='needed for each autotuned comparison')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError('compile_comparison.py compares GPU kernels and needs a CUDA device; none was found')
    device = torch.device('cuda')
    start = time.monotonic()
    report: dict[str, Any] = dict(
        command=f'python benchmarks/compile_comparison.py --turns {args.turns} --steps {args.steps}',
        device=describe_device(device),
        versions=describe_versions(device),
        comparisons={},
    )
    for name, needed, compare in comparisons(args.turns, args.steps, args.autotune_seconds, device):
        left = args.budget - (time.monotonic() - start)
        if left < needed:
            report['comparisons'][name] = dict(skipped=f'needs {needed:.0f} s, {max(left, 0):.0f} s were left')
        else:
            sys.stderr.write(f'[{time.monotonic() - start:4.0f} s] {name}\n')
            report['comparisons'][name] = compare()
        report['seconds'] = round(time.monotonic() - start)
        if args.out is not None:
            cli.write_json(report, args.out)
        if args.markdown is not None:
            args.markdown.write_text(render(report), encoding='utf-8')
    if args.out is None:
        sys.stdout.write(json.dumps(report, indent=2) + '\n')
    if args.markdown is None:
        sys.stdout.write(render(report))


def comparisons(
    turns: int, steps: int, autotune_seconds: float, device: torch.device
) -> list[tuple[str, float, Callable[[], dict[str, Any]]]]:
    """List the comparisons, the most important first.

    Args:
        turns: Turns of each variant.
        steps: Steps of one measurement.
        autotune_seconds: Time that an autotuned comparison has to have left to start.
        device: Where to measure.

    Returns:
        Name, seconds that have to be left to start, and the function that measures.
    """

    def synthesis(*variants: Variant) -> Callable[[], dict[str, Any]]:
        return lambda: compare_synthesis(load_config('bf16'), variants, 640, 32, turns, steps, device)

    def training(*variants: Variant) -> Callable[[], dict[str, Any]]:
        return lambda: compare_training(load_config('fp32'), variants, 640, 16, turns, steps, device)

    return [
        ('fake_quantize', 0, lambda: compare_fake_quantize((FUSED, PLAIN, COMPILED), FEATURES, turns, device)),
        ('synthesis', 0, synthesis(FUSED, PLAIN, COMPILED)),
        ('training', 0, training(FUSED, PLAIN, COMPILED)),
        ('synthesis_autotuned', autotune_seconds, synthesis(FUSED, AUTOTUNED)),
        ('training_autotuned', autotune_seconds, training(FUSED, AUTOTUNED)),
    ]


def load_config(precision: str, path: Path = CONFIG) -> Config:
    """Read a config and set the precision of synthesis and training, ``'fp32'`` or ``'bf16'``."""
    register_all_modules()
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({'zsq.synthesis.precision': precision, 'zsq.train.amp': precision == 'bf16'})
    return cfg


def compare_synthesis(
    cfg: Config, variants: Sequence[Variant], side: int, batch_size: int, turns: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Time the synthesis step of each variant.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        variants: What takes turns; the first is the one that ratios refer to.
        side: Side of the images in pixels.
        batch_size: Images of a step.
        turns: Turns of each variant.
        steps: Steps of one measurement.
        device: Where to measure.
    """
    settings = Settings((side, side), batch_size, 2, steps, None, device)
    result = compare({variant: partial(_Synthesis, cfg, settings, variant) for variant in variants}, turns, device)
    return dict(image_size=side, batch_size=batch_size, precision=cfg.zsq.synthesis.precision, variants=result)


def compare_training(
    cfg: Config, variants: Sequence[Variant], side: int, batch_size: int, turns: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Time the training step with a teacher; arguments as of :func:`compare_synthesis`."""
    settings = Settings((side, side), batch_size, 1, steps, None, device)
    result = compare({variant: partial(_Training, cfg, settings, variant) for variant in variants}, turns, device)
    return dict(
        image_size=side, batch_size=batch_size, precision='bf16' if cfg.zsq.train.amp else 'fp32', variants=result
    )


def compare_fake_quantize(
    variants: Sequence[Variant], shape: tuple[int, ...], turns: int, device: torch.device
) -> dict[str, Any]:
    """Time forward and backward of fake quantization alone, unsigned 4 bits with one step for the fp32 tensor.

    Args:
        variants: What takes turns; the first is the one that ratios refer to.
        shape: Of the tensor.
        turns: Turns of each variant.
        device: Where to measure.
    """
    result = compare({variant: partial(_FakeQuantize, variant, shape, device) for variant in variants}, turns, device)
    return dict(shape=list(shape), precision='fp32', variants=result)


def compare(
    makers: Mapping[Variant, Callable[[], Contender]], turns: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Prepare all variants, then time them in turns.

    Args:
        makers: Builds and warms up each variant.
        turns: Turns of each.
        device: Where they run.

    Returns:
        By name of the variant: ``ms`` of a step (median) and ``spread`` (lowest and highest), ``ratio`` to the first
        variant within each turn, the facts of the variant; or ``error``, the reason for which it stopped.
    """
    timings = {variant: Timings() for variant in makers}
    contenders: dict[Variant, Contender] = {}
    for variant, make in makers.items():
        begun = time.monotonic()
        with _recording_failure(timings[variant]), variant_active(variant):
            memory = PeakMemory(device)
            contenders[variant] = make()
            timings[variant].facts.update(prepare_seconds=round(time.monotonic() - begun, 1), **memory.read())
        timings[variant].facts.update(_compiler_counts())
    for _ in range(turns):
        for variant, contender in contenders.items():
            if timings[variant].error is None:
                with _recording_failure(timings[variant]), variant_active(variant):
                    timings[variant].seconds += contender.measure()
                # Compilation within a turn would be timed as part of its steps.
                timings[variant].facts['recompilations'] = (
                    timings[variant].facts.get('recompilations', 0) + _compiler_counts()['graphs']
                )
    for variant, contender in contenders.items():
        if timings[variant].error is None:
            timings[variant].facts.update(contender.facts())
    first = next(iter(makers))
    result = {variant.name: _summary(timing, timings[first]) for variant, timing in timings.items()}
    contenders.clear()
    torch._dynamo.reset()
    gc.collect()
    return result


@contextmanager
def variant_active(variant: Variant) -> Iterator[None]:
    """Select the kernels of a variant inside the block."""
    with ExitStack() as stack:
        stack.enter_context(fused_kernels(variant.fused))
        if variant.compile is not None:
            # The compiler cannot fuse the operators of SyncBatchNorm, and reading the environment breaks its graph.
            stack.enter_context(patched(batch_norm, '_statistics', channel_statistics))
            stack.enter_context(patched(batch_norm, '_scaled', scale_channels))
            stack.enter_context(patched(fake_quantization, 'fused_kernels_enabled', lambda: False))
            stack.enter_context(patched(FrozenBatchNorm, 'forward', nn.BatchNorm2d.forward))
            stack.enter_context(patched(priors, 'total_variation', _compiled_total_variation(variant)))
        yield


def channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel of (N, C, H, W), fp32 of shape (C,)."""
    variance, mean = torch.var_mean(features.float(), (0, 2, 3), correction=0)
    return mean, variance


def scale_channels(features: Tensor, scale: Tensor, bias: Tensor, center: Tensor | None = None) -> Tensor:
    """Return ``(features - center) * scale + bias`` of each channel, in the type of ``features``."""
    shape = (1, -1, 1, 1)
    centered = features.float() if center is None else features.float() - center.view(shape)
    return (centered * scale.view(shape) + bias.view(shape)).to(features.dtype)


_TOTAL_VARIATION: dict[str, Callable[[Tensor], Tensor]] = {}


def _compiled_total_variation(variant: Variant) -> Callable[[Tensor], Tensor]:
    if variant.name not in _TOTAL_VARIATION:
        _TOTAL_VARIATION[variant.name] = compiled(priors.directional_differences, variant)
    return _TOTAL_VARIATION[variant.name]


def compiled(function: Callable[..., Any], variant: Variant) -> Callable[..., Any]:
    """Compile a function as a variant says."""
    assert variant.compile is not None
    return torch.compile(function, dynamic=False, **variant.compile)


class _Synthesis(Contender):
    """The synthesis step. Each turn synthesizes one batch for a few steps and captures a CUDA graph again."""

    def __init__(self, cfg: Config, settings: Settings, variant: Variant) -> None:
        self.stage = SynthesisStage(cfg, settings, -1)
        self.steps = settings.steps
        if variant.compile is not None:
            detector = self.stage.task.detector
            detector.extract_feat = compiled(detector.extract_feat, variant)
            detector.bbox_head.forward = compiled(detector.bbox_head.forward, variant)
        self.measure()

    def measure(self) -> list[float]:
        """See :class:`Contender`."""
        return [seconds / self.steps for seconds in self.stage.run(None).seconds]

    def facts(self) -> dict[str, Any]:
        """See :class:`Contender`."""
        return {name: self.stage.facts[name] for name in ('cuda_graph', 'eager_reason', 'losses')}


class _Training(Contender):
    """The training step of the student with its teacher."""

    def __init__(self, cfg: Config, settings: Settings, variant: Variant) -> None:
        models, cfg = training_models(copy.deepcopy(cfg), settings, names=('float', 'distilled'))
        self.model: Any = models['distilled']
        batch = make_batch(models['float'], settings.batch_size or 1, settings.image_size or (640, 640))
        self.watch = Stopwatch(settings.device)
        self.steps = settings.steps

        def prepare(model: Any) -> None:
            if variant.compile is not None:
                for detector in (model.student, model.teacher):
                    detector._forward = compiled(detector._forward, variant)

        self.trainee = Trainee(self.model, batch, cfg.optim_wrapper, settings.device, prepare)

    def measure(self) -> list[float]:
        """See :class:`Contender`."""
        self.watch.start()
        self.trainee.steps(self.steps)
        return [self.watch.lap() / self.steps]

    def facts(self) -> dict[str, Any]:
        """See :class:`Contender`."""
        profile = self.trainee.profile().read(2, 1.0)
        return dict(cuda_graph=bool(profile['graph_launches']), kernel_ms=profile['kernel_ms'])


class _FakeQuantize(Contender):
    """Forward and backward of fake quantization, as a CUDA graph on a GPU so that the host costs nothing."""

    def __init__(self, variant: Variant, shape: tuple[int, ...], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(shape, generator=generator).to(device).requires_grad_()
        self.step = torch.full((1,) * len(shape), 0.2, device=device, requires_grad=True)
        self.grad = torch.randn(shape, generator=generator).to(device)
        self.function = _quantize_4_bits if variant.compile is None else compiled(_quantize_4_bits, variant)
        self.watch = Stopwatch(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type != 'cuda':
            self._run()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self.graph = graph

    def _run(self) -> None:
        output = self.function(self.x, self.step)
        self.grads = torch.autograd.grad(output, (self.x, self.step), self.grad)

    def measure(self) -> list[float]:
        """See :class:`Contender`."""
        run = self._run if self.graph is None else self.graph.replay
        self.watch.start()
        for _ in range(FAKE_QUANTIZE_CALLS):
            run()
        return [self.watch.lap() / FAKE_QUANTIZE_CALLS]

    def facts(self) -> dict[str, Any]:
        """See :class:`Contender`. The gradient of the step shows that variants compute the same."""
        return dict(cuda_graph=self.graph is not None, step_gradient=round(float(self.grads[1]), 4))


def _quantize_4_bits(x: Tensor, step: Tensor) -> Tensor:
    return fake_quantization.fake_quantize(x, step, 0, 15)


@contextmanager
def _recording_failure(timings: Timings) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Whatever the compiler or a capture raises, the other variants are still to be measured.
        timings.error = f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ""}'
        sys.stderr.write(f'{timings.error}\n')


def _compiler_counts() -> dict[str, int]:
    """Return the numbers of compiled graphs and of graph breaks since the last call."""
    counters: Any = torch._dynamo.utils.counters
    counts = dict(graphs=counters['stats']['unique_graphs'], graph_breaks=sum(counters['graph_break'].values()))
    counters.clear()
    return counts


def _summary(timings: Timings, first: Timings) -> dict[str, Any]:
    if timings.error is not None:
        return dict(error=timings.error, **timings.facts)
    ms, spread = middle([1000 * seconds for seconds in timings.seconds], 4)
    summary: dict[str, Any] = dict(ms=ms, spread=spread)
    if first.error is None:
        ratios = [own / other for own, other in zip(timings.seconds, first.seconds, strict=True)]
        summary['ratio'], summary['ratio_spread'] = middle(ratios, 3)
    return dict(summary, **timings.facts)


def render(report: Mapping[str, Any]) -> str:
    """Write the report as a Markdown table, with errors and skipped comparisons below it."""
    rows, notes = [], []
    for name, comparison in report['comparisons'].items():
        if 'skipped' in comparison:
            notes.append(f'{name} was skipped: {comparison["skipped"]}.')
            continue
        for variant, found in comparison['variants'].items():
            if 'error' in found:
                notes.append(f'{name}, {variant} failed: `{found["error"]}`.')
                continue
            low, high = found['spread']
            rows.append(
                [
                    *(name, variant, f'{found["ms"]:.3f}', f'{low:.3f} to {high:.3f}'),
                    f'{found["ratio"]:.2f}' if 'ratio' in found else '',
                    'yes' if found.get('cuda_graph') else 'no',
                    f'{found["prepare_seconds"]:.0f}',
                    '' if found['peak_memory_gib'] is None else f'{found["peak_memory_gib"]:.2f}',
                ]
            )
    header = ['', 'variant', 'ms a step', 'lowest to highest', 'x first', 'CUDA graph', 'preparation, s', 'GiB']
    table = markdown_table(header, rows)
    versions = ', '.join(f'{name} {version}' for name, version in report['versions'].items())
    return '\n\n'.join([table, *notes, f'Measured on {report["device"]}; {versions}.']) + '\n'


if __name__ == '__main__':
    cli.run(main)
