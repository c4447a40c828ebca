# SPDX-License-Identifier: Apache-2.0
"""Tests of the deployment benchmarks: tables match the kept results, and each script runs at toy size."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import deploy_accuracy
import deploy_models
import deploy_page
import deploy_size
import deploy_speed
import numpy as np
import onnx
import pytest
from deploy_accuracy import EVALUATIONS, Evaluation
from deploy_page import Results
from deploy_sessions import BoundSession
from onnx import TensorProto, helper

from mmzsq.deploy import export
from mmzsq.errors import UserError

MACHINE = dict(command='python x.py', cpu=dict(name='CPU', cores=2, features=['avx512_vnni']), versions=dict(onnx='1'))


def evaluation(ap: float, **entries: Any) -> dict[str, Any]:
    return dict(MACHINE, AP=ap, AP50=2 * ap, evaluation_images=200, **entries)


def speed(**ms: list[float]) -> dict[str, Any]:
    graphs = [dict(graph='detector', title='', threads=1, ms=ms)]
    return dict(MACHINE, name='yolov5-n', title='YOLOv5-n', graphs=graphs)


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells behind the first one, by the first one."""
    lines = [[cell.strip() for cell in line[1:-1].split('|')] for line in text.splitlines() if line[:1] == '|']
    return {line[0]: line[1:] for line in lines}


def test_a_speed_up_is_the_median_over_rounds_in_the_same_runtime() -> None:
    # Round by round 2, 3 and 10 times faster: the ratio of medians would be 30 / 8.
    times = speed(openvino_float=[20, 30, 100], openvino_w8a8=[10, 10, 10], onnxruntime_float=[60, 60, 60])
    lines = deploy_page.render_speed(Results({'speed_yolov5-n': times})).splitlines()
    assert '| YOLOv5-n | OpenVINO | ours, W8A8 | 10.0 | 3.00 |' in lines
    assert '| YOLOv5-n | ONNX Runtime | float | 60.0 | 1.00 |' in lines
    assert not [line for line in lines if 'NNCF' in line]


def test_accuracies_stand_beside_those_of_the_checkpoint() -> None:
    results = Results(
        {
            'accuracy_float_torch': evaluation(0.294),
            'accuracy_w4a8_torch': evaluation(0.261),
            'accuracy_w4a8_openvino': evaluation(0.26),
        }
    )
    rows = rows_of(deploy_page.render_accuracy(results))
    assert rows['full precision'] == ['29.4', '', '']
    assert rows['W4A8'] == ['26.1', '26.0', '']
    assert 'W8A8' not in rows


def test_calibration_rows_name_their_images() -> None:
    results = Results(
        {
            'calibration_nncf_synthetic': evaluation(0.285, calibration_images=16),
            'calibration_onnxruntime_static_noise': evaluation(0.1, calibration_images=32),
            'accuracy_w8a8_openvino': evaluation(0.291),
        }
    )
    rows = rows_of(deploy_page.render_calibration(results))
    assert rows['16 synthetic images'] == ['28.5', '']
    assert rows['32 images of noise'] == ['', '10.0']
    assert rows['ours, a student trained on 512 synthetic images'] == ['29.1', '']


def test_sizes_are_compared_with_float() -> None:
    sizes = dict(float=8_000_000, w8a8=2_000_000, w4a8_int4=1_600_000)
    kept = dict(title='YOLOv5-n', bytes=sizes, command='python x.py', versions={})
    rows = rows_of(deploy_page.render_size(Results({'size_yolov5-n': kept})))
    assert rows['W8A8, 8-bit containers'] == ['2.00', '4.00']
    assert rows['W4A8, INT4'] == ['1.60', '5.00']


