"""Write every dashboard of content.py to deploy/grafana/dashboards."""

from __future__ import annotations

from pathlib import Path

from deploy.grafana.content import DASHBOARDS
from deploy.grafana.panels import as_json

FOLDER = Path(__file__).parent / "dashboards"

if __name__ == "__main__":
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.uid}.json").write_text(as_json(dashboard))
