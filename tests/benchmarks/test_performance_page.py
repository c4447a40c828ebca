# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/performance_page.py."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import performance_page
import pytest
from performance_page import TABLES, Results, amdahl, general_ratio, render_goals, whole_method_minutes
from speed_cases import CASES

TOOL = 'benchmarks/performance_page.py'
END = '<!-- end of speed -->\n'
PAGE = f'# Page\n\n<!-- speed: goals -->\nold\n{END}\nBetween.\n\n<!-- speed: scaling -->\n{END}'
TOP = [dict(name='void gemm<a|b>', ms=2.0, count=3.0, share=0.25)]
STEP = dict(
    ms_per_image_iteration=0.395,
    spread=[0.39, 0.41],
    task='PaddedTargetsTask',
    cuda_graph=True,
    eager_reason=None,
    launches=2.0,
    graph_launches=1.0,
    kernels=900.0,
    kernel_ms=12.5,
    busy=0.98,
    utilization=99.0,
    peak_memory_gib=3.25,
    peak_reserved_gib=4.5,
    top=TOP,
)
RELABEL = dict(
    STEP,
    ms_per_image_iteration=0.05,
    ms_per_image_step=0.04,
    ms_per_image_correction=1.0,
    correction_spread=[0.9, 1.2],
    added=7,
    removed=3,
    captures_lost=0,
)
TRAINING = dict(
    steps={
        name: dict(STEP, ms=ms, images_per_second=32000 / ms, cuda_graph=name != 'float')
        for name, ms in dict(float=100.0, quantized=120.0, distilled=200.0).items()
    },
    ratio_quantized=1.2,
    ratio_quantized_spread=[1.19, 1.21],
    ratio_distilled=2.0,
    ratio_distilled_spread=[1.9, 2.1],
)
WHERE = dict(device='NVIDIA H100', versions=dict(mmzsq='0.1.0', torch='2.9'))
MAIN = dict(WHERE, case='yolov5-s_640_b32', command='python a.py', synthesis=STEP, training=TRAINING)
COARSE = dict(WHERE, case='yolov5-s_160_b64', command='python b.py', synthesis=STEP, relabel=RELABEL)
SCALING = dict(
    WHERE,
    command='python c.py',
    processes=[1, 2],
    speedup=dict(generation=1.95, training=1.7),
    serial_share=dict(generation=0.02, training=0.1),
    same_set=True,
)


