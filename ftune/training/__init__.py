"""RunSpec to trained weights: the torch side. `run.py` tells the story."""

import logging

# Said at its import, which Hugging Face's Trainer causes: that an optional CPU kernel is not there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
