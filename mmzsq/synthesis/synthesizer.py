# SPDX-License-Identifier: Apache-2.0
"""Synthesis of one batch of images: optimize noise until a detector detects the labels in it.

    L(x) = detection_weight * L_det(x, labels) + sum_p prior_p(x)

(eq. 1-3 of the paper; DeepInversion, Yin et al. 2020, for a detector). On a GPU, the whole step from cutout to clamping
is captured into one CUDA graph, provided that the detector's loss never synchronizes with the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.errors import UserError
from mmzsq.fused_kernels import fused_kernels_enabled
from mmzsq.synthesis.acceleration import Acceleration
from mmzsq.synthesis.cutout import Cutout
from mmzsq.synthesis.label_samplers import LabelPrior, LabelSampler, RelabelCounts
from mmzsq.synthesis.optimization_step import OptimizationStep
from mmzsq.synthesis.priors import Prior

DETECTION_INTERVAL = 8
"""Default of ``detection_interval`` for a detector whose loss is computed image by image."""


class Precision(Protocol):
    """How a task computes its loss under autocast; see :class:`mmzsq.tasks.mixed_precision.LossPrecision`."""

    fp32_reason: str | None


class SynthesisTask(Protocol):
    """Interface of a detector for synthesis; implemented by :class:`mmzsq.tasks.DetectionTask`."""

    detector: nn.Module
    num_classes: int
    needs_masks: bool
    channel_order: str
    is_batched: bool

    @property
    def loss_precision(self) -> Precision:
        """Tells whether 16 bits had to be given up for the loss."""

    @property
    def device(self) -> torch.device:
        """Device of the detector."""

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> Any:
        """Convert labels to the form that :meth:`loss` takes."""

    def update_samples(self, samples: Any, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> bool:
        """Replace the labels of ``samples`` in place if they fit; return whether they did."""

    def loss(self, images: Tensor, samples: Any) -> Tensor:
        """Return the detector's training loss for images in [0, 1], a scalar."""

    def run_network(self, images: Tensor) -> None:
        """Run the layers that feature priors observe, without the loss."""

    def predict(self, images: Tensor) -> list[InstanceData]:
        """Return the detector's predictions for images in [0, 1]."""

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Convert normalized network inputs to images in [0, 1]."""

    def label_prior(self) -> LabelPrior:
        """Return the label statistics of the detector's training data, estimated from its weights."""


@dataclass(frozen=True)
class StepProgress:
    """State of one batch, passed to ``on_progress`` about twenty times.

    Attributes:
        iteration: Number of steps done.
        iterations: Total number of steps.
        losses: Latest value of each weighted term.
        images: Shape (N, 3, H, W), in [0, 1].
        labels: The current labels.
    """

    iteration: int
    iterations: int
    losses: dict[str, float]
    images: Tensor
    labels: list[InstanceData]


@dataclass
class SynthesisResult:
    """One finished batch.

    Attributes:
        images: Shape (N, 3, H, W), in [0, 1], on the detector's device.
        labels: Labels of each image, on the CPU, in pixels of ``images``.
        losses: Last value of each weighted term.
        seconds: Wall time.
        captured: Whether the last step ran as a CUDA graph.
        counts: Number of boxes ``added`` and ``removed`` by relabeling.
        factors: Last factor of each balanced term; empty without balance.
    """

    images: Tensor
    labels: list[InstanceData]
    losses: dict[str, float]
    seconds: float
    captured: bool
    counts: dict[str, int] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's default generators of the CPU and ``device`` inside the block, then restore their state."""
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(seed)
        yield


