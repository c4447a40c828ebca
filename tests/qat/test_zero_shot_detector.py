# SPDX-License-Identifier: Apache-2.0
"""Teacher and student as one model, the loading of a teacher, and a detector as synthesis sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmdet
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import ExponentialMovingAverage, revert_sync_batchnorm
from mmengine.structures import InstanceData
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.config.presets import preset_section
from mmzsq.errors import UserError
from mmzsq.qat import ZeroShotDetector, zero_shot_detector
from mmzsq.qat.teacher import digest, load_teacher
from mmzsq.quantization import calibrating, set_quantization
from mmzsq.quantization.units import tensors_in
from mmzsq.tasks import DetectionTask
from mmzsq.tasks.detection_task import num_classes, sum_losses

DEFAULT = preset_section('default', {'quantizer': {'w_bits': 4}})
PAPER = preset_section('paper', {'quantizer': {'w_bits': 4}})
PAPER_TRANSFORMER = preset_section('paper_transformer', {'quantizer': {'w_bits': 4}})
# Skips the search for the first steps, which takes a second.
QUANTIZER = dict(
    DEFAULT['quantizer'],
    w_bits=4,
    a_bits=4,
    weight=dict(scheme='signed', per_channel=True, init='lsq'),
    activation=dict(scheme='offset', init='lsq'),
)
SIZE = (64, 64)
Make = Callable[..., ZeroShotDetector]


@pytest.fixture(scope='module')
def detector_cfg(repo: Path) -> dict[str, Any]:
    register_all_modules()
    return Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py').model.to_dict()


@pytest.fixture(scope='module')
def checkpoint(detector_cfg: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with random weights and random BatchNorm statistics."""
    torch.manual_seed(1)
    detector = MODELS.build(copy.deepcopy(detector_cfg))
    detector.init_weights()
    with torch.no_grad():
        detector.train()(torch.rand(4, 3, *SIZE), mode='tensor')
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save({'state_dict': detector.state_dict(), 'meta': {'dataset_meta': {'classes': ('a',)}}}, path)
    return path


@pytest.fixture
def float_detector(detector_cfg: dict[str, Any], checkpoint: Path) -> nn.Module:
    detector = MODELS.build(copy.deepcopy(detector_cfg))
    load_teacher(detector, str(checkpoint))
    return detector


@pytest.fixture
def make(detector_cfg: dict[str, Any], checkpoint: Path) -> Make:
    """Make a student that starts from the teacher, with initialized steps unless ``calibrate`` is false."""

    def make(preset: dict[str, Any] = DEFAULT, calibrate: bool = True, **options: Any) -> ZeroShotDetector:
        arguments = dict(quantizer=QUANTIZER, distillation=preset['distillation'], teacher=str(checkpoint))
        model = ZeroShotDetector(copy.deepcopy(detector_cfg), **{**arguments, **options})
        model.init_weights()
        if calibrate:
            with torch.no_grad(), calibrating(model.eval().student):
                model.student(torch.rand(2, 3, *SIZE), mode='tensor')
        return model.train()

    return make


def batch() -> tuple[Tensor, list[DetDataSample]]:
    """Two images with a box each."""
    samples = []
    for label in (1, 3):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=SIZE, batch_input_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, scale_factor=(1.0, 1.0)
            )
        )
        sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8.0, 40.0, 50.0]]), labels=torch.tensor([label]))
        samples.append(sample)
    return torch.rand(2, 3, *SIZE), samples


def train_step(model: ZeroShotDetector, lr: float = 1e-2) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = model(*batch(), mode='loss')
    torch.stack([value for name, value in losses.items() if 'loss' in name]).sum().backward()
    optimizer.step()
    return losses


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


# The state of a student consists of those of the float detector and of the quantizers.


def test_the_state_dict_is_the_float_detectors_plus_the_quantizers(make: Make, float_detector: nn.Module) -> None:
    names = set(make().state_dict())
    floats = set(float_detector.state_dict())
    assert floats < names
    assert names - floats == {name for name in names if '_quantizer.' in name}
    assert any(name.endswith('weight_quantizer.log_step') for name in names)


