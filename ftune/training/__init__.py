"""RunSpec to trained weights: the torch side. `run.py` tells the story."""

import logging
import os

# OpenMP's threads spin at the end of every small kernel. Where another process wants the same cores, each spin waits
# out a time slice: a LoRA step of SmolLM2-135M took 16 s instead of 3 on two busy cores. Torch reads it as it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Said at its import, which Hugging Face's Trainer causes: that an optional CPU kernel is not there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
