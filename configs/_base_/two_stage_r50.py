"""As ``two_stage.py``; the paper quantizes backbone and FPN, except the stem and the last bottleneck, and no head."""

_base_ = './two_stage.py'
two_stage = dict(
    presets=dict(
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
