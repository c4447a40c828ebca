# SPDX-License-Identifier: Apache-2.0
"""What released OpenMMLab packages need on today's PyTorch, each with its reason.

MMEngine 0.10.7, MMDetection 3.3.0 and MMCV 2.1.0 are used as released; nothing of them is forked.
:func:`install` runs when ``mmzsq`` is imported, may run any number of times, and leaves alone
whatever works without it:

* ``mmcv.ops`` without a compiler: :func:`provide_mmcv_ops`;
* checkpoints that load with ``weights_only=True``: :func:`allow_mmengine_checkpoints` and
  :mod:`mmzsq.checkpoint`;
* bases of installed packages, ``mmzsq::...`` among them: :func:`resolve_package_bases`.

:func:`patch_ssd_head` needs MMDetection's models, and runs when :mod:`mmzsq.models` is imported.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.logging import HistoryBuffer

from mmzsq.checkpoint import SAFE_LOADING, register_checkpoint_loaders
from mmzsq.errors import UserError
from mmzsq.mmcv_ops.torchvision_ops import EXTENSION, TorchvisionOps

HISTORY_STATISTICS = ('min', 'max', 'current', 'mean')


def install() -> None:
    """Apply everything in this module.

    Raises:
        UserError: If no MMCV is installed at all.
    """
    provide_mmcv_ops()
    allow_mmengine_checkpoints()
    register_checkpoint_loaders()
    resolve_package_bases()


def provide_mmcv_ops() -> None:
    """Serve ``mmcv._ext`` from torchvision when MMCV has no compiled operators.

    ``import mmdet.models`` imports ``mmcv.ops``, each file of which looks its operators up in the
    compiled module ``mmcv._ext``. ``mmcv-lite`` has none, and compiling the full package takes over
    half an hour. A compiled module, even one that fails to load, is left as it is.

    Raises:
        UserError: If no MMCV is installed at all.
    """
    if EXTENSION in sys.modules:
        return
    if importlib.util.find_spec('mmcv') is None:
        raise UserError('mmcv is not installed. Install it without a compiler: pip install mmcv-lite==2.1.0')
    if importlib.util.find_spec(EXTENSION) is None:
        sys.modules[EXTENSION] = TorchvisionOps()


def allow_mmengine_checkpoints() -> None:
    """Declare safe what MMEngine's checkpoints hold besides tensors.

    MMEngine 0.10.7 saves its message hub in every checkpoint: ``HistoryBuffer`` objects around
    numpy arrays. torch 2.6 made ``weights_only=True`` the default of ``torch.load`` and refuses
    what is not declared safe. All that is declared here only builds arrays and numbers. Older torch
    cannot declare it, and nothing is done.
    """
    if not SAFE_LOADING:
        return
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in np.typecodes['AllInteger'] + 'efd?']
    allowed = [HistoryBuffer, np.ndarray, np.dtype, *dtypes]
    # numpy 2 renamed numpy.core to numpy._core: a checkpoint names the one of its writer.
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed += [(reconstruct, f'{module}._reconstruct'), (scalar, f'{module}.scalar')]
    # A pickle refers to a method by getattr, which nobody should allow as it is.
    allowed += [(_history_statistic, 'builtins.getattr')]
    torch.serialization.add_safe_globals(allowed)


def resolve_package_bases() -> None:
    """Find bases such as ``'mmzsq::_base_/zsq_w4a8.py'`` where Python finds the package.

    MMEngine resolves ``package::path`` for the packages of a fixed table, asks ``pkg_resources``
    (gone from setuptools 82) where they are, and looks in the wrong place for an editable install.
    What is not found as Python would import it is left to MMEngine.
    """
    config_utils.MODULE2PACKAGE.setdefault('mmzsq', 'mmzsq')
    original = Config._get_cfg_path
    if getattr(original, '__module__', None) == __name__:
        return

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, separator, name = cfg_path.partition('::')
        if not separator:
            return original(cfg_path, filename)
        root = package_configs(package)
        if root is not None and (root / name).is_file():
            # Our own types carry their scope, and a `_scope_` key would be unknown in `zsq`.
            return str(root / name), None if package == 'mmzsq' else package
        if package == 'mmzsq':
            raise UserError(_no_such_config(name, root))
        return original(cfg_path, filename)

    Config._get_cfg_path = staticmethod(get_cfg_path)


def patch_ssd_head() -> None:
    """Give MMDetection's ``SSDHead`` the attribute ``loss_cls`` that 3.3.0 reads to predict.

    Since 3.2.0 ``BaseDenseHead`` asks this loss what class scores mean. SSD's head, which computes its loss itself, has
    none, and every prediction ends in an AttributeError (MMDetection's issue 11780).
    """
    from mmdet.models.dense_heads import SSDHead

    if not hasattr(SSDHead, 'loss_cls'):
        SSDHead.loss_cls = None


def package_configs(package: str) -> Path | None:
    """Folder with the configs that an OpenMMLab package ships.

    Args:
        package: Name as in ``import``, for example ``'mmdet'``.

    Returns:
        ``<package>/.mim/configs``, or None when the package is not installed or ships none.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / '.mim' / 'configs'
    return folder if folder.is_dir() else None


def _no_such_config(name: str, root: Path | None) -> str:
    if root is None:
        return 'mmzsq was installed without its configs: install it again, pip install mmzsq'
    known = [path.relative_to(root).as_posix() for path in sorted(root.rglob('*.py'))]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f' Did you mean one of {", ".join(nearest)}?' if nearest else ''
    return f'mmzsq ships no config {name!r}.{hint} All of them are under {root}.'


def _history_statistic(owner: type, name: str) -> Callable[..., Any]:
    if owner is HistoryBuffer and name in HISTORY_STATISTICS:
        return getattr(HistoryBuffer, name)
    raise UnpicklingError(f'the file refers to the attribute {name!r} of {owner!r}')
