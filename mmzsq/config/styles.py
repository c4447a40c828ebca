# SPDX-License-Identifier: Apache-2.0
"""Advice for configs that mix the two styles of MMEngine: text (``_base_``) and pure Python (``read_base``)."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mmengine.config import Config

from mmzsq.compat import package_configs
from mmzsq.errors import UserError

MIXED = 'configuration file type in the inheritance chain'
"""Part of MMEngine's message about mixed styles."""

OWN = 'mmzsq.configs'


def advice(leaf: Path, error: Exception) -> str | None:
    """Say what to write instead of a config that MMEngine refuses because of its style.

    Args:
        leaf: The config.
        error: What MMEngine raised.

    Returns:
        A message with the lines to write, or None if the error is another one.
    """
    if 'not found! It means that incorrect module' in str(error) and f'/{OWN.replace(".", "/")}/' in str(error):
        return f'{error}. The bases of mmzsq for pure-Python configs are {", ".join(_own_modules())}.'
    if MIXED not in str(error):
        return None
    tree = ast.parse(leaf.read_text(encoding='utf-8'))
    text_bases, modules = _text_bases(tree), list(_modules(tree))
    for base in text_bases:
        file = _file_of_base(base, leaf)
        if file is not None and file.is_file() and Config._is_lazy_import(str(file)):
            return _advise_python(leaf, base, text_bases)
    for module in modules:
        file = _file_of_module(module, leaf)
        if file is not None and file.is_file() and _text_bases(ast.parse(file.read_text(encoding='utf-8'))):
            return _advise_text(leaf, module, modules)
    return (
        'some of its bases are text configs (`_base_ = ...`), and others are pure-Python configs '
        '(`with read_base(): ...`). MMEngine needs one style in all of them.'
    )


def check_section_is_merged(leaf: Path) -> None:
    """Refuse a pure-Python config that assigns ``zsq`` although it imports a base of this package.

    In a text config, ``zsq = dict(...)`` changes the section of the base. In Python, it replaces the section, and the
    bits with it.

    Args:
        leaf: A config of either style.

    Raises:
        UserError: If the section of the base would be lost.
    """
    if leaf.suffix != '.py':
        return
    tree = ast.parse(leaf.read_text(encoding='utf-8'))
    base = next((module for module in _modules(tree) if module.startswith(f'{OWN}.')), None)
    if base is None:
        return
    for node in tree.body:
        if 'zsq' in _assigned(node):
            raise UserError(
                f'{leaf}, line {node.lineno}: in a pure-Python config, `zsq = ...` replaces the section of {base}, '
                'and its bits with it. Write zsq.merge(dict(...)) instead.'
            )


def _advise_python(leaf: Path, other: str, bases: list[str]) -> str:
    modules = [_module_of_base(base) for base in bases]
    lines = ['from mmengine.config import read_base', 'with read_base():']
    lines += [f'    from {module} import *' for module in modules]
    renamed = [
        base
        for base, module in zip(bases, modules, strict=True)
        if not all(name.isidentifier() for name in module.lstrip('.').split('.'))
    ]
    note = f'\nRename {", ".join(renamed)}: Python cannot import such a name.' if renamed else ''
    return (
        f'its base {other} is a pure-Python config, and a text config cannot build on one. Write {leaf.name} in Python '
        'too, with these lines instead of _base_ = ..., and zsq.merge(dict(...)) instead of zsq = dict(...):\n'
        + '\n'.join(lines)
        + note
    )


def _advise_text(leaf: Path, other: str, modules: list[str]) -> str:
    bases = ', '.join(repr(_base_of_module(module)) for module in modules)
    return (
        f'its base {other} is a text config, and a pure-Python config cannot build on one. Write {leaf.name} as text '
        f'too, with this line instead of `with read_base(): ...`, and dict(type=...) with names instead of classes:\n'
        f'_base_ = [{bases}]'
    )


def _assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _text_bases(tree: ast.Module) -> list[str]:
    """Return the values of ``_base_`` that are written out; MMEngine evaluates others."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and '_base_' in _assigned(node):
            values = node.value.elts if isinstance(node.value, (ast.List, ast.Tuple)) else [node.value]
            return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return []


def _modules(tree: ast.Module) -> Iterator[str]:
    """Yield the modules that are imported under ``with read_base()``, with leading dots if they are relative."""
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.With) else []:
            if isinstance(inner, ast.ImportFrom) and inner.module is not None:
                yield '.' * inner.level + inner.module


def _own_modules() -> list[str]:
    folder = _package(OWN.split('.')[0])
    return [f'{OWN}.{file.stem}' for file in sorted((folder / 'configs').glob('zsq_*.py'))] if folder else []


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _file_of_base(base: str, leaf: Path) -> Path | None:
    package, separator, name = base.partition('::')
    if not separator:
        return leaf.parent / base
    root = package_configs(package)
    return None if root is None else root / name


def _file_of_module(module: str, leaf: Path) -> Path | None:
    names = module.lstrip('.').split('.')
    level = len(module) - len(module.lstrip('.'))
    if level:
        return leaf.parent.joinpath(*['..'] * (level - 1), *names).with_suffix('.py')
    folder = _package(names[0])
    return None if folder is None else folder.joinpath(*names[1:]).with_suffix('.py')


def _module_of_base(base: str) -> str:
    package, separator, name = base.partition('::')
    file = PurePosixPath((name if separator else base).replace('\\', '/')).with_suffix('')
    if file.parts[-2:-1] == ('_base_',) and f'{OWN}.{file.name}' in _own_modules():
        return f'{OWN}.{file.name}'
    if separator:
        return '.'.join((package, 'configs', *file.parts))
    up = file.parts.count('..')
    return '.' * (up + 1) + '.'.join(file.parts[up:])


def _base_of_module(module: str) -> str:
    names = module.lstrip('.').split('.')
    level = len(module) - len(module.lstrip('.'))
    if level:
        return '/'.join((*(['..'] * (level - 1) or ['.']), *names)) + '.py'
    if module.startswith(f'{OWN}.'):
        return f'mmzsq::_base_/{names[-1]}.py'
    return f'{names[0]}::{"/".join(names[2:])}.py'