def test_goals_are_reached_missed_or_open() -> None:
    results = Results(
        {
            'speed_yolov5-n': speed(openvino_float=[22.0], openvino_w8a8=[10.0], openvino_nncf=[11.9]),
            'accuracy_w8a8_torch': evaluation(0.292),
            'accuracy_w8a8_openvino': evaluation(0.289),
            'accuracy_w8a8_onnxruntime': evaluation(0.295),
            'accuracy_w4a4_torch': evaluation(0.2),
            'accuracy_w4a4_openvino': evaluation(0.196),
            'accuracy_w4a4_onnxruntime': evaluation(0.2),
            'calibration_nncf_real32': evaluation(0.288),
            'calibration_nncf_real300': evaluation(0.290),
        }
    )
    rows = rows_of(deploy_page.render_goals(results))
    assert rows['YOLOv5-n W8A8, OpenVINO, 1 thread, over float'] == ['>= 2.2x', '2.20x', 'yes']
    assert rows['the same over NNCF'] == ['>= 1.2x', '1.19x', 'no']
    # The best of NNCF's counts.
    assert rows["AP of YOLOv5-n W8A8 in OpenVINO, against NNCF's best on real images"][1:] == ['28.9, 29.0', 'no']
    assert rows['AP(file) - AP(checkpoint), W8A8'][2] == 'yes'
    assert rows['AP(file) - AP(checkpoint), W4A4'][1:] == ['-0.4 in OpenVINO, +0.0 in ONNX Runtime', 'no']
    assert rows['AP(file) - AP(checkpoint), W6A6'][1:] == ['', 'not measured']


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with an empty page and one result."""
    (tmp_path / 'docs').mkdir()
    blocks = [f'<!-- deploy: {name} -->\n<!-- end of {name} -->\n' for name in deploy_page.BLOCKS]
    (tmp_path / deploy_page.PAGE).write_text('# By hand\n' + '\n'.join(blocks) + 'The end.\n')
    (tmp_path / deploy_page.RESULTS).mkdir(parents=True)
    (tmp_path / deploy_page.RESULTS / 'accuracy_float_torch.json').write_text(json.dumps(evaluation(0.294)))
    return tmp_path


def test_the_page_keeps_what_is_written_by_hand(root: Path) -> None:
    page = root / deploy_page.PAGE
    deploy_page.main(['--root', str(root)])
    text = page.read_text()
    assert text.startswith('# By hand\n') and text.endswith('The end.\n')
    assert '| full precision | 29.4 |' in text
    deploy_page.main(['--root', str(root), '--check'])
    deploy_page.main(['--root', str(root)])
    assert page.read_text() == text


def test_check_fails_for_an_edited_number_and_writes_nothing(root: Path) -> None:
    page = root / deploy_page.PAGE
    deploy_page.main(['--root', str(root)])
    edited = page.read_text().replace('29.4', '31.0')
    page.write_text(edited)
    with pytest.raises(SystemExit) as stopped:
        deploy_page.main(['--root', str(root), '--check'])
    assert stopped.value.code == 1
    assert page.read_text() == edited


def test_a_page_without_a_block_is_refused(root: Path) -> None:
    page = root / deploy_page.PAGE
    page.write_text(page.read_text().replace('<!-- end of size -->', ''))
    with pytest.raises(SystemExit, match='<!-- deploy: size -->'):
        deploy_page.main(['--root', str(root)])


def test_the_kept_page_is_up_to_date() -> None:
    deploy_page.main(['--check'])


def test_kept_results_name_their_command_and_machine(repo: Path) -> None:
    known = {case.name for case in EVALUATIONS}
    for path in (repo / deploy_models.RESULTS).glob('*.json'):
        content = json.loads(path.read_text())
        assert content['command'].startswith('python benchmarks/deploy_'), path.name
        assert not re.search(r' /\w', content['command']), f'{path.name}: a path of one machine'
        assert 'onnx' in content['versions']
        if path.stem.startswith(('accuracy_', 'calibration_')):
            assert path.stem in known
            assert content['evaluation_images'] == 200 and content['cpu']['name']


def twice(path: Path, size: int, factor: float) -> Path:
    """A graph that multiplies its input by a constant."""
    value = helper.make_tensor('factor', TensorProto.FLOAT, [], [factor])
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, size, size]) for name in ('x', 'y')]
    graph = helper.make_graph([helper.make_node('Mul', ['x', 'factor'], ['y'])], 'g', infos[:1], infos[1:], [value])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize('runtime', ['openvino', 'onnxruntime'])
def test_a_bound_session_computes_on_its_input_in_place(tmp_path: Path, runtime: str) -> None:
    x = np.ones((1, 3, 4, 4), np.float32)
    session = BoundSession(twice(tmp_path / 'm.onnx', 4, 2.0), runtime, 1, x)
    session.run()
    np.testing.assert_array_equal(session.outputs()[0], 2 * x)


def test_all_variants_are_timed_in_each_round(tmp_path: Path) -> None:
    paths = {
        'openvino_float': twice(tmp_path / 'a.onnx', 8, 2.0),
        'openvino_w8a8': twice(tmp_path / 'b.onnx', 8, 3.0),
        'onnxruntime_static': twice(tmp_path / 'c.onnx', 8, 4.0),
    }
    inputs = np.zeros((1, 3, 8, 8), np.float32)
    ms = deploy_speed.measure(paths, inputs, 1, runs=7, seconds=60)['ms']
    assert {name: len(values) for name, values in ms.items()} == dict.fromkeys(paths, 7)
    # The limit of time counts only after the least number of rounds.
    ms = deploy_speed.measure(paths, inputs, 1, runs=7, seconds=0)['ms']
    assert {len(values) for values in ms.values()} == {deploy_speed.MINIMUM_RUNS}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> deploy_speed.Detector:
    """The demo's detector at 64 pixels as the only one to measure."""
    detector = deploy_speed.Detector('tiny', 'Tiny', 'configs/zsq/yolov5-p_shapes_w4a4.py', size=(64, 64))
    monkeypatch.setattr(deploy_speed, 'DETECTORS', (detector,))
    monkeypatch.setattr(deploy_models, 'NOISE_SIZE', (64, 64))
    return detector


