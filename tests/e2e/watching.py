"""Prometheus' HTTP API: what it scrapes, evaluates and holds. https://prometheus.io/docs/prometheus/latest/querying/api/"""

from dataclasses import dataclass
from typing import Any

import httpx

Json = dict[str, Any]


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expression: str) -> list[Json]:
        """Samples of an instant vector."""
        return self._get("query", query=expression)["result"]

    def targets(self, namespace: str) -> list[Json]:
        """What it scrapes in a namespace."""
        found = self._get("targets", state="active")["activeTargets"]
        return [target for target in found if target["labels"].get("namespace") == namespace]

    def rules(self) -> list[Json]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {one["labels"]["alertname"] for one in self._get("alerts")["alerts"] if one["state"] == "firing"}

    def _get(self, path: str, **parameters: str) -> Json:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]
