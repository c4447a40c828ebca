# SPDX-License-Identifier: Apache-2.0
"""Time synthesis, relabeling and training steps as a real run takes them.

Every time is a median over repeats, with the lowest and highest value. Compared variants are interleaved in one
process, so that a device that slows down affects all of them: steps with and without relabeling, and training steps of
the float, the quantized and the distilled detector.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark_meter import PeakMemory, Profile, Stopwatch, middle
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.config.compose import complete_section, compose
from mmzsq.datasets import stack_images
from mmzsq.errors import UserError
from mmzsq.models.train_eval_modes import eval_mode
from mmzsq.qat.dry_run import dry_run
from mmzsq.qat.teacher import load_teacher
from mmzsq.quantization import calibrating
from mmzsq.registry import MODELS
from mmzsq.synthesis import CalibrationSetGenerator
from mmzsq.synthesis.label_samplers import LabelSampler, MultiBoxSampler, RelabelCounts, fit_masks
from mmzsq.synthesis.optimization_step import EAGER_STEPS
from mmzsq.tasks import build_detection_task
from mmzsq.tasks.detection_task import data_samples, needs_masks, num_classes, pixel_range

SYNTHESIS_WARMUP = 1 + EAGER_STEPS + 2
"""Steps before timing starts: one, then after relabeling the eager steps, the captured step and one replay."""
TRAINING_WARMUP = 5
"""Steps before timing starts: they choose algorithms, compile kernels and capture the graph."""
PROFILED_STEPS = 2
"""Number of profiled steps; a few, since reading a profile of thousands of kernels is slow."""
NOISE_SIZE = 256
"""Side in pixels of the noise image that scales random weights."""
BOXES = 4
"""Number of boxes per image of drawn labels and drawn predictions."""


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Attributes:
        image_size: Height and width in pixels; None uses those of the config's stage, in training 640 px.
        batch_size: Images per step; None uses that of the config.
        repeats: Number of measurements of each kind.
        steps: Steps per measurement.
        checkpoint: Checkpoint of the float detector; None uses random weights.
        device: Device to measure on.
    """

    image_size: tuple[int, int] | None
    batch_size: int | None
    repeats: int
    steps: int
    checkpoint: str | None
    device: torch.device


def measure_synthesis(cfg: Config, settings: Settings) -> dict[str, Any]:
    """Time the whole synthesis step: erasing, detection loss, priors, backward, Adam, clamp.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        settings: Settings of the measurement.
    """
    stage = SynthesisStage(cfg, settings, -1)
    clock = stage.run(None)
    per_image = 1000 / stage.batch_size
    ms, spread = middle([per_image * seconds / settings.steps for seconds in clock.seconds])
    profile = clock.profile.read(PROFILED_STEPS, stage.batch_size * ms)
    return dict(ms_per_image_iteration=ms, spread=spread, **stage.facts, **profile)


def measure_relabeling(cfg: Config, settings: Settings) -> dict[str, Any]:
    """Time relabeling: prediction, suppression, comparison, and the update of the labels in the step.

    Steps with and without relabeling are interleaved. The cost of relabeling is their difference.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        settings: Settings of the measurement.

    Returns:
        ``ms_per_image_correction`` is the cost of relabeling once, ``ms_per_image_iteration`` that of the whole stage
        with as many corrections as its sampler makes. The profile covers one correction and :data:`PROFILED_STEPS`
        steps.

    Raises:
        UserError: If the config's sampler is not adaptive, or a measurement has too few steps for a capture.
    """
    if settings.steps < EAGER_STEPS + 2:
        raise UserError(f'--steps must be at least {EAGER_STEPS + 2} for relabeling, not {settings.steps}')
    stage = SynthesisStage(cfg, settings, 0)
    sampler = stage.generator.sampler
    if not sampler.adaptive:
        raise UserError(f'{type(sampler).__name__} does not correct labels: measure synthesis instead')
    clock = stage.run(sampler)
    plain, corrected = clock.seconds[0::2], clock.seconds[1::2]
    per_image = 1000 / stage.batch_size
    correction, spread = middle([per_image * (b - a) for a, b in zip(plain, corrected, strict=True)])
    step, step_spread = middle([per_image * seconds / settings.steps for seconds in plain])
    corrections = sum(sampler.should_relabel(iteration) for iteration in range(stage.iterations))
    return dict(
        ms_per_image_iteration=round(step + correction * corrections / max(stage.iterations, 1), 4),
        ms_per_image_correction=correction,
        correction_spread=spread,
        ms_per_image_step=step,
        step_spread=step_spread,
        corrections=corrections,
        iterations=stage.iterations,
        predictions='drawn' if settings.checkpoint is None else 'of the detector',
        **stage.facts,
        **clock.profile.read(PROFILED_STEPS, stage.batch_size * (step + correction / PROFILED_STEPS)),
    )


