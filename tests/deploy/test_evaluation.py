# SPDX-License-Identifier: Apache-2.0
"""``python -m mmzsq.test CONFIG model.onnx`` reports what it reports for the checkpoint of the file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS
from mmengine.structures import InstanceData

from mmzsq import cli
from mmzsq import export as export_tool
from mmzsq import test as test_tool
from mmzsq.config import compose
from mmzsq.deploy import OnnxDetector, export, export_float

RUNTIMES = ('onnxruntime', 'openvino')
CLASSES_OF_DATA = 'test_dataloader.dataset.metainfo.classes'
CLASSES = ('cat', 'dog', 'person')


@METRICS.register_module(force=True)
class DetectionSums(BaseMetric):
    """Sums over scores, boxes and mask pixels of the best detections; the AP of random weights is 0."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        for sample in data_samples:
            found = sample['pred_instances']
            best = found['scores'].argsort(descending=True)[:10]
            masks = found['masks'][best.numpy()].sum() if 'masks' in found else 0
            values = (found['scores'][best].double().sum(), found['bboxes'][best].double().sum(), masks)
            self.results.append(tuple(float(value) for value in values))

    def compute_metrics(self, results: list[tuple[float, ...]]) -> dict[str, float]:
        return dict(zip(('scores', 'bboxes', 'masks'), np.array(results).sum(0).tolist(), strict=True))


@pytest.fixture
def mask_rcnn(tiny_cfg: Callable[[str], Any], repo: Path, tmp_path: Path) -> Config:
    """Config of a tiny Mask R-CNN with a zsq section and four images on disk."""
    rng = np.random.default_rng(0)
    (tmp_path / 'images').mkdir()
    boxes = []
    for index in range(4):
        image = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (96, 64))
        cv2.imwrite(str(tmp_path / f'images/{index}.png'), image)
        boxes.append(dict(id=index + 1, image_id=index, category_id=1, bbox=[8, 8, 30, 20], area=600, iscrowd=0))
    coco = dict(
        images=[dict(id=index, file_name=f'{index}.png', width=96, height=64) for index in range(4)],
        annotations=boxes,
        categories=[dict(id=index, name=name) for index, name in enumerate(CLASSES)],
    )
    (tmp_path / 'coco.json').write_text(json.dumps(coco))
    cfg = Config.fromfile(repo / 'configs/_base_/zsq_w4a8.py')
    cfg.merge_from_dict({'zsq.quantizer.a_bits': 4, 'zsq.quantizer.first_bits': 'same'})
    cfg.model = tiny_cfg('mask-rcnn_r18')
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(64, 64), keep_ratio=False),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ]
    dataset = dict(
        type='CocoDataset',
        data_root=str(tmp_path),
        ann_file='coco.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=CLASSES),
        test_mode=True,
        pipeline=pipeline,
    )
    cfg.test_dataloader = ConfigDict(
        batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset
    )
    cfg.test_evaluator = ConfigDict(type='DetectionSums', prefix='sum')
    cfg.test_cfg = ConfigDict(type='TestLoop')
    cfg.default_scope = 'mmdet'
    # A hook that copies the model, which a session does not allow.
    cfg.custom_hooks = [dict(type='EMAHook')]
    cfg.load_from = 'gone.pth'
    return cfg


