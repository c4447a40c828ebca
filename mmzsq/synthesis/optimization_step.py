# SPDX-License-Identifier: Apache-2.0
"""One optimization step of a batch of images, eager or replayed from CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.synthesis.acceleration import Acceleration
from mmzsq.synthesis.cutout import Cutout
from mmzsq.synthesis.gradient_balance import GradientBalance
from mmzsq.synthesis.priors import Prior

EAGER_STEPS = 3
"""Eager steps before a capture. They allocate state that a captured step must not allocate."""

MEASURE_INTERVAL = 10
"""Steps between two measurements of the gradients' norms. A measuring step has one backward more."""


class StepSettings(Protocol):
    """What a step reads of a :class:`~mmzsq.synthesis.synthesizer.Synthesizer`, and where it reports to."""

    task: Any
    priors: list[Prior]
    detection_weight: float
    detection_reduction: str
    detection_interval: int
    balance: bool
    betas: tuple[float, float]
    cutout: Cutout | None
    clamp: bool
    precision: str
    capture: bool
    acceleration: Acceleration | None
    eager_reason: str | None


class OptimizationStep:
    """One optimization step of a batch, run eagerly or replayed from a CUDA graph.

    A *joint* step computes all terms and their gradient together. If the detection loss is renewed only every few steps
    (``detection_interval``), its gradient is computed by itself, eagerly, and kept until then. The step between
    computes the priors alone. It does not read labels, so it can be captured for every detector.

    Args:
        synthesizer: Settings and detector.
        images: Initial images in [0, 1], (N, 3, H, W). Changed in place.
        labels: Labels of each image.
    """

    def __init__(self, synthesizer: StepSettings, images: Tensor, labels: list[InstanceData]) -> None:
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
        self.names = _names(synthesizer.priors)
        self.balance: GradientBalance | None = None
        if synthesizer.balance:
            weights = {'detection': synthesizer.detection_weight}
            weights |= {
                name: prior.weight for name, prior in self.names.items() if not prior.is_feature_prior and prior.weight
            }
            self.balance = GradientBalance(weights, images.device)
        self.interval = synthesizer.detection_interval
        if self.interval > 1:
            self.kept_gradient = torch.zeros_like(images)
            self.kept_loss = torch.zeros((), device=images.device)
        self.iteration = 0
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self.eager_steps = 0
        self.may_capture = on_cuda and synthesizer.capture and synthesizer.eager_reason is None
        # All eager steps share one stream, because memory freed on a stream is reused on that stream only.
        self.side_stream = torch.cuda.Stream() if self.may_capture else None
        self.set_labels(labels)

    @property
    def captured(self) -> bool:
        """Whether steps are currently replayed from a CUDA graph."""
        return bool(self.graphs)

    def set_labels(self, labels: list[InstanceData]) -> None:
        """Replace the labels; images and optimizer state are kept, and so is a captured graph if it can be."""
        self.renew = True
        if self.samples is not None and self.task.update_samples(self.samples, labels, self.size):
            return
        self.samples = self.task.data_samples(labels, self.size)
        if self.interval == 1:
            self.graphs = {}
            self.eager_steps = 0

    def __call__(self, lr: float) -> None:
        """Take one step at learning rate ``lr``."""
        renews = self.interval > 1 and (self.renew or self.iteration % self.interval == 0)
        if renews:
            self._on_side_stream(self._renew_detection)
            self.renew = False
        measures = self.balance is not None and (
            renews if self.interval > 1 else self.iteration % MEASURE_INTERVAL == 0
        )
        self.iteration += 1
        if not self.images.is_cuda:
            self.optimizer.param_groups[0]['lr'] = lr
            self._compute(measures)
            return
        self.lr.fill_(lr)
        if measures in self.graphs:
            self.graphs[measures].replay()
        elif self.may_capture and self.eager_steps >= EAGER_STEPS:
            self._step_and_capture(measures)
        else:
            self._eager(measures)

    def _on_side_stream(self, compute: Any, *args: Any) -> None:
        if self.side_stream is None:
            compute(*args)
            return
        self.side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side_stream):
            compute(*args)
        torch.cuda.current_stream().wait_stream(self.side_stream)

    def _eager(self, measures: bool) -> None:
        self._on_side_stream(self._compute, measures)
        self.eager_steps += 1

    def _step_and_capture(self, measures: bool) -> None:
        """Run one step with synchronization forbidden, then capture it; record the reason if that fails."""
        mode = torch.cuda.get_sync_debug_mode()
        random = _random_states(self.images.device)
        torch.cuda.set_sync_debug_mode('error')
        try:
            self._eager(measures)
        except RuntimeError as error:
            self.may_capture = False
            self.synthesizer.eager_reason = str(error).splitlines()[0]
            what = 'the detection loss' if self.interval == 1 else 'the network'
            warnings.warn(
                f'synthesis runs eagerly: {what} synchronizes with the device ({self.synthesizer.eager_reason})',
                stacklevel=2,
            )
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        if not self.may_capture:
            # Repeat the step with the same random numbers; the priors drop the features of the failed attempt.
            _set_random_states(random)
            for prior in self.synthesizer.priors:
                prior.reset()
            self._eager(measures)
            return
        self.optimizer.zero_grad(set_to_none=True)
        # A graph uses a memory pool of its own, so release the cached memory of the eager steps.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # The graphs run one after the other and keep nothing between them but the losses, so they share memory.
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self._compute(measures)
        self.graphs[measures] = graph

    def _inputs(self) -> Tensor:
        """Return the images as the network sees them, with a rectangle erased where cutout does so."""
        cutout = self.synthesizer.cutout
        return self.images if cutout is None else cutout(self.images)

    def _detection_loss(self) -> Tensor:
        options = self.synthesizer
        inputs = self._inputs()
        precision = self.task.loss_precision
        before = precision.fp32_reason
        with self._accelerated():
            detection = self.task.loss(inputs, self.samples)
        if precision.fp32_reason != before:
            # The task has computed the loss again in fp32. The priors have seen both forwards.
            for prior in options.priors:
                prior.reset()
            with self._accelerated():
                detection = self.task.loss(inputs, self.samples)
        if self.balance is not None:
            return detection.float()
        scale = len(self.images) if options.detection_reduction == 'sum' else 1
        return options.detection_weight * scale * detection.float()

    def _renew_detection(self) -> None:
        """Compute the detection loss and its gradient, and keep both. The priors ignore this forward."""
        with ExitStack() as stack:
            for prior in self.synthesizer.priors:
                stack.enter_context(prior.paused())
            loss = self._detection_loss()
        (gradient,) = torch.autograd.grad(loss, self.images)
        # A loss may be finite and its gradient not, for boxes without an area for instance. Such a gradient is left
        # out, because its values would stay in the images for ever. A loss that is not finite ends the run.
        finite = gradient.isfinite().all()
        self.kept_gradient.copy_(torch.where(finite, gradient, 0))
        self.kept_loss.copy_(loss.detach())

    def _compute(self, measures: bool = False) -> None:
        options = self.synthesizer
        self.optimizer.zero_grad(set_to_none=True)
        if self.interval > 1:
            losses = {'detection': self.kept_loss} | self._prior_losses(observe=True)
            self._keep_losses(losses)
            self._set_gradient(losses, self.kept_gradient, measures)
        else:
            losses = {'detection': self._detection_loss()} | self._prior_losses(observe=False)
            self._keep_losses(losses)
            if self.balance is None:
                torch.stack(list(losses.values())).sum().backward()
            elif measures:
                self._set_gradient(losses, None, measures)
            else:
                scaled = [
                    loss * self.balance.factor(name) if name in self.balance else loss for name, loss in losses.items()
                ]
                torch.stack(scaled).sum().backward()
        self.optimizer.step()
        if options.clamp:
            with torch.no_grad():
                self.images.clamp_(0, 1)

    def _prior_losses(self, observe: bool) -> dict[str, Tensor]:
        """Return the priors' terms; with ``observe``, first show the network's layers to the feature priors."""
        if observe and any(prior.is_feature_prior for prior in self.synthesizer.priors):
            inputs = self._inputs()
            with self._accelerated():
                self.task.run_network(inputs)
        return {name: prior(self.images) for name, prior in self.names.items()}

    def _keep_losses(self, losses: Mapping[str, Tensor]) -> None:
        if not self.losses:
            self.losses = {name: loss.detach().clone() for name, loss in losses.items()}
        # Both graphs write to the same tensors.
        for name, loss in losses.items():
            self.losses[name].copy_(loss.detach())

    def _set_gradient(self, losses: Mapping[str, Tensor], detection: Tensor | None, measures: bool) -> None:
        """Set the images' gradient to the sum of the terms' scaled gradients.

        Args:
            losses: All terms.
            detection: Gradient of the detection loss; None: compute it from ``losses``.
            measures: Whether to measure the gradients and update the factors first.
        """
        features = [losses[name] for name, prior in self.names.items() if prior.is_feature_prior]
        gradients: dict[str, Tensor] = {}
        for name, prior in self.names.items():
            if not prior.is_feature_prior and prior.weight:
                (gradients[name],) = torch.autograd.grad(losses[name], self.images)
        total: Tensor | None = None
        if features:
            (total,) = torch.autograd.grad(torch.stack(features).sum(), self.images, retain_graph=detection is None)
        if detection is None:
            (detection,) = torch.autograd.grad(losses['detection'], self.images)
        gradients['detection'] = detection
        if self.balance is not None and measures:
            # Without a feature prior, the detection loss is the reference of the image priors.
            self.balance.measure(detection if total is None else total, gradients)
        with torch.no_grad():
            # In the memory layout of the images, as the fused optimizer requires.
            gradient = torch.zeros_like(self.images)
            if total is not None:
                gradient += total
            for name, term in gradients.items():
                gradient += term if self.balance is None else self.balance.factor(name) * term
            self.images.grad = gradient

    @contextmanager
    def _accelerated(self) -> Iterator[None]:
        acceleration = self.synthesizer.acceleration
        with nullcontext() if acceleration is None else acceleration():
            if self.images.is_cuda and self.synthesizer.precision == 'bf16':
                # The cache of cast weights would be filled inside a captured step and freed outside of it.
                with torch.autocast('cuda', torch.bfloat16, cache_enabled=False):
                    yield
            else:
                yield


def _names(priors: list[Prior]) -> dict[str, Prior]:
    """Name the priors by their classes; a second one of a class gets the suffix ``_2``."""
    names: dict[str, Prior] = {}
    for prior in priors:
        name = type(prior).__name__
        count = sum(known.partition('_')[0] == name for known in names)
        names[f'{name}_{count + 1}' if count else name] = prior
    return names


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the random state of the CPU, and that of ``device`` if it is a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == 'cuda' else None


def _set_random_states(states: tuple[Tensor, Tensor | None]) -> None:
    cpu_state, device_state = states
    torch.set_rng_state(cpu_state)
    if device_state is not None:
        torch.cuda.set_rng_state(device_state)
