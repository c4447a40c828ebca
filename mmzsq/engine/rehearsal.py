# SPDX-License-Identifier: Apache-2.0
"""Rehearsal of a run: all stages at toy size, what they exercised, and an estimate for the whole run.

``python -m mmzsq.train CONFIG --rehearse`` calls :func:`rehearse`. It writes to ``WORK_DIR/rehearsal`` alone. Images,
steps and evaluation are those of :mod:`mmzsq.config.rehearsal`. The estimate measures trial steps at the sizes and
batches of the run, as the dry run does (:mod:`mmzsq.engine.forecast`).
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config

from mmzsq.atomic_files import to_json, write_atomically
from mmzsq.checkpoint import describe_error
from mmzsq.config import compose
from mmzsq.config.rehearsal import EVALUATION_IMAGES, rehearsal_config
from mmzsq.engine.console import duration
from mmzsq.engine.forecast import StepCost, cost_lines, stage_cost, train_cost
from mmzsq.engine.hooks.calibration_set_hook import CalibrationSetHook, Source
from mmzsq.engine.report import RESULTS_FILE
from mmzsq.errors import UserError
from mmzsq.pipelines import pipeline_of
from mmzsq.registry import HOOKS
from mmzsq.synthesis.default_sizes import SIZE_MULTIPLE, stages_of
from mmzsq.synthesis.label_samplers import rescale_labels
from mmzsq.synthesis.stage_sizes import accepts, full_size
from mmzsq.tasks import build_detection_task
from mmzsq.visualization.gallery import load_labeled_images

REPORT_FILE = 'rehearsal.json'
EXPORTED_FILE = 'student.onnx'

SHORT_SIDES = (160, 256, 384, 512)
"""Shorter sides of the finished images to try, in pixels."""

COARSE_SIDES = dict(relabel=96, refine=128)
"""Shorter sides of the images of earlier stages, in pixels, if the detector takes them."""

MEASURED_LAYERS = 2
"""Layers that bit allocation measures."""

SHOWN_AS_ZERO = 5e-5
"""Losses below this are 0.0000 in MMEngine's log."""

RAN, NOT_RUN, FAILED = 'ran', 'not run', 'failed'


@dataclass(frozen=True)
class Check:
    """One part of a run.

    Attributes:
        name: Name of the part.
        status: ``'ran'``, ``'not run'`` or ``'failed'``.
        detail: What ran, or why it did not.
    """

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Rehearsal:
    """Result of a rehearsal.

    Attributes:
        folder: Folder with everything that it wrote.
        seconds: Time that it took.
        checks: Parts of the run, in order.
        num_images: Images of the whole run.
        costs: Cost of each stage of synthesis and of training in the whole run.
        no_estimate: Why ``costs`` is not complete, or None.
        not_evaluated: Message about an evaluation that failed, or None.
    """

    folder: Path
    seconds: float
    checks: tuple[Check, ...]
    num_images: int
    costs: tuple[StepCost, ...]
    no_estimate: str | None
    not_evaluated: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dict(
            seconds=round(self.seconds, 1),
            checks=[asdict(check) for check in self.checks],
            estimate=dict(
                num_images=self.num_images, costs=[asdict(cost) for cost in self.costs], problem=self.no_estimate
            ),
            not_evaluated=self.not_evaluated,
        )

    def summary(self) -> str:
        """Return the result as lines of text."""
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} thread(s)'
        )
        lines = [f'rehearsal: {duration(self.seconds)}, all files in {self.folder}. Its accuracy means nothing.']
        width = max(len(check.name) for check in self.checks)
        for status in (RAN, NOT_RUN, FAILED):
            lines += [
                f'  {status:<7}  {check.name:<{width}}  {check.detail}'
                for check in self.checks
                if check.status == status
            ]
        lines.append('not part of a rehearsal: several processes, --resume, accuracy, and the health of the images')
        lines.append(f'estimate for the whole run on this device ({device}):')
        lines += [f'  {line}' for line in (cost_lines(self.costs, self.num_images) if self.costs else [])]
        if self.no_estimate is not None:
            lines.append(f'  {self.no_estimate}')
        return '\n'.join(lines)


