# SPDX-License-Identifier: Apache-2.0
"""The three kinds of step that a zero-shot quantization takes, each timed as the real run takes it.

Every time is a median over repeats with the lowest and highest beside it. What is compared is measured in turns within
one process, so that a device that slows down slows down both: steps with and without a correction of the labels, and
training steps of the float, the quantized and the distilled detector.
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
from mmzsq.synthesis.synthesizer import EAGER_STEPS
from mmzsq.tasks import build_detection_task
from mmzsq.tasks.detection_task import data_samples, needs_masks, num_classes, pixel_range

SYNTHESIS_WARMUP = 1 + EAGER_STEPS + 2
"""Steps before the clock starts: one, and after a correction the eager ones, that which is captured, and a replay."""
TRAINING_WARMUP = 5
"""Steps before the clock starts: the first choose algorithms, compile kernels and are captured."""
PROFILED_STEPS = 2
"""Steps that are profiled; reading a profile of thousands of kernels takes longer than they do."""
NOISE_SIZE = 256
"""Side in pixels of the image by which random weights are brought into scale."""
BOXES = 4
"""Boxes an image, of drawn labels and of drawn predictions."""


@dataclass(frozen=True)
class Settings:
    """What is measured and how often.

    Attributes:
        image_size: Height and width in pixels; None: that of the config's stage, 640 px in training.
        batch_size: Images a step; None: that of the config.
        repeats: Measurements of each kind.
        steps: That one measurement is of.
        checkpoint: Of the float detector; None: random weights, on which the time of a step hardly depends.
        device: Where to measure.
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
        settings: How to measure.
    """
    stage = SynthesisStage(cfg, settings, -1)
    clock = stage.run(None)
    per_image = 1000 / stage.batch_size
    ms, spread = middle([per_image * seconds / settings.steps for seconds in clock.seconds])
    profile = clock.profile.read(PROFILED_STEPS, stage.batch_size * ms)
    return dict(ms_per_image_iteration=ms, spread=spread, **stage.facts, **profile)


def measure_relabeling(cfg: Config, settings: Settings) -> dict[str, Any]:
    """Time the correction of labels: prediction, suppression, comparison, and handing new labels to the step.

    Steps with and without a correction before them take turns; what a correction costs is their difference.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        settings: How to measure.

    Returns:
        ``ms_per_image_correction`` of one, and ``ms_per_image_iteration`` of the config's stage as a whole, with as
        many corrections as its sampler makes there. The profile is of a correction and :data:`PROFILED_STEPS` steps.

    Raises:
        UserError: If the config's sampler corrects nothing, or a capture would not fit into the steps of a measurement.
    """
    if settings.steps < EAGER_STEPS + 2:
        raise UserError(f'--steps is at least {EAGER_STEPS + 2} for relabeling, not {settings.steps}')
    stage = SynthesisStage(cfg, settings, 0)
    sampler = stage.generator.sampler
    if not sampler.adaptive:
        raise UserError(f'{type(sampler).__name__} corrects no labels: measure synthesis instead')
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
    """Time a training step of the float detector, its quantized student alone, and the student with its teacher.

    All learn by the same optimizer from the same random images and boxes: the first two by the detector's own loss, the
    third as the config says. The float detector does by MMEngine's step, the others by their own, which may be a graph.
    A step is all that there is of it: copying images to the device, normalization, forward, backward, clipping,
    optimizer; only reading images is left out.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        settings: How to measure.

    Returns:
        ``steps`` by name, and the ratios of the last two to the first within each turn.
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
        precision='bf16' if cfg.optim_wrapper.type == 'AmpOptimWrapper' else 'fp32',
        utilization=watch.mean_utilization,
        steps=steps,
    )
    for name in ('quantized', 'distilled'):
        ratios = [other / plain for other, plain in zip(seconds[name], seconds['float'], strict=True)]
        result[f'ratio_{name}'], result[f'ratio_{name}_spread'] = middle(ratios, 3)
    return result


