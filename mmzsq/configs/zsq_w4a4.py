# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 bits and activations of 4 bits, for pure-Python configs."""

runner_type = 'mmzsq.ZeroShotRunner'
zsq = dict(quantizer=dict(type='mmzsq.LSQ', w_bits=4, a_bits=4))
