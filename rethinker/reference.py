"""The settings reference, docs/settings.md, from config.py: `python -m rethinker.reference > docs/settings.md`."""

from __future__ import annotations

import sys

from rethinker.config import Config
from rethinker.settings import to_yaml


def settings_reference() -> str:
    """Every setting with its meaning, type, range and default, as the recipe that it might be in."""
    return f"""# Settings

A recipe is a YAML file with these sections; `--section.name value` replaces one of them on the command line. What a
recipe leaves out has the default given here; `rethinker train RECIPE --print_config` prints all.

```yaml
{to_yaml(Config())}```
"""


if __name__ == "__main__":
    sys.stdout.write(settings_reference())
