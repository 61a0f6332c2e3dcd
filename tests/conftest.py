"""One thread a process: tiny models gain nothing from more, and waiting for each other is what load slows."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