def measure_training(cfg: Config, settings: Settings) -> dict[str, Any]:
    """Time a training step of the float detector, of its quantized student, and of the student with its teacher.

    All use the same optimizer, random images and boxes. The first two use the detector's own loss, the third the losses
    of the config. The float detector uses MMEngine's step, the others their own step, which may be a CUDA graph. A step
    consists of copying images to the device, normalization, forward, backward, clipping and optimizer. Reading images
    is left out.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        settings: Settings of the measurement.

    Returns:
        ``steps`` by name, and the ratios of the last two to the first, taken turn by turn.
    """
    models, cfg = training_models(cfg, settings)
    size = settings.image_size or (640, 640)
    batch_size = settings.batch_size or cfg.zsq.train.batch_size
    batch = make_batch(models['float'], batch_size, size)
    trainees = {name: Trainee(model, batch, cfg.optim_wrapper, settings.device) for name, model in models.items()}
    watch = Stopwatch(settings.device)
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    for _ in range(settings.repeats):
        for name, trainee in trainees.items():
            watch.start()
            trainee.steps(settings.steps)
            seconds[name].append(watch.lap() / settings.steps)
    steps = {}
    for name, trainee in trainees.items():
        ms, spread = middle([1000 * value for value in seconds[name]], 3)
        profile = trainee.profile().read(PROFILED_STEPS, ms)
        steps[name] = dict(
            ms=ms,
            spread=spread,
            images_per_second=round(1000 * batch_size / ms, 1),
            cuda_graph=bool(profile['graph_launches']),
            **trainee.memory,
            **profile,
        )
    result: dict[str, Any] = dict(
        image_size=list(size),
        batch_size=batch_size,
        precision='bf16' if cfg.optim_wrapper.type == 'mmengine.AmpOptimWrapper' else 'fp32',
        utilization=watch.mean_utilization,
        steps=steps,
    )
    for name in ('quantized', 'distilled'):
        ratios = [other / plain for other, plain in zip(seconds[name], seconds['float'], strict=True)]
        result[f'ratio_{name}'], result[f'ratio_{name}_spread'] = middle(ratios, 3)
    return result


