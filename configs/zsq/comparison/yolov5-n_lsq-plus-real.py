"""Not zero-shot: LSQ+ in place of LSQ, whose activations have a learnt offset."""

_base_ = ['./yolov5-n_lsq-real.py']
zsq = dict(
    # Another type replaces the quantizer of the preset as a whole.
    quantizer=dict(
        type='mmzsq.LSQPlus',
        weight=dict(scheme='signed', per_channel=False, init='lsq', narrow=False),
        activation=dict(scheme='offset', init='lsq'),
        step='linear',
        first_bits=None,
        last_bits=None,
    )
)
