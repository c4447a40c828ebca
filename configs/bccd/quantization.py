"""Quantization settings for blood cells, except the bits: ``zsq = {{_base_.blood_cells}}``."""

blood_cells = dict(
    # 16 steps per epoch. The comparison uses 292 real images.
    calibration_set=dict(num_images=128),
    label_sampler=dict(
        # A general description of a smear, not measured on the data: about a dozen cells per image, none larger than a
        # third of it. Classes are drawn evenly; the detector corrects the rest.
        start=dict(type='mmzsq.MultiBoxSampler', num_boxes=(5, 15), side=(0.08, 0.3)),
        warmup=200,
        interval=100,
        # A platelet covers half a percent of the image.
        area=(0.002, 0.5),
        # Scores are a softmax. Below 0.5, the detector finds cells in any texture, some 50 per image.
        score_thr=0.5,
    ),
    synthesis=dict(
        # The weights that the results were measured with; the balance of the preset was not measured here yet.
        balance=False,
        detection_weight=1.0,
        detection_reduction='sum',
        detection_interval=1,
        # Smears are smooth. With the weight for photographs, cells become patches of noise.
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='kl', weight=1.0),
            dict(type='mmzsq.PatchSimilarityPrior', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=0.02),
        ],
        cutout=dict(probability=0.5, area=(0.02, 0.2), ratio=(0.3, 3.3), value=0.0),
        # Height and width of the detectors' images. The first stage uses half of it.
        relabel=dict(image_size=0.5, iterations=500, batch_size=32),
        refine=None,
        synthesize=dict(image_size=(480, 640), iterations=150, batch_size=16, start='previous'),
    ),
    train=dict(max_epochs=16, batch_size=8),
)
