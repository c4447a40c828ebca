# SPDX-License-Identifier: Apache-2.0
"""Replace attributes of an object, usually methods, inside a ``with`` block.

Blocks on one object may be nested: each restores the state before it. If an attribute was defined on the class only, it
is removed from the object at the end of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace one attribute inside the block.

    Args:
        owner: Any object with a ``__dict__``: a module, a class instance, a Python module.
        name: Name of the attribute, which the object or its class defines.
        replacement: The value inside the block. To call the original method, read it before the block begins.

    Example:
        >>> class Greeter:
        ...     def greet(self): return 'hello'
        >>> greeter = Greeter()
        >>> with patched(greeter, 'greet', lambda: 'goodbye'):
        ...     greeter.greet()
        'goodbye'
        >>> greeter.greet()
        'hello'
    """
    attributes = vars(owner)
    held = name in attributes
    before = attributes.get(name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if held:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def patched_forwards(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of several modules inside the block.

    Hooks of a module run only when the module is called. A patched ``forward`` also sees direct calls, such as
    ``bbox_head.forward(...)`` in MMDetection's detectors.

    Args:
        forwards: The replacement for each module.
    """
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.enter_context(patched(module, 'forward', forward))
        yield
