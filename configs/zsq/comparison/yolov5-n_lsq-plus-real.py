"""Not zero-shot: LSQ+, which learns an offset of activations, in place of LSQ."""

_base_ = ['./yolov5-n_lsq-real.py']
zsq = dict(
    # A different type replaces the preset's whole quantizer section.
    quantizer=dict(
        type='mmzsq.LSQPlus',
        weight=dict(scheme='signed', per_channel=False, init='lsq', narrow=False),
        activation=dict(scheme='offset', init='lsq'),
        step='linear',
        first_bits=None,
        last_bits=None,
    )
)