def build_detector(cfg: Config, checkpoint: str | None) -> nn.Module:
    """Build the float detector on the CPU, with weights that give finite losses.

    Args:
        cfg: Config with the detector.
        checkpoint: Weights; None uses random weights. Heads then have their initial weights, and BatchNorm normalizes
            the activations of a noise image. Otherwise activations would grow from layer to layer until losses are not
            finite.
    """
    torch.manual_seed(0)
    detector = MMDET_MODELS.build(copy.deepcopy(cfg.model))
    if checkpoint is not None:
        load_teacher(detector, checkpoint)
        return detector
    for name, part in detector.named_children():
        # Initial weights of a backbone may be a download.
        if name != 'backbone' and isinstance(part, BaseModule):
            part.init_weights()
    black, white = pixel_range(detector.data_preprocessor)
    noise = black + (white - black) * torch.rand(1, 3, NOISE_SIZE, NOISE_SIZE)

    def take_scale(layer: Any, inputs: tuple[torch.Tensor]) -> None:
        dims = [0, *range(2, inputs[0].dim())]
        # The second moment, not the variance: deep layers average noise away, and a tiny variance would be scaled up
        # layer by layer.
        layer.running_var.copy_(inputs[0].square().mean(dims))

    layers = [module for module in detector.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    hooks = [layer.register_forward_pre_hook(take_scale) for layer in layers]
    hooks.append(detector.register_forward_pre_hook(lambda _, arguments: (noise, *arguments[1:])))
    with torch.no_grad(), eval_mode(detector, keep=()):
        dry_run(detector, NOISE_SIZE)
    for hook in hooks:
        hook.remove()
    return detector


def make_batch(detector: nn.Module, batch_size: int, size: tuple[int, int]) -> dict[str, Any]:
    """Draw random images and labels in the format of a data loader.

    Args:
        detector: Detector that the labels are for.
        batch_size: Number of images.
        size: Height and width in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    labels = _draw_labels(batch_size, size, detector, generator)
    images = torch.randint(0, 256, (batch_size, 3, *size), generator=generator, dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=data_samples(labels, size, torch.device('cpu')))


def as_loaded(batch: dict[str, Any], labels: bool, device: torch.device) -> dict[str, Any]:
    """Collate a batch as the data loader of a student does, in pinned memory for a GPU.

    Args:
        batch: Returned by :func:`make_batch`.
        labels: Whether the student is trained on labels.
        device: Device of the student.
    """
    items = zip(batch['inputs'], copy.deepcopy(batch['data_samples']), strict=True)
    loaded = stack_images([dict(inputs=image, data_samples=sample) for image, sample in items], labels)
    if device.type == 'cuda':
        loaded['inputs'] = loaded['inputs'].pin_memory()
    return loaded


class SynthesisStage:
    """One stage of a config's synthesis at the image and batch size of the settings.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        settings: Settings of the measurement.
        index: Index of the stage among those of the config.

    Attributes:
        facts: Details of the last run, for the report.
    """

    def __init__(self, cfg: Config, settings: Settings, index: int) -> None:
        section = complete_section(cfg.zsq.to_dict())
        self.settings = settings
        self.memory = PeakMemory(settings.device)
        self.seed = section['calibration_set']['seed']
        self.task: Any = build_detection_task(build_detector(cfg, settings.checkpoint).to(settings.device))
        default_batch = section['calibration_set']['batch_size']
        self.generator = CalibrationSetGenerator(
            self.task, section['synthesis'], section['label_sampler'], default_batch, self.seed
        )
        stage = self.generator.stages[index]
        self.size = settings.image_size or stage.image_size
        self.batch_size = settings.batch_size or stage.batch_size
        self.iterations = stage.iterations
        self.facts: dict[str, Any] = {}

    def run(self, sampler: LabelSampler | None) -> _Clock:
        """Synthesize one batch and store its details in :attr:`facts`.

        Args:
            sampler: Corrects the labels in every second measurement; None disables relabeling.
        """
        generator = torch.Generator().manual_seed(self.seed)
        labels = self.generator.sampler.sample(self.batch_size, self.size, self.task.num_classes, generator)
        labels = fit_masks(labels, self.size, self.task.needs_masks)
        clock = _Clock(sampler, self.settings)
        if sampler is not None and self.settings.checkpoint is None:
            clock.drawn = [self._draw_predictions(generator) for _ in range(clock.corrections)]
        synthesizer = self.generator.synthesizer
        # Images optimized for random weights would soon make losses infinite, so they stay noise.
        lr = 0.0 if self.settings.checkpoint is None else None
        with _counting_refusals(self.task) as refused:
            result = synthesizer.run(labels, self.size, clock.iterations, self.seed, lr=lr, sampler=clock)
        self.facts = dict(
            image_size=list(self.size),
            batch_size=self.batch_size,
            precision=synthesizer.precision if self.task.device.type == 'cuda' else 'fp32',
            task=type(self.task).__name__,
            note=self.task.note,
            priors=[type(prior).__name__ for prior in synthesizer.priors],
            boxes=sum(len(instances) for instances in labels),
            added=result.counts['added'],
            removed=result.counts['removed'],
            captures_lost=len(refused),
            losses={name: round(value, 5) for name, value in result.losses.items()},
            cuda_graph=result.captured,
            eager_reason=synthesizer.eager_reason,
            utilization=clock.watch.mean_utilization,
            **self.memory.read(),
        )
        return clock

    def _draw_predictions(self, generator: torch.Generator) -> list[InstanceData]:
        """Draw predictions, since random weights detect nothing and labels would never change."""
        predictions = _draw_labels(self.batch_size, self.size, self.task.detector, generator)
        for instances in predictions:
            instances.scores = torch.rand(len(instances), generator=generator)
        return predictions


@dataclass
class _Clock(LabelSampler):
    """A label sampler that times the synthesis which calls it before each step.

    Attributes:
        sampler: Corrects the labels before every second measurement and before the profiled steps.
        settings: Settings of the measurement.
        seconds: Seconds of each measurement.
        drawn: Predictions to use instead of the detector's, one entry per correction.
    """

    adaptive = True

    sampler: LabelSampler | None
    settings: Settings
    seconds: list[float] = field(default_factory=list)
    drawn: list[list[InstanceData]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.settings.device)
        self.profile = Profile(self.settings.device)

    @property
    def measurements(self) -> int:
        """Number of measurements, of both kinds if labels are corrected."""
        return self.settings.repeats * (1 if self.sampler is None else 2)

    @property
    def corrections(self) -> int:
        """Number of corrections: one for warm-up, one in every second measurement, one profiled."""
        return 0 if self.sampler is None else 2 + self.settings.repeats

    @property
    def iterations(self) -> int:
        """Number of steps: warm-up, measurements, profile, and one step that ends the profile."""
        return SYNTHESIS_WARMUP + self.measurements * self.settings.steps + PROFILED_STEPS + 1

    def sample(
        self, num_images: int, image_size: tuple[int, int], num_classes: int, generator: torch.Generator
    ) -> list[InstanceData]:
        """Not supported."""
        raise NotImplementedError

    def should_relabel(self, iteration: int) -> bool:
        """Record the time if a measurement begins or ends; return whether to correct the labels now."""
        position = iteration - SYNTHESIS_WARMUP
        index, step = divmod(position, self.settings.steps)
        if position < 0:
            return self.sampler is not None and iteration == 1
        if position == self.measurements * self.settings.steps + PROFILED_STEPS:
            self.watch.lap()
            self.profile.stop()
            return False
        if step or index > self.measurements:
            return False
        if index == 0:
            self.watch.start()
        else:
            self.seconds.append(self.watch.lap())
        if index == self.measurements:
            self.profile.start()
        return self.sampler is not None and (index % 2 == 1 or index == self.measurements)

    def relabel(
        self, labels: Sequence[InstanceData], predictions: Sequence[InstanceData], image_size: tuple[int, int]
    ) -> tuple[list[InstanceData], RelabelCounts]:
        """Correct the labels by the wrapped sampler."""
        assert self.sampler is not None
        return self.sampler.relabel(labels, self.drawn.pop() if self.drawn else predictions, image_size)


class Trainee:
    """A model with its optimizer after warm-up.

    Args:
        model: A detector, or a student with its teacher.
        batch: Returned by :func:`make_batch`.
        optim_wrapper: Config of the optimizer wrapper.
        device: Device of the model.
        prepare: Called with the model after its quantizers are initialized, before the first training step.

    Attributes:
        memory: Peak memory of initialization and warm-up.
    """

    def __init__(
        self,
        model: Any,
        batch: dict[str, Any],
        optim_wrapper: Any,
        device: torch.device,
        prepare: Callable[[Any], None] | None = None,
    ) -> None:
        memory = PeakMemory(device)
        self.model = model.to(device)
        self.batch = batch
        if hasattr(model, 'student'):
            self.batch = as_loaded(batch, bool(model.detection_weight), device)
        self.device = device
        self.wrapper = build_optim_wrapper(model, optim_wrapper)
        self.model.train()
        if hasattr(model, 'student'):
            with torch.no_grad(), calibrating(model.student):
                data = model.data_preprocessor(self._fresh_batch(), False)
                model.student(data['inputs'], data['data_samples'], mode='tensor')
        if prepare is not None:
            prepare(self.model)
        self.steps(TRAINING_WARMUP)
        self.memory = memory.read()

    def steps(self, count: int) -> None:
        """Take ``count`` steps without waiting for the device."""
        for _ in range(count):
            self.model.train_step(self._fresh_batch(), self.wrapper)

    def profile(self) -> Profile:
        """Profile :data:`PROFILED_STEPS` steps."""
        profile, watch = Profile(self.device), Stopwatch(self.device)
        watch.start()
        profile.start()
        self.steps(PROFILED_STEPS)
        watch.lap()
        profile.stop()
        return profile

    def _fresh_batch(self) -> dict[str, Any]:
        # The preprocessor writes the padded shapes into the samples.
        return dict(self.batch)


def training_models(
    cfg: Config, settings: Settings, names: Collection[str] = ('float', 'quantized', 'distilled')
) -> tuple[dict[str, nn.Module], Config]:
    """Build the float detector, its quantized student and the student with a teacher, with the same weights.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        settings: Settings of the measurement.
        names: Models wanted beside ``'float'``.

    Returns:
        Models by name, and the composed config.
    """
    cfg = copy.deepcopy(cfg)
    plain: Any = build_detector(cfg, settings.checkpoint)
    # Batch augmentations would change the image size from step to step.
    plain.data_preprocessor.batch_augments = None
    with tempfile.TemporaryDirectory() as folder:
        cfg.load_from = str(Path(folder, 'weights.pth'))
        torch.save(dict(state_dict=plain.state_dict()), cfg.load_from)
        cfg = compose(cfg)
        models = dict(float=plain)
        for name, distillation in (
            ('quantized', dict(detection_weight=1.0, losses=[])),
            ('distilled', cfg.model.distillation),
        ):
            if name not in names:
                continue
            changed = dict(cfg.model, distillation=distillation)
            if name == 'quantized':
                # Augmentation does not adjust labels.
                changed.update(augmentation=None)
            model = MODELS.build(changed)
            model.init_weights()
            models[name] = model
            # All models use the same memory format, for a fair comparison.
            plain.to(memory_format=model.memory_format)
    if settings.device.type != 'cuda' and cfg.optim_wrapper.type == 'mmengine.AmpOptimWrapper':
        sys.stderr.write('no GPU: training is measured in fp32\n')
        cfg.optim_wrapper.type = 'mmengine.OptimWrapper'
        cfg.optim_wrapper.pop('dtype')
    return models, cfg


def _draw_labels(
    count: int, size: tuple[int, int], detector: nn.Module, generator: torch.Generator
) -> list[InstanceData]:
    labels = MultiBoxSampler((BOXES, BOXES)).sample(count, size, num_classes(detector), generator)
    return fit_masks(labels, size, needs_masks(detector))


@contextmanager
def _counting_refusals(task: Any) -> Iterator[list[None]]:
    """Collect an entry whenever ``task`` cannot update labels in place, so that the step is captured again."""
    refused: list[None] = []
    update = task.update_samples

    def counted(*arguments: Any) -> bool:
        fits = bool(update(*arguments))
        refused.extend([] if fits else [None])
        return fits

    task.update_samples = counted
    try:
        yield refused
    finally:
        del task.update_samples
