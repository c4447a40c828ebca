# SPDX-License-Identifier: Apache-2.0
"""The page and the card of runs that are written by hand, and the page in a browser if one is installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import tensor
from torchvision.ops import box_iou

from mmzsq.atomic_files import sha256
from mmzsq.config import compose
from mmzsq.errors import UserError
from mmzsq.registry import MODELS
from mmzsq.report import Run, write_card, write_report
from mmzsq.report.boxes_of_sets import relative_size
from mmzsq.report.figures import thresholds
from mmzsq.report.matching import iou, match
from mmzsq.report.page import verdict
from mmzsq.report.runs import Group, differences, group_runs

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
ADDRESSES = {'src', 'href', 'xlink:href', 'action', 'data', 'poster', 'srcset', 'ping', 'formaction'}


def results(student: float = 0.4, seed: int = 0, **quantizer: Any) -> dict[str, Any]:
    rows = dict(float=0.5, ptq=0.3, zero_shot=student)
    metrics = {
        row: {'coco/bbox_mAP': value, 'coco/bbox_mAP_50': value + 0.111, 'coco/bbox_mAP_s': value / 2}
        for row, value in rows.items()
    }
    return dict(
        config='configs/a/detector_w4a4.py',
        teacher='teacher.pth',
        teacher_sha256='ab' * 32,
        preset='default',
        quantizer=dict(w_bits=4, a_bits=4, **quantizer),
        metrics=metrics,
        not_evaluated=None,
        scores=dict(
            source='evaluation', images=10, threshold=0.37,
            rows=dict(float=dict(recall=0.612, precision=0.71), zero_shot=dict(
                recall=0.523, precision=None, matched=77, shift=[-0.2, -0.123, 0.1])),
        ),
        evaluation_images=10,
        checkpoint='epoch_2.pth',
        model_mb=dict(float=8.0, quantized=1.25),
        bit_operations=dict(float=2048, quantized=512),
        calibration_set=dict(statistics={}, stages=dict(refine=dict(seconds=7.5))),
        settings=dict(calibration_set=dict(seed=seed, dir=f'set{seed}')),
        train=dict(iterations=4),
        seconds=dict(train=12.25),
        device='CPU, 1 threads',
        versions=dict(mmzsq='1.2.3'),
    )  # fmt: skip


DETAILS = dict(
    command='python -m mmzsq.train detector_w4a4.py',
    class_ap=dict(float={'dog': 0.6, '</script>cat': 0.5}, zero_shot={'dog': 0.2, '</script>cat': 0.45}),
    losses=dict(loss=dict(iterations=[1, 2], values=[2.0, 1.0])),
    layers=[
        dict(name='backbone.0', type='Conv2d', role='', weights=1000, w_bits=4, a_bits=4, reason='', macs=1,
             **{part: dict(clipped=0.01, error=error, low=-1.0, high=1.0, grid=[-0.9, 0.8], counts=[1, 5, 2])
                for part, error in (('weight', 0.25), ('input', 0.125))}),
        dict(name='head', type='Conv2d', role='last', weights=10, w_bits=32, a_bits=32, reason='skip', macs=1),
    ],
    detections=dict(
        source='evaluation', compared=1, min_score=0.05, pairs=[[0.9, 0.8], [0.5, 0.4]],
        scores=dict(float=[0.9, 0.5, 0.45], quantized=[0.8, 0.4, 0.35]),
        images=[dict(file='image_00.jpg', height=40, width=60,
                     float=[[5, 5, 25, 25, 0.9, 0], [30, 5, 50, 30, 0.6, 1]], quantized=[[6, 5, 25, 26, 0.8, 0]])],
    ),
)  # fmt: skip


def make_run(folder: Path, **options: Any) -> Path:
    (folder / 'report').mkdir(parents=True)
    (folder / 'results.json').write_text(json.dumps(results(**options)))
    (folder / 'report' / 'details.json').write_text(json.dumps(DETAILS))
    cv2.imwrite(str(folder / 'report' / 'image_00.jpg'), np.full((40, 60, 3), 90, np.uint8))
    images = folder / 'calibration_set' / 'images'
    forming = folder / 'calibration_set' / 'previews' / 'forming'
    for path in (images, forming, folder / 'calibration_set' / 'annotations'):
        path.mkdir(parents=True)
    cv2.imwrite(str(images / 'a.png'), np.full((32, 64, 3), 200, np.uint8))
    cv2.imwrite(str(forming / 'refine_00005.jpg'), np.full((8, 8, 3), 200, np.uint8))
    coco = dict(
        images=[dict(id=0, file_name='a.png', width=64, height=32)],
        categories=[dict(id=0, name='dog'), dict(id=1, name='</script>cat')],
        annotations=[dict(id=0, image_id=0, category_id=1, bbox=[0, 0, 32, 16], area=512, iscrowd=0)],
    )
    (folder / 'calibration_set' / 'annotations' / 'instances.json').write_text(json.dumps(coco))
    return folder


class _Addresses(HTMLParser):
    """Collects the addresses that a browser may load, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts: list[str] = []
        self.in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.in_script = tag == 'script'
        self.found += [value or '' for name, value in attrs if name in ADDRESSES]

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts.append(data)


