# SPDX-License-Identifier: Apache-2.0
"""The section ``zsq.synthesis``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mmzsq.typed_section import (
    Betas,
    FromList,
    ImageSize,
    Meaning,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Settings,
    Share,
    TypedSection,
    failure,
)

AreaRange = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]],
    FromList,
    Meaning('(low, high) with 0 < low <= high <= 1'),
]
RatioRange = Annotated[tuple[PositiveFloat, PositiveFloat], FromList, Meaning('(low, high) with 0 < low <= high')]


class CutoutConfig(TypedSection):
    """Random erasing of one rectangle in each image and step."""

    probability: Share = 0.5
    """Probability that an image is erased."""
    area: AreaRange = (0.02, 0.2)
    """Range of the erased share of the image."""
    ratio: RatioRange = (0.3, 3.3)
    """Range of height divided by width."""
    value: Share | Literal['mean'] = 0.0
    """Fill color in [0, 1], or the mean color of the image."""

    @model_validator(mode='after')
    def _check_order(self) -> Self:
        for name, (low, high) in (('area', self.area), ('ratio', self.ratio)):
            if low > high:
                raise failure(f'{{where}}.{name} is ({low}, {high}), but must be (low, high) with low <= high.')
        return self


class StageConfig(TypedSection):
    """One stage of synthesis: image size, number of steps, and initial images."""

    image_size: ImageSize | Annotated[float, Field(gt=0, lt=1)] | None
    """Size of the images in pixels, or, below 1, a share of the size of ``synthesize``. None: for ``synthesize`` that
    of the test pipeline, for ``relabel`` the smallest that the detector takes, for ``refine`` one between both."""
    iterations: NonNegative
    """Optimization steps. 0 keeps the initial images."""
    batch_size: Positive | None = None
    """Images optimized together; fewer on a GPU that they do not fit, see ``zsq.synthesis.fit_batches``. None:
    ``zsq.calibration_set.batch_size``."""
    lr: PositiveFloat | None = None
    """Learning rate of this stage. None: ``zsq.synthesis.lr``."""
    start: Literal['noise', 'previous', 'procedural'] = 'noise'
    """Initial images: noise, the resized images of the previous stage, or procedural pictures."""


NO_ITERATIONS = 'iterations is 0, but must be an integer of at least 1.'


def iterations_allowed(name: str, stage: StageConfig) -> bool:
    """Return whether a stage may have its number of iterations; only some stages may have 0, to change labels only."""
    return stage.iterations > 0 or name == 'synthesize' or (name, stage.start) == ('relabel', 'previous')


Stages = StageConfig | list[StageConfig] | None


class SynthesisConfig(TypedSection):
    """Synthesis of images from labels."""

    relabel: Stages
    """First stage or stages, in which the teacher corrects the labels. None: no such stage."""
    refine: Stages
    """Stage or stages between ``relabel`` and ``synthesize``. None: no such stage."""
    synthesize: StageConfig
    """Last stage, whose images are kept."""
    fit_batches: bool
    """Halve the batch of a stage until a trial step fits into the memory of the GPU."""
    priors: list[Settings]
    """Image and feature priors: for each its ``type`` and arguments."""
    require_feature_prior: bool
    """Stop if no feature prior applies to the detector."""
    balance: bool
    """Scale the detection loss and the image priors by their gradients at the images. Their weights are then the norms
    of their gradients, divided by that of the feature priors' gradient, whatever the losses add up to."""
    detection_weight: NonNegativeFloat
    """Weight of the detection loss."""
    detection_reduction: Literal['sum', 'mean']
    """Whether the detection loss, a mean over the images, is multiplied by their number (``'sum'``). Without effect if
    ``balance`` is True."""
    detection_interval: Positive | None
    """Steps between two evaluations of the detection loss; its gradient is kept in between. None: 1 if the loss of a
    batch is computed at once, 8 if MMDetection computes it image by image."""
    lr: PositiveFloat
    """Learning rate of Adam. It decays to 0 along a cosine."""
    warmup: NonNegative
    """Steps over which the learning rate increases from 0."""
    betas: Betas
    """Coefficients of Adam."""
    init: Literal['uniform', 'normal']
    """Initial noise: uniform in [0, 1], or standard normal in the network's normalized input."""
    cutout: CutoutConfig | None
    """Random erasing. None: no erasing."""
    clamp: bool
    """Clamp pixels to [0, 1] after each step."""
    keep: Literal['last', 'best']
    """Which images to keep: those of the last step, or those of the lowest loss."""
    keep_interval: Positive = 50
    """Steps between two comparisons, for ``keep='best'``."""
    precision: Literal['fp32', 'bf16']
    """Precision on a GPU. The CPU always computes in fp32."""
    capture: bool
    """Capture a step as a CUDA graph where possible."""

    @model_validator(mode='after')
    def _check_stages(self) -> Self:
        size = self.synthesize.image_size
        if isinstance(size, float):
            raise failure(
                f'{{where}}.synthesize.image_size is {size}, but must be in pixels: other stages refer to it.'
            )
        for name in ('relabel', 'refine'):
            stages = getattr(self, name)
            for index, stage in enumerate(stages if isinstance(stages, list) else [stages]):
                if stage is not None and not iterations_allowed(name, stage):
                    position = f'[{index}]' if isinstance(stages, list) else ''
                    raise failure(f'{{where}}.{name}{position}.{NO_ITERATIONS}')
        return self
