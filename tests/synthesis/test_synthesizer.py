# SPDX-License-Identifier: Apache-2.0
"""The optimization of one batch, on a task small enough to know its optimum."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn

from mmzsq.errors import UserError
from mmzsq.synthesis import AdaptiveLabelSampler, BNStatisticsPrior, Synthesizer, TotalVariationPrior
from mmzsq.synthesis.optimization_step import OptimizationStep

SIZE = (16, 16)


class BrightBoxes:
    """A detector that sees brightness: its loss asks for white inside the boxes, black elsewhere."""

    is_batched = True
    loss_precision = SimpleNamespace(fp32_reason=None)

    def __init__(self) -> None:
        self.detector = nn.BatchNorm2d(3).eval().requires_grad_(False)
        self.num_classes = 2
        self.channel_order = 'rgb'
        self.device = torch.device('cpu')
        self.predictions: list[InstanceData] | None = None

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> torch.Tensor:
        wanted = torch.zeros(len(labels), 1, *image_size)
        for mask, instances in zip(wanted, labels, strict=True):
            for x1, y1, x2, y2 in instances.bboxes.int().tolist():
                mask[0, y1:y2, x1:x2] = 1
        return wanted

    def update_samples(
        self, samples: torch.Tensor, labels: Sequence[InstanceData], image_size: tuple[int, int]
    ) -> bool:
        return False

    def loss(self, images: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        self.detector(images)
        return (images - samples).square().mean()

    def predict(self, images: torch.Tensor) -> list[InstanceData]:
        assert images.min() >= 0 and images.max() <= 1
        self.detector(images)
        return self.predictions or []


def boxes(*per_image: list[list[float]]) -> list[InstanceData]:
    return [
        InstanceData(bboxes=torch.tensor(image), labels=torch.zeros(len(image), dtype=torch.long))
        for image in per_image
    ]


LABELS = boxes([[2, 2, 8, 8]], [[4, 6, 14, 12]])


def test_images_show_the_labeled_objects() -> None:
    task = BrightBoxes()
    result = Synthesizer(task, [], detection_weight=100.0, lr=0.05).run(LABELS, SIZE, 200, seed=0)
    wanted = task.data_samples(LABELS, SIZE)
    assert (result.images - wanted).abs().max() < 0.05
    assert result.losses['detection'] < 0.5


def test_all_weighted_terms_are_reported_and_sum_reduction_counts_images() -> None:
    task = BrightBoxes()
    priors = [BNStatisticsPrior(weight=0.5, form='l2'), TotalVariationPrior(weight=0.1)]
    kwargs = dict(detection_weight=3.0, lr=1e-12)
    total = Synthesizer(task, priors, detection_reduction='sum', **kwargs).run(LABELS, SIZE, 1, seed=0)
    mean = Synthesizer(task, priors, detection_reduction='mean', **kwargs).run(LABELS, SIZE, 1, seed=0)
    assert set(total.losses) == {'detection', 'BNStatisticsPrior', 'TotalVariationPrior'}
    assert total.losses['detection'] == pytest.approx(2 * mean.losses['detection'])
    images = total.images
    expected = 3.0 * float((images - task.data_samples(LABELS, SIZE)).square().mean())
    assert mean.losses['detection'] == pytest.approx(expected, rel=1e-3)


def test_a_seed_fixes_every_bit_and_the_callers_random_state_is_left_alone() -> None:
    synthesizer = Synthesizer(BrightBoxes(), [TotalVariationPrior()], cutout=dict(probability=1.0))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = synthesizer.run(LABELS, SIZE, 10, seed=1).images
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(synthesizer.run(LABELS, SIZE, 10, seed=1).images, first)
    assert not torch.equal(synthesizer.run(LABELS, SIZE, 10, seed=2).images, first)


def test_pixels_stay_in_range() -> None:
    images = Synthesizer(BrightBoxes(), [], detection_weight=1e3, lr=5.0).run(LABELS, SIZE, 7, seed=0).images
    assert images.min() >= 0 and images.max() <= 1


class RecordingTask(BrightBoxes):
    """Keeps the images of each step and their loss, which asks for shades of gray that the steps overshoot."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[torch.Tensor] = []
        self.losses: list[float] = []

    def loss(self, images: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        loss = (images - 0.25 - 0.5 * samples).square().mean()
        self.images.append(images.detach().clone())
        self.losses.append(float(loss.detach()))
        return loss


@pytest.mark.parametrize('interval', [1, 3])
def test_the_best_images_are_those_that_had_the_lowest_loss(interval: int) -> None:
    task = RecordingTask()
    result = Synthesizer(task, [], lr=0.3, keep='best', keep_interval=interval).run(LABELS, SIZE, 9, seed=0)
    best = min(range(0, 9, interval), key=task.losses.__getitem__)
    assert 0 < best < 8
    assert torch.equal(result.images, task.images[best])
    assert not any(torch.equal(task.images[best], task.images[other]) for other in range(9) if other != best)


def test_the_best_images_have_the_lowest_sum_of_all_terms() -> None:
    class Prior(Pausing):
        """Prefers the first images."""

        calls = 0

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return images.new_tensor(100.0 * self.calls)

    task = RecordingTask()
    result = Synthesizer(task, [Prior()], lr=0.1, keep='best', keep_interval=1).run(LABELS, SIZE, 9, seed=0)
    assert min(range(9), key=task.losses.__getitem__) > 0
    assert torch.equal(result.images, task.images[0])


def test_relabeling_changes_labels_on_the_way_and_the_images_follow() -> None:
    task = BrightBoxes()
    added = InstanceData(
        bboxes=torch.tensor([[10.0, 10, 16, 16], [2, 2, 8, 8]]),
        scores=torch.tensor([0.9, 0.9]),
        labels=torch.tensor([1, 0]),
    )
    task.predictions = [added]
    sampler = AdaptiveLabelSampler(warmup=20, interval=20)
    synthesizer = Synthesizer(task, [BNStatisticsPrior(weight=1e-6)], detection_weight=100.0, lr=0.05)
    result = synthesizer.run(boxes([[2, 2, 8, 8]]), SIZE, 200, seed=0, sampler=sampler)
    assert result.counts == {'added': 1, 'removed': 0}
    assert result.labels[0].bboxes.tolist() == [[2, 2, 8, 8], [10, 10, 16, 16]]
    assert result.labels[0].labels.tolist() == [0, 1]
    assert result.images[0, :, 11:15, 11:15].min() > 0.9


def test_no_hook_is_left_on_the_detector() -> None:
    task = BrightBoxes()
    Synthesizer(task, [BNStatisticsPrior()]).run(LABELS, SIZE, 2, seed=0)
    assert not task.detector._forward_pre_hooks


def test_progress_reports_iterations_losses_and_images() -> None:
    seen = []
    result = Synthesizer(BrightBoxes(), []).run(LABELS, SIZE, 40, seed=0, on_progress=seen.append)
    assert [step.iteration for step in seen] == list(range(2, 41, 2))
    assert seen[-1].losses == result.losses and torch.equal(seen[-1].images, result.images)


def test_the_last_progress_is_the_state_after_the_last_iteration() -> None:
    """Also if the iterations are no multiple of the distance between two reports."""
    seen = []
    result = Synthesizer(BrightBoxes(), []).run(LABELS, SIZE, 47, seed=0, on_progress=seen.append)
    assert [step.iteration for step in seen] == [*range(2, 47, 2), 47]
    assert seen[-1].losses == result.losses and torch.equal(seen[-1].images, result.images)


def test_a_non_finite_loss_stops_with_advice() -> None:
    task = BrightBoxes()
    task.loss = lambda images, samples: images.sum() * math.nan  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r'diverged.*synthesis\.lr'):
        Synthesizer(task, []).run(LABELS, SIZE, 40, seed=0)