@pytest.fixture
def update(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the tool on a page and all results in a folder; returns the page."""
    page = tmp_path / 'page.md'
    page.write_text(PAGE)

    def update(*options: str) -> str:
        results = [str(path) for path in sorted(tmp_path.glob('*.json'))]
        monkeypatch.setattr(sys, 'argv', [TOOL, *results, str(page), *options])
        runpy.run_path(str(repo / TOOL), run_name='__main__')
        return page.read_text()

    return update


def keep(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / f'{name}.json').write_text(json.dumps(content))


def cells(text: str, title: str) -> list[str]:
    """Cells of the first row with this title, without the title."""
    [row, *_] = [line for line in text.splitlines() if line.startswith(f'| {title} |')]
    return [cell.strip() for cell in row.split('|')[2:-1]]


def test_without_results_every_row_is_empty_and_says_so() -> None:
    for render in TABLES.values():
        assert 'Nothing was measured yet.' in render(Results({}, None))
    text = TABLES['goals'](Results({}, None))
    assert cells(text, 'YOLOv5-s, 640 px, batch 32') == ['7.90', '0.556', '<= 0.4', '', '', '', '', '']
    assert cells(text, 'Mask R-CNN Swin-T, 640 px, batch 16')[1:3] == ['52.000*', '<= 12']


def test_measurements_are_shown_with_their_goals(update: Callable[..., str], tmp_path: Path) -> None:
    keep(tmp_path, MAIN['case'], MAIN)
    keep(tmp_path, COARSE['case'], COARSE)
    keep(tmp_path, 'scaling', SCALING)
    text = update()
    # 7.9 / 0.395 and 0.556 / 0.395.
    measured = ['7.90', '0.556', '<= 0.4', '0.395', '0.390 to 0.410', '20.0', '1.4', 'yes']
    assert cells(text, 'YOLOv5-s, 640 px, batch 32') == measured
    training = 'YOLOv5-s, 640 px, batch 32: training step, distilled / float'
    assert cells(text, training)[2:] == ['<= 1.8', '2.000', '1.900 to 2.100', '', '', 'no']
    assert cells(text, 'two GPUs, generation, speedup')[3] == '1.95'
    assert cells(text, 'two GPUs, training, speedup')[-1] == 'no'
    assert 'Not measured: YOLOv5-s, 160 px, batch 256;' in text
    assert 'Measured on NVIDIA H100; mmzsq 0.1.0, torch 2.9:\n\n```bash\npython a.py\npython b.py\n```' in text
    # 1 / (0.1 + 0.9 / 4)
    assert cells(text, 'training') == ['1.70', '10.00 %', '1.8', '3.1', '4.7', '6.4', '8.8']
    assert 'same set, compared by SHA-256: yes' in text
    assert text.startswith('# Page\n') and 'Between.' in text and '\nold\n' not in text


def test_step_tables_show_tasks_and_graphs() -> None:
    results = Results({result['case']: result for result in (MAIN, COARSE)}, None)
    title = 'YOLOv5-s, 640 px, batch 32'
    step = ['PaddedTargetsTask', '0.395', 'yes', '2.0', '1.0', '900.0', '12.5', '98 %', '99', '3.25']
    assert cells(TABLES['synthesis'](results), title) == step
    assert cells(TABLES['relabeling'](results), 'YOLOv5-s, 160 px, batch 64') == [
        *('0.0400', '1.000', '0.900 to 1.200', '0.0500', '10', '0')
    ]
    training = cells(TABLES['training'](results), title)
    assert training[:6] == ['100.0', '120.0', '200.0', '320', '267', '160']
    assert training[6:9] == ['12.5', '12.5', '12.5']
    assert training[9:] == ['1.20 (1.19 to 1.21)', '2.00 (1.90 to 2.10)', 'yes', 'yes', '98 %']
    memory = '3.25 / 4.50'
    assert cells(TABLES['memory'](results), title) == [memory, '', memory, memory, memory]
    # The bar in the name is escaped.
    assert '| `void gemm<a\\|b>` | 2.000 | 3.0 | 25 % |' in TABLES['costs'](results)


def test_the_reason_for_eager_steps_is_shown() -> None:
    eager = dict(MAIN, synthesis=dict(STEP, cuda_graph=False, eager_reason='it waits'))
    text = TABLES['synthesis'](Results({MAIN['case']: eager}, None))
    assert 'YOLOv5-s, 640 px, batch 32 runs eagerly: it waits.' in text


def test_the_whole_method_is_extrapolated_from_three_rates() -> None:
    slower = dict(COARSE, case='yolov5-s_160_b128', relabel=dict(RELABEL, ms_per_image_iteration=0.06))
    results = Results({result['case']: result for result in (MAIN, slower, COARSE)}, None)
    # 2000 images: 2500 iterations of 0.05 and of 0.395 ms, and 20 epochs at 160 images a second.
    seconds = 2000 * (2500 * (0.05 + 0.395) / 1000 + 20 / 160)
    assert whole_method_minutes(results, labels=True) == pytest.approx(seconds / 60)
    assert whole_method_minutes(results, labels=False) == pytest.approx((seconds - 2000 * 2.5 * 0.05) / 60)
    assert whole_method_minutes(Results({MAIN['case']: MAIN}, None), labels=True) is None
    assert whole_method_minutes(Results({COARSE['case']: COARSE}, None), labels=False) is None


def test_a_fully_serial_part_has_no_speedup() -> None:
    assert amdahl(1.0, 8) == 1
    assert amdahl(0.0, 8) == 8


def test_check_reports_a_stale_page_without_writing(update: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        update('--check')
    assert exit_.value.code == 1
    assert (tmp_path / 'page.md').read_text() == PAGE
    update()
    update('--check')


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('other', MAIN, 'holds the case yolov5-s_640_b32: rename it to'),
        ('other', dict(MAIN, case='other'), "no case of benchmarks/speed_cases.py: 'other'"),
    ],
)
def test_a_mistake_is_one_message(
    update: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: dict[str, Any],
    message: str,
) -> None:
    keep(tmp_path, name, content)
    with pytest.raises(SystemExit) as exit_:
        update()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_page_without_tables_or_with_an_unknown_one_is_refused() -> None:
    with pytest.raises(performance_page.UserError, match='no table to write'):
        performance_page.update('text', Results({}, None))
    with pytest.raises(performance_page.UserError, match="unknown table 'speeds'. Known tables: goals,"):
        performance_page.update('<!-- speed: speeds -->\n<!-- end of speed -->', Results({}, None))


def test_the_page_of_this_repository_is_up_to_date(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = sorted((repo / 'benchmarks' / 'results' / 'benchmarks').glob('*.json'))
    assert {path.stem for path in results} <= {'scaling', *(case.name for case in CASES)}
    monkeypatch.setattr(sys, 'argv', [TOOL, *map(str, results), str(repo / 'docs' / 'performance.md'), '--check'])
    runpy.run_path(str(repo / TOOL), run_name='__main__')


def test_the_general_path_is_compared_with_fused_kernels() -> None:
    general = dict(MAIN, case='yolov5-s_640_b32_general', synthesis=dict(STEP, ms_per_image_iteration=0.79))
    both = Results({result['case']: result for result in (MAIN, general)}, None)
    assert general_ratio(both) == pytest.approx(2.0)
    assert general_ratio(Results({MAIN['case']: MAIN}, None)) is None
    row = next(line for line in render_goals(both).splitlines() if 'general path / fused' in line)
    assert [cell.strip() for cell in row.split('|')][4:6] == ['<= 3', '2.000'] and row.rstrip(' |').endswith('yes')
