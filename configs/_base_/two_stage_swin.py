"""As ``two_stage.py``; the paper has numbers of its own for transformers, which stand for its preset."""

_base_ = './two_stage.py'
two_stage = dict(
    presets=dict(
        default=dict(train=dict(optimizer=dict(type='AdamW', lr=1e-5, weight_decay=0.05))),
        paper='paper_transformer',
    )
)
