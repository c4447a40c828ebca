# SPDX-License-Identifier: Apache-2.0
"""Run every stage of a zero-shot run on a detector, with tiny settings, and check each stage.

:func:`check` takes the config of any detector combined with a zsq base and runs all stages: compose, quantize,
synthesize, relabel, one training step, evaluation and a checkpoint. If a stage fails, it is reported with the reason
and the following stages are skipped. :func:`zoo_config` makes such a config from one of MMDetection's, small enough for
one CPU core. On request, losses run under autocast in bf16, which is the default on a GPU. Most errors of data types
are the same on the CPU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mmdet
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.config.compose import class_names, compose
from mmzsq.qat import ZeroShotDetector
from mmzsq.quantization import calibrating, quantized_layers
from mmzsq.registry import MODELS
from mmzsq.synthesis import CalibrationSet, CalibrationSetGenerator
from mmzsq.synthesis.label_samplers import fit_masks
from mmzsq.synthesis.optimization_step import EAGER_STEPS
from mmzsq.synthesis.synthesizer import seeded
from mmzsq.tasks import build_detection_task
from mmzsq.tasks.detection_task import blank_samples, pixel_range, sum_losses, whole_image_samples

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
ZSQ_BASE = Path(__file__).resolve().parents[2] / 'configs/_base_/zsq_w4a8.py'

CHANNEL_KEYS = ('channels', 'embed_dims', 'num_feats', 'num_ins')
"""Suffixes of settings that count channels. Settings that count a part of the channels (group widths) do not match."""

MAX_PREDICTIONS = 20


@dataclass
class Result:
    """Result of a check.

    Attributes:
        failed: Name of the stage that failed; None if all stages passed.
        reason: Reason of the failure in one line.
        error: The exception.
        seconds: Wall time of all stages.
        quantized: Number of quantized layers.
        floats: Class and reason of each layer that stays in floating point, by name.
        silent: Names of quantized layers that get no gradient because their inputs are all zeros.
        fp32_reason: Why the loss was computed in fp32 under autocast; None if it was not.
    """

    failed: str | None = None
    reason: str = ''
    error: Exception | None = None
    seconds: float = 0.0
    quantized: int = 0
    floats: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    fp32_reason: str | None = None

    @property
    def works(self) -> bool:
        """Whether all stages passed."""
        return self.failed is None


def check(cfg: Config, work_dir: Path | str, device: str = 'cpu', autocast: bool = False) -> Result:
    """Run all stages on a detector.

    Args:
        cfg: Config of the detector with a zsq section, preferably with tiny settings as in :func:`zoo_config`.
        work_dir: An empty folder for the teacher, the calibration set and the checkpoint.
        device: ``'cpu'`` or ``'cuda'``.
        autocast: Whether losses of synthesis and training run under autocast in bf16.
    """
    result = Result()
    run = _Run(cfg, Path(work_dir), result, torch.device(device), autocast)
    start = time.perf_counter()
    torch.manual_seed(0)
    for stage in (run.compose, run.quantize, run.synthesize, run.relabel, run.train, run.evaluate, run.save_and_load):
        try:
            stage()
        except Exception as error:
            result.failed = stage.__name__.replace('_', ' ')
            result.error = error
            result.reason = ': '.join(filter(None, (type(error).__name__, *str(error).splitlines()[:1])))
            break
    result.seconds = time.perf_counter() - start
    return result


def zoo_config(path: str, size: int = 64, shrink: int = 4, changes: Mapping[str, Any] | None = None) -> Config:
    """Combine one of MMDetection's configs with a zsq base and make it as small as possible.

    Args:
        path: Path of the config below MMDetection's ``configs``.
        size: Side of the images in pixels.
        shrink: Divisor of all channels of the detector.
        changes: Further overrides, as for ``--cfg-options``.
    """
    cfg = Config.fromfile(CONFIGS / path)
    base = Config.fromfile(ZSQ_BASE)
    cfg.runner_type = base.runner_type
    cfg.zsq = base.zsq
    model = small(cfg.model.to_dict(), shrink)
    cfg.pop('model')
    cfg.model = ConfigDict(model)
    cfg.merge_from_dict(tiny_run(size))
    cfg.merge_from_dict(copy.deepcopy(dict(changes or {})))
    return cfg


def tiny_run(size: int) -> dict[str, Any]:
    """Return overrides for two images of ``size`` pixels in few iterations, without the search for initial steps.

    On a GPU, there are enough iterations to capture them in a CUDA graph and to see its losses fall.
    """
    iterations = EAGER_STEPS + 15 if torch.cuda.is_available() else 3
    return {
        'zsq.quantizer.weight': dict(init='lsq'),
        'zsq.quantizer.activation': dict(init='lsq'),
        'zsq.calibration_set': dict(num_images=2, batch_size=2),
        # Low thresholds, so that an untrained detector finds objects.
        'zsq.label_sampler': dict(warmup=1, interval=1, score_thr=1e-6, area=(0.0, 1.0), add_iou=0.9),
        'zsq.synthesis.relabel': dict(image_size=size, iterations=2, batch_size=2),
        'zsq.synthesis.refine': None,
        'zsq.synthesis.synthesize': dict(image_size=size, iterations=iterations, batch_size=2, lr=0.002),
        'zsq.synthesis.cutout': None,
        # The detection loss includes the masks of the labels, if there are any.
        'zsq.distillation.detection_weight': 1.0,
        'zsq.train': dict(batch_size=2, num_workers=0),
    }


def small(model: dict[str, Any], shrink: int) -> dict[str, Any]:
    """Return a detector's config with fewer channels, without pretrained weights, and with thresholds of 0."""
    backbone = model.get('backbone', {})
    if shrink > 1 and isinstance(backbone.get('depth'), int) and 'base_channels' not in backbone:
        backbone['base_channels'] = 64
        if 'stem_channels' not in backbone:
            backbone['stem_channels'] = 64
    return _small(model, shrink)


