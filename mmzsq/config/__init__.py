# SPDX-License-Identifier: Apache-2.0
"""The ``zsq`` section: its presets, and how it turns a detector's config into a runnable one."""

from mmzsq.config.compose import compose

__all__ = ['compose']
