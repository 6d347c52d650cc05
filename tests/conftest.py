"""What every test shares: one torch thread, no network, and what tests in several rooms need."""

import os

# Before torch is imported anywhere: tests of several rooms run side by side on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