def test_page_has_all_numbers_and_loads_nothing(tmp_path: Path) -> None:
    path = write_report([make_run(tmp_path / 'run')])
    page = path.read_text()
    assert path == tmp_path / 'run' / 'report.html'
    assert len(page) < 3_000_000
    for row in results()['metrics'].values():
        for value in row.values():
            assert f'<td>{value:.3f}' in page
    for text in ('-0.123</td><td>0.523', '<td>0.612</td><td>0.710', 'best threshold, 0.37'):
        assert text in page
    for text in ('8.00', '1.25', 'ab' * 32, 'python -m mmzsq.train detector_w4a4.py', '7.5 s', '12.2 s', 'epoch_2.pth'):
        assert text in page
    parser = _Addresses()
    parser.feed(page)
    assert all(address.startswith(('data:', '#')) for address in parser.found)
    assert 'url(http' not in page and '@import' not in page
    # A name cannot end the script that holds the data.
    data = json.loads(parser.scripts[0])
    assert data['classes'] == ['dog', '</script>cat']
    assert data['gallery'][0]['boxes'] == [[0, 0, 32, 16, 1]]
    assert data['forming'][0]['stage'] == 'refine' and data['forming'][0]['iteration'] == 5
    assert data['images'][0]['float'] == DETAILS['detections']['images'][0]['float']  # type: ignore[index]


def test_figures_are_files_too(tmp_path: Path) -> None:
    write_report([make_run(tmp_path / 'run')])
    folder = tmp_path / 'run' / 'report' / 'figures'
    names = {path.stem for path in folder.glob('*.svg')}
    assert {'ap_by_class', 'ap_by_size', 'scores', 'thresholds', 'labels', 'training_losses', 'layers'} <= names
    for name in names:
        assert cv2.imread(str(folder / f'{name}.png')) is not None
        assert '<svg' in (folder / f'{name}.svg').read_text()


def test_results_alone_are_enough(tmp_path: Path) -> None:
    content = results()
    content.update(metrics={}, not_evaluated='no <data> here')
    (tmp_path / 'results.json').write_text(json.dumps(content))
    page = write_report([tmp_path]).read_text()
    assert 'no &lt;data&gt; here' in page
    assert 'its accuracy was not measured' in page
    assert 'results: []' in write_card(tmp_path).read_text()


def test_seeds_become_one_row_with_their_spread(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f's{seed}', student=value, seed=seed) for seed, value in enumerate((0.4, 0.42))]
    other = make_run(tmp_path / 'other', student=0.3, equalize=True)
    runs = [Run.load(folder) for folder in (*folders, other)]
    groups = group_runs(runs)
    assert [len(group.runs) for group in groups] == [2, 1]
    assert groups[0].spread('zero_shot', 'coco/bbox_mAP') == pytest.approx((0.41, 0.02 / 2**0.5))
    assert groups[1].spread('zero_shot', 'coco/bbox_mAP') == (0.3, None)
    assert differences(runs) == {'quantizer.equalize': [None, None, True], 'calibration_set.seed': [0, 1, 0]}
    out = tmp_path / 'out.html'
    page = write_report([*folders, other], out).read_text()
    assert '0.410 <small>± 0.014' in page
    assert 'Best of 2, detector_w4a4 (2 seeds): W4A4 keeps 82% of the accuracy' in page
    assert (tmp_path / 'out_figures' / 'comparison.png').is_file()


