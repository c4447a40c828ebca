# SPDX-License-Identifier: Apache-2.0
"""Training step whose forward and backward of teacher and student run as one CUDA graph.

A quantized detector launches thousands of small kernels per step, and launching them takes the host several times as
long as the GPU needs to run them. The result is the same, because the graph holds the kernels of an eager step. The
average of the gradients over processes and the optimizer step follow after the graph.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.dist import get_backend, is_distributed
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import Tensor, nn

from mmzsq.models.padded_targets import PaddedTargets

EAGER_STEPS = 3
"""Steps with one input shape until the capture. They allocate memory and choose kernels, as a capture requires. The
last of them first runs as a trial, whose effects are undone, and then as the first step of the graph."""

OPTIM_WRAPPERS = (OptimWrapper, AmpOptimWrapper)
"""Supported classes (no subclasses): their update is a backward pass, then gradient clipping and an optimizer step."""


class CapturedStep:
    """Runs the training steps of one model, as a CUDA graph from the third step with one input shape on.

    A step runs eagerly, as in MMEngine, if a graph could not represent it: on the CPU, with gradient accumulation, with
    images of another shape than the captured one, with padded images, and if the loss synchronizes with the device. On
    a GPU, the log says once that steps run as a graph, or why not. The all-reduce of the normalizers of a loss is part
    of the graph; only the NCCL backend supports that.

    Args:
        allowed: Whether to capture a graph at all.
    """

    def __init__(self, allowed: bool = True) -> None:
        self.allowed = allowed
        self._said = False
        self.eager_steps: Counter[torch.Size] = Counter()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.targets: PaddedTargets | None = None

    def release(self) -> None:
        """Free the graph and its memory. The next steps run eagerly until a new graph is captured.

        Call this before a process leaves its process group: NCCL waits for graphs that hold its collectives.
        """
        if self.graph is not None:
            self.graph.reset()
        self.graph, self.targets, self.eager_steps = None, None, Counter()
        for name in ('inputs', 'log_vars', 'parameters', 'grads'):
            vars(self).pop(name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedStep:
        # A graph is bound to the tensors of its capture.
        return type(self)(self.allowed)

    def __call__(
        self,
        model: BaseModel,
        data: dict[str, Any],
        optim_wrapper: OptimWrapper,
        obstacle: str | None = None,
        average: Callable[[nn.Module], None] | None = None,
        targets: PaddedTargets | None = None,
    ) -> dict[str, Tensor]:
        """Take one step.

        Args:
            model: The trained model.
            data: ``inputs`` (N, 3, H, W), normalized, on the device, and ``data_samples``.
            optim_wrapper: Optimizer wrapper of the model.
            obstacle: Why the loss depends on more than the pixels and ``targets``, for the log; None if it does not.
            average: Averages the gradients of the model over all processes.
            targets: Padded targets that the loss takes instead of the data samples, if it supports them.

        Returns:
            The values that MMEngine logs: each loss, and their sum as ``'loss'``.
        """
        inputs, samples = data['inputs'], data['data_samples']
        labels = samples if targets is None else targets
        obstacle = obstacle or _obstacle(inputs, samples, optim_wrapper)
        if not self.allowed or obstacle is not None:
            self.say_why(obstacle, inputs)
            log_vars = _forward_backward(model, inputs, labels, optim_wrapper)
        elif self.graph is None:
            log_vars = self._eager_or_capture(model, inputs, labels, optim_wrapper)
        elif not self._has_captured_shapes(inputs, targets):
            log_vars = _forward_backward(model, inputs, labels, optim_wrapper)
        else:
            log_vars = self._replay(inputs, targets)
        if optim_wrapper.should_update():
            if average is not None:
                average(model)
            optim_wrapper.step()
            optim_wrapper.zero_grad()
        return log_vars

    def say_why(self, obstacle: str | None, inputs: Any) -> None:
        """Log once why steps run eagerly on a GPU. On the CPU nothing else is expected.

        Args:
            obstacle: The reason as a clause; None to log nothing.
            inputs: The images of the step.
        """
        if obstacle is None or not self.allowed or self._said or not (isinstance(inputs, Tensor) and inputs.is_cuda):
            return
        self._said = True
        print_log(f'training: steps do not run as a CUDA graph, since {obstacle}', logger='current')

    def _has_captured_shapes(self, inputs: Tensor, targets: PaddedTargets | None) -> bool:
        """Return whether the shapes are those of the captured graph."""
        if inputs.shape != self.inputs.shape or inputs.dtype != self.inputs.dtype:
            return False
        return targets is None or (self.targets is not None and targets.labels.shape == self.targets.labels.shape)

    def _eager_or_capture(
        self, model: BaseModel, inputs: Tensor, labels: Sequence[Any] | PaddedTargets, optim_wrapper: OptimWrapper
    ) -> dict[str, Tensor]:
        self.eager_steps[inputs.shape] += 1
        if self.eager_steps[inputs.shape] < EAGER_STEPS:
            return _run_on_side_stream(model, inputs, labels, optim_wrapper)
        # The trial would update the statistics of BatchNorm in train mode, and draw random numbers.
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        random_state = torch.cuda.get_rng_state(inputs.device)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode('error')
        try:
            _run_on_side_stream(model, inputs, labels, optim_wrapper)
        except RuntimeError as error:
            self.allowed = False
            reason = str(error).splitlines()[0]
            warnings.warn(f'training steps run eagerly: the loss synchronizes with the device ({reason})', stacklevel=2)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        # That step was a trial: undo its effects.
        optim_wrapper.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.cuda.set_rng_state(random_state, inputs.device)
        if not self.allowed:
            return _forward_backward(model, inputs, labels, optim_wrapper)
        self.inputs = inputs.clone()
        targets = labels if isinstance(labels, PaddedTargets) else None
        self.targets = None if targets is None else PaddedTargets(*(value.clone() for value in targets))
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Threads of a data loader may use the device during the capture.
        with torch.cuda.graph(graph, capture_error_mode='thread_local'):
            self.log_vars = _forward_backward(model, self.inputs, self.targets or labels, optim_wrapper)
        self.parameters = [p for p in model.parameters() if p.grad is not None]
        self.grads = [p.grad for p in self.parameters]
        self.graph = graph
        print_log(f'training: steps on images {tuple(inputs.shape)} run as a CUDA graph from now on', logger='current')
        return self._replay(inputs, targets)

    def _replay(self, inputs: Tensor, targets: PaddedTargets | None = None) -> dict[str, Tensor]:
        assert self.graph is not None
        self.inputs.copy_(inputs)
        if targets is not None and self.targets is not None:
            for held, value in zip(self.targets, targets, strict=True):
                held.copy_(value)
        self.graph.replay()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        return {name: value.clone() for name, value in self.log_vars.items()}


def _obstacle(inputs: Any, samples: Sequence[Any], optim_wrapper: OptimWrapper) -> str | None:
    """Return why a graph cannot represent a step with these arguments, as a clause, or None."""
    if not isinstance(inputs, Tensor):
        return 'images differ in size'
    if not inputs.is_cuda:
        return 'there is no GPU'
    if type(optim_wrapper) not in OPTIM_WRAPPERS:
        return f'{type(optim_wrapper).__name__} may update weights in other ways'
    if optim_wrapper._accumulative_counts != 1:
        return 'gradients are accumulated'
    if is_distributed() and get_backend() != 'nccl':
        return 'only the NCCL backend can be part of a graph'
    if any(tuple(sample.img_shape[:2]) != tuple(inputs.shape[-2:]) for sample in samples):
        # Padding differs from batch to batch, and attention masks depend on it.
        return 'images are padded'
    return None


def _forward_backward(
    model: BaseModel, inputs: Tensor, labels: Sequence[Any] | PaddedTargets, optim_wrapper: OptimWrapper
) -> dict[str, Tensor]:
    """Run the first half of ``BaseModel.train_step`` and of ``OptimWrapper.update_params``."""
    with optim_wrapper.optim_context(model):
        losses = model(inputs, labels, mode='loss')
    total, log_vars = model.parse_losses(losses)
    optim_wrapper.backward(optim_wrapper.scale_loss(total))
    return {name: value.detach() for name, value in log_vars.items()}


def _run_on_side_stream(
    model: BaseModel, inputs: Tensor, labels: Sequence[Any] | PaddedTargets, optim_wrapper: OptimWrapper
) -> dict[str, Tensor]:
    """Run eagerly on a side stream, as a capture does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        log_vars = _forward_backward(model, inputs, labels, optim_wrapper)
    torch.cuda.current_stream().wait_stream(stream)
    return log_vars
