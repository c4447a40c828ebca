# SPDX-License-Identifier: Apache-2.0
"""Weights of 5 bits and activations of 5 bits, for pure-Python configs."""

runner_type = 'mmzsq.ZeroShotRunner'
zsq = dict(quantizer=dict(type='mmzsq.LSQ', w_bits=5, a_bits=5))