def test_verdict(tmp_path: Path) -> None:
    run = Run.load(make_run(tmp_path / 'run'))
    text = verdict(run, Group([run]))
    assert text == 'W4A4 keeps 80% of the accuracy at 1/6.4 of the size; no image of yours was read to quantize it.'
    run.results['calibration_set']['statistics'] = dict(real=True)
    assert 'no image of yours' not in verdict(run, Group([run]))


SPEED = dict(
    runtime='openvino', float_ms=10.0, quantized_ms=4.8, ratio=2.1, pairs=50, threads=1, cpu='A CPU', size=[640, 640]
)


def write_speed(folder: Path, checkpoint: Path, **changes: Any) -> None:
    """Write an exported file and the numbers that ``mmzsq.export --benchmark`` leaves beside it."""
    (folder / 'student.onnx').write_bytes(b'file')
    entry = dict(sha256=sha256(b'file'), checkpoint=str(checkpoint), passed=True, speed=dict(SPEED, **changes))
    (folder / 'deploy.json').write_text(json.dumps(dict(passed=True, models={'student.onnx': entry})))


@pytest.mark.parametrize('place', ['.', '..'])
def test_verdict_has_the_measured_speed(tmp_path: Path, place: str) -> None:
    folder = make_run(tmp_path / 'run')
    write_speed(folder / place, folder / 'epoch_2.pth')
    page = write_report([folder]).read_text()
    assert 'at 1/6.4 of the size; 2.1x faster on this CPU in OpenVINO; no image of yours' in page
    assert '4.80 ms' in page and 'from 10.00 ms' in page and 'A CPU' in page
    assert '2.1x faster' in write_card(folder).read_text()


@pytest.mark.parametrize(('ratio', 'words'), [(0.5, '2.0x slower'), (1.02, 'as fast as float')])
def test_a_file_that_is_not_faster_is_said_to_be_so(tmp_path: Path, ratio: float, words: str) -> None:
    folder = make_run(tmp_path / 'run')
    write_speed(folder, folder / 'epoch_2.pth', ratio=ratio)
    assert words in verdict(Run.load(folder), Group([Run.load(folder)]))


def test_the_speed_of_another_file_or_checkpoint_does_not_count(tmp_path: Path) -> None:
    folder = make_run(tmp_path / 'run')
    write_speed(folder, folder / 'epoch_1.pth')
    assert Run.load(folder).speed is None
    write_speed(folder, tmp_path / 'other' / 'epoch_2.pth')
    assert Run.load(folder).speed is None
    write_speed(folder, folder / 'epoch_2.pth')
    assert Run.load(folder).speed == dict(SPEED, file='student.onnx')
    (folder / 'student.onnx').write_bytes(b'exported again')
    assert Run.load(folder).speed is None


def test_layers_have_the_sensitivity_that_an_allocation_measured(tmp_path: Path) -> None:
    folder = make_run(tmp_path / 'run')
    assert '<th>sensitivity</th>' not in write_report([folder]).read_text()
    growth = {'2': 0.5, '8': 0.001}
    (folder / 'sensitivity.json').write_text(json.dumps(dict(inputs=True, layers={'backbone.0': growth})))
    layers = {layer['name']: layer for layer in Run.load(folder).layers}
    assert layers['backbone.0']['sensitivity'] == growth and 'sensitivity' not in layers['head']
    assert '<th>sensitivity</th>' in write_report([folder]).read_text()


