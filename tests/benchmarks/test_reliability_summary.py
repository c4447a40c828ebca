# SPDX-License-Identifier: Apache-2.0
"""The summary of the reliability tests."""

from __future__ import annotations

from pathlib import Path

from reliability import summarize, table

REPORT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="verdict" value="clear"/></properties></testcase>
<testcase name="b"><properties><property name="verdict" value="clear"/></properties></testcase>
<testcase name="c"><properties><property name="verdict" value="traceback"/></properties><failure/></testcase>
<testcase name="d"><properties><property name="bit-equal" value="7"/><property name="lost" value="1"/></properties>
</testcase><testcase name="e"/></testsuite></testsuites>"""


def test_verdicts_are_counted_by_kind(tmp_path: Path) -> None:
    (tmp_path / 'report.xml').write_text(REPORT)
    found = summarize(tmp_path / 'report.xml')
    assert +found['wrong inputs'] == dict(clear=2, traceback=1)
    assert +found['killed runs'] == {'bit-equal': 7, 'lost': 1}
    lines = table(found).splitlines()
    header = [cell.strip() for cell in lines[0].split('|')]
    rows = {(cells := [cell.strip() for cell in line.split('|')])[1]: cells for line in lines[2:]}
    assert rows['wrong inputs, now'][header.index('tried')] == '3'
    assert rows['wrong inputs, now'][header.index('clear')] == '2'
    assert rows['killed runs, now'][header.index('bit-equal')] == '7'
    assert rows['killed runs, now'][header.index('traceback')] == ''
