# SPDX-License-Identifier: Apache-2.0
"""Kinds of rows in the table of wrong inputs, and the files that the rows start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]

Prepare = Callable[[Path], object]

REMEDY = (
    r'must |Did you mean|Known keys|Registered: |[Ss]et |[Gg]ive |[Nn]ame |[Aa]dd |[Cc]heck |[Ll]ower |[Cc]hoose |'
    r'[Cc]orrect|[Dd]elete |[Rr]un |[Ii]nstall |[Uu]se |[Ee]xport |[Ww]rite |[Dd]ownload |[Dd]rop |needs |grant |'
    r'[Ss]ave it again|'
    r'does not exist|No such file|It ships|are for an exported|ImportError|'
    r'choose from|are required|only go with|takes no|is for |belongs to |free disk|put '
)
"""What a message says to do, or what it says is allowed."""

OF_A_FILE = (
    rf'{REMEDY}|truncated|damaged|[Ii]t is not |not a checkpoint|is not an? |was not written by|'
    'cannot be read as|could run code|contains a '
)
"""For a file that is not what it should be, what it is instead says what to do: give another."""

TINY = f"""
_base_ = {str(REPO / 'configs/zsq/yolov5-p_shapes_w4a4.py')!r}
work_dir = 'out'
zsq = dict(
    calibration_set=dict(num_images=3, batch_size=2),
    label_sampler=dict(warmup=1, interval=1),
    synthesis=dict(
        relabel=dict(image_size=64, iterations=2, batch_size=2),
        synthesize=dict(image_size=96, iterations=1, batch_size=2),
    ),
    train=dict(batch_size=2, num_workers=0, init_batches=1),
    presets=dict(default=dict(train=dict(max_epochs=2))),
)
default_hooks = dict(checkpoint=dict(interval=1))
val_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(num_images=2, image_size=64)
)
test_dataloader = val_dataloader
"""
"""A run of seconds with the detector that ships."""


FLOAT = f"""
_base_ = {str(REPO / 'configs/shapes/yolov5-p_shapes.py')!r}
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(num_images=2, image_size=64))
"""
"""The float detector that ships."""


@dataclass(frozen=True)
class Wrong:
    """One wrong input and what its message must say.

    Attributes:
        name: Names the row.
        argv: Tool and arguments.
        names: Text of the message that names the key or file.
        remedy: Regular expression of the remedy.
        files: Content of text files by name, written before.
        prepare: Called with the folder before.
        needs: ``'run'`` copies the work_dir of a finished run to ``out``.
        fails: Reason why the product does not answer rightly today.
    """

    name: str
    argv: tuple[str, ...]
    names: str
    remedy: str = REMEDY
    files: dict[str, str] = field(default_factory=dict)
    prepare: Prepare | None = None
    needs: str | None = None
    fails: str | None = None


def options(tool: str, values: dict[str, Sequence[str]], **others: Any) -> list[Wrong]:
    """Make a row of each value of each key, given by ``--cfg-options``. The message must name the key."""
    return [
        Wrong(f'{key}={value}', (tool, 'tiny.py', '--cfg-options', f'{key}={value}'), key, **others)
        for key, wrong in values.items()
        for value in wrong
    ]


def leaf(name: str, text: str, names: str, tool: str = 'train', args: Sequence[str] = (), **others: Any) -> Wrong:
    """Make a row of a config that changes the tiny one by ``text``."""
    files = {'case.py': f"_base_ = 'tiny.py'\n{text}\n", **others.pop('files', {})}
    return Wrong(name, (tool, 'case.py', *args), names, files=files, **others)


def command(name: str, argv: str, names: str, **others: Any) -> Wrong:
    """Make a row of a command line, split at blanks."""
    return Wrong(name, tuple(argv.split()), names, **others)