def test_a_float_checkpoint_loads_into_the_student(make: Make, float_detector: nn.Module) -> None:
    model = make()
    wanted = {name: torch.rand_like(value.float()).to(value.dtype) for name, value in snapshot(float_detector).items()}
    result = model.load_state_dict(wanted, strict=False)
    assert result.unexpected_keys == []
    assert all('_quantizer.' in name for name in result.missing_keys)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in wanted.items())


def test_the_students_own_state_loads_strictly_without_a_teacher(make: Make, detector_cfg: dict[str, Any]) -> None:
    model = make()
    fresh = ZeroShotDetector(copy.deepcopy(detector_cfg), QUANTIZER, DEFAULT['distillation'], 'gone.pth')
    fresh.load_state_dict(model.state_dict(), strict=True)
    inputs, samples = batch()
    with torch.no_grad():
        (expected,), (maps,) = (m.eval()(inputs, samples, mode='tensor') for m in (model, fresh))
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


def test_a_detector_that_changes_its_config_when_built_is_built_twice_alike(
    detector_cfg: dict[str, Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like DETR's head, which replaces a number in its config by a tensor."""
    build = MODELS.build

    def build_and_spoil(cfg: dict[str, Any]) -> nn.Module:
        detector = build(cfg)
        cfg.clear()
        return detector

    monkeypatch.setattr(MODELS, 'build', build_and_spoil)
    cfg = copy.deepcopy(detector_cfg)
    model = ZeroShotDetector(cfg, QUANTIZER, DEFAULT['distillation'], str(checkpoint))
    assert type(model.load_teacher()) is type(model.student)
    assert model.detector_cfg == detector_cfg


def test_the_teacher_is_in_no_state_parameter_module_or_copy(make: Make) -> None:
    model = make()
    own = {id(value) for value in (*model.teacher.parameters(), *model.teacher.buffers())}
    assert not own & {id(value) for value in (*model.parameters(), *model.buffers())}
    assert not {id(module) for module in model.teacher.modules()} & {id(module) for module in model.modules()}
    assert not any('teacher' in name for name in model.state_dict())
    assert copy.deepcopy(model).teacher is model.teacher


def test_using_a_teacher_that_is_not_loaded_is_an_error(detector_cfg: dict[str, Any]) -> None:
    model = ZeroShotDetector(copy.deepcopy(detector_cfg), QUANTIZER)
    with pytest.raises(RuntimeError, match='load_teacher'):
        _ = model.teacher
    with pytest.raises(UserError, match='set load_from'):
        model.init_weights()


# Training.


def test_the_student_starts_as_the_teacher(make: Make) -> None:
    model = make(calibrate=False)
    teacher = model.teacher.state_dict()
    assert teacher
    assert all(torch.equal(model.state_dict()[name], value) for name, value in teacher.items())


@pytest.mark.parametrize('preset', [DEFAULT, PAPER], ids=['default', 'paper'])
def test_a_step_moves_the_student_and_not_the_teacher(make: Make, preset: dict[str, Any]) -> None:
    model = make(preset, bn=preset['train']['bn'])
    teacher, student = snapshot(model.teacher), snapshot(model)
    losses = train_step(model)
    assert all(torch.isfinite(value).all() and value.grad_fn for name, value in losses.items() if 'loss' in name)
    assert ('loss_detection' in losses) == (preset is PAPER)
    assert not changed(teacher, model.teacher)
    moved = changed(student, model)
    assert any(name.endswith('conv.weight') for name in moved)
    assert any('log_step' in name for name in moved)
    assert not model.teacher.training
    assert not any(module.training for module in model.teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.teacher.parameters())


def test_an_exact_student_has_no_loss(make: Make) -> None:
    model = make().eval()
    set_quantization(model.student, False)
    losses = model(*batch(), mode='loss')
    assert float(sum(losses.values()).detach()) == pytest.approx(0, abs=1e-4)
    set_quantization(model.student, True)
    assert float(sum(model(*batch(), mode='loss').values()).detach()) > 1e-2


def test_the_detection_loss_has_its_weight(make: Make) -> None:
    inputs, samples = batch()
    for weight in (0.5, 2.0):
        model = make(distillation=dict(detection_weight=weight, losses=[]))
        expected = weight * sum_losses(model.student.loss(inputs, samples))
        losses = model(inputs, samples, mode='loss')
        assert float(sum(losses.values()).detach()) == pytest.approx(float(expected.detach()))


def test_without_distillation_the_teacher_does_not_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    for losses in ([], DEFAULT['distillation']['losses']):
        model = make(distillation=dict(detection_weight=1.0, losses=losses))
        backbone = model.teacher.backbone
        monkeypatch.setattr(backbone, 'forward', lambda *args, f=backbone.forward: ran.append(True) or f(*args))
        train_step(model)
        assert len(ran) == bool(losses)


def test_batchnorm_is_frozen_or_trains_as_configured(make: Make) -> None:
    statistics = ('running_mean', 'running_var')
    for bn, moves in (('frozen', False), ('train', True)):
        model = make(bn=bn)
        before = snapshot(model)
        train_step(model)
        moved = {name for name in changed(before, model) if name.endswith(statistics)}
        assert bool(moved) == moves
        assert {m.training for m in model.student.modules() if isinstance(m, nn.BatchNorm2d)} == {moves}
        # The statistics are frozen, the affine parameters are not.
        assert any('bn.weight' in name for name in changed(before, model))
    with pytest.raises(UserError, match="'frozen' or 'train', but is 'frosen'"):
        make(bn='frosen')


def test_output_grids_remain_if_mmengine_reverts_sync_batchnorm(
    make: Make, detector_cfg: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Runner and MMDetection's ``init_detector`` replace such layers in a model that is complete."""
    for part in ('backbone', 'neck'):
        monkeypatch.setitem(detector_cfg[part], 'norm_cfg', dict(type='SyncBN', momentum=0.03, eps=0.001))
    model = make(quantizer=dict(QUANTIZER, outputs=8)).eval()
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        expected = model.student(images, mode='tensor')
        maps = revert_sync_batchnorm(model).student(images, mode='tensor')
    assert any(isinstance(m, _BatchNorm) and hasattr(m, 'output_quantizer') for m in model.student.modules())
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(maps), tensors_in(expected), strict=True))


def test_ema_averages_weights_and_steps_of_the_student(make: Make) -> None:
    model = make(bn='train', calibrate=False)
    # Like EMAHook, copy before the quantizers have steps.
    average = ExponentialMovingAverage(model, momentum=0.5, update_buffers=True)
    with torch.no_grad(), calibrating(model.eval().student):
        model.student(torch.rand(2, 3, *SIZE), mode='tensor')
    model.train()
    average.update_parameters(model)
    first = snapshot(model)
    train_step(model)
    average.update_parameters(model)
    assert changed(first, model)
    averaged = average.module.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(averaged[name], (first[name] + value) / 2, rtol=1e-4, atol=1e-5)
    assert list(average.state_dict()) == ['steps', *(f'module.{name}' for name in model.state_dict())]
    with torch.no_grad():
        average.module.eval()(*batch(), mode='tensor')


def test_the_teacher_predicts_inside_predict_with_teacher(make: Make) -> None:
    model = make().eval()
    inputs, samples = batch()

    def scores() -> Tensor:
        with torch.no_grad():
            return model(inputs, copy.deepcopy(samples), mode='predict')[0].pred_instances.scores

    with torch.no_grad():
        own, of_teacher = (
            m.predict(inputs, copy.deepcopy(samples), rescale=True)[0].pred_instances.scores
            for m in (model.student, model.teacher)
        )
    assert not torch.equal(own, of_teacher)
    with model.predict_with_teacher():
        assert torch.equal(scores(), of_teacher)
    assert torch.equal(scores(), own)


def test_the_teacher_follows_the_student_to_another_type_or_device(make: Make) -> None:
    model = make().double()
    assert next(model.teacher.parameters()).dtype == torch.float64


# Presets that apply to any detector.


@pytest.fixture
def make_tiny(tiny_cfg: Callable[[str], Any], tmp_path: Path) -> Make:
    """Make a student of one of the tiny detectors, with initialized steps, in train mode."""

    def make_tiny(name: str, preset: dict[str, Any] = DEFAULT, **quantizer: Any) -> ZeroShotDetector:
        teacher = MODELS.build(tiny_cfg(name))
        teacher.init_weights()
        # The initial weights of the RPN are so small that quantization changes almost nothing.
        torch.nn.init.normal_(teacher.rpn_head.rpn_cls.weight, std=0.2)
        torch.save(teacher.state_dict(), tmp_path / f'{name}.pth')
        model = ZeroShotDetector(
            tiny_cfg(name), {**QUANTIZER, **quantizer}, preset['distillation'], str(tmp_path / f'{name}.pth')
        )
        model.init_weights()
        inputs, samples = batch()
        with torch.no_grad(), calibrating(model.eval().student):
            model.student(inputs, samples, mode='tensor')
        return model.train()

    return make_tiny


@pytest.mark.parametrize('name', ['mask-rcnn_r18', 'mask-rcnn_swin', 'faster-rcnn_r18'])
def test_all_parts_of_a_two_stage_student_learn(make_tiny: Make, name: str) -> None:
    model = make_tiny(name)
    losses = train_step(model)
    assert list(losses) == ['loss_0_TwoStagePredictionLoss', 'loss_1_FeatureMSELoss']
    assert all(value.item() > 1e-3 and torch.isfinite(value) for value in losses.values())
    learns = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = ['backbone.', 'neck.', 'rpn_head.', 'roi_head.bbox_head.']
    for part in [*parts, 'roi_head.mask_head.'] if name.startswith('mask') else parts:
        for kind in ('weight', 'weight_quantizer.log_step', 'input_quantizer.log_step'):
            assert any(n.startswith(f'student.{part}') and n.endswith(kind) for n in learns), (part, kind)


@pytest.mark.parametrize('name', ['mask-rcnn_r18', 'mask-rcnn_swin'])
def test_an_exact_student_has_no_loss_even_while_it_trains(make_tiny: Make, name: str) -> None:
    """The stochastic depth of this Swin would make it differ from its teacher."""
    model = make_tiny(name)
    set_quantization(model.student, False)
    assert sum(model(*batch(), mode='loss').values()).item() == pytest.approx(0, abs=1e-4)


def test_quantized_layers_of_a_frozen_stage_are_trained(make_tiny: Make) -> None:
    model = make_tiny('faster-rcnn_r18')
    assert model.student.backbone.frozen_stages == 1
    train_step(model)
    stage = dict(model.student.backbone.layer1[0].named_parameters())
    for name in ('conv1.weight', 'conv1.weight_quantizer.log_step', 'conv1.input_quantizer.log_step'):
        assert stage[name].grad.abs().sum() > 0
    assert stage['bn1.weight'].grad is None


def test_yolov5_is_compared_by_its_head_and_batchnorms(make: Make) -> None:
    model = make()
    norms = {name for name, module in model.student.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert model.taps == {'bbox_head', *norms}
    assert list(model(*batch(), mode='loss')) == ['loss_0_DensePredictionLoss', 'loss_1_FeatureMSELoss']


def test_the_papers_transformer_is_compared_by_proposals_and_blocks(make_tiny: Make) -> None:
    model = make_tiny('mask-rcnn_swin', PAPER_TRANSFORMER, scope='backbone')
    assert model.taps == {
        'rpn_head',
        *(name for name, module in model.student.named_modules() if type(module).__name__ == 'SwinBlock'),
    }
    inputs, samples = batch()
    for sample in samples:
        masks = np.zeros((1, *SIZE), np.uint8)
        masks[:, 8:50, 8:40] = 1
        sample.gt_instances.labels.fill_(2)
        sample.gt_instances.masks = BitmapMasks(masks, *SIZE)
    torch.manual_seed(3)
    losses = model(inputs, samples, mode='loss')
    assert list(losses) == ['loss_detection', 'loss_0_PredictionKLLoss', 'loss_1_FeatureMSELoss']
    torch.manual_seed(3)
    own = sum_losses(model.student.loss(inputs, samples))
    assert losses['loss_detection'].item() == pytest.approx(own.item(), rel=1e-5)
    with torch.no_grad():
        maps_S, maps_T = (
            torch.cat([m.flatten(1) for kind in d.rpn_head(d.extract_feat(inputs)) for m in kind], 1)
            for d in (model.student, model.teacher)
        )
    expected = nn.functional.kl_div(maps_S.log_softmax(1), maps_T.softmax(1), reduction='batchmean')
    assert losses['loss_0_PredictionKLLoss'].item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_log_names_losses_and_modules(make_tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(zero_shot_detector, 'print_log', lambda line, logger: lines.append(line))
    make_tiny('mask-rcnn_swin')
    assert lines[0].startswith('distillation: TwoStagePredictionLoss(')
    assert lines[0].endswith('on rpn_head, roi_head.bbox_head, roi_head.mask_head')
    assert lines[1].endswith('on 6 modules from backbone.stages.0.blocks.0 to neck')


def test_an_unsupported_loss_is_refused_when_built(tiny_cfg: Callable[[str], Any]) -> None:
    for loss, message in (('DensePredictionLoss', 'dense_predictions'), ('TwoStagePredictionLoss', 'does not support')):
        with pytest.raises(UserError, match=message):
            ZeroShotDetector(
                tiny_cfg('retinanet_r18'), QUANTIZER, dict(detection_weight=0.0, losses=[dict(type=f'mmzsq.{loss}')])
            )


# Loading a teacher.


def test_a_teacher_of_other_classes_is_refused(detector_cfg: dict[str, Any], checkpoint: Path) -> None:
    cfg = copy.deepcopy(detector_cfg)
    cfg['bbox_head']['num_classes'] = 5
    with pytest.raises(UserError, match='number of classes') as error:
        load_teacher(MODELS.build(cfg), str(checkpoint))
    assert 'bbox_head' in str(error.value)


def test_a_teacher_with_missing_weights_is_refused(float_detector: nn.Module, tmp_path: Path) -> None:
    state = float_detector.state_dict()
    name = next(iter(state))
    del state[name]
    torch.save(state, tmp_path / 'part.pth')
    with pytest.raises(UserError, match=f'missing .*{name}'):
        load_teacher(float_detector, str(tmp_path / 'part.pth'))


@pytest.mark.parametrize(
    ('file', 'message'), [(None, 'set load_from'), ('', 'set load_from'), ('nowhere.pth', 'nowhere.pth')]
)
def test_a_missing_teacher_is_a_user_error(float_detector: nn.Module, file: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_teacher(float_detector, file)


def test_a_damaged_teacher_is_named(float_detector: nn.Module, tmp_path: Path) -> None:
    (tmp_path / 'cut.pth').write_bytes(b'PK\x03\x04 cut off')
    with pytest.raises(UserError, match=r'cut\.pth'):
        load_teacher(float_detector, str(tmp_path / 'cut.pth'))


def test_the_meta_of_a_checkpoint_is_kept(float_detector: nn.Module, checkpoint: Path, tmp_path: Path) -> None:
    assert load_teacher(float_detector, str(checkpoint))['dataset_meta']['classes'] == ('a',)
    torch.save(float_detector.state_dict(), tmp_path / 'bare.pth')
    assert load_teacher(float_detector, str(tmp_path / 'bare.pth')) == {}


def test_digest_depends_on_weights_only(
    detector_cfg: dict[str, Any], float_detector: nn.Module, tmp_path: Path
) -> None:
    state = {name: value.contiguous() for name, value in float_detector.state_dict().items()}
    torch.save({'state_dict': {f'module.{name}': value for name, value in state.items()}}, tmp_path / 'ddp.pth')
    torch.save(dict(reversed(state.items())), tmp_path / 'bare.pth')
    save_file(state, tmp_path / 'weights.safetensors')
    wanted = digest(float_detector)
    for name in ('ddp.pth', 'bare.pth', 'weights.safetensors'):
        other = MODELS.build(copy.deepcopy(detector_cfg))
        assert digest(other) != wanted
        load_teacher(other, str(tmp_path / name))
        assert digest(other) == wanted
    # fp16 values are exact in fp32: equal values in another type are the same detector.
    half = copy.deepcopy(float_detector).half()
    assert digest(half) == digest(copy.deepcopy(half).float())


def test_digest_changes_with_the_last_bit_of_any_weight_or_statistic(float_detector: nn.Module) -> None:
    wanted = digest(float_detector)
    for name in ('weight', 'bias', 'running_var'):
        other = copy.deepcopy(float_detector)
        value = next(v for n, v in other.state_dict().items() if n.endswith(f'bn.{name}'))
        value[0] = torch.nextafter(value[0], torch.tensor(9.0))
        assert digest(other) != wanted


# A detector as synthesis sees it.


def caffe_style(mean: tuple[float, ...], std: tuple[float, ...], bgr_to_rgb: bool) -> nn.Module:
    """A small RetinaNet of MMDetection's config with the given preprocessor."""
    register_all_modules()
    configs = Path(mmdet.__file__).parent / '.mim' / 'configs'
    cfg = Config.fromfile(configs / 'retinanet/retinanet_r18_fpn_1x_coco.py')
    changes = {
        'data_preprocessor': dict(mean=list(mean), std=list(std), bgr_to_rgb=bgr_to_rgb),
        'backbone.init_cfg': None,
        'backbone.base_channels': 8,
        'neck': dict(in_channels=[8, 16, 32, 64], out_channels=8),
        'bbox_head': dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1),
    }
    cfg.merge_from_dict({f'model.{name}': value for name, value in changes.items()})
    return MODELS.build(cfg.model)


@pytest.mark.parametrize(
    ('mean', 'std', 'bgr_to_rgb', 'order'),
    [
        ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), False, 'bgr'),
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), True, 'rgb'),
        ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0), True, 'rgb'),
    ],
)
def test_inputs_equal_those_of_the_detectors_preprocessor(
    mean: tuple[float, ...], std: tuple[float, ...], bgr_to_rgb: bool, order: str
) -> None:
    detector = caffe_style(mean, std, bgr_to_rgb)
    # As OpenCV reads a file: uint8, BGR.
    bgr = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    image = torch.from_numpy(bgr).permute(2, 0, 1)
    sample = DetDataSample(metainfo=dict(img_shape=(64, 96)))
    expected = detector.data_preprocessor(dict(inputs=[image], data_samples=[sample]))['inputs']
    task = DetectionTask(detector)
    assert task.channel_order == order
    images = (image.flip(0) if order == 'rgb' else image)[None].float() / 255
    torch.testing.assert_close(task.normalize(images), expected, rtol=1e-5, atol=1e-3)


def test_a_task_freezes_its_detector_and_knows_its_classes() -> None:
    detector = caffe_style((0.0,) * 3, (1.0,) * 3, False).train()
    task = DetectionTask(detector)
    assert task.num_classes == 3
    assert not any(module.training for module in detector.modules())
    assert not any(parameter.requires_grad for parameter in detector.parameters())
    with pytest.raises(UserError, match='num_classes'):
        num_classes(nn.Linear(1, 1))


def test_the_loss_of_any_detector_reaches_the_pixels() -> None:
    task = DetectionTask(caffe_style((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), False))
    images = torch.rand(2, 3, 64, 96, requires_grad=True)
    labels = [
        InstanceData(bboxes=torch.tensor([[8.0, 8.0, 60.0, 50.0]]), labels=torch.tensor([2])),
        InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)),
    ]
    samples = task.data_samples(labels, (64, 96))
    loss = task.loss(images, samples)
    terms = task.detector.loss(task.normalize(images), samples)
    assert float(loss) == pytest.approx(float(sum(sum(value) for value in terms.values())), rel=1e-5)
    loss.backward()
    assert images.grad.abs().sum() > 0


def test_losses_are_summed_as_mmengine_does(float_detector: nn.Module) -> None:
    losses = dict(loss_cls=[torch.tensor([1.0, 3.0]), torch.tensor(4.0)], acc=torch.tensor(99.0), loss=torch.ones(2))
    assert float(sum_losses(losses)) == float(float_detector.parse_losses(losses)[0]) == 7.0


