"""The campaign finds faults that are not mended yet (docs/reliability.md): its tests run where they are asked for."""

import os

collect_ignore_glob = [] if os.environ.get("KNOWEDIT_CAMPAIGN") else ["test_*.py"]
