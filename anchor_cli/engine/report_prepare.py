"""The data panel of the report: what `anchor prepare` counted, from its manifest `prepare.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anchor_cli.engine.report_data import RunRecord
from anchor_cli.engine.report_html import key_table


def data_panel(run: RunRecord, *, single: bool) -> str:
    """Rows in, kept and rejected, lengths and histograms of one run's data; empty without a manifest."""
    if not run.data:
        return ""
    values: Mapping[str, Any] = run.data
    return key_table([(run.name, values)])