def test_speed_is_measured_written_and_resumed(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'argv', ['deploy_speed.py'])
    wanted = ('openvino_float', 'openvino_w8a8', 'onnxruntime_static', 'openvino_nncf')
    variants = tuple(variant for variant in deploy_speed.VARIANTS if variant.name in wanted)
    monkeypatch.setattr(deploy_speed, 'VARIANTS', variants)
    options = ['--files', tmp_path / 'files', '--out', tmp_path / 'out', '--nncf-python', tmp_path / 'none']
    options += ['--detectors', 'tiny', '--threads', '1', '--runs', '5']
    deploy_speed.main(list(map(str, options)))
    printed = capsys.readouterr().out
    assert 'NNCF, W8A8: left out' in printed and 'pip install nncf' in printed
    result = json.loads((tmp_path / 'out/speed_tiny.json').read_text())
    [graph] = result['graphs']
    assert set(graph['ms']) == {'openvino_float', 'openvino_w8a8', 'onnxruntime_static'}
    assert all(min(values) > 0 for values in graph['ms'].values())
    assert result['cpu']['cores'] and result['versions']['openvino']
    integers = onnx.load(tmp_path / 'files/tiny/w8a8.openvino.onnx').graph.node
    assert [node for node in integers if node.op_type == 'QuantizeLinear']
    floats = onnx.load(tmp_path / 'files/tiny/float/detector.onnx').graph.node
    assert not [node for node in floats if node.op_type == 'QuantizeLinear']
    deploy_speed.main(list(map(str, options)))
    assert 'skipped' in capsys.readouterr().out


def test_every_detector_names_a_config_of_the_repository(repo: Path) -> None:
    configs = [detector.config for detector in deploy_speed.DETECTORS] + [case.config for case in deploy_size.CASES]
    assert all((repo / config).is_file() for config in configs)


def test_evaluations_have_names_of_their_own_and_are_skipped_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len({case.name for case in EVALUATIONS}) == len(EVALUATIONS)
    (tmp_path / 'accuracy_w8a8_torch.json').write_text('{}')
    bench = deploy_accuracy.Bench(None, None, None, tmp_path / 'files')
    done, missing = (Evaluation('accuracy', bits, 'torch') for bits in ('w8a8', 'w4a4'))
    assert deploy_accuracy.run(bench, [done, missing], tmp_path, 'command') == [missing.name]
    assert 'give the trained students with --students' in capsys.readouterr().out