def rehearse(cfg: Config, build: Callable[[Config], Any]) -> Rehearsal:
    """Run all stages of a config at toy size in ``WORK_DIR/rehearsal``, and log what they exercised.

    Args:
        cfg: A detector's config with a ``zsq`` section. It is not changed.
        build: Builds a :class:`~mmzsq.engine.ZeroShotRunner` from a config.

    Returns:
        The result, which is also written to ``rehearsal.json``.

    Raises:
        UserError: If the config has a mistake that the run would meet, or cannot be rehearsed.
    """
    start = time.perf_counter()
    small = rehearsal_config(cfg)
    whole = compose(cfg)
    folder = Path(small.work_dir)
    # An earlier rehearsal may have had other settings.
    shutil.rmtree(small.zsq.calibration_set.dir, ignore_errors=True)
    (folder / REPORT_FILE).unlink(missing_ok=True)
    runner = build(small)
    hook = next(hook for hook in runner.hooks if isinstance(hook, CalibrationSetHook))
    hook.measures_health = False
    _choose_sizes(runner, hook, whole.zsq.synthesis)
    runner.measured_layers = MEASURED_LAYERS
    runner.train()
    source = _whole_hook(whole).build_source(runner, runner.detector.load_teacher())
    costs, no_estimate = _estimate(runner, hook, source, whole.zsq)
    checks = (*_checks_of_run(runner, hook, source, whole.zsq), _graph_check(source, costs), _export_check(runner))
    num_images = whole.zsq.calibration_set.num_images
    seconds = time.perf_counter() - start
    made = Rehearsal(folder, seconds, checks, num_images, costs, no_estimate, runner.not_evaluated)
    write_atomically(folder / REPORT_FILE, to_json(made.to_dict(), indent=1))
    runner.logger.info(made.summary())
    return made


def _whole_hook(whole: Config) -> CalibrationSetHook:
    [section] = [hook for hook in whole.custom_hooks if hook['type'] == 'mmzsq.CalibrationSetHook']
    hook: CalibrationSetHook = HOOKS.build(copy.deepcopy(section))
    return hook


def _choose_sizes(runner: Any, hook: CalibrationSetHook, whole: Mapping[str, Any]) -> None:
    """Set the sizes of the rehearsal's images: small ones in the proportions of the run, that the detector takes.

    Args:
        runner: The runner of the rehearsal.
        hook: Its hook that makes the images.
        whole: The section ``zsq.synthesis`` of the run.
    """
    teacher = runner.detector.load_teacher()
    full, _ = full_size(whole, teacher, pipeline_of(runner.cfg))
    task = None if hook.source == 'procedural' else build_detection_task(teacher)
    multiple = max(SIZE_MULTIPLE, int(getattr(teacher.data_preprocessor, 'pad_size_divisor', 1) or 1))

    def scaled(short: int) -> tuple[int, int]:
        factor = min(short / min(full), 1.0)
        height, width = (max(round(side * factor / multiple), 1) * multiple for side in full)
        return height, width

    def takes(size: tuple[int, int]) -> bool:
        return task is None or accepts(task, size)

    last = next((size for size in map(scaled, SHORT_SIDES) if takes(size)), full)
    sizes = dict(synthesize=last)
    for name, stage in stages_of(hook.synthesis):
        if name not in sizes:
            coarse = scaled(min(COARSE_SIDES[name], min(last)))
            sizes[name] = coarse if takes(coarse) else last
        stage['image_size'] = list(sizes[name])
    for name, stage in stages_of(runner.cfg.zsq.synthesis):
        stage['image_size'] = list(sizes[name])


def _estimate(
    runner: Any, hook: CalibrationSetHook, source: Source, zsq: Any
) -> tuple[tuple[StepCost, ...], str | None]:
    """Measure trial steps of the whole run.

    Returns:
        The costs, and why a part of them is missing, or None.
    """
    costs: list[StepCost] = []
    num_images = zsq.calibration_set.num_images
    place = 'synthesis'
    try:
        if source.synthesized is not None:
            generator = source.synthesized
            # Every second image of a mixed set is a picture.
            count = num_images - num_images // 2 if source.name == 'mixed' else num_images
            costs += [stage_cost(generator, stage, count) for stage in generator.stages if stage.iterations]
            size = generator.stages[-1].image_size
        else:
            assert source.pictures is not None
            size = source.pictures.image_size
        place = 'training'
        if zsq.train.max_epochs:
            images, labels, _ = load_labeled_images(hook.root, range(hook.num_images))
            height, width = size
            resized = np.stack([cv2.resize(image, (width, height)) for image in images])
            known = rescale_labels(labels, images[0].shape[:2], size)
            costs.append(train_cost(runner, resized, known, zsq, num_images))
    except torch.cuda.OutOfMemoryError:
        runner.detector.end_training()
        torch.cuda.empty_cache()
        key = 'zsq.train.batch_size' if place == 'training' else 'batch_size of the stages of zsq.synthesis'
        return tuple(costs), f'{place} does not fit into the memory of this GPU: lower {key}'
    return tuple(costs), None if costs else 'no steps to measure: the config neither synthesizes images nor trains'


