# SPDX-License-Identifier: Apache-2.0
"""``report.html``: the results of a run, or of several, as one page that needs no network."""

from mmzsq.report.card import CARD_FILE, write_card
from mmzsq.report.page import REPORT_FILE, write_report
from mmzsq.report.runs import DETAILS_FILE, FOLDER, Run

__all__ = ['CARD_FILE', 'DETAILS_FILE', 'FOLDER', 'REPORT_FILE', 'Run', 'write_card', 'write_report']
