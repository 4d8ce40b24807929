"""`log.jsonl`: one line for every logged step of a run, and none twice after a resume."""

import json
from pathlib import Path
from typing import Any

from trainer.files import write_whole


class History:
    """The logged steps of a run, appended as they happen. `begin` first drops what a resumed run will do again."""

    def __init__(self, run: Path) -> None:
        self._path = run / "log.jsonl"

    def begin(self, step: int) -> None:
        """Keeps the lines of steps up to `step`."""
        lines = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        write_whole(self._path, "".join(lines))

    def append(self, **row: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Every whole line; the last one may have been cut by a kill."""
        if not self._path.exists():
            return []
        rows = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows
