# SPDX-License-Identifier: Apache-2.0
"""Missing and old packages of OpenMMLab are reported in one message, whichever distribution they come from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mmzsq.errors import UserError
from mmzsq.requirements import OLDEST, MissingPackageError, check_packages


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of import packages that stand in for OpenMMLab's, in the oldest versions."""
    for name, version in OLDEST.items():
        write(tmp_path, name, f'__version__ = {version!r}\n')
        for module in [module for module in sys.modules if module == name or module.startswith(f'{name}.')]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    yield tmp_path
    for name in OLDEST:
        sys.modules.pop(name, None)


def write(folder: Path, name: str, text: str) -> None:
    (folder / f'{name}.py').write_text(text)


def message() -> str:
    for name in OLDEST:
        sys.modules.pop(name, None)
    with pytest.raises(MissingPackageError) as caught:
        check_packages()
    assert isinstance(caught.value, UserError)
    return str(caught.value)


def test_the_oldest_versions_pass(packages: Path) -> None:
    check_packages()
    assert isinstance(sys.modules['mmdet'], ModuleType)
    assert Path(str(sys.modules['mmdet'].__file__)).parent == packages


@pytest.mark.parametrize('version', ['0.10.12', '0.11.0rc1', '1.0'])
def test_later_versions_pass(packages: Path, version: str) -> None:
    write(packages, 'mmengine', f'__version__ = {version!r}\n')
    check_packages()


def test_all_that_is_missing_is_named_with_the_commands(packages: Path) -> None:
    (packages / 'mmengine.py').unlink()
    write(packages, 'mmcv', 'import mmengine\n')
    (packages / 'mmdet.py').unlink()
    text = message()
    assert text.startswith('mmengine is not installed; mmdet is not installed. ')
    assert all(f"pip install 'mmzsq[{extra}]'" in text for extra in ('lite', 'stock', 'onedl'))


def test_an_old_version_is_named(packages: Path) -> None:
    write(packages, 'mmdet', "__version__ = '3.2.10'\n")
    assert message().startswith('mmdet 3.2.10 is too old, 3.3.0 or later is needed. ')


def test_a_version_that_mmdetection_refuses_is_told_in_its_words(packages: Path) -> None:
    write(packages, 'mmdet', "assert False, 'MMCV==2.2.0 is used but incompatible.'\n")
    assert message().startswith('mmdet cannot be imported: MMCV==2.2.0 is used but incompatible.')


def test_a_missing_package_of_theirs_is_left_to_python(packages: Path) -> None:
    write(packages, 'mmcv', 'import addict_that_is_missing\n')
    with pytest.raises(ModuleNotFoundError, match='addict_that_is_missing') as caught:
        check_packages()
    assert not isinstance(caught.value, UserError)