def _small(value: Any, shrink: int, key: str = '') -> Any:
    if isinstance(value, dict):
        if value.get('type') == 'Pretrained':
            return None
        return {name: _small(item, shrink, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_small(item, shrink, key) for item in value)
    if key.endswith(CHANNEL_KEYS) and type(value) is int and value >= 8 * shrink and value % shrink == 0:
        return value // shrink
    if key in ('score_thr', 'filter_thr', 'mask_thr'):
        return 0.0
    if key == 'max_per_img' and isinstance(value, int):
        return min(value, MAX_PREDICTIONS)
    return value


class _Run:
    """The stages in order. Each raises an error if it fails."""

    def __init__(self, cfg: Config, work_dir: Path, result: Result, device: torch.device, autocast: bool) -> None:
        self.cfg = copy.deepcopy(cfg)
        self.device = device
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=autocast, cache_enabled=False)
        self.cfg.zsq.synthesis.precision = 'bf16' if autocast else 'fp32'
        self.work_dir = work_dir
        self.result = result
        self.cfg.work_dir = str(work_dir)
        self.cfg.load_from = str(work_dir / 'teacher.pth')

    def compose(self) -> None:
        register_all_modules()
        self.classes = class_names(self.cfg)
        self.cfg = compose(self.cfg)

    def quantize(self) -> None:
        teacher = MMDET_MODELS.build(copy.deepcopy(self.cfg.model.detector))
        as_if_trained(teacher, self.cfg.zsq.synthesis.synthesize.image_size, self.device)
        torch.save({'state_dict': teacher.state_dict()}, self.cfg.load_from)
        self.model: ZeroShotDetector = MODELS.build(copy.deepcopy(self.cfg.model))
        self.model.init_weights()
        self.model.to(self.device)
        listed = [layer.name for layer in self.model.report.layers if layer.quantized or layer.reason]
        # The report lists the parts of a packed parameter under the module that owns it.
        listed += [name.rpartition('.')[0] for name in listed if name.endswith('_projection')]
        left_out = [name for name in weights(teacher) if not _within(name, listed)]
        expect(not left_out, f'weights that the report does not list: {enumerate_names(left_out)}')
        layers = self.model.report.layers
        self.result.quantized = sum(layer.quantized for layer in layers)
        self.result.floats = {layer.name: f'{layer.type}: {layer.reason}' for layer in layers if not layer.quantized}

    def synthesize(self) -> None:
        zsq = self.cfg.zsq.to_dict()
        task = build_detection_task(self.model.load_teacher())
        if self.device.type == 'cpu':
            # On a GPU, the synthesizer turns autocast on.
            task.loss = self.autocast()(task.loss)  # type: ignore[method-assign]
        batch_size, seed = zsq['calibration_set']['batch_size'], zsq['calibration_set']['seed']
        self.generator = CalibrationSetGenerator(task, zsq['synthesis'], zsq['label_sampler'], batch_size, seed)
        classes = self.classes or [f'class_{index}' for index in range(task.num_classes)]
        expect(len(classes) == task.num_classes, f'{len(classes)} classes in the data, {task.num_classes} in the heads')
        calibration_set = CalibrationSet.open(
            Path(zsq['calibration_set']['dir']),
            fingerprint={},
            num_images=zsq['calibration_set']['num_images'],
            shard_size=self.generator.shard_size,
            classes=classes,
            uses_real_labels=False,
            versions={},
        )
        self.generator.generate(calibration_set, calibration_set.missing_shards())
        calibration_set.merge()
        stage = self.generator.stages[-1]
        labels = self.generator.sampler.sample(2, stage.image_size, task.num_classes, torch.Generator().manual_seed(1))
        self.labels = fit_masks(labels, stage.image_size, task.needs_masks)
        start = torch.rand(2, 3, *stage.image_size).to(self.device)
        before, grad = self.objective(start, self.labels)
        expect(bool(torch.isfinite(grad).all()), 'the gradient of the image is not finite')
        expect(all(image.abs().sum() > 0 for image in grad), 'an image has no gradient')
        synthesizer = self.generator.synthesizer
        made = synthesizer.run(self.labels, stage.image_size, stage.iterations, seed=0, start=start, lr=stage.lr)
        after, _ = self.objective(made.images, self.labels)
        # Each term counts by its share, whatever it adds up to, as in the balance of synthesis. A prior that noise
        # nearly minimizes, such as that of attention, may grow: then the detection loss falls.
        shares = after / before.clamp(min=1e-12)
        expect(
            float(min(shares.mean(), shares[0])) < 1,
            f'the losses do not fall: {before.tolist()} before, {after.tolist()} after',
        )
        self.result.fp32_reason = task.loss_precision.fp32_reason

    def relabel(self) -> None:
        stage = self.generator.stages[-1]
        images = torch.rand(2, 3, *stage.image_size).to(self.device)
        found = self.generator.synthesizer.predict(images)
        expect(any(len(instances) for instances in found), 'the teacher predicts nothing')
        labels, counts = self.generator.sampler.relabel(self.labels, found, stage.image_size)
        expect(counts.added + counts.removed > 0, 'the predictions change no label')
        terms, _ = self.objective(images, labels)
        expect(bool(terms.isfinite().all()), f'the losses of the new labels are {terms.tolist()}')

    def train(self) -> None:
        batch = next(iter(Runner.build_dataloader(self.cfg.train_dataloader, seed=0)))
        self.batch = self.model.data_preprocessor(batch, False)
        inputs, samples = self.batch['inputs'], self.batch['data_samples']
        self.model.eval()
        with torch.no_grad(), calibrating(self.model.student):
            self.model.student(inputs, samples, mode='tensor')
        self.model.train()
        # The distillation losses alone must reach every layer.
        self.model.detection_weight = 0.0
        with seeing_zeros(self.model.student) as self.result.silent, self.autocast():
            losses = self.model(inputs, samples, mode='loss')
        for name, value in losses.items():
            expect(bool(torch.isfinite(value).all()), f'{name} is {value}')
        sum_losses(losses).backward()
        expect_gradients(self.model, self.result.silent)
        self.model.detection_weight = 1.0
        with self.autocast():
            own = self.model(inputs, samples, mode='loss')['loss_detection']
        expect(bool(torch.isfinite(own)), f'its own loss is {own}')
        # The values of these gradients are not checked: on untrained outputs, they can be infinite in any precision.
        learned = [parameter for parameter in self.model.student.parameters() if parameter.requires_grad]
        torch.autograd.grad(own, learned, allow_unused=True)
        with torch.no_grad():
            for parameter in self.model.student.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad.sign()

    def evaluate(self) -> None:
        inputs = self.batch['inputs']
        samples = blank_samples(len(inputs), (inputs.shape[2], inputs.shape[3]), inputs.device)
        with torch.no_grad():
            results = self.model.eval()(inputs, samples, mode='predict')
        expect(len(results) == 2, f'{len(results)} results of two images')
        for result in results:
            found = result.pred_instances
            expect(len(found) > 0, 'the student predicts nothing')
            expect(bool(torch.isfinite(found.scores).all()), 'scores are not finite')
            expect(found.bboxes.shape == (len(found), 4), f'boxes of shape {tuple(found.bboxes.shape)}')

    def save_and_load(self) -> None:
        path = self.work_dir / 'student.pth'
        torch.save({'state_dict': self.model.state_dict()}, path)
        loaded: ZeroShotDetector = MODELS.build(copy.deepcopy(self.cfg.model)).to(self.device)
        # Not strict, as in a run: some detectors register a module under a second name during training.
        state = torch.load(path, map_location=self.device, weights_only=True)['state_dict']
        result = loaded.load_state_dict(state, strict=False)
        expect(not result.missing_keys, f'the checkpoint lacks {enumerate_names(result.missing_keys)}')
        with torch.no_grad():
            expected, found = (
                tensors(model.eval()(**copy.deepcopy(self.batch), mode='tensor')) for model in (self.model, loaded)
            )
        expect(len(expected) > 0 and len(expected) == len(found), 'the number of outputs differs')
        expect(
            all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), 'the loaded student has other outputs'
        )

    def objective(self, images: Tensor, labels: list[InstanceData]) -> tuple[Tensor, Tensor]:
        """Return the terms of synthesis, unscaled, and the gradient of their sum, with the same random numbers."""
        task, synthesizer = self.generator.task, self.generator.synthesizer
        images = images.clone().requires_grad_()
        samples = task.data_samples(labels, (images.shape[2], images.shape[3]))
        for prior in synthesizer.priors:
            prior.attach(task.detector)
        try:
            with seeded(0, task.device), self.autocast():
                terms = [task.loss(images, samples).float()]
            terms += [prior(images) for prior in synthesizer.priors]
            torch.stack(terms).sum().backward()
        finally:
            for prior in synthesizer.priors:
                prior.detach()
        assert images.grad is not None
        return torch.stack(terms).detach(), images.grad


