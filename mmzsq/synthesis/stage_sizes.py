# SPDX-License-Identifier: Apache-2.0
"""Image sizes and batches of the stages of synthesis that a config leaves open.

* The size of ``synthesize`` is that of the detector's test pipeline. A pipeline that keeps the aspect ratio makes
  images of many sizes. A square with as many pixels takes their place, with sides of at most :data:`LARGEST_SQUARE`
  pixels, because the cost of synthesis grows with the pixels.
* ``relabel`` takes the smallest size that the network and its head accept, from a quarter of the full size on, but at
  least :data:`SMALLEST_COARSE`. A trial forward with the detection loss and a prediction decides.
* ``refine`` lies between both, as the geometric mean.
* Batches are halved until a trial step fits into the memory of the GPU (``zsq.synthesis.fit_batches``).

A set on disk remembers these choices, since another machine may choose differently: :func:`choose_stages` takes them
from there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import nn

from mmzsq.errors import UserError
from mmzsq.pipelines import frame_of
from mmzsq.synthesis.default_sizes import DEFAULT_SIZE, SIZE_MULTIPLE, coarse_sizes, complete_sizes, stages_of
from mmzsq.synthesis.generator import CalibrationSetGenerator
from mmzsq.synthesis.label_samplers import fit_masks
from mmzsq.synthesis.synthesizer import SynthesisTask, seeded

LARGEST_SQUARE = 640
"""Side in pixels of the square for a pipeline that keeps the aspect ratio, at most."""

MEMORY_SHARE = 0.85
"""Share of the free memory of a GPU that a trial step may take. Capturing a step needs some memory on top."""

TRIAL_STEPS = 2


def choose_stages(
    task: SynthesisTask,
    synthesis: Mapping[str, Any],
    label_sampler: Mapping[str, Any],
    batch_size: int,
    seed: int,
    pipeline: Sequence[Mapping[str, Any]],
    known: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Choose what the section ``zsq.synthesis`` leaves open.

    Args:
        task: The frozen detector.
        synthesis: The section.
        label_sampler: The section ``zsq.label_sampler``.
        batch_size: Default batch size of a stage.
        seed: Seed of the set.
        pipeline: The test pipeline of the detector's config; may be empty.
        known: The completed section of a set that exists. Its sizes of coarse stages and its batches are taken.

    Returns:
        The section with a size and a batch size for each stage, without ``fit_batches``; and one line for each stage
        that says what was chosen and why.

    Raises:
        UserError: If the section is invalid, or the detector's loss needs a package that is not installed.
    """
    chosen = copy.deepcopy(dict(synthesis))
    fits_batches = chosen.pop('fit_batches', False)
    full, reason = full_size(chosen, task.detector, pipeline)
    if known is not None:
        chosen = complete_sizes(_adopt(chosen, known, batch_size, fits_batches), full)
        return chosen, _lines(chosen, synthesis, reason, 'as in the set', batch_size)
    coarse, coarse_reason = None, ''
    if any(stage.get('image_size') is None for name, stage in stages_of(chosen) if name == 'relabel'):
        coarse, coarse_reason = _coarse_size(task, full)
    chosen = complete_sizes(chosen, full, coarse)
    for (name, stage), (_, asked) in zip(stages_of(chosen), stages_of(synthesis), strict=True):
        open_size = name == 'refine' and asked.get('image_size') is None
        if open_size and tuple(stage['image_size']) not in (full, coarse) and not accepts(task, stage['image_size']):
            stage['image_size'] = list(full)
    if fits_batches and task.device.type == 'cuda':
        generator = CalibrationSetGenerator(task, chosen, dict(label_sampler), batch_size, seed)
        batches = _fitting_batches(generator)
        for name, stage in stages_of(chosen):
            configured = stage.get('batch_size') or batch_size
            stage['batch_size'] = min(configured, batches.get((name, configured), configured))
    return chosen, _lines(chosen, synthesis, reason, coarse_reason, batch_size)


def fitting_batch(batch_size: int, step: Callable[[int], None]) -> int:
    """Halve a batch until a step with it fits into memory.

    Args:
        batch_size: The first batch to try.
        step: Takes a step with a batch; raises ``torch.cuda.OutOfMemoryError`` if it does not fit.

    Returns:
        The largest fitting batch; 1 if none fits.
    """
    while batch_size > 1:
        try:
            step(batch_size)
        except torch.cuda.OutOfMemoryError:
            batch_size //= 2
            continue
        return batch_size
    return 1


def accepts(task: SynthesisTask, size: Sequence[int]) -> bool:
    """Return whether the detector computes a finite loss, and predicts, for images of a size.

    The state of all random generators is kept.

    Args:
        task: The frozen detector.
        size: Height and width in pixels.

    Raises:
        UserError: If the loss needs a package that is not installed.
    """
    height, width = size
    size = (height, width)
    box = torch.tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]])
    labels = [InstanceData(bboxes=box, labels=torch.zeros(1, dtype=torch.long))]
    with seeded(0, task.device), torch.no_grad():
        images = torch.rand(len(labels), 3, *size).to(task.device)
        try:
            samples = task.data_samples(fit_masks(labels, size, task.needs_masks), size)
            loss = task.loss(images, samples)
            task.predict(images)
        except (UserError, torch.cuda.OutOfMemoryError):
            raise
        except Exception:
            # Feature maps of no pixels fail in many ways, in any layer of any head.
            return False
    return bool(loss.isfinite())


