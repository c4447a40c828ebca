# SPDX-License-Identifier: Apache-2.0
"""``python -m mmzsq.stock`` runs MMDetection's own tools on our configs and runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from mmzsq import cli, stock
from mmzsq.errors import UserError

LEAF = """
_base_ = ['{repo}/configs/shapes/yolov5-p_shapes.py', 'mmzsq::_base_/zsq_w4a8.py']
load_from = '{repo}/mmzsq/assets/yolov5-p_shapes.safetensors'
zsq = dict(preset='instant', calibration_set=dict(num_images=4), synthesis=dict(synthesize=dict(image_size=64)))
test_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(num_images=4))
val_dataloader = test_dataloader
"""


def test_a_tool_runs_with_our_bases(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'leaf.py').write_text(LEAF.format(repo=repo))
    monkeypatch.setattr(sys, 'argv', ['stock', 'print_config', str(tmp_path / 'leaf.py')])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    stock.main()
    printed = capsys.readouterr().out
    assert "runner_type = 'mmzsq.ZeroShotRunner'" in printed and "type='YOLOv5'" in printed.replace('mmzsq.', '')


def test_an_unknown_tool_is_refused_with_the_names_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['stock', 'quantify'])
    with pytest.raises(UserError, match=r'no tool quantify\. Its tools: .*analysis_tools/get_flops.*train'):
        stock.main()


def test_the_command_that_continues_names_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'train.py').write_text(
        'from pathlib import Path\n'
        'from mmzsq import cli\n'
        'cli._RUN.work_dir = Path(__file__).parent\n'
        "raise OSError(28, 'No space left on device', 'out/log.txt')\n"
    )
    with ZipFile(tmp_path / 'epoch_1.pth', 'w') as archive:
        archive.writestr('data', '')
    monkeypatch.setattr(stock, 'tools_folder', lambda: tmp_path)
    monkeypatch.setattr(sys, 'argv', ['mmzsq/stock.py', 'train', 'my.py', '--work-dir', 'out'])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    with pytest.raises(SystemExit):
        cli.run(stock.main)
    assert capsys.readouterr().err.endswith(' train my.py --work-dir out --resume`\n')


@pytest.mark.nightly
def test_mmdetections_tools_work_on_a_run(repo: Path, tmp_path: Path) -> None:
    (tmp_path / 'leaf.py').write_text(LEAF.format(repo=repo))
    env = dict(os.environ, PYTHONPATH=str(repo))

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, '-m', *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run('mmzsq.train', 'leaf.py', '--work-dir', 'out')
    assert 'Flops' in run('mmzsq.stock', 'get_flops', 'leaf.py')
    run('mmzsq.stock', 'browse_dataset', 'out/leaf.py', '--output-dir', 'browse', '--not-show')
    assert len(list((tmp_path / 'browse').glob('*.png'))) > 0
    checkpoint = (tmp_path / 'out' / 'last_checkpoint').read_text()
    assert 'coco/bbox_mAP' in run('mmzsq.stock', 'test', 'leaf.py', checkpoint, '--out', 'found.pkl')
    run('mmzsq.stock', 'confusion_matrix', 'leaf.py', 'found.pkl', 'matrix')
    assert (tmp_path / 'matrix' / 'confusion_matrix.png').stat().st_size > 0
    # It imports seaborn, which MMDetection does not require.
    pytest.importorskip('seaborn')
    log = next((tmp_path / 'out').glob('*/vis_data/scalars.json'))
    run('mmzsq.stock', 'analyze_logs', 'plot_curve', str(log), '--keys', 'coco/bbox_mAP', '--out', 'curve.pdf')
    assert (tmp_path / 'curve.pdf').stat().st_size > 0
