"""The paper's settings for YOLO11, except the bits: ``zsq = {{_base_.yolo11}}``."""

yolo11 = dict(
    presets=dict(
        paper=dict(
            # All but the first layer and the head.
            quantizer=dict(scope=['backbone', 'neck'], last_bits='same'),
            label_sampler=dict(interval=100),
            synthesis=dict(
                relabel=dict(iterations=3000, batch_size=512),
                synthesize=dict(iterations=3000),
                priors=[
                    dict(type='mmzsq.BNStatisticsPrior', form='l2', weight=0.05, first_weight=5.0),
                    dict(type='mmzsq.TotalVariationPrior', weight=2e-3),
                ],
                cutout=None,
                clamp=False,
                keep_interval=100,
            ),
            distillation=dict(detection_weight=0.01),
            train=dict(batch_size=16, accumulate=4, optimizer=dict(lr=1e-5), schedule='constant'),
        )
    )
)