def full_size(
    synthesis: Mapping[str, Any], detector: nn.Module, pipeline: Sequence[Mapping[str, Any]]
) -> tuple[tuple[int, int], str]:
    """Return height and width of the finished images, in pixels, and the reason for them.

    Args:
        synthesis: The section ``zsq.synthesis``.
        detector: The teacher.
        pipeline: The test pipeline of its config; may be empty.
    """
    given = synthesis['synthesize'].get('image_size')
    if given is not None:
        return ((given, given) if isinstance(given, int) else tuple(given)), 'as set'
    frame = frame_of(pipeline, _divisor(detector))
    if frame is None:
        return (DEFAULT_SIZE, DEFAULT_SIZE), 'since the test pipeline fixes no size'
    if frame.fixed:
        return (frame.height, frame.width), 'from the test pipeline'
    side = math.sqrt(frame.height * frame.width)
    multiple = max(SIZE_MULTIPLE, _divisor(detector))
    rounded = max(round(min(side, LARGEST_SQUARE) / multiple), 1) * multiple
    scale = f'{max(frame[:2])}x{min(frame[:2])}, keeps the aspect ratio'
    if side > LARGEST_SQUARE:
        return (rounded, rounded), f'for speed; the test pipeline ({scale}) makes larger images'
    return (rounded, rounded), f'about the pixels of the test pipeline ({scale})'


def _divisor(detector: nn.Module) -> int:
    return int(getattr(detector.data_preprocessor, 'pad_size_divisor', 1) or 1)


def _coarse_size(task: SynthesisTask, full: tuple[int, int]) -> tuple[tuple[int, int], str]:
    candidates = list(coarse_sizes(full, max(SIZE_MULTIPLE, _divisor(task.detector))))
    for size in candidates[:-1]:
        if accepts(task, size):
            grown = size != candidates[0]
            return size, 'the smallest size that the detector takes' if grown else 'a coarse view'
    return full, 'the full size, since the detector takes no smaller one'


def _adopt(synthesis: dict[str, Any], known: Mapping[str, Any], batch_size: int, fits_batches: bool) -> dict[str, Any]:
    """Fill the open sizes of coarse stages, and batches, with those of an existing set."""
    own, other = list(stages_of(synthesis)), list(stages_of(known))
    if [name for name, _ in own] != [name for name, _ in other]:
        # Other settings, which opening the set reports.
        return synthesis
    for (name, stage), (_, of_set) in zip(own, other, strict=True):
        if stage.get('image_size') is None and name != 'synthesize':
            stage['image_size'] = of_set.get('image_size')
        configured, found = stage.get('batch_size') or batch_size, of_set.get('batch_size')
        if fits_batches and isinstance(found, int) and found in _halves(configured):
            stage['batch_size'] = found
    return synthesis


def _halves(batch_size: int) -> Iterator[int]:
    while batch_size:
        yield batch_size
        batch_size //= 2


def _fitting_batches(generator: CalibrationSetGenerator) -> dict[tuple[str, int], int]:
    """Return the fitting batch of each stage, by name and configured batch."""
    found: dict[tuple[str, int], int] = {}
    for stage in generator.stages:

        def step(count: int, size: tuple[int, int] = stage.image_size) -> None:
            _trial_step(generator, size, count)

        key = stage.name, stage.batch_size
        found[key] = min(fitting_batch(stage.batch_size, step), found.get(key, stage.batch_size))
    torch.cuda.empty_cache()
    return found


def _trial_step(generator: CalibrationSetGenerator, size: tuple[int, int], count: int) -> None:
    """Take two steps and predict; raise ``OutOfMemoryError`` if that takes nearly all of the memory."""
    device = generator.task.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    labels = generator.sampler.sample(count, size, generator.task.num_classes, torch.Generator().manual_seed(0))
    labels = fit_masks(labels, size, generator.task.needs_masks)
    images = generator.synthesizer.run(labels, size, TRIAL_STEPS, seed=0).images
    generator.synthesizer.predict(images)
    if torch.cuda.max_memory_reserved(device) > MEMORY_SHARE * available:
        raise torch.cuda.OutOfMemoryError(f'{count} images of {size} take nearly all of the memory')


def _lines(
    synthesis: Mapping[str, Any], given: Mapping[str, Any], full_reason: str, coarse_reason: str, batch_size: int
) -> list[str]:
    reasons = dict(relabel=coarse_reason, refine='between both', synthesize=full_reason)
    lines = []
    for (name, stage), (_, asked) in zip(stages_of(synthesis), stages_of(given), strict=True):
        size = stage['image_size']
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shown = f'{size:g} of the full size' if isinstance(size, float) else f'{height}x{width} px'
        reason = reasons[name] if asked.get('image_size') is None else 'as set'
        batch = stage.get('batch_size') or batch_size
        lines.append(f'stage {name}: {shown} ({reason}), {stage["iterations"]} iterations, batches of {batch}')
    return lines