class Synthesizer:
    """Optimizes batches of images for a detector.

    ``keep='best'`` compares the images every ``keep_interval`` steps, before the step, by the sum of all weighted terms
    that the step computes, with its cutout. It compares whole batches, starts over when labels change, and ignores the
    images after the last step, because no step evaluates them. This is our reading of the authors' code, which keeps
    the iterate with the lowest "teacher loss", checked every 50 or 100 iterations; the paper does not mention it. The
    sum is the objective that is minimized. The detection loss alone would prefer images that ignore the priors.

    Args:
        task: The frozen detector.
        priors: Penalties added to the detection loss.
        detection_weight: Weight of the detection loss.
        detection_reduction: ``'sum'`` multiplies the detector's loss, a mean over images, by the number of images (as
            in the authors' code); ``'mean'`` uses it unchanged.
        lr: Initial learning rate of Adam; decays to 0 along a cosine.
        warmup: Number of steps in which the learning rate increases linearly from 0 to ``lr``, before it decays.
        init: Initial images: ``'uniform'`` noise in [0, 1], or ``'normal'`` noise with mean 0 and standard deviation 1
            in normalized network inputs.
        betas: ``betas`` of Adam.
        cutout: Arguments of :class:`~mmzsq.synthesis.cutout.Cutout`, or None for no cutout.
        clamp: Whether to clamp pixels to [0, 1] after each step. Predictions for relabeling and finished images are
            always clamped.
        keep: ``'last'`` returns the images after the last step, ``'best'`` those with the lowest loss, as above.
        keep_interval: Number of steps between two comparisons for ``keep='best'``.
        precision: ``'fp32'`` or ``'bf16'`` (autocast; CUDA only, the CPU always computes in fp32).
        capture: Whether to capture the step into a CUDA graph if possible.
        balance: Whether to scale terms by their gradients (:mod:`mmzsq.synthesis.gradient_balance`). The gradients of
            the detection loss and of each image prior then have ``detection_weight`` and the prior's ``weight`` times
            the norm of the feature priors' gradient. Without a feature prior, the detection loss is the reference.
        detection_interval: Steps between two evaluations of the detection loss. Its gradient is kept in between, and
            each step computes the priors. 1 computes all terms in each step; None is 1 if the task computes the loss
            of a batch at once, else :data:`DETECTION_INTERVAL`.

    Attributes:
        eager_reason: Why steps are not captured; None if nothing has prevented it.

    Raises:
        UserError: If an option has an unknown value.
    """

    def __init__(
        self,
        task: SynthesisTask,
        priors: Sequence[Prior],
        detection_weight: float = 0.5,
        detection_reduction: str = 'sum',
        lr: float = 0.2,
        warmup: int = 0,
        init: str = 'uniform',
        betas: tuple[float, float] = (0.9, 0.999),
        cutout: dict[str, Any] | None = None,
        clamp: bool = True,
        keep: str = 'last',
        keep_interval: int = 50,
        precision: str = 'bf16',
        capture: bool = True,
        balance: bool = False,
        detection_interval: int | None = 1,
    ) -> None:
        for key, value, allowed in (
            ('detection_reduction', detection_reduction, ('sum', 'mean')),
            ('init', init, ('uniform', 'normal')),
            ('keep', keep, ('last', 'best')),
            ('precision', precision, ('fp32', 'bf16')),
        ):
            if value not in allowed:
                raise UserError(f'{key} of zsq.synthesis is one of {allowed}, not {value!r}')
        self.task = task
        self.priors = list(priors)
        self.detection_weight = detection_weight
        self.detection_reduction = detection_reduction
        self.lr = lr
        self.warmup = warmup
        self.init = init
        self.betas = betas
        self.cutout = Cutout(**cutout) if cutout is not None else None
        self.clamp = clamp
        self.keep = keep
        self.keep_interval = keep_interval
        self.precision = precision
        self.capture = capture
        self.balance = balance
        if detection_interval is None:
            detection_interval = 1 if task.is_batched else DETECTION_INTERVAL
        self.detection_interval = detection_interval
        self.eager_reason: str | None = None
        self.acceleration: Acceleration | None = None

    def run(
        self,
        labels: Sequence[InstanceData],
        image_size: tuple[int, int],
        iterations: int,
        seed: int,
        start: Tensor | None = None,
        lr: float | None = None,
        sampler: LabelSampler | None = None,
        on_progress: Callable[[StepProgress], None] | None = None,
    ) -> SynthesisResult:
        """Optimize one batch.

        Args:
            labels: One entry for each image, with ``bboxes`` xyxy in pixels of images of ``image_size``.
            image_size: Height and width in pixels.
            iterations: Number of steps. With 0, the initial images are returned, and labels are corrected once.
            seed: Seed of noise and cutout: the same seed gives the same bits on the same device.
            start: Initial images in [0, 1], (N, 3, any height, any width), which are resized; None: noise.
            lr: Learning rate; None: that of the synthesizer.
            sampler: If given and adaptive, corrects the labels by the detector's predictions during optimization.
            on_progress: Called about twenty times, the last time after the last iteration, or never if ``iterations``
                is 0.

        Returns:
            The finished batch.

        Raises:
            UserError: If the loss stops being finite.
        """
        device = self.task.device
        fast = device.type == 'cuda' and fused_kernels_enabled()
        self.acceleration = Acceleration(self.task.detector, self.dtype) if fast else None
        for prior in self.priors:
            prior.attach(self.task.detector)
        try:
            with seeded(seed, device):
                images = self._initial_images(start, len(labels), image_size)
                if iterations == 0:
                    return self._run_without_steps(images, list(labels), sampler)
                rate = self.lr if lr is None else lr
                return self._run(images, list(labels), iterations, rate, sampler, on_progress)
        finally:
            self.acceleration = None
            for prior in self.priors:
                prior.detach()

    def describe_detection(self) -> str:
        """Return the weight and interval of the detection loss in words."""
        weight = f'{self.detection_weight:g} x'
        if self.balance:
            text = f'{weight} the gradient of the feature priors'
        else:
            text = f'{weight} the {self.detection_reduction} over the images of a batch'
        return text if self.detection_interval == 1 else f'{text}, renewed every {self.detection_interval} steps'

    @property
    def dtype(self) -> torch.dtype:
        """Data type of convolutions and linear layers on a GPU."""
        return torch.bfloat16 if self.precision == 'bf16' else torch.float32

    def _run(
        self,
        images: Tensor,
        labels: list[InstanceData],
        iterations: int,
        lr: float,
        sampler: LabelSampler | None,
        on_progress: Callable[[StepProgress], None] | None,
    ) -> SynthesisResult:
        start = time.perf_counter()
        image_size = (images.shape[2], images.shape[3])
        if images.is_cuda:
            # Convolutions and reductions on a GPU are faster in this layout.
            images = images.contiguous(memory_format=torch.channels_last)
        step = OptimizationStep(self, images, labels)
        counts = asdict(RelabelCounts())
        best_loss = torch.full((), math.inf, device=self.task.device)
        best_images = step.images.detach().clone() if self.keep == 'best' else None
        losses: dict[str, float] = {}
        for iteration in range(iterations):
            if sampler is not None and sampler.adaptive and sampler.should_relabel(iteration):
                labels, relabeled = sampler.relabel(labels, self.predict(step.images), image_size)
                counts = {key: counts[key] + number for key, number in asdict(relabeled).items()}
                if relabeled.any:
                    step.set_labels(labels)
                    if best_images is not None:
                        # The best images so far show the old labels.
                        best_images = step.images.detach().clone()
                        best_loss.fill_(math.inf)
            compares = iteration % self.keep_interval == 0
            if best_images is not None and compares:
                # The step evaluates these images and then changes them.
                before = step.images.detach().clone()
            step(lr * self.schedule(iteration, iterations))
            if best_images is not None and compares:
                total = torch.stack(list(step.losses.values())).sum()
                best_images = torch.where(total < best_loss, before, best_images)
                best_loss = torch.minimum(total, best_loss)
            done = iteration + 1
            if done % max(iterations // 20, 1) == 0 or done == iterations:
                losses = self._finite_losses(step, iteration)
                if on_progress is not None:
                    on_progress(StepProgress(done, iterations, losses, step.images.detach(), labels))
        result = step.images.detach() if best_images is None else best_images
        seconds = time.perf_counter() - start
        factors = {} if step.balance is None else step.balance.values()
        return SynthesisResult(result.clamp(0, 1), labels, losses, seconds, step.captured, counts, factors)

    def _run_without_steps(
        self, images: Tensor, labels: list[InstanceData], sampler: LabelSampler | None
    ) -> SynthesisResult:
        start = time.perf_counter()
        counts = RelabelCounts()
        if sampler is not None and sampler.adaptive:
            labels, counts = sampler.relabel(labels, self.predict(images), (images.shape[2], images.shape[3]))
        return SynthesisResult(images.clamp(0, 1), labels, {}, time.perf_counter() - start, False, asdict(counts))

    def schedule(self, iteration: int, iterations: int) -> float:
        """Return the learning rate as a fraction of the initial one: linear warm-up, then half a cosine.

        Args:
            iteration: Index of the step, from 0.
            iterations: Total number of steps.
        """
        if iteration < self.warmup:
            return (iteration + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (iteration - self.warmup) / (iterations - self.warmup)))

    def _initial_images(self, start: Tensor | None, count: int, image_size: tuple[int, int]) -> Tensor:
        """Return resized ``start`` images, or else noise, on the detector's device."""
        if start is not None:
            return F.interpolate(start, image_size, mode='bilinear', antialias=True)
        # The CPU draws the same noise for every kind of device.
        if self.init == 'uniform':
            return torch.rand(count, 3, *image_size).to(self.task.device)
        return self.task.denormalize(torch.randn(count, 3, *image_size).to(self.task.device))

    def predict(self, images: Tensor) -> list[InstanceData]:
        """Return the detector's predictions for un-augmented images, clamped to [0, 1]; the priors ignore this forward.

        Images are clamped even where the optimization does not clamp them (``paper`` preset of YOLO11): the calibration
        set stores clamped images, and labels should describe the stored images.
        """
        with ExitStack() as stack:
            for prior in self.priors:
                stack.enter_context(prior.paused())
            return self.task.predict(images.detach().clamp(0, 1))

    @staticmethod
    def _finite_losses(step: OptimizationStep, iteration: int) -> dict[str, float]:
        losses = dict(zip(step.losses, torch.stack(list(step.losses.values())).tolist(), strict=True))
        bad = [f'{name} = {value}' for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f'synthesis diverged at iteration {iteration}: {", ".join(bad)}. Lower zsq.synthesis.lr, use '
                "zsq.synthesis.precision='fp32', or check that load_from is the checkpoint of this config"
            )
        return losses