def as_if_trained(detector: nn.Module, size: int, device: torch.device) -> None:
    """Move an untrained detector to a device and make it similar to a trained one: nonzero weights, real statistics."""
    detector.init_weights()
    detector.eval().to(device)
    handles = []
    for module in detector.modules():
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(remember_statistics))
    images = noise_of_all_scales(size).to(device)
    samples = whole_image_samples(len(images), (size, size), device)
    with torch.no_grad():
        for parameter in detector.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(torch.randn_like(parameter) * max(0.1 * spread, 0.01))
        for name, module in detector.named_modules():
            # Small initial weights without a norm let features vanish. In 16 bits, teacher and student would be equal.
            if '_convs' in name and isinstance(module, nn.Conv2d) and (spread := float(module.weight.std())) > 0:
                target = (2 / module.weight[0].numel()) ** 0.5
                module.weight.mul_(max(target / spread, 1.0))
        black, white = (level.to(device) for level in pixel_range(detector.data_preprocessor))
        detector(black + images * (white - black), samples, mode='tensor')
    for handle in handles:
        handle.remove()


def noise_of_all_scales(size: int) -> Tensor:
    """Draw noise images in [0, 1], (8, 3, size, size): two for each of four grain sizes."""
    grains = (size, 16, 8, 4)
    images = [F.interpolate(torch.rand(2, 3, side, side), (size, size), mode='bilinear') for side in grains]
    return torch.cat(images)


