# SPDX-License-Identifier: Apache-2.0
"""Adapt released OpenMMLab packages to current PyTorch and Python.

The package uses MMEngine, MMDetection and MMCV as released, stock or of the OneDL forks. :func:`install` runs when
``mmzsq`` is imported. It may run more than once and changes nothing that already works:

* :func:`provide_mmcv_ops` makes ``mmcv.ops`` work without compiled operators.
* :mod:`mmzsq.checkpoint` makes checkpoints load with ``weights_only=True``.
* :func:`resolve_package_bases` finds the base configs of installed packages, including ``mmzsq::...``.
* :func:`resolve_package_modules` does so for pure-Python configs.

:func:`patch_mmdet` needs MMDetection's models and MMCV's operators, and therefore runs when :mod:`mmzsq.models` is
imported.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.config import config as config_module
from mmengine.config import utils as config_utils

from mmzsq.checkpoint import allow_mmengine_checkpoints, register_checkpoint_loaders
from mmzsq.errors import UserError
from mmzsq.mmcv_ops.pytorch_ops import at_least_fp32
from mmzsq.mmcv_ops.torchvision_ops import EXTENSION, TorchvisionOps


def install() -> None:
    """Apply all patches of this module except those of :func:`patch_mmdet`."""
    provide_mmcv_ops()
    allow_mmengine_checkpoints()
    register_checkpoint_loaders()
    resolve_package_bases()
    resolve_package_modules()
    import_fork_quietly()


def provide_mmcv_ops() -> None:
    """Serve ``mmcv._ext`` from torchvision when MMCV has no compiled operators.

    ``import mmdet.models`` imports ``mmcv.ops``, whose files look up their operators in the compiled module
    ``mmcv._ext``. ``mmcv-lite`` does not contain this module, and compiling the full package takes over half an hour.
    An existing compiled module is never replaced, even if it fails to load.
    """
    if EXTENSION in sys.modules:
        return
    if importlib.util.find_spec(EXTENSION) is None:
        sys.modules[EXTENSION] = TorchvisionOps()


def import_fork_quietly() -> None:
    """Import OneDL's MMDetection with its standard output on standard error.

    Without compiled operators it prints on import which of its parts are missing, and tools print a config or JSON to
    standard output.
    """
    try:
        distribution('onedl-mmdetection')
    except PackageNotFoundError:
        return
    if isinstance(sys.modules.get(EXTENSION), TorchvisionOps):
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module('mmdet.datasets')
            importlib.import_module('mmdet.models')


def resolve_package_bases() -> None:
    """Resolve base configs such as ``'mmzsq::_base_/zsq_w4a8.py'`` through Python's import system.

    MMEngine resolves ``package::path`` only for packages in a fixed table, locates them through ``pkg_resources``
    (removed in setuptools 82), and looks in the wrong place for editable installs. Paths that are not found through
    the import system are left to MMEngine.
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
            # Types of this package name their scope, and the `zsq` section would reject a `_scope_` key.
            return str(root / name), None if package == 'mmzsq' else package
        if package == 'mmzsq':
            raise UserError(_no_such_config(name, root))
        return original(cfg_path, filename)

    Config._get_cfg_path = staticmethod(get_cfg_path)


def resolve_package_modules() -> None:
    """Resolve the bases of pure-Python configs, such as ``mmzsq.configs.zsq_w4a8``, through Python's import system.

    MMEngine locates their packages through ``pkg_resources``, with the consequences that
    :func:`resolve_package_bases` names. Packages that are not found are left to MMEngine.
    """
    original = config_module.get_installed_path
    if getattr(original, '__module__', None) == __name__:
        return

    def get_installed_path(package: str) -> str:
        spec = importlib.util.find_spec(package)
        return original(package) if spec is None or spec.origin is None else str(Path(spec.origin).parent)

    config_module.get_installed_path = get_installed_path


def patch_mmdet() -> None:
    """Apply the patches of MMDetection's models and of the MMCV operators that they call."""
    patch_ssd_head()
    patch_point_assigner()
    patch_reppoints_head()
    patch_deformable_attention()
    patch_masked_convolution()


def patch_ssd_head() -> None:
    """Add the attribute ``loss_cls`` to MMDetection's ``SSDHead``, which MMDetection 3.3.0 reads during prediction.

    Since MMDetection 3.2.0, ``BaseDenseHead`` asks ``loss_cls`` how to interpret class scores. ``SSDHead`` computes its
    loss without such a module, so that every prediction raises an AttributeError (MMDetection issue 11780).
    """
    from mmdet.models.dense_heads import SSDHead

    if not hasattr(SSDHead, 'loss_cls'):
        SSDHead.loss_cls = None


