"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
  write_whole(path, json.dumps(value, indent=2) + "\n")