def test_predictions_are_in_pixels_of_the_image_given(float_detector: nn.Module) -> None:
    """A head with a fixed answer: one anchor of one cell is certain of class 5, all others predict nothing."""
    task = DetectionTask(float_detector)
    head = task.detector.bbox_head
    maps = [torch.full((1, 3 * 13, 64 // stride, 96 // stride), -20.0) for stride in (8, 16, 32)]
    anchor, row, column = 1, 2, 3
    # Offsets of 0 give a box of the anchor's size at the center of the cell.
    answer = maps[0].view(1, 3, 13, 8, 12)[0, anchor, :, row, column]
    answer[:4], answer[4], answer[5 + 5] = 0.0, 20.0, 20.0
    head.forward = lambda feats: (maps,)
    [found] = task.predict(torch.rand(1, 3, 64, 96))
    assert found.labels.tolist() == [5]
    width, height = head.anchors[0, anchor].tolist()
    center_x, center_y = (column + 0.5) * 8, (row + 0.5) * 8
    expected = [center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2]
    torch.testing.assert_close(found.bboxes[0], torch.tensor(expected), rtol=0, atol=1e-3)
    assert found.bboxes.device.type == 'cpu'


def test_batch_augments_of_float_training_are_off(detector_cfg: dict[str, Any]) -> None:
    """Like YOLOX, whose batches change their size every ten iterations."""
    resize = dict(type='BatchSyncRandomResize', random_size_range=(32, 33), interval=1, size_divisor=32)
    preprocessor = dict(detector_cfg['data_preprocessor'], batch_augments=[resize])
    resized = dict(detector_cfg, data_preprocessor=preprocessor)
    MessageHub.get_current_instance().update_info('iter', 0)
    sizes = []
    for owner in (MODELS.build(copy.deepcopy(resized)), ZeroShotDetector(resized, QUANTIZER)):
        for _ in range(2):
            images, samples = batch()
            data = owner.data_preprocessor(dict(inputs=list(images), data_samples=samples), training=True)
        sizes.append(tuple(data['inputs'].shape[2:]))
    assert sizes == [(32, 32), SIZE]


def test_teacher_and_student_see_the_same_augmented_images(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Always mirrors: both detectors see the mirrored images, and the batch itself does not change."""
    model = make(augmentation=dict(flip=1.0)).train()
    seen = []
    for detector in (model.student, model.teacher):
        run = detector.forward
        monkeypatch.setattr(detector, 'forward', lambda x, *a, run=run, **k: (seen.append(x), run(x, *a, **k))[1])
    inputs = torch.rand(2, 3, *SIZE)
    model.loss(inputs, None)
    assert len(seen) == 2
    for view in seen:
        assert torch.equal(view, inputs.flip(3))


def test_augmentation_with_a_detection_loss_is_an_error(make: Make) -> None:
    with pytest.raises(UserError, match=r'augmentation.*detection_weight=0'):
        make(PAPER, calibrate=False, augmentation=dict(flip=0.5))


def test_channels_last_changes_the_layout_and_not_the_losses(make: Make) -> None:
    inputs = torch.rand(2, 3, *SIZE)
    results = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        model = make(quantizer=dict(QUANTIZER, w_bits=8, a_bits=8), channels_last=channels_last)
        maps: list[Tensor] = []
        for detector in (model.student, model.teacher):
            detector.backbone.register_forward_hook(lambda _, __, outputs, maps=maps: maps.extend(outputs))
        losses = model.loss(inputs, None)
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
        # A map with one channel or one pixel has both layouts.
        wide = [m for m in maps if m.shape[1] > 1 and m.shape[2] * m.shape[3] > 1]
        assert wide and all(m.is_contiguous(memory_format=torch.channels_last) is channels_last for m in wide)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-5)
    # Sums in another order round a few values to another level.
    for name, gradient in results[0][1].items():
        assert float((results[1][1][name] - gradient).norm()) <= 0.05 * float(gradient.norm()) + 1e-6, name
