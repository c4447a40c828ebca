# SPDX-License-Identifier: Apache-2.0
"""One batch of synthetic images: noise, optimized until a detector sees the labels in it and its priors agree.

    L(x) = detection_weight * L_det(x, labels) + sum_p prior_p(x)

(the paper's eq. 1-3; DeepInversion, Yin et al. 2020, for a detector). On a GPU the whole step, from erasing a rectangle
to clamping the pixels, is captured into one CUDA graph when the detector's loss never waits for the device.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
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
from mmzsq.synthesis.priors import Prior

EAGER_STEPS = 3
"""Steps run eagerly before a capture: they allocate what a captured step must find in place."""


class Task(Protocol):
    """What synthesis needs of a detector; see :class:`mmzsq.tasks.DetectionTask`."""

    detector: nn.Module
    num_classes: int
    needs_masks: bool
    channel_order: str

    @property
    def device(self) -> torch.device:
        """Where the detector is."""

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> Any:
        """Labels in the form that :meth:`loss` takes."""

    def update_samples(self, samples: Any, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> bool:
        """Put other labels into ``samples`` in place, if they fit; return whether they did."""

    def loss(self, images: Tensor, samples: Any) -> Tensor:
        """The detector's training loss for images in [0, 1], a scalar."""

    def predict(self, images: Tensor) -> list[InstanceData]:
        """What the detector finds in images in [0, 1]."""

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Images in [0, 1] of what the network takes; the inverse of the detector's normalization."""

    def label_prior(self) -> LabelPrior:
        """What the detector's weights tell of the labels that it was trained on."""


@dataclass(frozen=True)
class StepProgress:
    """Where one batch stands; handed to a caller's ``on_progress`` about twenty times a batch.

    Attributes:
        iteration: Steps done.
        iterations: Steps in all.
        losses: The latest value of each weighted term.
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
        captured: Whether the steps ran as a CUDA graph.
        counts: What relabeling did: ``added`` and ``removed`` boxes.
    """

    images: Tensor
    labels: list[InstanceData]
    losses: dict[str, float]
    seconds: float
    captured: bool
    counts: dict[str, int] = field(default_factory=dict)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's default generators of the CPU and ``device``; the state before comes back at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(seed)
        yield


