"""What a kernel may cost: machine instructions and special functions per element, compiled for sm_90.

The H200 moves the 5 bytes of a bf16 logit, its gradient and a uint8 label in the time of 31 to 39 instructions and 3.9
to 4.9 special functions; below that, the memory is the limit. tests/test_compiled.py holds every kernel to its row,
`python -m bench.sass` prints where it stands. Whoever makes a kernel cheaper lowers its row.
"""

from typing import NamedTuple


class Budget(NamedTuple):
    instructions: int
    special: int


SIGMOID = {
    "bce": Budget(21, 3),
    "focal 0": Budget(25, 3),
    "focal 1": Budget(27, 3),
    "focal 2": Budget(28, 3),
    "focal 3.7": Budget(30, 4),
    "focal 1 alpha": Budget(27, 3),
    "focal 2 alpha": Budget(28, 3),
    "focal 3.7 alpha": Budget(31, 4),
    "focal 2 fp16": Budget(27, 3),
    "bce fp32": Budget(43, 2),
    "focal 2 fp32": Budget(51, 2),
    "focal 3.7 fp32": Budget(62, 3),
    "focal 2 fp64": Budget(233, 3),
    "focal 3.7 fp64": Budget(285, 3),
    "focal 2 int64 targets": Budget(29, 3),
    "bce soft": Budget(28, 3),
    "focal 2 soft bf16 alpha": Budget(55, 4),
    "focal 3.7 soft pos_weight": Budget(88, 5),
    "focal 2 fp32 soft": Budget(71, 3),
    "focal 2 loss": Budget(20, 3),
    "focal 2 none": Budget(20, 3),
    "focal 2 backward": Budget(26, 3),
    "focal 2 backward again": Budget(25, 3),
    "focal 2 backward none": Budget(28, 3),
    "focal 2 counted": Budget(28, 3),
    "focal 2 wide": Budget(28, 3),
    "focal 2 alpha 1000": Budget(32, 3),
    "focal 2 alpha 1001": Budget(38, 3),
    "bce pos_weight 1000": Budget(26, 3),
    "bce pos_weight 1001": Budget(32, 3),
    "bce weight 1000": Budget(25, 3),
    "bce weight matrix": Budget(24, 3),
    "bce padded rows": Budget(22, 3),
    "bce odd rows": Budget(30, 3),
    "poly": Budget(25, 3),
    "poly focal 2": Budget(30, 3),
    "asymmetric": Budget(51, 5),
    "asymmetric unclipped": Budget(32, 3),
    "asymmetric fp32": Budget(113, 3),
    "asymmetric soft": Budget(110, 7),
    "balanced": Budget(65, 7),
    "balanced soft": Budget(91, 10),
    "ghm": Budget(31, 3),
    "ghm soft": Budget(38, 3),
    "focal 2 alpha smoothing": Budget(55, 4),
    "focal 2 alpha ignored": Budget(33, 3),
    "focal 2 alpha mask": Budget(34, 3),
    "focal 2 alpha sample_weight": Budget(37, 3),
    "bce sparse": Budget(19, 3),
    "focal 2 sparse": Budget(25, 3),
    "focal 2 alpha sparse": Budget(27, 3),
    "focal 2 alpha sparse backward": Budget(23, 3),
    "focal 2 sparse wide": Budget(35, 3),
    "focal 2 fp32 sparse": Budget(52, 2),
    "asymmetric sparse": Budget(39, 5),
    "balanced sparse": Budget(70, 7),
    "ghm sparse": Budget(29, 3),
}
