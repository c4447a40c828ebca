# SPDX-License-Identifier: Apache-2.0
"""``mmzsq.quantize`` from a file of another project to a verified ONNX file."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torchvision.models import detection

from mmzsq import quantize
from mmzsq.cli import Interruption
from mmzsq.config import compose
from mmzsq.converters.conversion import ConvertedDetector
from mmzsq.converters.files import COCO, ForeignDetector, convert_file
from mmzsq.errors import NotEvaluatedError, UserError
from mmzsq.pipelines import Frame, frame_of

SMALL = (
    *('zsq.calibration_set.num_images=2', 'zsq.train.init_batches=1', 'zsq.train.num_workers=0'),
    'zsq.train.batch_size=2',
)


def sized(pixels: int) -> list[str]:
    """Return settings for square images."""
    scale = f'dataset.pipeline.1.scale=({pixels},{pixels})'
    return [
        *SMALL,
        f'zsq.synthesis.synthesize.image_size={pixels}',
        f'test_dataloader.{scale}',
        f'val_dataloader.{scale}',
    ]


def test_without_a_target_it_stops_after_the_student_and_prints_the_export(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize.export, 'main', lambda _: pytest.fail('it exports'))
    quantize.main([str(shared / 'weights/yolov5n.pt'), '--preset', 'instant', '--cfg-options', *sized(64)])
    out = tmp_path / 'work_dirs/yolov5n_w8a8'
    leaf = (out / 'yolov5n_w8a8.py').read_text()
    assert leaf.startswith("_base_ = ['mmzsq::yolov5/yolov5-n_coco.py', 'mmzsq::_base_/zsq_w8a8.py']\nload_from = ")
    assert len(leaf.splitlines()) == 3
    assert quantize.last_student(out / 'run') == out / 'run/epoch_0.pth'
    command = 'python -m mmzsq.export work_dirs/yolov5n_w8a8/yolov5n_w8a8.py work_dirs/yolov5n_w8a8/run/epoch_0.pth'
    assert command in capsys.readouterr().out


@pytest.mark.nightly
def test_one_command_from_an_ultralytics_file_to_a_verified_onnx_file(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    weights = str(shared / 'weights/yolov5n.pt')
    quantize.main([weights, '--preset', 'instant', '--target', 'onnxruntime', '--cfg-options', *sized(256)])
    out = tmp_path / 'work_dirs/yolov5n_w8a8'
    assert (out / 'yolov5n_w8a8.onnx').is_file()
    (entry,) = json.loads((out / 'deploy.json').read_text()).values()
    assert entry['runtimes']['onnxruntime']


@pytest.mark.parametrize('own_classes', [False, True])
def test_the_config_of_torchvision_weights_fits_them(tmp_path: Path, own_classes: bool) -> None:
    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3 if own_classes else 91)
    path = tmp_path / 'mask.pth'
    torch.save({'model': model.state_dict(), 'epoch': 1}, path)
    detector = convert_file(path, ['cell', 'nucleus'] if own_classes else None)
    assert detector.classes[0] == ('cell' if own_classes else 'person')
    leaf = tmp_path / 'leaf.py'
    leaf.write_text(quantize.leaf_config(detector, path, 'w4a8', 'instant', 'onnxruntime'))
    cfg = Config.fromfile(leaf)
    register_all_modules()
    with torch.device('meta'):
        shapes = {name: value.shape for name, value in MODELS.build(cfg.model).state_dict().items()}
    assert shapes == {name: value.shape for name, value in detector.converted.state_dict.items()}
    composed = compose(cfg)
    assert composed.zsq.preset == 'instant'
    assert (composed.zsq.quantizer.w_bits, composed.zsq.quantizer.target) == (4, 'onnxruntime')
    if own_classes:
        assert composed.test_dataloader.dataset.metainfo.classes == ['cell', 'nucleus']


def test_a_wrong_file_ends_in_one_message_that_lists_supported_detectors(tmp_path: Path) -> None:
    path = tmp_path / 'other.pth'
    torch.save({'fc.weight': torch.zeros(2, 2)}, path)
    for file in (path, tmp_path / 'missing.pt'):
        with pytest.raises(UserError, match=rf'{file.name}.*YOLOv5.*fasterrcnn_resnet50_fpn'):
            quantize.main([str(file)])


class Steps:
    """Training and export that only write their files, and may be killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.killed = ''
        self.not_evaluated = False
        monkeypatch.setattr(quantize.train, 'main', self.train)
        monkeypatch.setattr(quantize.export, 'main', self.export)
        monkeypatch.setattr(quantize.export, 'runtimes_for', lambda _: [])

    def step(self, name: str) -> None:
        """Enter a step, in which the process may be killed."""
        self.done.append(name)
        if self.killed == name:
            raise Interruption

    def train(self, arguments: list[str]) -> None:
        """Synthesize, and write a checkpoint after each of two epochs, as ``mmzsq.train`` does."""
        run_dir = Path(arguments[arguments.index('--work-dir') + 1])
        run_dir.mkdir(exist_ok=True)
        if '--resume' not in arguments:
            self.step('set')
            (run_dir / 'epoch_1.pth').write_bytes(b'1')
        self.step('training')
        (run_dir / 'epoch_2.pth').write_bytes(b'2')
        if self.not_evaluated:
            raise NotEvaluatedError('no data')

    def export(self, arguments: list[str]) -> None:
        """Write a file, as ``mmzsq.export`` does."""
        self.step('export --benchmark' if '--benchmark' in arguments else 'export')
        assert 'epoch_2.pth' in arguments[1]
        out = Path(arguments[arguments.index('--out') + 1])
        out.write_bytes(b'onnx')
        out.with_suffix('.box_head.onnx').write_bytes(b'part')


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Steps:
    """Fake steps, in an empty folder with a file of a detector."""
    monkeypatch.chdir(tmp_path)
    converted = ConvertedDetector('YOLO11', 'n', 2, {'weight': torch.zeros(1)})
    detector = ForeignDetector(converted, ('a', 'b'), 'mmzsq::yolo11/yolo11-n_coco.py', None, ('bbox_head',), True)
    monkeypatch.setattr(quantize, 'convert_file', lambda *_: detector)
    Path('my.pt').write_bytes(b'one detector')
    return Steps(monkeypatch)


