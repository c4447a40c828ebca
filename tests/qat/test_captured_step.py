# SPDX-License-Identifier: Apache-2.0
"""Captured training steps match eager ones, and run eagerly if they cannot be captured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.structures import InstanceData

from mmzsq.config.presets import preset_section
from mmzsq.models.padded_targets import PaddedTargets, pad_targets
from mmzsq.qat import ZeroShotDetector, captured_step, zero_shot_detector
from mmzsq.qat.captured_step import EAGER_STEPS, CapturedStep
from mmzsq.quantization import calibrating
from mmzsq.tasks.detection_task import blank_samples, data_samples
from mmzsq.tasks.padded_task import PAD_MULTIPLE, TargetCapacity

DEFAULT = preset_section('default', {'quantizer': {'w_bits': 4}})
PAPER = preset_section('paper', {'quantizer': {'w_bits': 4}})

SIZE = (64, 96)
Make = Callable[..., ZeroShotDetector]


@pytest.fixture(autouse=True)
def same_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make captured and eager steps use the same deterministic algorithms.

    Otherwise a rounding error may move a value to another quantization level, where it is no longer small.
    """
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def make(tiny_cfg: Callable[[str], Any], tmp_path: Path) -> Make:
    def make(name: str = 'yolov5', preset: dict[str, Any] = DEFAULT, **options: Any) -> ZeroShotDetector:
        torch.manual_seed(0)
        checkpoint = tmp_path / f'{name}.pth'
        detector = MODELS.build(tiny_cfg(name))
        detector.init_weights()
        torch.save({'state_dict': detector.state_dict()}, checkpoint)
        model = ZeroShotDetector(
            tiny_cfg(name),
            quantizer=dict(DEFAULT['quantizer'], w_bits=8, a_bits=8),
            distillation=preset['distillation'],
            teacher=str(checkpoint),
            **options,
        )
        model.init_weights()
        torch.manual_seed(1)
        with torch.no_grad():
            # A student equal to its teacher learns from rounding noise: a change of 1e-6 in its weights changes the
            # loss by 10 %. From here on, by 1 %.
            for weight in model.student.parameters():
                weight.mul_(1 + 0.3 * torch.randn_like(weight))
        with torch.no_grad(), calibrating(model.eval().student):
            model.student(torch.rand(2, 3, *SIZE), blank_samples(2, SIZE, torch.device('cpu')), mode='tensor')
        return model.train()

    return make


def labels(count: int) -> InstanceData:
    corners = torch.rand(count, 2, 2).sort(1).values * torch.tensor(SIZE[::-1])
    return InstanceData(bboxes=corners.flatten(1), labels=torch.arange(count) % 3)