def test_calibration_inputs_are_those_of_the_network(tmp_path: Path, repo: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 640, 640, 3), dtype=np.uint8)
    np.save(tmp_path / 'images.npy', images)
    bench = deploy_accuracy.Bench(None, None, tmp_path, tmp_path / 'files')
    inputs = np.load(bench.inputs('synthetic'))
    # YOLOv5 takes RGB in [0, 1].
    np.testing.assert_allclose(inputs, images.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    with pytest.raises(UserError, match='--format npy'):
        deploy_accuracy.Bench(None, None, tmp_path / 'none', tmp_path / 'other').inputs('synthetic')


def test_quantize_static_keeps_the_metadata_and_nncf_is_optional(tmp_path: Path, tiny: Any) -> None:
    cfg = deploy_models.load_config(tiny.config)
    detector = deploy_models.build_float(cfg)
    student = deploy_models.build_student(cfg, None, detector)
    export(student, tmp_path / 'like.onnx', size=(64, 64), raw=True)
    files = deploy_models.write_float_files(detector, tmp_path / 'like.onnx', tmp_path / 'float', (64, 64))
    inputs = np.random.default_rng(0).random((2, 3, 64, 64), dtype=np.float32)
    deploy_models.quantize_with_onnxruntime(files['detector'], inputs, tmp_path / 'static.onnx')
    metadata = [
        {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        for path in (files['detector'], tmp_path / 'static.onnx')
    ]
    assert metadata[0] == metadata[1] and metadata[0]['detector'] == 'YOLOv5'
    assert sorted(path.name for path in tmp_path.glob('static*')) == ['static.onnx']
    with pytest.raises(UserError, match='pip install nncf'):
        deploy_models.quantize_with_nncf(files['detector'], Path('x.npy'), tmp_path / 'q.xml', tmp_path / 'none')


def test_nncf_quantizes_a_float_file(tmp_path: Path, repo: Path, tiny: Any) -> None:
    python = repo / deploy_models.NNCF_PYTHON
    if not python.exists():
        pytest.skip(f'NNCF is not installed in {deploy_models.NNCF_PYTHON}')
    cfg = deploy_models.load_config(tiny.config)
    detector = deploy_models.build_float(cfg, repo / 'mmzsq/assets/yolov5-p_shapes.safetensors')
    student = deploy_models.build_student(cfg, None, detector)
    export(student, tmp_path / 'like.onnx', size=(64, 64), raw=True)
    files = deploy_models.write_float_files(detector, tmp_path / 'like.onnx', tmp_path / 'float', (64, 64))
    inputs = np.random.default_rng(0).random((2, 3, 64, 64), dtype=np.float32)
    np.save(tmp_path / 'inputs.npy', inputs)
    out = tmp_path / 'nncf/q.xml'
    deploy_models.quantize_with_nncf(files['detector'], tmp_path / 'inputs.npy', out, python)
    assert 'FakeQuantize' in out.read_text()
    first, second = (BoundSession(path, 'openvino', 1, inputs[:1]) for path in (files['detector'], out))
    for session in (first, second):
        session.run()
    for value, given in zip(first.outputs(), second.outputs(), strict=True):
        assert np.abs(given - value).mean() < 0.1 * np.abs(value).mean()


def test_sizes_of_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.setattr(deploy_size, 'FILES', (('w8a8', False), ('w4a4', True)))
    case = deploy_size.Case('tiny', 'Tiny', tiny.config, (64, 64))
    sizes = deploy_size.measure(case, tmp_path)
    assert sizes['float'] > 2 * sizes['w8a8'] > 2 * sizes['w4a4_int4']
    assert sizes['w8a8'] == (tmp_path / 'tiny_w8a8.onnx').stat().st_size


def test_the_command_is_that_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['/somewhere/benchmarks/deploy_speed.py', '--runs', '3'])
    assert deploy_models.command_line() == 'python benchmarks/deploy_speed.py --runs 3'
    assert deploy_models.command_line(['--quick']) == 'python benchmarks/deploy_speed.py --quick'
