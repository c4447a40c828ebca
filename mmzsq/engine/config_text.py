# SPDX-License-Identifier: Apache-2.0
"""The text of a config, formatted once.

MMEngine formats the whole config with yapf for the log, for each visualizer backend and for every checkpoint. That
takes 0.4 s for a small detector and more than a second for Mask R-CNN, as long as ten training steps on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config

from mmzsq.patching import patched


@contextmanager
def formatted_once() -> Iterator[None]:
    """Remember the texts of all configs inside the block. A config that has changed is formatted again."""
    format_text: Any = Config.__dict__['pretty_text'].fget
    texts: dict[str, str] = {}

    def pretty_text(config: Config) -> str:
        content = repr(config.to_dict())
        if content not in texts:
            texts[content] = format_text(config)
        return texts[content]

    with patched(Config, 'pretty_text', property(pretty_text)):
        yield