class Synthesizer:
    """Optimizes batches of images for a detector.

    Args:
        task: The frozen detector.
        priors: Penalties added to the detection loss.
        detection_weight: Weight of the detection loss.
        detection_reduction: ``'sum'`` multiplies the detector's loss, a mean over images, by their number (the paper's
            code); ``'mean'`` leaves it.
        lr: Learning rate of Adam, falling to 0 along a cosine.
        warmup: Steps in which the learning rate rises evenly from 0 to ``lr``, before it falls.
        init: The start: ``'uniform'`` noise in [0, 1], or ``'normal'`` noise of mean 0 and deviation 1 in what the
            network takes.
        betas: Adam's.
        cutout: Arguments of :class:`~mmzsq.synthesis.cutout.Cutout`, or None for no erasing.
        clamp: Whether pixels are clamped to [0, 1] after each step.
        keep: ``'last'`` image, or ``'best'``: that of the lowest total loss among the steps looked at.
        keep_interval: Steps between two looks, for ``keep='best'``.
        precision: ``'fp32'`` or ``'bf16'`` (autocast; CUDA only, the CPU always computes in fp32).
        capture: Whether to capture the step into a CUDA graph where that is possible.
    """

    def __init__(
        self,
        task: Task,
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
        self.eager_reason: str | None = None
        self.layers: Acceleration | None = None

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
            labels: One entry an image, ``bboxes`` xyxy in pixels of images of ``image_size``.
            image_size: Height and width in pixels.
            iterations: Steps; after none, the images are what they started from, and labels are corrected once.
            seed: Fixes noise and erasing: the same seed gives the same bits on the same device.
            start: Images in [0, 1], (N, 3, any height, any width), to start from, resized; None: fresh noise.
            lr: Learning rate in place of the synthesizer's own.
            sampler: If given and adaptive, corrects the labels by the detector's predictions on the way.
            on_progress: Called about twenty times; never, without steps.

        Raises:
            UserError: If the loss stops being finite.
        """
        device = self.task.device
        fast = device.type == 'cuda' and fused_kernels_enabled()
        self.layers = Acceleration(self.task.detector, self.dtype) if fast else None
        for prior in self.priors:
            prior.attach(self.task.detector)
        try:
            with seeded(seed, device):
                images = self._start(start, len(labels), image_size)
                if iterations == 0:
                    return self._untouched(images, list(labels), sampler)
                rate = self.lr if lr is None else lr
                return self._run(images, list(labels), iterations, rate, sampler, on_progress)
        finally:
            self.layers = None
            for prior in self.priors:
                prior.detach()

    @property
    def dtype(self) -> torch.dtype:
        """What convolutions compute in, on a GPU."""
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
            # The layout of the fast convolutions and reductions on a GPU.
            images = images.contiguous(memory_format=torch.channels_last)
        step = _Step(self, images, labels)
        counts = asdict(RelabelCounts())
        best_loss = torch.full((), math.inf, device=self.task.device)
        best_images = step.images.detach().clone() if self.keep == 'best' else None
        for iteration in range(iterations):
            if sampler is not None and sampler.adaptive and sampler.due(iteration):
                labels, relabeled = sampler.relabel(labels, self.predict(step.images), image_size)
                counts = {key: counts[key] + number for key, number in asdict(relabeled).items()}
                if relabeled.any:
                    step.set_labels(labels)
                    if best_images is not None:
                        # What showed the labels of before best does not show these.
                        best_images = step.images.detach().clone()
                        best_loss.fill_(math.inf)
            if best_images is not None and iteration % self.keep_interval == 0:
                before = step.images.detach().clone()
            step(lr * self.schedule(iteration, iterations))
            if best_images is not None and iteration % self.keep_interval == 0:
                total = torch.stack(list(step.losses.values())).sum()
                best_images = torch.where(total < best_loss, before, best_images)
                best_loss = torch.minimum(total, best_loss)
            if (iteration + 1) % max(iterations // 20, 1) == 0:
                losses = self._finite_losses(step, iteration)
                if on_progress is not None:
                    on_progress(StepProgress(iteration + 1, iterations, losses, step.images.detach(), labels))
        result = step.images.detach() if best_images is None else best_images
        losses = self._finite_losses(step, iterations)
        seconds = time.perf_counter() - start
        return SynthesisResult(result.clamp(0, 1), labels, losses, seconds, step.captured, counts)

    def _untouched(self, images: Tensor, labels: list[InstanceData], sampler: LabelSampler | None) -> SynthesisResult:
        start = time.perf_counter()
        counts = RelabelCounts()
        if sampler is not None and sampler.adaptive:
            labels, counts = sampler.relabel(labels, self.predict(images), (images.shape[2], images.shape[3]))
        return SynthesisResult(images.clamp(0, 1), labels, {}, time.perf_counter() - start, False, asdict(counts))

    def schedule(self, iteration: int, iterations: int) -> float:
        """Share of the learning rate at step ``iteration`` (from 0) of ``iterations``: warm-up, then a half cosine."""
        if iteration < self.warmup:
            return (iteration + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (iteration - self.warmup) / (iterations - self.warmup)))

    def _start(self, start: Tensor | None, count: int, image_size: tuple[int, int]) -> Tensor:
        """What the images start from, on the detector's device."""
        if start is not None:
            return F.interpolate(start, image_size, mode='bilinear', antialias=True)
        # Noise is drawn on the CPU: the same on every kind of device.
        if self.init == 'uniform':
            return torch.rand(count, 3, *image_size).to(self.task.device)
        return self.task.denormalize(torch.randn(count, 3, *image_size).to(self.task.device))

    def predict(self, images: Tensor) -> list[InstanceData]:
        """What the detector finds in images in [0, 1] as they are, un-augmented; leaves no trace in the priors."""
        with ExitStack() as stack:
            for prior in self.priors:
                stack.enter_context(prior.paused())
            return self.task.predict(images.detach().clamp(0, 1))

    @staticmethod
    def _finite_losses(step: _Step, iteration: int) -> dict[str, float]:
        losses = dict(zip(step.losses, torch.stack(list(step.losses.values())).tolist(), strict=True))
        bad = [f'{name} = {value}' for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f'synthesis diverged at iteration {iteration}: {", ".join(bad)}. Lower zsq.synthesis.lr, use '
                "zsq.synthesis.precision='fp32', or check that load_from is the checkpoint of this config"
            )
        return losses


class _Step:
    """One optimization step over a batch; eager, or a replayed CUDA graph."""

    def __init__(self, synthesizer: Synthesizer, images: Tensor, labels: list[InstanceData]) -> None:
        self.synthesizer = synthesizer
        self.task = synthesizer.task
        self.images = images.requires_grad_()
        self.size = (images.shape[2], images.shape[3])
        self.losses: dict[str, Tensor] = {}
        self.samples: Any = None
        on_cuda = images.is_cuda
        self.lr = torch.zeros((), device=images.device)
        self.optimizer = torch.optim.Adam(
            [self.images],
            lr=self.lr if on_cuda else 0.0,
            betas=synthesizer.betas,
            capturable=on_cuda,
            fused=on_cuda,
        )
        self.may_capture = on_cuda and synthesizer.capture and synthesizer.eager_reason is None
        # One for all eager steps: memory freed on a stream serves that stream alone.
        self.side_stream = torch.cuda.Stream() if self.may_capture else None
        self.set_labels(labels)

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a CUDA graph now."""
        return self.graph is not None

    def set_labels(self, labels: list[InstanceData]) -> None:
        """Change what the detector is to see; images, moments and learning rate carry on, and a graph if it can."""
        if self.samples is not None and self.task.update_samples(self.samples, labels, self.size):
            return
        self.samples = self.task.data_samples(labels, self.size)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0

    def __call__(self, lr: float) -> None:
        """Take one step at learning rate ``lr``."""
        if not self.images.is_cuda:
            self.optimizer.param_groups[0]['lr'] = lr
            self._compute()
            return
        self.lr.fill_(lr)
        if self.graph is not None:
            self.graph.replay()
        elif self.may_capture and self.eager_steps >= EAGER_STEPS:
            self._step_and_capture()
        else:
            self._eager()

    def _eager(self) -> None:
        stream = torch.cuda.current_stream() if self.side_stream is None else self.side_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.eager_steps += 1

    def _step_and_capture(self) -> None:
        """Take one step that may not wait for the device, then capture it; or note why it cannot be."""
        mode = torch.cuda.get_sync_debug_mode()
        random = _random_states(self.images.device)
        torch.cuda.set_sync_debug_mode('error')
        try:
            self._eager()
        except RuntimeError as error:
            self.may_capture = False
            self.synthesizer.eager_reason = str(error).splitlines()[0]
            warnings.warn(
                f'synthesis runs eagerly: the detection loss waits for the device ({self.synthesizer.eager_reason})',
                stacklevel=2,
            )
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        if not self.may_capture:
            # The step is taken again: with the same random numbers, and features are seen once.
            _set_random_states(random)
            for prior in self.synthesizer.priors:
                prior.forget()
            self._eager()
            return
        self.optimizer.zero_grad(set_to_none=True)
        # A graph has memory of its own: that of the eager steps would stay beside it.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute()
        self.graph = graph

    def _compute(self) -> None:
        options = self.synthesizer
        self.optimizer.zero_grad(set_to_none=True)
        seen = options.cutout(self.images) if options.cutout is not None else self.images
        with self._fast_network():
            detection = self.task.loss(seen, self.samples)
        scale = len(self.images) if options.detection_reduction == 'sum' else 1
        losses = {'detection': options.detection_weight * scale * detection.float()}
        for prior in options.priors:
            name = type(prior).__name__
            count = sum(known.partition('_')[0] == name for known in losses)
            losses[f'{name}_{count + 1}' if count else name] = prior(self.images)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        self.optimizer.step()
        if options.clamp:
            with torch.no_grad():
                self.images.clamp_(0, 1)
        self.losses = {name: loss.detach() for name, loss in losses.items()}

    @contextmanager
    def _fast_network(self) -> Iterator[None]:
        layers = self.synthesizer.layers
        with nullcontext() if layers is None else layers():
            if self.images.is_cuda and self.synthesizer.precision == 'bf16':
                # The cache of weights cast to bf16 would be filled inside a captured step and freed outside of it.
                with torch.autocast('cuda', torch.bfloat16, cache_enabled=False):
                    yield
            else:
                yield


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the CPU, and of ``device`` if that is another."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == 'cuda' else None


def _set_random_states(states: tuple[Tensor, Tensor | None]) -> None:
    of_cpu, of_device = states
    torch.set_rng_state(of_cpu)
    if of_device is not None:
        torch.cuda.set_rng_state(of_device)