def _checks_of_run(runner: Any, hook: CalibrationSetHook, source: Source, zsq: Any) -> list[Check]:
    detector = runner.detector
    statistics = json.loads((Path(runner.work_dir) / RESULTS_FILE).read_bytes())
    of_set = statistics['calibration_set']['statistics']
    found = [f'{of_set["images"]} images, {of_set.get("boxes", 0)} boxes']
    if source.synthesized is not None:
        found += [
            f'{name} {"x".join(map(str, stage["image_size"]))} px'
            for name, stage in stages_of(hook.synthesis)
            if stage['iterations']
        ]
    checks = [Check('images', RAN, f'{source.name}: {", ".join(found)}'), _prior_check(source)]
    layers = [layer for layer in detector.report.layers if layer.weights and layer.type != 'Parameter']
    kept = [layer for layer in layers if not layer.quantized]
    why = '; '.join(sorted({layer.reason for layer in kept}))
    found = [f'{len(layers) - len(kept)} layers quantized', f'{len(kept)} float' + f' ({why})' * bool(why)]
    if others := detector.report.float_parameters():
        found.append(others)
    checks.append(Check('quantizers', RAN, ', '.join(found)))
    if detector.quantization_config.allocate is None:
        checks.append(Check('bit allocation', NOT_RUN, 'zsq.quantizer.allocate is not set'))
    else:
        text = f'{MEASURED_LAYERS} layers measured; the run measures each with each of its candidates'
        checks.append(Check('bit allocation', RAN, text))
    checks.append(_training_check(runner))
    checks.append(_evaluation_check(statistics, runner))
    return checks


def _prior_check(source: Source) -> Check:
    name = 'feature prior'
    if source.synthesized is None:
        return Check(name, NOT_RUN, 'the images are procedural pictures')
    generator = source.synthesized
    applied = [type(prior).__name__ for prior in generator.synthesizer.priors if prior.is_feature_prior]
    left_out = [type(prior).__name__ for prior in generator.priors_left_out]
    note = f'; do not apply to this detector: {", ".join(left_out)}' if left_out else ''
    if not applied:
        return Check(name, NOT_RUN, f'none applies: images follow from the detection loss and image priors alone{note}')
    return Check(name, RAN, ', '.join(applied) + note)


def _training_check(runner: Any) -> Check:
    if not runner.max_iters:
        return Check('training', NOT_RUN, 'zsq.train.max_epochs is 0: post-training quantization')
    losses = {
        name.partition('/')[2]: float(buffer.current())
        for name, buffer in runner.message_hub.log_scalars.items()
        if name.startswith('train/') and 'loss' in name
    }
    shown = ', '.join(f'{name} {value:.3g}' for name, value in losses.items())
    text = f'{runner.max_iters} steps, last losses: {shown}'
    small = [name for name, value in losses.items() if abs(value) < SHOWN_AS_ZERO]
    if small:
        text += (
            f' (the log shows {", ".join(small)} as 0.0000: normal for untrained weights, whose outputs hardly vary)'
        )
    return Check('training', RAN, text)


def _evaluation_check(results: Mapping[str, Any], runner: Any) -> Check:
    rows, reason = list(results['metrics']), results['not_evaluated']
    if reason is None:
        count = min(EVALUATION_IMAGES, results['evaluation_images'])
        return Check('evaluation', RAN, f'{", ".join(rows)} on {count} images')
    return Check('evaluation', NOT_RUN if runner.not_evaluated is None else FAILED, reason)


def _graph_check(source: Source, costs: tuple[StepCost, ...]) -> Check:
    name = 'CUDA graphs'
    if not torch.cuda.is_available():
        return Check(name, NOT_RUN, 'no GPU')
    if not costs:
        return Check(name, NOT_RUN, 'no steps were measured')
    eager = [cost.name for cost in costs if not cost.captured]
    reason = None if source.synthesized is None else source.synthesized.synthesizer.eager_reason
    captured = [cost.name for cost in costs if cost.captured]
    text = f'at full size: {", ".join(captured) or "no stage"} captured'
    if eager:
        text += f', {", ".join(eager)} eager' + (f' ({reason})' if reason else '')
    return Check(name, RAN if captured else NOT_RUN, text)


def _export_check(runner: Any) -> Check:
    """Export the student at the size of the rehearsal's images, as ``mmzsq.export`` does."""
    zsq = runner.cfg.zsq
    target = zsq.quantizer.get('target') or 'openvino'
    size = tuple(zsq.synthesis.synthesize.image_size)
    try:
        # Deployment is an extra.
        from mmzsq import deploy
    except UserError as error:
        return Check('export', NOT_RUN, str(error))
    student = copy.deepcopy(runner.detector.student).cpu().eval()
    try:
        report = deploy.export(student, Path(runner.work_dir) / EXPORTED_FILE, target, size)
    except Exception as error:
        # Whatever code of a detector raises while it is traced.
        return Check(
            'export',
            FAILED,
            f'not possible for {target}: {error if isinstance(error, UserError) else describe_error(error)}',
        )
    layers = len({layer.layer for layer in report.layers})
    return Check('export', RAN, f'possible for {target}: {len(report.files)} file(s), {layers} layers; not verified')