def remember_statistics(layer: _BatchNorm, args: tuple[Tensor, ...]) -> None:
    """Set the statistics of a BatchNorm layer to those of its current input."""
    layer.running_mean.copy_(args[0].mean((0, 2, 3)))
    layer.running_var.copy_(args[0].var((0, 2, 3), correction=0) + 1e-3)


def weights(detector: nn.Module) -> list[str]:
    """Return the names of the parameters with two or more dimensions."""
    return [name for name, parameter in detector.named_parameters() if parameter.dim() >= 2]


@contextmanager
def seeing_zeros(student: nn.Module) -> Iterator[list[str]]:
    """Record the quantized layers whose input is all zeros inside the block, such as the first queries of a decoder."""
    inputs: dict[str, bool] = {}
    handles = []
    for name, layer in quantized_layers(student):

        def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = inputs.get(name, False) or bool(args[0].any())

        handles.append(layer.input_quantizer.register_forward_pre_hook(note))
    silent: list[str] = []
    try:
        yield silent
    finally:
        for handle in handles:
            handle.remove()
        silent += [name for name, any_value in inputs.items() if not any_value]


def expect_gradients(model: ZeroShotDetector, silent: Iterable[str]) -> None:
    """Check that every quantized weight and every step has a finite, nonzero gradient.

    Args:
        model: The model after a backward pass.
        silent: Names of layers that need no gradient.
    """
    floats = [layer.name for layer in model.report.layers if not layer.quantized] + list(silent)
    faults: dict[str, list[str]] = {}
    for name, parameter in model.student.named_parameters():
        learns = ('_quantizer.' in name or parameter.dim() >= 2) and not _within(name, floats)
        fault = gradient_fault(parameter) if learns else None
        if fault:
            faults.setdefault(fault, []).append(name)
    expect(not faults, '; '.join(f'{fault}: {enumerate_names(names)}' for fault, names in faults.items()))


def _within(name: str, listed: Iterable[str]) -> bool:
    return any(name == other or name.startswith(f'{other}.') for other in listed)


def gradient_fault(parameter: Tensor) -> str | None:
    """Describe the fault in the gradient of a parameter; None if there is none."""
    if parameter.grad is None:
        return 'no gradient'
    if not torch.isfinite(parameter.grad).all():
        return 'gradient not finite'
    return 'gradient zero' if not parameter.grad.any() else None


def tensors(nest: Any) -> list[Tensor]:
    """Return all tensors in nested mappings, sequences and instance data."""
    if isinstance(nest, Tensor):
        return [nest]
    if isinstance(nest, Mapping):
        nest = list(nest.values())
    elif isinstance(nest, InstanceData):
        nest = [value for _, value in nest.items()]
    if isinstance(nest, (list, tuple)):
        return [tensor for item in nest for tensor in tensors(item)]
    return []


def enumerate_names(names: Iterable[str]) -> str:
    """List the first four names and the number of the remaining ones."""
    names = list(names)
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return ', '.join(names[:4]) + more


def expect(condition: bool, fault: str) -> None:
    """Raise an AssertionError with the message ``fault`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(fault)
