# SPDX-License-Identifier: Apache-2.0
"""The ``zsq`` section of a config: all keys with their types, ranges, units and meaning.

:class:`ZsqSection` combines two kinds of sections. The sections of the components are defined next to the code that
they configure (:mod:`mmzsq.quantization.config`, :mod:`mmzsq.synthesis.config`, :mod:`mmzsq.distillation.config`).
The sections of the run are defined here. Values come from a preset (:mod:`mmzsq.config.presets`) and the user's config.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from mmzsq.distillation.config import AugmentationConfig, DistillationConfig
from mmzsq.quantization import QuantizationConfig
from mmzsq.synthesis.config import SynthesisConfig
from mmzsq.typed_section import (
    Decay,
    ImageSize,
    Meaning,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Settings,
    Share,
    Type,
    TypedSection,
    failure,
)

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Sha256 = Annotated[str, Field(pattern='^[0-9a-fA-F]{64}$')]


SMALLEST_SIDE = 32
"""Smallest side of training images in pixels."""


class PartConfig(TypedSection):
    """A registered part: its class, and the arguments of that class."""

    model_config = ConfigDict(extra='allow')

    type: Type
    """Name of the registered class."""


class CalibrationSetConfig(TypedSection):
    """The calibration set: synthetic images with labels, on disk."""

    dir: str | None
    """Folder of the set. None: the folder ``calibration_set`` in the work_dir."""
    source: Literal['auto', 'synthesized', 'procedural', 'mixed']
    """Source of the images: synthesized from the detector, procedural pictures, or half of each (``'mixed'``).
    ``'auto'``: synthesized, or procedural if no feature prior of ``zsq.synthesis`` applies to the detector."""
    num_images: Positive
    """Number of images."""
    batch_size: Positive
    """Images optimized together in stages of ``zsq.synthesis`` without a ``batch_size``."""
    seed: Seed
    """Seed of the set, and of the run if the config has no ``randomness.seed``."""
    real: Settings | None
    """For comparison only: config of a data set of real images to train on instead of a synthetic set."""


class OptimizerConfig(TypedSection):
    """The optimizer: its class, and the arguments of that class."""

    model_config = ConfigDict(extra='allow')

    type: Type
    """Name of the optimizer in MMEngine's registry, which holds all of ``torch.optim``."""
    lr: PositiveFloat
    """Learning rate of weights."""

    @model_validator(mode='before')
    @classmethod
    def _check_lr(cls, section: Any) -> Any:
        if isinstance(section, dict) and section.get('lr') is None:
            raise failure(
                '{where} has no lr. An optimizer of another type does not inherit the settings of the preset: set '
                '{where}.lr too.'
            )
        return section


class TrainConfig(TypedSection):
    """Quantization-aware training of the student."""

    max_epochs: NonNegative
    """Passes over the calibration set. 0: post-training quantization, which only initializes the steps."""
    batch_size: Positive
    """Images in a batch of one process."""
    accumulate: Positive
    """Batches whose gradients are accumulated for one optimizer step."""
    num_workers: NonNegative
    """Processes that load images, for each training process."""
    optimizer: OptimizerConfig
    """The optimizer."""
    weight_size: PositiveFloat | None
    """Size of the weights that ``optimizer.lr`` is tuned for: the median over layers of the root mean square of a
    layer's weights. Larger weights have larger rounding steps, so their learning rate is raised in proportion, at
    most tenfold. None: ``optimizer.lr`` is not changed."""
    step_lr: NonNegativeFloat | None
    """Learning rate of the quantizers' steps. None: that of the weights."""
    schedule: Literal['cosine', 'linear', 'constant']
    """Decay of the learning rate."""
    final_lr_ratio: Share
    """Learning rate at the end, divided by that at the start."""
    bn: Literal['frozen', 'train']
    """BatchNorm statistics: ``'frozen'`` keeps those of the teacher, ``'train'`` collects new ones."""
    ema: Decay | None
    """Decay of the moving average of weights that is evaluated and saved. None: no average."""
    clip_grad: NonNegativeFloat | None
    """Largest L2 norm of the gradient. None: no clipping."""
    amp: bool
    """Train under bfloat16 autocast. Ignored without a GPU."""
    init_batches: Positive
    """Number of batches that initialize the steps of the quantizers."""
    capture: bool
    """Capture a training step as a CUDA graph where possible."""
    augmentation: AugmentationConfig | None
    """Random views of the images. They need ``zsq.distillation.detection_weight=0``. None: no augmentation."""
    image_size: ImageSize | None
    """Size that images are resized to. None: no resizing."""
    channels_last: bool
    """Use the channels-last memory format."""

    @model_validator(mode='after')
    def _check_image_size(self) -> Self:
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        if any(side is not None and side < SMALLEST_SIDE for side in sides):
            raise failure(
                f'{{where}}.image_size is {self.image_size}, but its sides must have at least {SMALLEST_SIDE} pixels: '
                'strides of detectors reduce smaller images to nothing.'
            )
        return self


class ReconstructionConfig(TypedSection):
    """Reconstruction of the student unit by unit, without labels and losses of the detector."""

    images: Positive = 64
    """Number of images to use, at most as many as ``zsq.train.init_batches`` holds."""
    batch_size: Positive = 1
    """Images that run together. An iteration takes several batches if the maps of a unit are small."""
    iterations: Positive = 300
    """Iterations of each unit."""
    cache_gib: PositiveFloat = 2.0
    """Memory for the inputs and outputs of one unit in GiB. A unit with large maps learns from fewer images."""


class ZsqSection(TypedSection):
    """The section ``zsq`` of a config."""

    preset: Literal['default', 'instant', 'reconstruct', 'paper', 'paper_transformer']
    """Defaults of all keys that the config does not set."""
    teacher: str | None = None
    """Checkpoint of the full-precision detector: a file or URL. None: ``load_from``."""
    teacher_sha256: Sha256 | None = None
    """SHA-256 that the teacher's file must have, as ``sha256sum`` prints it. None: any file is accepted."""
    quantizer: QuantizationConfig
    """Selection of layers, bits and quantizers."""
    calibration_set: CalibrationSetConfig
    """The synthetic images."""
    label_sampler: PartConfig
    """Source of labels: a registered label sampler and its arguments."""
    synthesis: SynthesisConfig
    """Synthesis of images."""
    distillation: DistillationConfig
    """Losses of the student."""
    reconstruction: ReconstructionConfig | None = None
    """Learn the rounding of weights, and the steps, before training. None: no reconstruction."""
    train: TrainConfig
    """Training of the student."""

    @model_validator(mode='after')
    def _check_together(self) -> Self:
        if not self.distillation.losses and not self.distillation.detection_weight:
            raise failure(
                'nothing to learn from: {where}.distillation.losses is empty and {where}.distillation.detection_weight '
                'is 0. Add a loss, or set a weight above 0.'
            )
        if self.train.augmentation is not None and self.distillation.detection_weight:
            raise failure(
                '{where}.train.augmentation changes images and not their labels, but the detection loss reads labels: '
                'set {where}.distillation.detection_weight=0 or {where}.train.augmentation=None.'
            )
        return self


PresetChanges = Annotated[dict[str, Any] | str, Meaning('a dict of settings or the name of a preset')]
