"""What there is to choose from."""

from __future__ import annotations

import tomllib

from rich.table import Table

from cluster.setup import catalog, config


def listing() -> list[Table]:
    """What there is to choose from."""
    runs = Table(title="presets (metafleet train NAME)", title_justify="left")
    runs.add_column("name", no_wrap=True)
    runs.add_column("what it is")
    for name in config.presets():
        table = tomllib.loads(config.find(name).read_text())
        runs.add_row(name, str(table.get("description", "")))
    parts = Table(title="to choose by --task.name, --learner.name, …", title_justify="left")
    parts.add_column("key", no_wrap=True)
    parts.add_column("name", no_wrap=True)
    parts.add_column("what it is")
    for key, choices in catalog.KEYS.items():
        for name, cls in choices.items():
            parts.add_row(key, name, (cls.__doc__ or "").strip().splitlines()[0])
    return [runs, parts]