def build_detector(cfg: Config, checkpoint: str | None) -> nn.Module:
    """Build the float detector on the CPU, with weights that a step can be taken with.

    Args:
        cfg: Its config.
        checkpoint: Its weights; None: random ones. Heads get those that training starts from, and BatchNorm brings
            to scale what it sees when the detector sees noise: else activations would grow from layer to layer until
            losses are not finite.
    """
    torch.manual_seed(0)
    detector = MMDET_MODELS.build(copy.deepcopy(cfg.model))
    if checkpoint is not None:
        load_teacher(detector, checkpoint)
        return detector
    for name, part in detector.named_children():
        # Those of a backbone may be a download.
        if name != 'backbone' and isinstance(part, BaseModule):
            part.init_weights()
    black, white = pixel_range(detector.data_preprocessor)
    noise = black + (white - black) * torch.rand(1, 3, NOISE_SIZE, NOISE_SIZE)

    def take_scale(layer: Any, inputs: tuple[torch.Tensor]) -> None:
        dims = [0, *range(2, inputs[0].dim())]
        # About 0 and not the mean: deep layers average noise away, and what little varies would blow up layer by layer.
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
    """Random images and labels, as a data loader gives them.

    Args:
        detector: Whose labels these are.
        batch_size: Images.
        size: Height and width in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    labels = _draw_labels(batch_size, size, detector, generator)
    images = torch.randint(0, 256, (batch_size, 3, *size), generator=generator, dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=data_samples(labels, size, torch.device('cpu')))


def as_loaded(batch: dict[str, Any], labels: bool, device: torch.device) -> dict[str, Any]:
    """The same batch as the data loader of a student gives it, in pinned memory on the way to a GPU.

    Args:
        batch: See :func:`make_batch`.
        labels: Whether the student learns from labels.
        device: Where it trains.
    """
    items = zip(batch['inputs'], copy.deepcopy(batch['data_samples']), strict=True)
    loaded = stack_images([dict(inputs=image, data_samples=sample) for image, sample in items], labels)
    if device.type == 'cuda':
        loaded['inputs'] = loaded['inputs'].pin_memory()
    return loaded


class SynthesisStage:
    """One stage of a config's synthesis, at the size and batch that are asked for.

    Args:
        cfg: A detector's config with a ``zsq`` section.
        settings: How to measure.
        index: Of the stage among those that would run.
    """

    def __init__(self, cfg: Config, settings: Settings, index: int) -> None:
        section = complete_section(cfg.zsq.to_dict(), cfg.get('model'))
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
        """Synthesize one batch and note what there is to know of it in :attr:`facts`.

        Args:
            sampler: Corrects the labels in every second measurement; None: nothing does.
        """
        generator = torch.Generator().manual_seed(self.seed)
        labels = self.generator.sampler.sample(self.batch_size, self.size, self.task.num_classes, generator)
        labels = fit_masks(labels, self.size, self.task.needs_masks)
        clock = _Clock(sampler, self.settings)
        if sampler is not None and self.settings.checkpoint is None:
            clock.drawn = [self._draw_predictions(generator) for _ in range(clock.corrections)]
        synthesizer = self.generator.synthesizer
        # Optimized for random weights, images would soon be such that losses are not finite: they stay noise.
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
        """What a detector might find: random weights find nothing, and no label would ever change."""
        predictions = _draw_labels(self.batch_size, self.size, self.task.detector, generator)
        for instances in predictions:
            instances.scores = torch.rand(len(instances), generator=generator)
        return predictions


@dataclass
class _Clock(LabelSampler):
    """Takes the time of a running synthesis, which asks its sampler before each step whether to correct the labels.

    Attributes:
        sampler: Corrects the labels before every second measurement, and before the steps that are profiled.
        settings: How to measure.
        seconds: Of each measurement.
        drawn: Predictions that stand for the detector's, one entry a correction.
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
        """Of both kinds, if labels are corrected."""
        return self.settings.repeats * (1 if self.sampler is None else 2)

    @property
    def corrections(self) -> int:
        """In all: one to warm up, one in every second measurement, one that is profiled."""
        return 0 if self.sampler is None else 2 + self.settings.repeats

    @property
    def iterations(self) -> int:
        """Warm-up, measurements, profile, and a step that ends the profile."""
        return SYNTHESIS_WARMUP + self.measurements * self.settings.steps + PROFILED_STEPS + 1

    def sample(
        self, num_images: int, image_size: tuple[int, int], num_classes: int, generator: torch.Generator
    ) -> list[InstanceData]:
        """Not what a clock is for."""
        raise NotImplementedError

    def should_relabel(self, iteration: int) -> bool:
        """Note the time where a measurement begins or ends; return whether labels are corrected now."""
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
        """Correct the labels as the sampler does."""
        assert self.sampler is not None
        return self.sampler.relabel(labels, self.drawn.pop() if self.drawn else predictions, image_size)


class Trainee:
    """One model and its optimizer, warmed up; its peak memory is taken on the way.

    Args:
        model: A detector, or teacher and student.
        batch: See :func:`make_batch`.
        optim_wrapper: Config.
        device: Where it trains.
        prepare: Called with the model after its quantizers have steps, before the first training step.
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
        """Take ``count`` steps; the device may still be at work afterwards."""
        for _ in range(count):
            self.model.train_step(self._fresh_batch(), self.wrapper)

    def profile(self) -> Profile:
        """Take :data:`PROFILED_STEPS` steps under the profiler."""
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
        settings: How to measure.
        names: Models wanted beside ``'float'``.

    Returns:
        Models by name, and the composed config.
    """
    cfg = copy.deepcopy(cfg)
    plain: Any = build_detector(cfg, settings.checkpoint)
    # They change the size of images from step to step, and the student's do not.
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
                # Its labels would no longer fit.
                changed.update(augmentation=None)
            model = MODELS.build(changed)
            model.init_weights()
            models[name] = model
            # The float detector is not to lose by the layout of its memory.
            plain.to(memory_format=model.memory_format)
    if settings.device.type != 'cuda' and cfg.optim_wrapper.type == 'AmpOptimWrapper':
        sys.stderr.write('no GPU: training is measured in fp32\n')
        cfg.optim_wrapper.type = 'OptimWrapper'
        cfg.optim_wrapper.pop('dtype')
    return models, cfg


def _draw_labels(
    count: int, size: tuple[int, int], detector: nn.Module, generator: torch.Generator
) -> list[InstanceData]:
    labels = MultiBoxSampler((BOXES, BOXES)).sample(count, size, num_classes(detector), generator)
    return fit_masks(labels, size, needs_masks(detector))


@contextmanager
def _counting_refusals(task: Any) -> Iterator[list[None]]:
    """Collect an entry each time that ``task`` cannot put labels in place, after which a step is captured anew."""
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