def labeled(counts: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Batches of two images with the given numbers of objects."""
    data = batches(len(counts))
    for batch, of_images in zip(data, counts, strict=True):
        batch['data_samples'] = data_samples([labels(count) for count in of_images], SIZE, torch.device('cpu'))
    return data


def batches(count: int, images: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        dict(
            inputs=list(torch.randint(0, 256, (images, 3, *SIZE), generator=generator, dtype=torch.uint8)),
            data_samples=blank_samples(images, SIZE, torch.device('cpu')),
        )
        for _ in range(count)
    ]


def weights(model: ZeroShotDetector) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])


def train(
    model: ZeroShotDetector, data: list[dict[str, Any]], wrapper: str = 'OptimWrapper', **options: Any
) -> list[dict[str, float]]:
    if wrapper == 'AmpOptimWrapper':
        options['dtype'] = 'bfloat16'
    optim_wrapper = build_optim_wrapper(
        model,
        dict(
            type=wrapper,
            constructor='mmzsq.GroupedOptimWrapperConstructor',
            optimizer=dict(type='Adam', lr=1e-3),
            paramwise_cfg=dict(custom_keys={'_quantizer.': dict(lr_mult=10.0)}),
            clip_grad=dict(max_norm=10.0),
            **options,
        ),
    )
    logs = [model.train_step(copy.deepcopy(batch), optim_wrapper) for batch in data]
    return [{name: value.item() for name, value in log.items()} for log in logs]


@pytest.mark.cuda
@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'AmpOptimWrapper'])
@pytest.mark.parametrize('name', ['yolov5', 'retinanet_r18'])
def test_captured_steps_match_eager_steps(make: Make, name: str, wrapper: str) -> None:
    """The losses of each step are equal, beyond the first eager steps and for a last batch of another size."""
    data = batches(EAGER_STEPS + 4) + batches(1, images=1)
    logs, moves = [], []
    for capture in (True, False):
        model = make(name, capture=capture).cuda()
        before = weights(model)
        logs.append(train(model, data, wrapper))
        moves.append(weights(model) - before)
        assert (model._captured_step.graph is not None) == capture
    assert torch.cosine_similarity(*moves, dim=0) > 0.9
    tolerance = 2e-3 if wrapper == 'OptimWrapper' else 3e-2
    for captured, eager in zip(*logs, strict=True):
        assert captured.keys() == eager.keys()
        assert captured == pytest.approx(eager, rel=tolerance)
    # The graph read the images of each batch.
    assert len({log['loss'] for log in logs[0]}) == len(data)
    assert copy.deepcopy(model)._captured_step.graph is None


class OnGPU(torch.Tensor):
    """A tensor on the CPU that passes for one on a GPU."""

    is_cuda = True


def test_the_log_says_once_why_steps_run_eagerly_on_a_gpu(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    changes: dict[str, Any] = {}
    preprocess = zero_shot_detector._preprocess

    def preprocess_for(*args: Any) -> dict[str, Any]:
        data = preprocess(*args)
        if changes.get('padded'):
            data['data_samples'][0].set_metainfo(dict(img_shape=(8, 8)))
        inputs = data['inputs']
        return dict(data, inputs=inputs if changes.get('on_cpu') else inputs.as_subclass(OnGPU))

    monkeypatch.setattr(captured_step, 'print_log', lambda text, **options: said.append(text))
    monkeypatch.setattr(zero_shot_detector, '_preprocess', preprocess_for)
    # Without a GPU, no operator may take these images.
    monkeypatch.setattr(captured_step, '_forward_backward', lambda *args: dict(loss=torch.zeros(())))
    for name, changes, why in (
        ('mask-rcnn_r18', {}, 'the number of proposals differs between images'),
        ('retinanet_r18', dict(padded=True), 'images are padded'),
        ('retinanet_r18', dict(accumulate=2), 'several batches make one update'),
        ('retinanet_r18', dict(capture=False, padded=True), None),
        ('retinanet_r18', dict(on_cpu=True), None),
    ):
        said.clear()
        model = make(name, capture=changes.get('capture', True))
        monkeypatch.setattr(model, 'augment', lambda inputs: inputs)
        monkeypatch.setattr(model, '_accumulated_update', lambda *args: dict(loss=torch.zeros(())))
        train(model, batches(3), accumulative_counts=changes.get('accumulate', 1))
        assert said == ([] if why is None else [f'training: steps do not run as a CUDA graph, since {why}'])


def test_release_frees_the_graph_and_a_new_one_is_captured() -> None:
    step, reset = CapturedStep(), []
    step.release()
    step.graph = SimpleNamespace(reset=lambda: reset.append(1))
    step.eager_steps[torch.Size([1, 3, 8, 8])] = EAGER_STEPS
    step.inputs, step.log_vars, step.parameters, step.grads = torch.ones(1), {}, [], []
    step.release()
    assert reset == [1]
    assert vars(step) == vars(CapturedStep())


@pytest.mark.cuda
def test_training_continues_after_a_release(make: Make) -> None:
    data, logs = batches(2 * EAGER_STEPS + 2), []
    for release in (True, False):
        model = make().cuda()
        first = train(model, data)
        if release:
            model.end_training()
            assert model._captured_step.graph is None
        logs.append([first, train(model, data)])
        assert model._captured_step.graph is not None
    for released, kept in zip(*(sum(log, []) for log in logs), strict=True):
        assert released == pytest.approx(kept, rel=2e-3)


@pytest.mark.cuda
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_losses_with_labels_or_proposals_run_eagerly_and_say_why(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr('mmzsq.qat.captured_step.print_log', lambda text, **options: said.append(text))
    for name, preset, why in (
        ('retinanet_r18', PAPER, 'labels image by image'),
        ('mask-rcnn_r18', DEFAULT, 'proposals'),
    ):
        said.clear()
        model = make(name, preset).cuda()
        train(model, batches(EAGER_STEPS + 2))
        assert model._captured_step.graph is None
        assert len(said) == 1 and why in said[0]


@pytest.mark.cuda
@pytest.mark.parametrize('bn', ['frozen', 'train'])
def test_padded_labels_are_learned_by_a_captured_step_too(make: Make, bn: str) -> None:
    """One batch has more objects than the padded length and runs eagerly."""
    data = labeled([*[(1 + index, 3) for index in range(EAGER_STEPS + 3)], (1, 2 * PAD_MULTIPLE + 1), (2, 2)])
    logs, statistics = [], []
    for capture in (True, False):
        model = make('yolov5', PAPER, capture=capture, bn=bn).cuda()
        logs.append(train(model, data))
        assert (model._captured_step.graph is not None) == capture
        statistics.append({key: value for key, value in model.state_dict().items() if 'running' in key})
    for captured, eager in zip(*logs, strict=True):
        assert captured == pytest.approx(eager, rel=5e-3)
        assert captured['loss_detection'] > 0
    for key, value in statistics[0].items():
        torch.testing.assert_close(value, statistics[1][key], rtol=1e-2, atol=1e-3)


def test_padded_targets_are_the_labels(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = labeled([(1, 3), (0, 2 * PAD_MULTIPLE + 1), (2, 1)])
    model, stock = make('yolov5', PAPER), make('yolov5', PAPER)
    logs = train(model, data)
    assert model._target_capacity.targets == 3 * PAD_MULTIPLE
    monkeypatch.setattr(type(stock), 'train_step', super(ZeroShotDetector, stock).train_step.__func__)
    for padded, own in zip(logs, train(stock, data), strict=True):
        assert padded == pytest.approx(own, rel=1e-5) and padded['loss_detection'] > 0


def test_the_padded_length_is_fixed_once_a_graph_exists() -> None:
    room = TargetCapacity()
    assert [
        room.pad([labels(count)], fixed).labels.shape[1] for count, fixed in ((3, False), (33, True), (3, True))
    ] == [
        2 * PAD_MULTIPLE,
        3 * PAD_MULTIPLE,
        2 * PAD_MULTIPLE,
    ]
    assert room.pad([labels(33)], fixed=False).valid.sum() == 33 and room.targets == 3 * PAD_MULTIPLE


def test_on_the_cpu_a_step_equals_mmengines(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = make(), make()
    logs = train(model, batches(2))
    monkeypatch.setattr(type(stock), 'train_step', super(ZeroShotDetector, stock).train_step.__func__)
    assert logs == train(stock, batches(2))


class Line(BaseModel):
    """A weight that each step decreases by the mean of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs: torch.Tensor, data_samples: Any, mode: str) -> dict[str, torch.Tensor]:
        return dict(loss=self.weight * inputs.mean())


