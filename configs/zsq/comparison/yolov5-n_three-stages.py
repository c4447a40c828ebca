"""Ablation: images of the first labels, one correction with the images fixed, then images of what became of them."""

_base_ = ['../yolov5-n_w8a8.py']
zsq = dict(
    # None while the images form; a round without iterations corrects once.
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
