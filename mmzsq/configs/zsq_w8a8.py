# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 bits and activations of 8 bits, for pure-Python configs."""

runner_type = 'mmzsq.ZeroShotRunner'
zsq = dict(quantizer=dict(type='mmzsq.LSQ', w_bits=8, a_bits=8))