def test_card_has_valid_front_matter(tmp_path: Path) -> None:
    card = write_card(make_run(tmp_path / 'run')).read_text()
    front = yaml.safe_load(card.split('---\n')[1])
    assert front['pipeline_tag'] == 'object-detection'
    metrics = front['model-index'][0]['results'][0]['metrics']
    assert {m['name']: m['value'] for m in metrics} == results()['metrics']['zero_shot']
    assert '| Student | 0.400 |' in card


@pytest.mark.parametrize('content', [None, '{', '[]', '{"metrics": {}}'])
def test_folder_without_results_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / 'results.json').write_text(content)
    with pytest.raises(UserError, match='results.json'):
        write_report([tmp_path])


def test_thresholds_keep_the_number_of_detections(tmp_path: Path) -> None:
    run = Run.load(make_run(tmp_path / 'run'))
    scores = DETAILS['detections']['scores']  # type: ignore[index]
    for before, after, count in thresholds(run):
        assert sum(score >= before for score in scores['float']) == count
        assert sum(score >= after for score in scores['quantized']) == count
    assert (0.5, 0.4, 2) in thresholds(run)


def test_matches_are_the_best_pairs() -> None:
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 50, (20, 2))
    sizes, labels = generator.uniform(10, 50, (20, 2)), np.arange(20)[:, None] % 2
    one = np.concatenate((corners, corners + sizes, generator.random((20, 1)), labels), 1)
    other = one[::-1].copy()
    other[:, :4] += 2
    overlaps = iou(one, other)
    assert overlaps == pytest.approx(box_iou(tensor(one[:, :4]), tensor(other[:, :4])).numpy(), abs=1e-5)
    pairs = match(one, other)
    assert all(one[i, 5] == other[j, 5] and overlaps[i, j] >= 0.5 for i, j in pairs)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    best = int(one[:, 4].argmax())
    same = np.where(other[:, 5] == one[best, 5], overlaps[best], 0)
    assert pairs[0] == (best, int(same.argmax()))
    assert match(one, other[:0]) == [] and match(one[:0], other) == []
    assert match(np.array([[0, 0, 9, 9, 1, 0]]), np.array([[0, 0, 9, 9, 1, 1]])) == []
    assert iou(np.zeros((1, 4)), np.zeros((1, 4))) == 0


def test_size_is_the_root_of_the_covered_share() -> None:
    assert relative_size([10, 10, 30, 20], 50, 100) == pytest.approx((200 / 5000) ** 0.5, abs=1e-4)