@pytest.mark.parametrize(
    ('killed', 'again'),
    [
        ('set', ['set', 'training', 'export']),
        ('training', ['training', 'export']),
        ('export', ['export']),
        ('', []),
    ],
)
def test_a_run_continues_with_the_step_in_which_it_was_killed(
    steps: Steps, killed: str, again: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ['my.pt', '--target', 'openvino', '--work-dir', 'out']
    steps.killed = killed
    with pytest.raises(Interruption) if killed else nullcontext():
        quantize.main(command)
    steps.done, steps.killed = [], ''
    capsys.readouterr()
    quantize.main(command)
    assert steps.done == again
    assert ('is finished and verified' in capsys.readouterr().out) == (not again)
    # Finished now, until a file is gone or changed.
    steps.done = []
    quantize.main(command)
    assert steps.done == []
    Path('out/my_w8a8.box_head.onnx').write_bytes(b'other')
    quantize.main(command)
    assert steps.done == ['export']


def test_a_speed_that_is_missing_is_measured_without_training(steps: Steps) -> None:
    command = ['my.pt', '--target', 'openvino', '--work-dir', 'out']
    quantize.main(command)
    steps.done = []
    quantize.main([*command, '--benchmark'])
    assert steps.done == ['export --benchmark']
    # What was measured stays.
    steps.done = []
    quantize.main([*command, '--benchmark'])
    quantize.main(command)
    assert steps.done == []


def test_a_student_for_any_runtime_is_exported_for_openvino_without_training(steps: Steps) -> None:
    quantize.main(['my.pt'])
    assert steps.done == ['set', 'training']
    quantize.main(['my.pt', '--target', 'openvino'])
    assert steps.done == ['set', 'training', 'export']
    # Students for ONNX Runtime have other grids.
    with pytest.raises(UserError, match='target is None there, onnxruntime now'):
        quantize.main(['my.pt', '--target', 'onnxruntime'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (['--bits', 'w4a8'], 'bits is w8a8 there, w4a8 now'),
        (['--preset', 'instant'], 'preset is default there, instant now'),
        (['--size', '320', '320'], r'size is None there, \[320, 320\] now'),
        (['--cfg-options', 'seed=1'], r"cfg_options is \[\] there, \['seed=1'\] now"),
        ([], 'sha256 is .* there, .* now'),
    ],
)
def test_a_folder_with_another_run_is_refused_and_kept(steps: Steps, change: list[str], message: str) -> None:
    quantize.main(['my.pt', '--work-dir', 'out'])
    before = {path: path.read_bytes() for path in Path('out').rglob('*') if path.is_file()}
    if not change:
        Path('my.pt').write_bytes(b'another one')
    with pytest.raises(
        UserError, match=rf'out holds another run \(.*{message}.*\): choose another folder by --work-dir'
    ):
        quantize.main(['my.pt', '--work-dir', 'out', *change])
    assert {path: path.read_bytes() for path in Path('out').rglob('*') if path.is_file()} == before


def test_a_student_that_was_not_evaluated_is_exported_before_the_command_fails(steps: Steps) -> None:
    steps.not_evaluated = True
    with pytest.raises(NotEvaluatedError, match='no data'):
        quantize.main(['my.pt', '--target', 'openvino', '--work-dir', 'out'])
    assert steps.done == ['set', 'training', 'export']
    assert Path('out/my_w8a8.onnx').is_file()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--benchmark'], '--benchmark measures the exported file: give a runtime by --target'),
        (['--size', '300', '320'], '--size is 300 320, but both must be multiples of 32'),
        (['--work-dir', 'my.pt/out'], 'cannot write my.pt/out'),
        (['--work-dir', 'foreign'], 'foreign holds a run of another command'),
        (['--work-dir', 'damaged'], 'damaged/quantize.json is damaged'),
        (['--classes', 'missing.txt'], '--classes is .*missing.txt.*, but there is no such file'),
    ],
)
def test_mistakes_end_before_any_work(steps: Steps, arguments: list[str], message: str) -> None:
    Path('foreign/run').mkdir(parents=True)
    Path('damaged').mkdir()
    Path('damaged/quantize.json').write_text('{')
    with pytest.raises(UserError, match=message):
        quantize.main(['my.pt', *arguments])
    assert steps.done == []


