"""As ``two_stage.py``; the paper quantized trunk and FPN without the stem and the last bottleneck, and no head.

The detection loss of two stages stays large: added up over the images, it keeps the prior of BatchNorm, one number for
a batch, from converging.
"""

_base_ = './two_stage.py'
two_stage = dict(
    presets=dict(
        default=dict(synthesis=dict(detection_weight=0.5, detection_reduction='mean')),
        paper=dict(
            quantizer=dict(
                scope=['backbone', 'neck'],
                skip=['backbone.conv1', 'backbone.layer4.2'],
                first_bits='same',
                last_bits='same',
            )
        ),
    )
)