@contextmanager
def recording_proxy() -> Iterator[tuple[int, list[str]]]:
    """Proxy that answers nothing and records the first line of each request."""
    lines: list[str] = []
    with socket.create_server(('127.0.0.1', 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    lines.append(connection.recv(1000).decode(errors='replace').split('\r\n')[0])

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], lines
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """Function that opens a page in headless Chromium and returns its output and the requests of the page."""
    if CHROMIUM is None:
        pytest.skip('no Chromium is installed')

    def browse(page: Path, *options: str) -> tuple[str, list[str]]:
        with recording_proxy() as (port, lines):
            done = subprocess.run(
                [
                    *(CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars'),
                    *('--disable-background-networking', '--disable-component-update', '--disable-sync'),
                    *('--no-first-run', f'--user-data-dir={tmp_path / "profile"}', '--virtual-time-budget=2000'),
                    *(f'--proxy-server=http://127.0.0.1:{port}', *options, page.resolve().as_uri()),
                ],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
        # The browser itself asks its maker for updates.
        return done.stdout, [line for line in lines if 'google' not in line]

    return browse


def test_browser_shows_the_results_without_a_request(
    tmp_path: Path, browse: Callable[..., tuple[str, list[str]]]
) -> None:
    page = write_report([make_run(tmp_path / 'run')])
    shown, requests = browse(page, '--dump-dom')
    assert not requests
    for row in results()['metrics'].values():
        for value in row.values():
            assert f'{value:.3f}' in shown
    # These are made by the script.
    for text in ('1 found by both, 1 lost, 0 gained', 'refine, iteration 5', 'backbone.0</td>', '25.0 %'):
        assert text in shown
    # A page that does ask for something is noticed.
    other = tmp_path / 'other.html'
    other.write_text('<img src="http://images.invalid/a.png">')
    assert any('images.invalid' in line for line in browse(other, '--dump-dom')[1])


@pytest.mark.parametrize('width', [1200, 500])
def test_page_fits_its_window(tmp_path: Path, browse: Callable[..., tuple[str, list[str]]], width: int) -> None:
    page = write_report([make_run(tmp_path / 'run')])
    # A script of the test reports how wide the content is.
    probe = "<script>document.title = 'width ' + document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    page.write_text(page.read_text().replace('</body>', f'{probe}</body>'))
    shown, _ = browse(page, f'--window-size={width},900', '--dump-dom')
    content, window = shown.split('<title>width ')[1].split('</title>')[0].split(' of ')
    assert int(content) <= int(window) == width
    picture = tmp_path / 'picture.png'
    browse(page, f'--window-size={width},900', f'--screenshot={picture}')
    pixels = cv2.imread(str(picture))
    assert pixels.shape == (900, width, 3)
    assert pixels.std() > 10


SELECT_WORST = "<script>document.querySelector('#worst').click();</script></body>"


class _Paste(HTMLParser):
    """Collects the block to paste."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ''
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == 'div':
            self.depth = self.depth + 1 if self.depth or dict(attrs).get('id') == 'paste' else 0
        self.in_pre = tag == 'pre'

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == 'div' and self.depth > 0
        self.in_pre = False

    def handle_data(self, data: str) -> None:
        if self.depth and self.in_pre:
            self.text += data


@pytest.mark.parametrize('is_pure_python', [False, True])
def test_pasting_the_block_keeps_the_layers_at_8_bits(
    tmp_path: Path, browse: Callable[..., tuple[str, list[str]]], is_pure_python: bool
) -> None:
    config = tmp_path / 'leaf_w4a4.py'
    if is_pure_python:
        config.write_text(
            'from mmengine.config import read_base\n\nwith read_base():\n    from mmzsq.configs.zsq_w4a4 import *\n'
        )
    else:
        overrides = "zsq = dict(quantizer=dict(overrides={'backbone.stage*': 5}))"
        bases = "['mmzsq::shapes/yolov5-p_shapes.py', 'mmzsq::_base_/zsq_w4a4.py']"
        config.write_text(f'_base_ = {bases}\n{overrides}\n')
    run = make_run(tmp_path / 'run')
    content = dict(results(), config=str(config))
    (run / 'results.json').write_text(json.dumps(content))
    names = ['backbone.stage1.0.conv', 'bbox_head.convs.0']
    measured = DETAILS['layers'][0]  # type: ignore[index]
    rows = [dict(measured, name=name) for name in names]
    kept = [dict(measured, name='backbone.stem.conv', w_bits=8, a_bits=8), DETAILS['layers'][1]]  # type: ignore[index]
    (run / 'report' / 'details.json').write_text(json.dumps(dict(DETAILS, layers=[*rows, *kept])))
    page = write_report([run])
    page.write_text(page.read_text().replace('</body>', SELECT_WORST))
    parser = _Paste()
    parser.feed(browse(page, '--dump-dom')[0])
    (tmp_path / 'pasted.py').write_text(parser.text)
    cfg = Config.fromfile(tmp_path / 'pasted.py')
    assert cfg.zsq.quantizer.w_bits == 4
    overrides = dict(cfg.zsq.quantizer.overrides)
    assert {name: overrides[name] for name in names} == dict.fromkeys(names, 8)
    # Neither a layer that has 8 bits nor one that is float.
    assert overrides.keys() - set(names) == (set() if is_pure_python else {'backbone.stage*'})
    if not is_pure_python:
        register_all_modules()
        layers = {layer.name: layer for layer in MODELS.build(compose(cfg).model).report.layers}
        assert (layers[names[0]].w_bits, layers[names[0]].a_bits) == (8, 8)
        assert layers['backbone.stage1.1.main_conv.conv'].w_bits == 5
