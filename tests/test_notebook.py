# SPDX-License-Identifier: Apache-2.0
"""demo/zero_shot_quantization.ipynb: it runs as it is, with fewer images and steps, and it ships with its outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

MAX_BYTES = 1_500_000
FEW = """
zsq = dict(
    calibration_set=dict(num_images=2, batch_size=2),
    label_sampler=dict(warmup=1, interval=1),
    synthesis=dict(relabel=dict(image_size=64, iterations=2), synthesize=dict(image_size=64, iterations=2)),
    # Three layers are initialized and verified instead of sixty.
    quantizer=dict(scope='bbox_head', weight=dict(init='lsq'), activation=dict(init='lsq')),
    train=dict(num_workers=0, init_batches=1, batch_size=2),
    presets=dict(default=dict(train=dict(max_epochs=1))),
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(num_images=2))
test_dataloader = val_dataloader
"""
"""Appended to the notebook's config."""


@pytest.fixture(scope='module')
def notebook() -> Any:
    return nbformat.read(Path(__file__).resolve().parents[1] / 'demo/zero_shot_quantization.ipynb', as_version=4)


def pictures(cells: Any) -> list[int]:
    """Number of pictures that each cell displays."""
    outputs = [cell.get('outputs', []) for cell in cells]
    return [sum('image/jpeg' in output.get('data', {}) for output in of_cell) for of_cell in outputs]


def test_the_notebook_runs(notebook: Any, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = nbformat.from_dict(notebook)
    [config] = [cell for cell in made.cells if 'config' in cell.metadata.get('tags', [])]
    config.source += FEW
    for name, value in dict(PYTHONPATH=repo, PATH=f'{Path(sys.executable).parent}:/usr/bin:/bin').items():
        monkeypatch.setenv(name, str(value))
    NotebookClient(made, timeout=300, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    assert pictures(made.cells) == pictures(notebook.cells)
    run = tmp_path / 'work_dirs/demo_w4a4'
    assert (run / 'report.html').is_file() and (run / 'student.onnx').is_file()
    assert json.loads((run / 'deploy.json').read_text())['passed'] is True


def test_the_notebook_ships_with_the_outputs_of_a_whole_run(notebook: Any, repo: Path) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(pictures(code)) >= 5
    [table] = [output.data['text/markdown'] for cell in code for output in cell.outputs if '| AP |' in str(output)]
    full, ptq, trained = (float(row.split('|')[2]) for row in table.splitlines()[2:])
    assert full == 56.3 and ptq < trained < full
    assert (repo / 'demo/zero_shot_quantization.ipynb').stat().st_size < MAX_BYTES
    assert not any(word in nbformat.writes(notebook) for word in ('"/tmp/', '/home/', '/work/'))


def test_the_first_cell_names_what_is_missing(notebook: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    first = next(cell for cell in notebook.cells if cell.cell_type == 'code')
    plain = first.source.replace('%pip', 'raise AssertionError #')
    with pytest.raises(RuntimeError, match='set REPOSITORY in this cell'):
        exec(plain, {})