def test_the_optimizer_steps_once_per_accumulation() -> None:
    model = Line()
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), accumulative_counts=2)
    optim_wrapper.initialize_count_status(model, 0, 4)
    weights = []
    for value in (1.0, 3.0, 5.0, 7.0):
        CapturedStep()(model, dict(inputs=torch.full((1,), value), data_samples=[]), optim_wrapper)
        weights.append(model.weight.item())
    assert weights == [0, -2, -2, -8]


class Graph:
    """Replaces a captured step of a :class:`Line`: reads and writes the same memory as the graph."""

    def __init__(self, step: CapturedStep, model: Line) -> None:
        step.inputs = torch.zeros(1)
        step.parameters, step.grads = [model.weight], [torch.zeros(())]
        step.log_vars = dict(loss=torch.zeros(()))
        step.targets = PaddedTargets(torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), torch.zeros(1, 2).bool())
        self.step, self.model = step, model

    def replay(self) -> None:
        mean = self.step.inputs.mean()
        self.step.grads[0].copy_(mean)
        self.step.log_vars['loss'].copy_(self.model.weight.detach() * mean)


@pytest.mark.parametrize('captured', [False, True])
def test_gradients_are_averaged_between_backward_and_the_step_of_the_optimizer(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process has seen only zeros."""
    monkeypatch.setattr(captured_step, '_obstacle', lambda *args: None if captured else 'it is not')
    model, step = Line(), CapturedStep()
    step.graph = Graph(step, model) if captured else None
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    losses = []
    for value in (2.0, 4.0):
        data = dict(inputs=torch.full((1,), value), data_samples=[])
        losses.append(step(model, data, optim_wrapper, average=lambda model: model.weight.grad.div_(2))['loss'].item())
    assert model.weight.item() == -1 - 2
    assert losses == [0, -4]


def test_a_graph_gets_the_targets_of_each_batch_if_their_shape_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_step, '_obstacle', lambda *args: None)
    model, step = Line(), CapturedStep()
    step.graph = Graph(step, model)
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    data = dict(inputs=torch.ones(1), data_samples=[])
    step(model, data, optim_wrapper, targets=pad_targets([labels(2)]))
    assert step.targets is not None and step.targets.valid.all() and step.targets.labels.tolist() == [[0, 1]]
    step(model, data, optim_wrapper, targets=pad_targets([labels(3)]))
    assert step.targets.labels.tolist() == [[0, 1]] and model.weight.item() == -2
