"""Runs of the bench that never ran."""

import torch

from bench.cases import Case, Quartiles, Row
from bench.results import Results

CPU = torch.device("cpu")
TIME = Case("sigmoid", "focal", (3, 50), torch.float32, torch.uint8, upstream=0.5)
CLASSES = Case("softmax", "softmax focal", (30, 7), torch.float32, torch.int64, upstream=0.5, targets="classes")
MEMORY = Case("memory", "bce", (64, 1000), torch.float32, torch.float32)
SPARSE_MEMORY = Case("memory", "focal", (64, 1000), torch.float32, None, labels_per_row=5)


def run_of(case, **medians):
    rows = [
        Row(case, name, name, name == "eager", seconds=Quartiles(0.98 * t, t, 1.02 * t)) for name, t in medians.items()
    ]
    return Results({"name": "a CPU", "date": "2000-01-01"}, rows)
