runner_type = 'mmzsq.ZeroShotRunner'
zsq = dict(quantizer=dict(type='mmzsq.LSQ', w_bits=6, a_bits=6))
