# SPDX-License-Identifier: Apache-2.0
"""Write all messages of the package into the troubleshooting page: ``messages_page.py docs/troubleshooting.md``.

``--check`` compares and writes nothing.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START, END = '<!-- messages, written by tools/misc/messages_page.py -->', '<!-- end of messages -->'
AREAS = {
    'config': 'The config',
    'engine': 'The run',
    'synthesis': 'Synthesis and the calibration set',
    'tasks': 'The detector',
    'quantization': 'Quantization',
    'distillation': 'Distillation',
    'qat': 'Training',
    'deploy': 'Export and deployment',
    'converters': 'Conversion of weights',
    'datasets': 'Data sets',
    'mmcv_ops': 'Operators of MMCV',
    '': 'Files, weights, names and the command line',
}


def messages(path: Path) -> list[str]:
    """Return the messages of a file.

    Args:
        path: A Python file.

    Returns:
        Texts of its ``raise UserError(...)``, with an ellipsis in place of each value. Messages that a variable holds
        are left out.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue
        name = node.exc.func
        if not (isinstance(name, ast.Name) and name.id.endswith('Error') and node.exc.args):
            continue
        if name.id in ('UserError', 'NotEvaluatedError'):
            text = _text(node.exc.args[0])
            if len(text.replace('…', '').split()) > 2:
                found.append(text)
    return found


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return '…'


def section() -> str:
    """Return the generated part of the page."""
    groups: dict[str, set[tuple[str, str]]] = {area: set() for area in AREAS}
    for path in sorted((ROOT / 'mmzsq').rglob('*.py')):
        place = path.relative_to(ROOT / 'mmzsq')
        area = place.parts[0] if place.parts[0] in AREAS else ''
        for text in messages(path):
            groups[area].add((' '.join(text.replace('`', "'").split()), f'../mmzsq/{place.as_posix()}'))
    lines = []
    for area, title in AREAS.items():
        if groups[area]:
            lines += [f'### {title}', '']
            lines += [f'* `{text}` ([source]({link}))' for text, link in sorted(groups[area], key=_order)] + ['']
    return '\n'.join(lines)


def _order(entry: tuple[str, str]) -> tuple[str, ...]:
    return entry[0].lstrip('… .:').lower(), *entry


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('page', type=Path)
    parser.add_argument('--check', action='store_true', help='exit with 1 if the page is out of date')
    args = parser.parse_args()
    old = args.page.read_text(encoding='utf-8')
    before, _, rest = old.partition(START)
    after = rest.partition(END)[2]
    if not after:
        parser.error(f'{args.page} has no block between "{START}" and "{END}".')
    new = f'{before}{START}\n\n{section()}\n{END}{after}'
    if args.check:
        sys.exit(
            0 if new == old else f'{args.page} is out of date: run `python tools/misc/messages_page.py {args.page}`.'
        )
    args.page.write_text(new, encoding='utf-8')


if __name__ == '__main__':
    main()
