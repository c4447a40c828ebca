# SPDX-License-Identifier: Apache-2.0
"""The text of a config is formatted once, and is still that of MMEngine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config

from mmzsq.engine.config_text import formatted_once


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Count how often a text is formatted."""
    formatted: list[Config] = []
    original: Any = Config.__dict__['pretty_text'].fget
    monkeypatch.setattr(Config, 'pretty_text', property(lambda config: formatted.append(config) or original(config)))
    return formatted


def test_a_text_is_formatted_again_only_if_the_config_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    config = Config(dict(a=1, b=dict(c=[1, 2])))
    expected = config.pretty_text
    calls.clear()
    with formatted_once():
        assert [config.pretty_text, config.pretty_text, Config(config.to_dict()).pretty_text] == [expected] * 3
        assert len(calls) == 1
        config.b.c = [2, 1]
        assert config.pretty_text != expected and len(calls) == 2
        changed = config.pretty_text
    assert config.pretty_text == changed and len(calls) == 3


def test_checkpoints_of_a_run_share_one_text(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    none = {f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')}
    runner = make_runner(**none)
    calls = counted(monkeypatch)
    runner.train()
    assert len(calls) == 1
    texts = [torch.load(path, weights_only=True)['meta']['cfg'] for path in Path('out').glob('epoch_*.pth')]
    assert texts and set(texts) == {runner.cfg.pretty_text}
