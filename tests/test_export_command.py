# SPDX-License-Identifier: Apache-2.0
"""``python -m mmzsq.export``: files, verification, and one message for each mistake before any file is written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from safetensors.torch import load_file

for package in ('onnx', 'onnxruntime', 'openvino'):
    pytest.importorskip(package, exc_type=ImportError)

import onnx  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from quantized_detectors import scenes  # noqa: E402

from mmzsq import cli  # noqa: E402
from mmzsq import export as command  # noqa: E402
from mmzsq.config import compose  # noqa: E402
from mmzsq.datasets.shapes_drawing import CLASS_NAMES  # noqa: E402
from mmzsq.quantization import calibrating, equalize  # noqa: E402
from mmzsq.registry import MODELS  # noqa: E402

CLASSES = list(CLASS_NAMES)
Tool = Callable[..., int]


def _write_student(repo: Path, folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """Write a quantized demo detector and its config; the config's teacher does not exist."""
    config = folder / f'{name}.py'
    config.write_text(
        f"_base_ = '{repo}/configs/zsq/yolov5-p_shapes_w4a4.py'\nload_from = 'teacher-that-is-gone.pth'\n"
        + f'zsq = dict(quantizer=dict({", ".join(f"{key}={value!r}" for key, value in changes.items())}))\n'
    )
    detector = MODELS.build(compose(Config.fromfile(config)).model).eval()
    detector.student.load_state_dict(load_file(repo / 'mmzsq/assets/yolov5-p_shapes.safetensors'), strict=False)
    images = scenes()
    with torch.no_grad():
        if detector.quantization_config.equalize:
            equalize(detector.student, lambda: detector.student(images))
        with calibrating(detector.student):
            detector.student(images)
    meta = dict(
        mmzsq=dict(quantizer=json.loads(json.dumps(detector.quantizer_cfg))), dataset_meta=dict(classes=CLASSES)
    )
    torch.save(dict(state_dict=detector.state_dict(), meta=meta), folder / f'{name}.pth')
    return config


@pytest.fixture(scope='session')
def students(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``w4.py``, ``w4.pth``, ``w8.py``, ``w8.pth``, and ``float.pth``."""
    register_all_modules()
    folder = tmp_path_factory.mktemp('students')
    _write_student(repo, folder, 'w4', {})
    _write_student(repo, folder, 'w8', dict(w_bits=8, a_bits=8))
    torch.save(dict(state_dict=load_file(repo / 'mmzsq/assets/yolov5-p_shapes.safetensors')), folder / 'float.pth')
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tool:
    """Run the command in an empty folder and return its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, 'LOCAL_RANK', '0')

    def call(*args: Any) -> int:
        monkeypatch.setattr(sys, 'argv', ['export', *map(str, args)])
        try:
            cli.run(command.main)
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    return call


