# SPDX-License-Identifier: Apache-2.0
"""A real COCO-trained YOLOv5-n on real COCO images, through the command line tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_yolov5n_is_as_accurate_as_a_plain_implementation_of_it(shared: Path, repo: Path, tmp_path: Path) -> None:
    """AP 29.3 and AP50 44.5: an independent implementation with the same weights on the same 200 images."""
    environment = dict(os.environ, PYTHONPATH=str(repo), OMP_NUM_THREADS='2')
    weights, data = tmp_path / 'yolov5n.safetensors', shared / 'data' / 'coco_mini'

    def run(*arguments: object) -> None:
        subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment, cwd=tmp_path)

    run(repo / 'tools/model_converters/ultralytics_to_mmzsq.py', shared / 'weights' / 'yolov5n.pt', weights)
    run(
        *(repo / 'tools/test.py', repo / 'configs/yolov5/yolov5-n_coco.py', weights, '--work-dir', tmp_path / 'run'),
        '--cfg-options',
        f'test_dataloader.dataset.data_root={data}/',
        f'test_evaluator.ann_file={data}/annotations/instances_val2017.json',
        'test_dataloader.num_workers=0',
        'test_dataloader.persistent_workers=False',
    )
    (record,) = (tmp_path / 'run').glob('*/*.json')
    metrics = json.loads(record.read_text().splitlines()[-1])
    assert 100 * metrics['coco/bbox_mAP'] == pytest.approx(29.3, abs=0.3)
    assert 100 * metrics['coco/bbox_mAP_50'] == pytest.approx(44.5, abs=0.3)
