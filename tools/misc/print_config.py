# SPDX-License-Identifier: Apache-2.0
"""Print the config of a run, with bases merged and the ``zsq`` section composed with the detector."""

from __future__ import annotations

import sys

from mmzsq import cli
from mmzsq.config import compose


def main() -> None:
    """Parse the command line and print."""
    options = cli.parser('Print the config of a run, with all bases and presets applied.')
    options.add_argument('--save-path', metavar='FILE', help='also write the config to this file (.py, .yml or .json)')
    args = options.parse_args()
    cfg = cli.load_config(args)
    if 'zsq' in cfg:
        cfg = compose(cfg)
    sys.stdout.write(cfg.pretty_text)
    if args.save_path is not None:
        cfg.dump(args.save_path)


if __name__ == '__main__':
    cli.run(main)
