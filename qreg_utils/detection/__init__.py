"""Object detection: an extra (``pip install -e .[detection]``) that nothing else in the project imports.

The extra is ultralytics, which is licensed under AGPL-3.0. Importing anything from here first makes it keep to itself:
no telemetry, no look-ups, no automatic installs, its settings file in the data folder. Environment variables that the
user has set win.
"""

import os
from importlib.util import find_spec

from qreg_utils.folders import data_dir

if find_spec("ultralytics") is None:
    raise ModuleNotFoundError(
        "detection needs ultralytics (AGPL-3.0): pip install -e '.[detection]'", name="ultralytics"
    )

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_VERBOSE", "false")  # its reports of every setting and batch
os.environ.setdefault("YOLO_CONFIG_DIR", str(data_dir()))
