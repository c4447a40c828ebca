# SPDX-License-Identifier: Apache-2.0
"""Released OpenMMLab packages work with current PyTorch, without a compiler and without unsafe loading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import mmcv.ops
import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from torch.utils._python_dispatch import TorchDispatchMode

import mmzsq.models  # noqa: F401  which applies the patches of MMDetection
from mmzsq import compat
from mmzsq.checkpoint import SAFE_LOADING, read_checkpoint
from mmzsq.errors import UserError
from mmzsq.mmcv_ops import torchvision_ops

served_by_torchvision = pytest.mark.skipif(
    not isinstance(sys.modules.get('mmcv._ext'), torchvision_ops.TorchvisionOps),
    reason='a compiled mmcv is installed',
)


def plain_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float, offset: int) -> list[int]:
    """Compute greedy NMS in a loop over pairs of boxes."""
    kept: list[int] = []
    for i in np.argsort(-scores, kind='stable'):
        for j in kept:
            low = np.maximum(boxes[i, :2], boxes[j, :2])
            high = np.minimum(boxes[i, 2:], boxes[j, 2:])
            overlap = np.prod(np.clip(high - low + offset, 0, None))
            areas = [np.prod(boxes[k, 2:] - boxes[k, :2] + offset) for k in (i, j)]
            if overlap / (sum(areas) - overlap) > threshold:
                break
        else:
            kept.append(int(i))
    return kept


@served_by_torchvision
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nms_equals_the_plain_algorithm(dtype: torch.dtype, offset: int) -> None:
    corner = torch.randint(0, 24, (60, 2))
    boxes = torch.cat((corner, corner + torch.randint(1, 12, (60, 2))), 1).to(dtype)
    scores = torch.linspace(0.1, 0.9, 60)[torch.randperm(60)].to(dtype)
    # No ratio of small areas equals this threshold, so rounding cannot change the result.
    _, kept = mmcv.ops.nms(boxes, scores, iou_threshold=0.3701, offset=offset)
    expected = plain_nms(boxes.double().numpy(), scores.double().numpy(), 0.3701, offset)
    assert kept.tolist() == expected
    assert 0 < len(expected) < 60


@served_by_torchvision
def test_nms_of_no_boxes_is_empty() -> None:
    dets, kept = mmcv.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)


@served_by_torchvision
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_roi_align_of_a_ramp_is_the_center_of_each_bin(dtype: torch.dtype) -> None:
    ramp = torch.arange(32.0).expand(1, 1, 32, 32).to(dtype)
    roi = torch.tensor([[0.0, 8.0, 8.0, 40.0, 40.0]], dtype=dtype)
    # Box 8..40 at scale 1/2 spans 4..20; bins of 4 have centers 6, 10, 14, 18; aligned: minus 1/2.
    out = mmcv.ops.roi_align(ramp, roi, (4, 4), 0.5, 2, 'avg', True)
    assert out.dtype == dtype
    torch.testing.assert_close(out[0, 0], torch.tensor([5.5, 9.5, 13.5, 17.5], dtype=dtype).expand(4, 4))


@served_by_torchvision
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_gradient_is_that_of_its_output(sampling_ratio: int, aligned: bool) -> None:
    features = torch.rand(2, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.3, 0.7, 12.1, 9.9], [1, 3.0, 2.0, 17.0, 13.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: mmcv.ops.roi_align(x, rois, (2, 3), 0.5, sampling_ratio, 'avg', aligned),
        features,
    )


@served_by_torchvision
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_roi_align_gradient_in_16_bits_is_the_rounded_fp32_one(dtype: torch.dtype) -> None:
    rois = torch.tensor([[0.0, 1.0, 2.0, 14.0, 12.0], [0.0, 0.0, 0.0, 8.0, 8.0]])
    grads = []
    for kind in (torch.float32, dtype):
        features = torch.zeros(1, 3, 8, 8, dtype=kind, requires_grad=True)
        mmcv.ops.roi_align(features, rois.to(kind), (3, 3), 0.5, 2, 'avg', True).sum().backward()
        grads.append(features.grad)
    assert grads[1].dtype == dtype
    torch.testing.assert_close(grads[1], grads[0].to(dtype))
    assert grads[0].sum() > 0


@served_by_torchvision
def test_an_unsupported_operator_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"'carafe_forward'.*mim install mmcv==2\.1"):
        torchvision_ops.TorchvisionOps().carafe_forward(torch.zeros(1))
    with pytest.raises(UserError, match="pool_mode='max'"):
        mmcv.ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 0, 'max')


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter with the given folders first on its path."""
    inserts = ''.join(f'sys.path.insert(0, {str(folder)!r})\n' for folder in path)
    return subprocess.run(
        [sys.executable, '-c', f'import sys\n{inserts}{code}'],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_compiled_mmcv_is_not_replaced(tmp_path: Path, repo: Path) -> None:
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text("__version__ = '2.1.0'\n")
    (package / '_ext.py').write_text("nms = 'compiled'\n")
    result = python('import mmzsq, mmcv._ext as e\nprint(e.nms, e.__file__)', repo, tmp_path)
    assert result.stdout.split() == ['compiled', str(package / '_ext.py')], result.stderr


def test_a_compiled_mmcv_that_does_not_load_is_not_hidden(tmp_path: Path, repo: Path) -> None:
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text("__version__ = '2.1.0'\n")
    (package / '_ext.py').write_text("raise ImportError('undefined symbol')\n")
    result = python('import mmzsq, mmcv._ext', repo, tmp_path)
    assert 'undefined symbol' in result.stderr


def test_a_missing_mmcv_is_reported_with_the_command_to_run(repo: Path) -> None:
    result = python("sys.modules['mmcv'] = None\nimport mmzsq", repo)
    assert 'mmcv is not installed' in result.stderr.splitlines()[-1]
    assert 'pip install --no-deps mmcv-lite==2.1.0' in result.stderr


@pytest.mark.skipif(
    mmengine.__version__ != '0.10.7',
    reason="OneDL's MMEngine takes every mmcv._ext for compiled, and then imports only what mmcv-lite has",
)
def test_mmengine_sees_that_the_operators_are_not_compiled() -> None:
    from mmengine.utils.dl_utils import mmcv_full_available

    stand_in = isinstance(sys.modules['mmcv._ext'], torchvision_ops.TorchvisionOps)
    assert mmcv_full_available() is not stand_in


def test_importing_the_commands_leaves_standard_output_to_them(repo: Path) -> None:
    # OneDL's MMDetection prints on import which of its parts are missing.
    assert python('import mmzsq.cli', repo).stdout == ''


def test_installing_twice_changes_nothing() -> None:
    before = Config._get_cfg_path, sys.modules['mmcv._ext']
    compat.install()
    assert before == (Config._get_cfg_path, sys.modules['mmcv._ext'])


needs_safe_loading = pytest.mark.skipif(not SAFE_LOADING, reason='torch before 2.6 cannot register safe objects')


@needs_safe_loading
def test_log_history_and_numpy_values_load_with_weights_only(tmp_path: Path) -> None:
    history = HistoryBuffer([0.5, 0.25], [1, 3])
    saved = {
        'history': history,
        'float': np.float32(2.5),
        'int': np.int64(7),
        'flags': np.eye(2) > 0,
    }
    torch.save(saved, tmp_path / 'hub.pth')
    loaded = torch.load(tmp_path / 'hub.pth', weights_only=True)
    assert loaded['history'].mean() == history.mean() == 0.1875
    assert loaded['history'].statistics('max') == 0.5
    assert (loaded['float'], loaded['int']) == (2.5, 7)
    np.testing.assert_array_equal(loaded['flags'], saved['flags'])


@needs_safe_loading
def test_a_checkpoint_loads_after_another_load_cleared_the_register(tmp_path: Path) -> None:
    torch.save({'state_dict': {}, 'message_hub': {'loss': HistoryBuffer([0.5], [1])}}, tmp_path / 'a.pth')
    # OneDL's MMEngine does so.
    with torch.serialization.safe_globals([HistoryBuffer, np.ndarray, np.dtype, *np.dtype('f8').__reduce__()[:1]]):
        pass
    assert HistoryBuffer not in torch.serialization.get_safe_globals()
    assert read_checkpoint(tmp_path / 'a.pth')['message_hub']['loss'].mean() == 0.5


@needs_safe_loading
def test_a_file_of_numpy_1_loads(tmp_path: Path) -> None:
    torch.save(np.arange(3.0), tmp_path / 'new.pth')
    with ZipFile(tmp_path / 'new.pth') as new, ZipFile(tmp_path / 'old.pth', 'w') as old:
        for entry in new.infolist():
            # The pickle stores module names as lines of text, so a shorter name can replace a longer one.
            data = new.read(entry).replace(b'numpy._core', b'numpy.core')
            old.writestr(entry.filename, data)
    loaded = torch.load(tmp_path / 'old.pth', weights_only=True)
    np.testing.assert_array_equal(loaded, np.arange(3.0))


@needs_safe_loading
@pytest.mark.parametrize('target', [(HistoryBuffer, '__init__'), (torch.Tensor, 'numpy')])
def test_a_file_cannot_reach_other_attributes(tmp_path: Path, target: tuple[type, str]) -> None:
    class Reach:
        def __reduce__(self) -> tuple:
            return getattr, target

    torch.save(Reach(), tmp_path / 'reach.pth')
    with pytest.raises(Exception, match='refers to the attribute'):
        torch.load(tmp_path / 'reach.pth', weights_only=True)


def config(folder: Path, text: str) -> Config:
    """Write a config file and load it."""
    path = folder / 'leaf.py'
    path.write_text(text)
    return Config.fromfile(path)


def test_a_base_of_mmdet_needs_no_pkg_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    cfg = config(tmp_path, "_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'")
    assert cfg.model.type == 'YOLOX'


def test_a_base_of_this_package_resolves_anywhere(tmp_path: Path, repo: Path) -> None:
    name = min((repo / 'configs').rglob('*.py')).relative_to(repo / 'configs').as_posix()
    path, scope = Config._get_cfg_path(f'mmzsq::{name}', str(tmp_path / 'leaf.py'))
    assert Path(path).read_text() == (repo / 'configs' / name).read_text()
    assert scope is None


def test_a_misspelled_base_suggests_the_nearest(tmp_path: Path, repo: Path) -> None:
    name = min((repo / 'configs').rglob('*.py')).relative_to(repo / 'configs').as_posix()
    with pytest.raises(UserError, match=name):
        config(tmp_path, f"_base_ = 'mmzsq::{name[:-3]}_x.py'")


def test_a_base_of_a_package_that_is_missing_fails_as_in_mmengine(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match='does not support to load nowhere'):
        config(tmp_path, "_base_ = 'nowhere::some/config.py'")


def test_ssd_predicts(zero_weights: None) -> None:
    """Unpatched, MMDetection 3.3.0 raises an AttributeError."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    from mmzsq.tasks.detection_task import DetectionTask

    register_all_modules()
    cfg = Config.fromfile(compat.package_configs('mmdet') / 'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py')
    cfg.model.test_cfg.score_thr = 0.0
    (found,) = DetectionTask(MODELS.build(cfg.model)).predict(torch.rand(1, 3, 320, 320))
    assert len(found) > 0 and torch.isfinite(found.scores).all()


def test_guided_anchors_predict_several_images_as_each_alone() -> None:
    """Unpatched, MMCV's masked convolution takes one image."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    from mmzsq.tasks.detection_task import DetectionTask

    register_all_modules()
    cfg = Config.fromfile(compat.package_configs('mmdet') / 'guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py')
    cfg.model.backbone.update(depth=18, base_channels=8, stem_channels=8, init_cfg=None)
    cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=2)
    cfg.model.test_cfg.update(score_thr=0.0, max_per_img=5)
    torch.manual_seed(0)
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    images = torch.rand(2, 3, 64, 64)
    together = DetectionTask(detector).predict(images)
    alone = [DetectionTask(detector).predict(image[None])[0] for image in images]
    for found, expected in zip(together, alone, strict=True):
        assert len(found) == 5
        torch.testing.assert_close(found.bboxes, expected.bboxes, rtol=1e-4, atol=1e-3)