@pytest.mark.parametrize('arguments', [['--bits', 'w3a3'], ['--bits', 'w8'], ['--target', 'foo']])
def test_unknown_choices_end_with_the_known_ones(
    steps: Steps, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        quantize.main(['my.pt', *arguments])
    assert ended.value.code == 2
    assert f"invalid choice: '{arguments[1]}'" in capsys.readouterr().err


@pytest.mark.parametrize('letterbox', [True, False])
def test_a_size_holds_for_the_whole_run(tmp_path: Path, letterbox: bool) -> None:
    converted = ConvertedDetector('', '', 80, {})
    base = 'mmzsq::yolo11/yolo11-n_coco.py' if letterbox else 'mmzsq::torchvision/retinanet_r50_fpn_coco.py'
    detector = ForeignDetector(converted, COCO, base, None, ('bbox_head',), letterbox)
    leaf = tmp_path / 'leaf.py'
    leaf.write_text(quantize.leaf_config(detector, tmp_path / 'w', 'w8a8', 'default', None, (256, 320)))
    cfg = Config.fromfile(leaf)
    # Upright images that keep their aspect ratio must fit, too.
    expected = Frame(256, 320, True) if letterbox else Frame(256, 256, False)
    for loader in (cfg.test_dataloader, cfg.val_dataloader):
        assert frame_of(loader.dataset.pipeline, 32) == expected
        assert [transform.type for transform in loader.dataset.pipeline][0] == 'LoadImageFromFile'
