runner_type = 'mmzsq.ZeroShotRunner'
zsq = dict(quantizer=dict(type='mmzsq.LSQ', w_bits=8, a_bits=8))