@pytest.fixture
def exported(mask_rcnn: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the config, a quantized checkpoint with random weights, and its file."""
    monkeypatch.chdir(tmp_path)
    # MMEngine formats a config by yapf several times a run, a second each.
    text = property(lambda cfg: ''.join(f'{key} = {value!r}\n' for key, value in cfg.to_dict().items()))
    monkeypatch.setattr(Config, 'pretty_text', text)
    mask_rcnn.dump('config.py')
    cfg = mask_rcnn.copy()
    cfg.work_dir = 'work'
    torch.manual_seed(0)
    model: Any = MODELS.build(compose(cfg).model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
        for name in ('fc_cls', 'fc_reg'):
            torch.nn.init.normal_(getattr(model.student.roi_head.bbox_head, name).weight, std=0.3)
    sample = dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)], data_samples=None)
    sample['data_samples'] = [DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))]
    model.initialize_quantizers([sample])
    torch.save(dict(state_dict=model.state_dict(), meta=dict(mmzsq=dict(teacher='gone.pth'))), 'student.pth')
    export(model, 'student.onnx', size=(64, 64), classes=CLASSES)
    return tmp_path


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Run the tool and return the metrics that it reports."""

    def evaluate(*args: str) -> dict[str, float]:
        monkeypatch.setattr(
            sys, 'argv', ['test.py', *args, '--work-dir', f'tested/{len(list(Path().glob("tested/*")))}']
        )
        cli.run(test_tool.main)
        newest = max(Path('tested').rglob('*.json'), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text().splitlines()[-1])

    return evaluate


def test_a_file_has_the_metrics_of_its_checkpoint(exported: Path, evaluate: Any) -> None:
    """Within what engines differ: a value that crosses a border between two levels changes some detections."""
    expected = evaluate('config.py', 'student.pth')
    assert expected['sum/scores'] > 1 and expected['sum/masks'] > 100
    for runtime in RUNTIMES:
        found = evaluate('config.py', 'student.onnx', '--runtime', runtime, '--threads', '1')
        assert found['sum/scores'] == pytest.approx(expected['sum/scores'], rel=0.02)
        assert found['sum/masks'] == pytest.approx(expected['sum/masks'], rel=0.2)


def test_a_float_file_has_exactly_the_metrics_of_its_checkpoint(exported: Path, evaluate: Any) -> None:
    cfg = Config.fromfile('config.py')
    for key in ('zsq', 'runner_type', 'custom_hooks'):
        cfg.pop(key)
    cfg.dump('float.py')
    torch.manual_seed(1)
    detector: Any = MODELS.build(cfg.model)
    for name in ('fc_cls', 'fc_reg'):
        torch.nn.init.normal_(getattr(detector.roi_head.bbox_head, name).weight, std=0.3)
    torch.save(detector.state_dict(), 'float.pth')
    export_float(detector, 'float.onnx', size=(64, 64), classes=CLASSES)
    expected = evaluate('float.py', 'float.pth')
    assert expected['sum/masks'] > 100
    for runtime in RUNTIMES:
        found = evaluate('float.py', 'float.onnx', '--runtime', runtime)
        for key in ('sum/scores', 'sum/bboxes', 'sum/masks'):
            assert found[key] == pytest.approx(expected[key], rel=1e-3), key


def test_a_composed_config_evaluates_the_file_too(exported: Path, evaluate: Any) -> None:
    expected = evaluate('config.py', 'student.onnx', '--runtime', 'onnxruntime')
    cfg = Config.fromfile('config.py')
    cfg.work_dir = 'work'
    compose(cfg).dump('composed.py')
    found = evaluate('composed.py', 'student.onnx', '--runtime', 'onnxruntime')
    assert found['sum/bboxes'] == expected['sum/bboxes']


def test_the_export_reports_metrics_of_checkpoint_and_files(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first images of the test data."""
    options = ('--out', 'student.onnx', '--size', '64', '64', '--verify', '1', '--ap', '3')
    monkeypatch.setattr(sys, 'argv', ['export', 'config.py', 'student.pth', *options])
    cli.run(export_tool.main)
    found = json.loads(Path('deploy.json').read_text())['models']['student.onnx']['ap']
    assert set(found) == {'checkpoint', *RUNTIMES}
    assert {report['images'] for report in found.values()} == {3}
    expected = found['checkpoint']['metrics']['sum/scores']
    assert expected > 1
    for runtime in RUNTIMES:
        assert found[runtime]['metrics']['sum/scores'] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(('count', 'images', 'precision'), [(2, 2, 1.0), (4, 4, 0.5), (9, 4, 0.5)])
def test_accuracy_is_that_of_the_first_images(mask_rcnn: Config, count: int, images: int, precision: float) -> None:
    """A detector that is right on the first two images, and finds nothing on the others."""
    mask_rcnn.test_evaluator = ConfigDict(
        type='CocoMetric', ann_file=str(Path(mask_rcnn.test_dataloader.dataset.data_root) / 'coco.json'), metric='bbox'
    )

    class Right:
        @staticmethod
        def test_step(batch: Any) -> list[Any]:
            (sample,) = batch['data_samples']
            boxes = torch.tensor([[8.0, 8.0, 38.0, 28.0]])[: int(sample.img_id < 2)]
            one = torch.ones(len(boxes))
            sample.pred_instances = InstanceData(bboxes=boxes, scores=one, labels=one.long())
            return [sample.to_dict()]

    found = export_tool.accuracy(Right(), mask_rcnn, count)
    assert found['images'] == images
    assert found['metrics']['coco/bbox_mAP'] == pytest.approx(precision, abs=0.01)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_two_stages_find_the_same_on_an_image_that_is_padded(mask_rcnn: Config, tmp_path: Path, runtime: str) -> None:
    """An image of 96x64 pixels is scaled to 72x48 by keep_ratio; the file takes 96x96, and PyTorch pads to that."""
    mask_rcnn.test_dataloader.dataset.pipeline[1] = dict(type='Resize', scale=(72, 64), keep_ratio=True)
    mask_rcnn.model.data_preprocessor.pad_size_divisor = 96
    register_all_modules()
    torch.manual_seed(1)
    detector: Any = MODELS.build(mask_rcnn.model).eval()
    for name in ('fc_cls', 'fc_reg'):
        torch.nn.init.normal_(getattr(detector.roi_head.bbox_head, name).weight, std=0.3)
    assert export_tool.image_size(export_tool.Student(detector, CLASSES, mask_rcnn)) == (96, 96)
    export_float(detector, tmp_path / 'float.onnx', size=(96, 96), classes=CLASSES)
    mask_rcnn.model.data_preprocessor.pad_size_divisor = 32
    deployed = OnnxDetector(tmp_path / 'float.onnx', mask_rcnn, runtime, threads=1)
    image = cv2.imread(str(tmp_path / 'images/0.png'))
    sample = deployed._prepare(image)
    assert tuple(sample['inputs'].shape[1:]) == (48, 72)
    found = deployed([image])[0].pred_instances
    with torch.no_grad():
        batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples'].clone()])
        expected = detector.test_step(batch)[0].pred_instances
    assert len(found) == len(expected) > 10
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.bboxes, expected.bboxes, rtol=1e-3, atol=0.05)
    # In pixels of the image, 64 high and 96 wide.
    assert found.masks.shape[1:] == (64, 96) and float(found.bboxes[:, 3].max()) <= 64


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['config.py', 'none.onnx'], 'none.onnx does not exist'),
        (['config.py', 'student.box_head.onnx'], 'is the part box_head of a two-stage detector'),
        (['config.py', 'student.pth', '--runtime', 'openvino'], 'are for an exported .onnx file'),
        (
            [
                'config.py',
                'student.onnx',
                '--cfg-options',
                "test_dataloader.dataset.metainfo.classes=['cat','dog','cow']",
            ],
            "class 2 of the config (test_dataloader.dataset), 'cow', is not in",
        ),
        (
            ['config.py', 'student.onnx', '--cfg-options', f"{CLASSES_OF_DATA}=['cat']"],
            'exported with 3 classes, but the test data of the config have 1',
        ),
        (['config.py', 'student.onnx', '--cfg-options', 'model.type=FasterRCNN'], 'the config describes a FasterRCNN'),
        (['config.py', 'large.onnx'], 'large.onnx is damaged'),
    ],
)
def test_a_mistake_is_one_message(
    args: list[str], message: str, exported: Path, evaluate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Path('large.onnx').write_bytes(b'not a model')
    with pytest.raises(SystemExit) as ended:
        evaluate(*args)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: ')
    assert message in error
