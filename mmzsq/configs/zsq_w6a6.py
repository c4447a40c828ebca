# SPDX-License-Identifier: Apache-2.0
"""Weights of 6 bits and activations of 6 bits, for pure-Python configs."""

runner_type = 'mmzsq.ZeroShotRunner'
zsq = dict(quantizer=dict(type='mmzsq.LSQ', w_bits=6, a_bits=6))
