# SPDX-License-Identifier: Apache-2.0
"""A model card with the front matter of a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from mmzsq.atomic_files import write_atomically
from mmzsq.report.page import config_name, main_metrics, provenance, verdict
from mmzsq.report.runs import ROWS, Group, Run

CARD_FILE = 'model_card.md'


def write_card(work_dir: str | Path) -> Path:
    """Write the model card of a run. A hub expects it as ``README.md`` of the model.

    Args:
        work_dir: Folder of the run.

    Returns:
        Path of the card.

    Raises:
        UserError: If the folder has no results, or the file cannot be written.
    """
    run = Run.load(work_dir)
    # The values are written as JSON, which is YAML.
    environment = Environment(
        loader=PackageLoader('mmzsq.report'), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters['yaml'] = _yaml
    content = environment.get_template('card.md').render(
        run=run,
        name=f'{config_name(run)}',
        verdict=verdict(run, Group([run])),
        metrics=main_metrics(run),
        rows=[row for row in ROWS if row in run.results['metrics']],
        row_titles=ROWS,
        provenance=provenance(run),
    )
    path = run.path / CARD_FILE
    write_atomically(path, content.encode())
    return path


def _yaml(value: Any) -> str:
    return json.dumps(value)