def patch_point_assigner() -> None:
    """Make MMDetection's ``PointAssigner``, which RepPoints uses, work on a GPU.

    MMDetection 3.3.0 creates the indices of the points on the CPU and then indexes them by a mask on the GPU, which
    PyTorch refuses. Here, tensors without a device are created on the device of the points.
    """
    from mmdet.models.task_modules import PointAssigner

    original = PointAssigner.assign
    if getattr(original, '__module__', None) == __name__:
        return

    def assign(self: Any, pred_instances: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.device(pred_instances.priors.device):
            return original(self, pred_instances, *args, **kwargs)

    PointAssigner.assign = assign


def patch_reppoints_head() -> None:
    """Give the boxes of MMDetection's ``RepPointsHead`` a finite gradient where all of their points coincide.

    The size of a box is the standard deviation of its points. If all have the same x or y, which is common after
    rounding to 16 bits, the deviation is 0 and PyTorch's gradient of it is not a number. Here, such points are spread
    by up to 1/1000 first. Others are not changed.
    """
    from mmdet.models.dense_heads import RepPointsHead

    original = RepPointsHead.points2bbox
    if getattr(original, '__module__', None) == __name__:
        return

    def points2bbox(self: Any, pts: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        points = pts.view(pts.shape[0], -1, 2, *pts.shape[2:])
        coincide = points.amax(1, keepdim=True) == points.amin(1, keepdim=True)
        spread = torch.linspace(-1e-3, 1e-3, points.shape[1], device=pts.device, dtype=pts.dtype)
        scale = points.detach().abs().clamp(min=1)
        apart = points + scale * spread.view(1, -1, 1, *[1] * (points.dim() - 3))
        return original(self, torch.where(coincide, apart, points).view_as(pts), *args, **kwargs)

    RepPointsHead.points2bbox = points2bbox


def patch_deformable_attention() -> None:
    """Compute MMCV's multi-scale deformable attention in fp32, also under autocast.

    MMCV converts the sampling locations to the data type of the features. In bf16, locations in the right half of an
    image 1280 pixels wide are 5 pixels apart, and the gradients of the locations are as coarse. Moreover, neither
    MMCV's compiled operator nor the implementation for the CPU accepts bf16.
    """
    from mmcv.ops import multi_scale_deform_attn as module

    function = module.MultiScaleDeformableAttnFunction
    original, on_cpu = function.forward, module.multi_scale_deformable_attn_pytorch
    if getattr(original, '__module__', None) == __name__:
        return

    def forward(ctx: Any, value: torch.Tensor, *args: Any) -> torch.Tensor:
        # MMCV converts the other tensors to the data type of the value.
        return original(ctx, at_least_fp32(value), *args)

    def attend(
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
    ) -> torch.Tensor:
        value = at_least_fp32(value)
        with torch.autocast(value.device.type, enabled=False):
            return on_cpu(value, value_spatial_shapes, sampling_locations.to(value), attention_weights.to(value))

    function.forward = staticmethod(forward)
    module.multi_scale_deformable_attn_pytorch = attend


def patch_masked_convolution() -> None:
    """Let MMCV's ``MaskedConv2d``, which only guided anchors use, convolve everywhere.

    Its mask saves time in prediction: these heads drop their outputs outside of it. MMCV's operator takes one image at
    a time and is not in mmcv-lite.
    """
    from mmcv.ops import MaskedConv2d

    def convolve(layer: torch.nn.Conv2d, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.Conv2d.forward(layer, x)

    MaskedConv2d.forward = convolve


def package_configs(package: str) -> Path | None:
    """Return the folder of the configs that an OpenMMLab package ships.

    Args:
        package: Import name, for example ``'mmdet'``.

    Returns:
        ``<package>/.mim/configs``, or None if the package is not installed or ships no configs.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / '.mim' / 'configs'
    return folder if folder.is_dir() else None


def _no_such_config(name: str, root: Path | None) -> str:
    if root is None:
        return 'mmzsq was installed without its configs. Install it again: pip install mmzsq'
    known = [path.relative_to(root).as_posix() for path in sorted(root.rglob('*.py'))]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f' Did you mean one of {", ".join(nearest)}?' if nearest else ''
    return f'mmzsq has no config {name!r}.{hint} All configs are in {root}.'
