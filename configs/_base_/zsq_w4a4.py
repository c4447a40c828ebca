runner_type = 'mmzsq.ZeroShotRunner'
zsq = dict(quantizer=dict(type='mmzsq.LSQ', w_bits=4, a_bits=4))