@pytest.mark.parametrize('kwargs', [dict(keep='first'), dict(precision='fp8'), dict(detection_reduction='max')])
def test_unknown_options_are_refused(kwargs: dict) -> None:
    with pytest.raises(UserError, match='is one of'):
        Synthesizer(BrightBoxes(), [], **kwargs)


def test_the_learning_rate_warms_up_then_falls_along_half_a_cosine() -> None:
    synthesizer = Synthesizer(BrightBoxes(), [], warmup=4)
    shares = [synthesizer.schedule(iteration, 12) for iteration in range(12)]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert shares[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert Synthesizer(BrightBoxes(), []).schedule(0, 10) == 1.0


def test_images_start_from_the_configured_noise() -> None:
    class Normalized(BrightBoxes):
        def denormalize(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * 0.25 + 0.5

    def start(init: str) -> torch.Tensor:
        options = dict(init=init, lr=0.0, clamp=False, detection_weight=1.0)
        return Synthesizer(Normalized(), [], **options).run(LABELS * 50, (32, 32), 1, seed=0).images

    uniform, normal = start('uniform'), start('normal')
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
    # Clamped at the end: images are in [0, 1].
    assert (normal == 0).float().mean().item() == pytest.approx(0.0228, abs=0.005)
    with pytest.raises(UserError, match='init'):
        Synthesizer(Normalized(), [], init='zeros')


def test_images_start_from_those_given_and_take_the_rate_given() -> None:
    start = torch.rand(2, 3, 8, 8)
    synthesizer = Synthesizer(BrightBoxes(), [], lr=0.3)
    enlarged = torch.nn.functional.interpolate(start, SIZE, mode='bilinear')
    assert (synthesizer.run(LABELS, SIZE, 1, 0, start=start, lr=1e-9).images - enlarged).abs().max() < 1e-6
    assert (synthesizer.run(LABELS, SIZE, 1, 0, start=start).images - enlarged).abs().max() > 0.1


class Pausing:
    """Counts how often it is attached and paused."""

    def __init__(self) -> None:
        self.pauses = 0
        self.attached = 0

    def attach(self, detector: nn.Module) -> None:
        self.attached += 1

    def detach(self) -> None:
        pass

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.pauses += 1
        yield

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.new_zeros(())


def test_priors_pause_while_the_detector_predicts_and_stay_attached() -> None:
    """A graph is replayed after a prediction that changed no label, so memory that it reads must not be freed."""
    task, prior = BrightBoxes(), Pausing()
    task.predictions = [InstanceData(bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long())] * 2
    sampler = AdaptiveLabelSampler(warmup=2, interval=2)
    Synthesizer(task, [prior]).run(LABELS, SIZE, 7, seed=0, sampler=sampler)
    assert (prior.attached, prior.pauses) == (1, 3)


def test_corrected_labels_are_written_in_place_where_the_task_can() -> None:
    class InPlace(BrightBoxes):
        made = updated = 0

        def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> torch.Tensor:
            self.made += 1
            return super().data_samples(labels, image_size)

        def update_samples(
            self, samples: torch.Tensor, labels: Sequence[InstanceData], image_size: tuple[int, int]
        ) -> bool:
            self.updated += 1
            samples.copy_(super().data_samples(labels, image_size))
            return True

    task = InPlace()
    seen = dict(bboxes=torch.tensor([[10.0, 10, 15, 15]]), scores=torch.tensor([0.9]), labels=torch.tensor([1]))
    task.predictions = [InstanceData(**seen), InstanceData(**{key: value[:0] for key, value in seen.items()})]
    sampler = AdaptiveLabelSampler(warmup=1, interval=1000, area=(0.01, 0.85))
    result = Synthesizer(task, [], detection_weight=100.0, lr=0.05).run(LABELS, SIZE, 200, seed=0, sampler=sampler)
    assert (task.made, task.updated, result.counts['added']) == (1, 1, 1)
    # The images show the corrected labels.
    assert (result.images - BrightBoxes().data_samples(result.labels, SIZE)).abs().max() < 0.05


def test_a_step_that_synchronizes_is_repeated_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check for synchronization is off in the repeated step."""
    mode = 'default'

    def set_mode(new: str) -> None:
        nonlocal mode
        mode = new

    monkeypatch.setattr(torch.cuda, 'get_sync_debug_mode', lambda: mode)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', set_mode)
    step = OptimizationStep(Synthesizer(BrightBoxes(), []), torch.rand(2, 3, *SIZE), LABELS)
    step.may_capture = True
    taken = []

    def eager(measures: bool) -> None:
        if mode == 'error':
            raise RuntimeError('called a synchronizing CUDA operation')
        taken.append(mode)

    monkeypatch.setattr(step, '_eager', eager)
    with pytest.warns(UserWarning, match='synthesis runs eagerly'):
        step._step_and_capture(False)
    assert taken == ['default'] and not step.may_capture
    assert step.synthesizer.eager_reason == 'called a synchronizing CUDA operation'


def test_a_failed_capture_gives_the_images_of_an_eager_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failed attempt draws random numbers and is observed by the priors; both must be undone."""
    for name in ('get_sync_debug_mode', 'set_sync_debug_mode'):
        monkeypatch.setattr(torch.cuda, name, lambda *mode: 'default')

    class Waits(BrightBoxes):
        fails = False

        def loss(self, images: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
            loss = super().loss(images, samples) + 0.01 * (torch.rand(()) * images).sum()
            if self.fails:
                raise RuntimeError('called a synchronizing CUDA operation')
            return loss

    def images(attempt: bool) -> torch.Tensor:
        task = Waits()
        prior = BNStatisticsPrior(weight=1.0)
        prior.attach(task.detector)
        torch.manual_seed(0)
        step = OptimizationStep(
            Synthesizer(task, [prior], cutout=dict(probability=1.0)), torch.rand(2, 3, *SIZE), LABELS
        )
        step.optimizer.param_groups[0]['lr'] = 0.1
        for _ in range(2):
            step._compute()
        if attempt:
            step.may_capture = True
            eager, tries = step._compute, []

            def first_fails(measures: bool) -> None:
                tries.append(True)
                task.fails = len(tries) == 1
                eager(measures)

            monkeypatch.setattr(step, '_eager', first_fails)
            with pytest.warns(UserWarning, match='synthesis runs eagerly'):
                step._step_and_capture(False)
            assert len(tries) == 2
        else:
            step._compute()
        return step.images.detach()

    assert torch.equal(images(attempt=True), images(attempt=False))


def test_each_of_two_priors_of_a_kind_counts() -> None:
    def run(*weights: float) -> dict[str, float]:
        priors = [TotalVariationPrior(weight=weight) for weight in weights]
        return Synthesizer(BrightBoxes(), priors, lr=0.0).run(LABELS, SIZE, 1, seed=0).losses

    one = run(2.0)['TotalVariationPrior']
    assert run(2.0, 0.0, 1.0) == pytest.approx(
        {**run(2.0), 'TotalVariationPrior_2': 0.0, 'TotalVariationPrior_3': one / 2}
    )


def test_the_best_images_are_those_of_the_final_labels() -> None:
    """Their loss is higher than that of earlier images, which lack an object."""

    class DearBoxes(BrightBoxes):
        def loss(self, images: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
            return super().loss(images, samples) + samples.sum()

    task = DearBoxes()
    seen = dict(bboxes=torch.tensor([[10.0, 10, 15, 15]]), scores=torch.tensor([0.9]), labels=torch.tensor([1]))
    task.predictions = [InstanceData(**seen), InstanceData(**{key: value[:0] for key, value in seen.items()})]
    sampler = AdaptiveLabelSampler(warmup=60, interval=1000, area=(0.01, 0.85))
    synthesizer = Synthesizer(task, [], detection_weight=100.0, lr=0.05, keep='best', keep_interval=50)
    result = synthesizer.run(LABELS, SIZE, 200, seed=0, sampler=sampler)
    assert result.counts['added'] == 1
    assert result.images[0, :, 10:15, 10:15].mean() > 0.9
    # Nothing is looked at after the correction: the images are those of then, and not of the first iteration.
    result = Synthesizer(task, [], detection_weight=100.0, lr=0.05, keep='best', keep_interval=1000).run(
        LABELS, SIZE, 62, seed=0, sampler=sampler
    )
    assert result.counts['added'] == 1
    assert result.images[0, :, 2:8, 2:8].mean() > 0.9


def test_a_loss_that_falls_back_to_fp32_is_observed_once() -> None:
    """The priors must not see the forward that failed."""

    class FallsBack(BrightBoxes):
        def __init__(self, falls_back: bool) -> None:
            super().__init__()
            self.loss_precision = SimpleNamespace(fp32_reason=None)
            self.falls_back = falls_back

        def loss(self, images: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
            if self.falls_back and self.loss_precision.fp32_reason is None:
                self.loss_precision.fp32_reason = 'not finite'
                self.detector(images + 1)
            return super().loss(images, samples)

    first, second = (
        Synthesizer(FallsBack(falls_back), [BNStatisticsPrior(weight=1.0)]).run(LABELS, SIZE, 3, seed=0).images
        for falls_back in (False, True)
    )
    assert torch.equal(first, second)