def test_point_assigner_creates_its_tensors_on_the_device_of_the_points() -> None:
    """With points on a device of their own, tensors on the CPU cannot be indexed by those of the points."""
    from mmdet.models.task_modules import PointAssigner
    from mmengine.structures import InstanceData

    devices = []

    class Ranges(TorchDispatchMode):
        """Record the devices of ranges."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if 'arange' in str(func):
                devices.append(made.device.type)
            return made

    points = InstanceData(priors=torch.zeros(4, 3, device='meta'))
    labels = InstanceData(bboxes=torch.zeros(1, 4, device='meta'), labels=torch.zeros(1, device='meta').long())
    # Meta tensors have no values, so the assignment itself fails.
    with Ranges(), pytest.raises((RuntimeError, NotImplementedError)):
        PointAssigner().assign(points, labels)
    assert devices == ['meta']
    points = InstanceData(priors=torch.tensor([[4.0, 4.0, 8.0], [60.0, 60.0, 8.0]]))
    labels = InstanceData(bboxes=torch.tensor([[0.0, 0.0, 32.0, 32.0]]), labels=torch.tensor([3]))
    assert PointAssigner(pos_num=1).assign(points, labels).gt_inds.tolist() == [1, 0]


def test_boxes_of_coinciding_points_have_a_finite_gradient_and_others_are_unchanged() -> None:
    from mmdet.models.dense_heads import RepPointsHead

    head = RepPointsHead(2, 8, num_points=9, transform_method='moment', init_cfg=None)
    pts = torch.randn(5, 18) * 20
    means, deviations = pts.view(5, 9, 2).mean(1), pts.view(5, 9, 2).std(1)
    expected = torch.cat((means - deviations, means + deviations), 1)[:, [1, 0, 3, 2]]
    torch.testing.assert_close(head.points2bbox(pts), expected)
    pts[0] = 3.0
    pts.requires_grad_()
    boxes = head.points2bbox(pts)
    torch.testing.assert_close(boxes[0], torch.full((4,), 3.0), rtol=0, atol=0.01)
    (grad,) = torch.autograd.grad(boxes.square().sum(), pts)
    assert torch.isfinite(grad).all() and grad.any(1).all()


@pytest.mark.parametrize('on_cpu', [True, False])
def test_deformable_attention_samples_in_fp32(on_cpu: bool) -> None:
    """In bf16, this location would be rounded to the middle between two other pixels."""
    from mmcv.ops import multi_scale_deform_attn as module

    value = (torch.arange(512.0) % 8).bfloat16().view(1, 512, 1, 1)
    shapes, location = torch.tensor([[1, 512]]), torch.tensor([(300.75 + 0.5) / 512, 0.5])
    location = location.view(1, 1, 1, 1, 1, 2).requires_grad_()
    weight = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        if on_cpu:
            found = module.multi_scale_deformable_attn_pytorch(value, shapes, location, weight)
        else:
            start = torch.zeros(1, dtype=torch.long)
            found = module.MultiScaleDeformableAttnFunction.apply(value, shapes, start, location, weight, 64)
    low, high = value[0, 300].float(), value[0, 301].float()
    torch.testing.assert_close(found.view(1, 1), 0.25 * low + 0.75 * high)
    (grad,) = torch.autograd.grad(found.sum(), location)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.flatten()[0], 512 * (high - low).squeeze())
