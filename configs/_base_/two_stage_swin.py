"""As ``two_stage.py``; the preset ``paper`` uses the paper's settings for transformers."""

_base_ = './two_stage.py'
two_stage = dict(
    presets=dict(
        default=dict(train=dict(optimizer=dict(type='AdamW', lr=1e-5, weight_decay=0.05))),
        paper='paper_transformer',
    )
)
