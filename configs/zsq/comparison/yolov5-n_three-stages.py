"""Ablation with three stages: images for the first labels, one correction, images for the corrected labels."""

_base_ = ['../yolov5-n_w8a8.py']
zsq = dict(
    # No corrections while the images form. The round with 0 iterations corrects the labels once.
    label_sampler=dict(warmup=800),
    presets=dict(
        default=dict(
            synthesis=dict(
                relabel=[
                    dict(image_size=160, iterations=800, batch_size=128),
                    dict(image_size=160, iterations=0, batch_size=128, start='previous'),
                ]
            )
        ),
        paper=dict(
            synthesis=dict(
                relabel=[
                    dict(image_size=160, iterations=800, batch_size=64),
                    dict(image_size=160, iterations=0, batch_size=64, start='previous'),
                ]
            )
        ),
    ),
)
