"""Progress bars for people: a widget in Jupyter, text in a terminal, nothing in a batch."""

import os
from functools import partial

from tqdm.auto import tqdm

# tqdm's notebook widget does not look at TQDM_DISABLE by itself, and would be saved with the notebook as a bar at 0%
progress_bar = partial(tqdm, disable=bool(os.environ.get("TQDM_DISABLE")))