def test_a_checkpoint_becomes_a_file_beside_it(call: Tool, students: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / 'epoch_60.pth'
    checkpoint.write_bytes((students / 'w4.pth').read_bytes())
    assert call(students / 'w4.py', checkpoint) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ['epoch_60.onnx', 'epoch_60.pth']
    model = onnx.load(tmp_path / 'epoch_60.onnx')
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata['target'] == 'openvino'
    assert json.loads(metadata['classes']) == CLASSES
    # From the test pipeline.
    assert json.loads(metadata['size']) == [256, 256]
    assert json.loads(metadata['resize']) == dict(mode='keep_ratio', scale=[256, 256], pad_value=None)
    assert json.loads(metadata['pipeline'])[1] == dict(type='Resize', scale=[256, 256], keep_ratio=True)
    assert json.loads(metadata['bits'])['backbone.stage2.0.conv'] == [4, 4]


def test_options_reach_the_file(call: Tool, students: Path, tmp_path: Path) -> None:
    file = tmp_path / 'new' / 'demo.onnx'
    options = ('--out', file, '--size', 128, 192, '--int4', '--raw', '--dynamic-batch', '--target', 'onnxruntime')
    assert call(students / 'w4.py', students / 'w4.pth', *options) == 0
    model = onnx.load(file)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert (metadata['target'], metadata['outputs'], metadata['size']) == ('onnxruntime', 'raw', '[128, 192]')
    assert onnx.TensorProto.INT4 in {tensor.data_type for tensor in model.graph.initializer}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == 'batch'


def test_a_composed_config_exports_too(call: Tool, students: Path, tmp_path: Path) -> None:
    compose(Config.fromfile(students / 'w4.py')).dump(tmp_path / 'composed.py')
    assert call(tmp_path / 'composed.py', students / 'w4.pth', '--out', 'demo.onnx', '--size', 128, 128) == 0


def test_verification_writes_its_numbers_and_passes(call: Tool, students: Path, tmp_path: Path) -> None:
    options = ('--out', 'demo.onnx', '--verify', 2, '--nms')
    assert call(students / 'w4.py', students / 'w4.pth', *options) == 0
    numbers = json.loads((tmp_path / 'deploy.json').read_text())
    assert numbers['passed'] is True and list(numbers['models']) == ['demo.onnx']
    numbers = numbers['models']['demo.onnx']
    assert set(numbers['runtimes']) == {'openvino', 'onnxruntime'}
    assert 'random noise' in numbers['images']['source'] and numbers['images']['count'] == 2
    for report in numbers['runtimes'].values():
        assert all(layer['integers_equal'] and layer['difference'] < 1e-5 for layer in report['layers'])


def test_a_benchmark_measures_the_file_beside_its_float_network(
    call: Tool, students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmzsq import deploy
    from mmzsq.deploy import VerifyReport, latency

    # The float network comes first in each pair.
    times = iter(range(10**6))
    monkeypatch.setattr(latency, 'PAIRS', 2)
    monkeypatch.setattr(latency, 'WARM_UP', 1)
    monkeypatch.setattr(latency, '_run', lambda sessions, inputs: 30.0 if next(times) % 2 == 0 else 10.0)
    checkpoint = tmp_path / 'epoch_60.pth'
    checkpoint.write_bytes((students / 'w4.pth').read_bytes())
    # Other tests verify.
    monkeypatch.setattr(deploy, 'verify', lambda *args, **options: VerifyReport(args[3]))
    teacher = ('--cfg-options', 'load_from=mmzsq://yolov5-p_shapes.safetensors')
    assert call(students / 'w4.py', checkpoint, '--verify', 1, '--benchmark', *teacher) == 0
    entry = json.loads((tmp_path / 'deploy.json').read_text())['models']['epoch_60.onnx']['speed']
    assert (entry['float_ms'], entry['quantized_ms'], entry['ratio']) == (30.0, 10.0, 3.0)
    assert (entry['runtime'], entry['pairs'], entry['size']) == ('openvino', 2, [256, 256])
    plain = onnx.load(tmp_path / 'epoch_60.float.onnx')
    assert 'QuantizeLinear' not in {node.op_type for node in plain.graph.node}


def test_a_file_that_fails_ends_with_code_1_and_names_the_layer(
    call: Tool, students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmzsq import deploy

    export = deploy.export

    def tampering(detector: Any, path: Path, *args: Any, **options: Any) -> Any:
        report = export(detector, path, *args, **options)
        model = onnx.load(path)
        tensor = next(t for t in model.graph.initializer if t.name == 'backbone.stage2.0.conv.weight_integers')
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
        onnx.save(model, path)
        return report

    monkeypatch.setattr(deploy, 'export', tampering)
    assert call(students / 'w4.py', students / 'w4.pth', '--out', 'demo.onnx', '--size', 256, 256, '--verify', 1) == 1
    assert 'backbone.stage2.0.conv (call 0): integers differ from those of training' in capsys.readouterr().err
    numbers = json.loads((tmp_path / 'deploy.json').read_text())
    assert numbers['passed'] is False and numbers['models']['demo.onnx']['passed'] is False


def test_each_model_of_a_folder_keeps_its_numbers(tmp_path: Path) -> None:
    first, second = tmp_path / 'w8.onnx', tmp_path / 'w4.onnx'
    for file in (first, second):
        file.write_text(file.name)
    (tmp_path / 'deploy.json').write_text('{"passed": true, "runtimes": {}}')
    command.record(first, dict(passed=True, ap=dict(images=3)))
    command.record(second, dict(passed=False))

    def content() -> Any:
        return json.loads((tmp_path / 'deploy.json').read_text())

    assert content()['models']['w8.onnx']['ap'] == dict(images=3)
    assert set(content()['models']) == {'w8.onnx', 'w4.onnx'} and content()['passed'] is False
    # Numbers do not outlive the file that they belong to.
    second.write_text('another')
    command.record(first, None)
    assert set(content()['models']) == {'w8.onnx'} and content()['passed'] is True
    first.unlink()
    command.record(second, dict(passed=True))
    assert set(content()['models']) == {'w4.onnx'}


def test_an_export_without_verification_drops_the_numbers_of_the_file_before(
    call: Tool, students: Path, tmp_path: Path
) -> None:
    (tmp_path / 'demo.onnx').write_text('before')
    command.record(tmp_path / 'demo.onnx', dict(passed=True))
    assert call(students / 'w4.py', students / 'w4.pth', '--out', 'demo.onnx', '--size', 64, 64) == 0
    assert json.loads((tmp_path / 'deploy.json').read_text())['models'] == {}


MISTAKES = {
    'float checkpoint': (('w4.py', 'float.pth'), 'it is a float checkpoint'),
    'other bits': (('w4.py', 'w8.pth'), 'the checkpoint was trained with other settings of zsq.quantizer: '),
    'missing checkpoint': (('w4.py', 'none.pth'), 'none.pth does not exist'),
    'not a checkpoint': (('w4.py', 'w4.py'), 'cannot be read'),
    'missing config': (('none.py', 'w4.pth'), 'none.py does not exist'),
    'size': (('w4.py', 'w4.pth', '--size', '100', '128'), 'size is 100 128 (height, width), but both must be positive'),
    'negative size': (('w4.py', 'w4.pth', '--size', '-32', '128'), 'both must be positive multiples of 32'),
    'offset for TensorRT': (
        ('w8.py', 'w8.pth', '--target', 'tensorrt'),
        'TensorRT takes int8 with zero point 0 alone, but ',
    ),
    'folder below a file': (('w4.py', 'w4.pth', '--out', 'occupied/x.onnx'), 'cannot write occupied/x.onnx'),
    'folder that nobody may write': (
        ('w4.py', 'w4.pth', '--out', '/proc/none/x.onnx'),
        'cannot write /proc/none/x.onnx',
    ),
    'a folder': (('w4.py', 'w4.pth', '--out', 'folder.onnx'), 'folder.onnx is a folder: name a file'),
    'suffix': (('w4.py', 'w4.pth', '--out', 'x.pt'), '--out is x.pt, but must end in .onnx'),
    'INT4 of 8 bits': (('w8.py', 'w8.pth', '--int4'), '--int4 stores weights of at most 4 bits, but'),
    'target': (('w4.py', 'w4.pth', '--target', 'openvion'), "Did you mean 'openvino'?"),
    'exporter': (('w4.py', 'w4.pth', '--exporter', 'torchskript'), "Did you mean 'torchscript'?"),
    'NMS of raw maps': (('w4.py', 'w4.pth', '--nms', '--raw'), 'export without --raw'),
    'AP without verification': (('w4.py', 'w4.pth', '--ap', '9'), '--ap belongs to --verify'),
    'speed without verification': (('w4.py', 'w4.pth', '--benchmark'), '--benchmark belongs to --verify'),
    'speed with NMS': (('w4.py', 'w4.pth', '--benchmark', '--verify', '1', '--nms'), 'leave out --nms'),
    'speed of TensorRT': (
        ('w4.py', 'w4.pth', '--benchmark', '--verify', '1', '--target', 'tensorrt'),
        '--benchmark measures on this CPU',
    ),
    'negative number': (('w4.py', 'w4.pth', '--verify', '-1'), '--verify is -1, but must be a number of images'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_ends_in_one_message_before_a_file_is_written(
    call: Tool, students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    args, message = MISTAKES[name]
    (tmp_path / 'occupied').write_text('')
    (tmp_path / 'folder.onnx').mkdir()
    before = sorted(tmp_path.rglob('*'))
    given = [students / arg if arg.endswith(('.py', '.pth')) else arg for arg in args]
    given += [] if '--out' in args else ['--out', 'x.onnx']
    given += [] if '--size' in args else ['--size', '64', '64']
    assert call(*given) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and message in errors[0]
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    ('missing', 'target', 'message'),
    [
        ('openvino', 'openvino', '--verify needs openvino, which is not installed'),
        ('onnxruntime', 'tensorrt', '--verify needs onnxruntime, which is not installed'),
    ],
)
def test_a_missing_runtime_is_named_before_the_export(
    call: Tool,
    students: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
    target: str,
    message: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name == missing else find(name, *rest))
    options = ('--out', 'x.onnx', '--target', target, '--verify', 1)
    assert call(students / 'w4.py', students / 'w4.pth', *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_onnx_the_command_says_what_to_install(students: Path, repo: Path, tmp_path: Path) -> None:
    """In a process of its own, where onnx cannot be imported."""
    hide = (
        'import importlib.util as u, sys\n'
        'find = u.find_spec\n'
        "u.find_spec = lambda name, *rest: None if name == 'onnx' else find(name, *rest)\n"
        f"sys.argv = ['export', {str(students / 'w4.py')!r}, {str(students / 'w4.pth')!r}]\n"
        'import runpy\n'
        "runpy.run_module('mmzsq.export', run_name='__main__')\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(repo))
    ended = subprocess.run(
        [sys.executable, '-c', hide], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == 'error: onnx is not installed: run `pip install "mmzsq[deploy]"`.'


@pytest.mark.parametrize(
    ('pipeline', 'divisor', 'size'),
    [
        ([dict(type='mmzsq.LetterResize', scale=(640, 480))], 1, (480, 640)),
        ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], 32, (1344, 1344)),
        ([dict(type='Resize', scale=(640, 512), keep_ratio=False)], 32, (512, 640)),
        ([dict(type='Resize', scale=(600, 600), keep_ratio=True), dict(type='Pad', size=(640, 640))], 1, (640, 640)),
        ([dict(type='mmdet.Resize', scale=(608, 608), keep_ratio=True), dict(type='PackDetInputs')], 32, (608, 608)),
    ],
)
def test_the_default_size_holds_every_image_of_the_pipeline(
    pipeline: list[dict[str, Any]], divisor: int, size: tuple[int, int]
) -> None:
    from types import SimpleNamespace

    detector: Any = SimpleNamespace(data_preprocessor=SimpleNamespace(pad_size_divisor=divisor))
    cfg: Any = dict(test_dataloader=dict(dataset=dict(pipeline=pipeline)))
    assert command.image_size(command.Student(detector, None, cfg)) == size
