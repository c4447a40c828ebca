# SPDX-License-Identifier: Apache-2.0
"""Make the calibration set of a config: ``python -m mmzsq.generate CONFIG``.

Training makes the set if it is missing. This tool makes it beforehand, for instance on another machine, and continues
where a stopped run left off.
"""

from __future__ import annotations

from mmzsq import cli
from mmzsq.errors import UserError


def main() -> None:
    """Parse the command line and generate."""
    args = cli.parser('Synthesize the calibration set of a config with a zsq section.').parse_args()
    cfg = cli.load_config(args)
    if 'zsq' not in cfg:
        raise UserError(
            f'config {args.config} has no zsq section: add a base such as '
            "'mmzsq::_base_/zsq_w4a8.py' beside the detector's config"
        )
    cli.build_runner(cfg).generate()


if __name__ == '__main__':
    cli.run(main)
