"""A launch of each kind that the losses make, for a compiler to look at."""

import torch

from .launches import Lines, Pass, Pointwise, Sigmoid
from .list_launches import Ranking
from .row_launches import Rows

_FOCAL_2 = Sigmoid("focal", (2,))
_ASL = Sigmoid("asymmetric", (4.0, 1.0, 0.05, False))
_DB = Sigmoid("balanced", (2.0, 2.0, 2.0, 0.1, 10.0, 0.2))
_GHM = Sigmoid("ghm", (30,))

SIGMOID: dict[str, Sigmoid] = {
    "bce": Sigmoid("bce"),
    "focal 0": Sigmoid("focal", (0,)),
    "focal 1": Sigmoid("focal", (1,)),
    "focal 2": _FOCAL_2,
    "focal 3.7": Sigmoid("focal", (3.7,)),
    "focal 1 alpha": Sigmoid("focal", (1,), alpha=0.25),
    "focal 2 alpha": _FOCAL_2._replace(alpha=0.25),
    "focal 3.7 alpha": Sigmoid("focal", (3.7,), alpha=0.25),
    # dtypes
    "focal 2 fp16": _FOCAL_2._replace(inputs=torch.float16),
    "bce fp32": Sigmoid("bce", inputs=torch.float32),
    "focal 2 fp32": _FOCAL_2._replace(inputs=torch.float32),
    "focal 3.7 fp32": Sigmoid("focal", (3.7,), inputs=torch.float32),
    "focal 2 fp64": _FOCAL_2._replace(inputs=torch.float64),
    "focal 3.7 fp64": Sigmoid("focal", (3.7,), inputs=torch.float64),
    "focal 2 int64 targets": _FOCAL_2._replace(targets=torch.int64),
    # soft labels
    "bce soft": Sigmoid("bce", targets=torch.float32),
    "focal 2 soft bf16 alpha": _FOCAL_2._replace(targets=torch.bfloat16, alpha=0.25),
    "focal 3.7 soft pos_weight": Sigmoid("focal", (3.7,), targets=torch.float32, pos_weight="[L]", num_labels=1000),
    "focal 2 fp32 soft": _FOCAL_2._replace(inputs=torch.float32, targets=torch.float32),
    # what a launch reads and writes
    "focal 2 alpha backward": _FOCAL_2._replace(alpha=0.25, step="backward"),
    "focal 2 loss": _FOCAL_2._replace(step="loss"),
    "focal 2 none": _FOCAL_2._replace(step="none"),
    "focal 2 backward": _FOCAL_2._replace(step="backward"),
    "focal 2 backward again": _FOCAL_2._replace(step="backward again"),
    "focal 2 backward none": _FOCAL_2._replace(step="backward none"),
    "focal 2 counted": _FOCAL_2._replace(counted=True),
    "focal 2 wide": _FOCAL_2._replace(rows=2**31 // 1001 + 2),
    # operands by label: an odd number of labels leaves no two of them aligned
    "focal 2 alpha 1000": _FOCAL_2._replace(alpha="[L]", num_labels=1000),
    "focal 2 alpha 1001": _FOCAL_2._replace(alpha="[L]"),
    "bce pos_weight 1000": Sigmoid("bce", pos_weight="[L]", num_labels=1000),
    "bce pos_weight 1001": Sigmoid("bce", pos_weight="[L]"),
    "bce weight 1000": Sigmoid("bce", weight="[L]", num_labels=1000),
    "bce weight matrix": Sigmoid("bce", weight="[N, L]"),
    "bce padded rows": Sigmoid("bce", num_labels=1000, row_stride=1008),
    "bce odd rows": Sigmoid("bce", num_labels=1000, row_stride=1007),
    # the other formulas
    "poly": Sigmoid("poly", (0.0, 2.0)),
    "poly focal 2": Sigmoid("poly", (2.0, 2.0)),
    "asymmetric": _ASL,
    "asymmetric unclipped": _ASL._replace(params=(4.0, 1.0, 0.0, False)),
    "asymmetric fp32": _ASL._replace(inputs=torch.float32),
    "asymmetric soft": _ASL._replace(targets=torch.float32),
    "balanced": _DB,
    "balanced soft": _DB._replace(targets=torch.float32),
    "ghm": _GHM,
    "ghm soft": _GHM._replace(targets=torch.float32),
    # options
    "focal 2 alpha smoothing": _FOCAL_2._replace(alpha=0.25, smoothing=0.1),
    "focal 2 alpha ignored": _FOCAL_2._replace(alpha=0.25, targets=torch.int8, ignored=-100),
    "focal 2 alpha mask": _FOCAL_2._replace(alpha=0.25, mask=True),
    "focal 2 alpha sample_weight": _FOCAL_2._replace(alpha=0.25, sample_weight=True),
    # sparse labels
    "bce sparse": Sigmoid("bce", targets="sparse"),
    "focal 2 sparse": _FOCAL_2._replace(targets="sparse"),
    "focal 2 alpha sparse": _FOCAL_2._replace(targets="sparse", alpha=0.25),
    "focal 2 alpha sparse backward": _FOCAL_2._replace(targets="sparse", alpha=0.25, step="backward"),
    "focal 2 sparse wide": _FOCAL_2._replace(targets="sparse", rows=2**31 // 1001 + 2),
    "focal 2 fp32 sparse": _FOCAL_2._replace(targets="sparse", inputs=torch.float32),
    "asymmetric sparse": _ASL._replace(targets="sparse"),
    "balanced sparse": _DB._replace(targets="sparse"),
    "ghm sparse": _GHM._replace(targets="sparse"),
}

_ZLPR, _TWO_WAY = Lines("zlpr"), Lines("partials", two_way=True, num_labels=2001)

LINES: dict[str, Lines] = {
    "zlpr": _ZLPR,
    "zlpr fp32": _ZLPR._replace(inputs=torch.float32),
    "zlpr fp64": _ZLPR._replace(inputs=torch.float64),
    "zlpr float targets": _ZLPR._replace(targets=torch.float32),
    "zlpr mask": _ZLPR._replace(mask=True),
    "zlpr loss": _ZLPR._replace(step="loss"),
    "zlpr none": _ZLPR._replace(step="none"),
    "zlpr backward": _ZLPR._replace(step="backward"),
    "zlpr ignored": _ZLPR._replace(targets=torch.int8, ignored=-100),
    "zlpr counted": _ZLPR._replace(count="elements", mask=True, step="loss"),
    "zlpr counted positives": _ZLPR._replace(count="positives", step="loss"),
    "zlpr wide": _ZLPR._replace(rows=2**31 // 1001 + 2),
    "zlpr sparse": _ZLPR._replace(targets="sparse"),
    "zlpr 1024": _ZLPR._replace(num_labels=1024),
    "zlpr 100": _ZLPR._replace(num_labels=100),
    "zlpr 100 sparse": _ZLPR._replace(num_labels=100, targets="sparse"),
    "zlpr 16001": _ZLPR._replace(num_labels=16001),
    "zlpr 16001 fp32": _ZLPR._replace(num_labels=16001, inputs=torch.float32),
    "zlpr partials": Lines("partials", num_labels=20001),
    "zlpr partials positives": Lines("partials", num_labels=20001, count="positives"),
    "zlpr partials sparse": Lines("partials", num_labels=20001, targets="sparse"),
    "zlpr partials 20480": Lines("partials", num_labels=20480),
    "zlpr gradient": Lines("gradient", num_labels=20001),
    "zlpr gradient sparse": Lines("gradient", num_labels=20001, targets="sparse"),
    "zlpr gradient 20480": Lines("gradient", num_labels=20480),
    "zlpr combine": Lines("combine", num_labels=20001),
    "zlpr total": Lines("total"),
    "two-way partials": _TWO_WAY,
    "two-way partials fp32": _TWO_WAY._replace(inputs=torch.float32),
    "two-way partials fp64": _TWO_WAY._replace(inputs=torch.float64),
    "two-way partials mask": _TWO_WAY._replace(mask=True),
    "two-way partials sparse": _TWO_WAY._replace(targets="sparse"),
    "two-way partials wide": _TWO_WAY._replace(rows=2**31 // 2001 + 2),
    "two-way partials 2048": _TWO_WAY._replace(num_labels=2048),
    "two-way gradient": _TWO_WAY._replace(kind="gradient"),
    "two-way gradient fp32": _TWO_WAY._replace(kind="gradient", inputs=torch.float32),
    "two-way gradient fp64": _TWO_WAY._replace(kind="gradient", inputs=torch.float64),
    "two-way gradient mask": _TWO_WAY._replace(kind="gradient", mask=True),
    "two-way gradient sparse": _TWO_WAY._replace(kind="gradient", targets="sparse"),
    "two-way gradient wide": _TWO_WAY._replace(kind="gradient", rows=2**31 // 2001 + 2),
    "two-way gradient 2048": _TWO_WAY._replace(kind="gradient", num_labels=2048),
    "two-way combine": _TWO_WAY._replace(kind="combine"),
    "two-way total": _TWO_WAY._replace(kind="total"),
}

_MSE, _KL = Pointwise("mse"), Pointwise("kl")

POINTWISE: dict[str, Pointwise] = {
    "mse": _MSE,
    "mse fp32": _MSE._replace(inputs=torch.float32, targets=torch.float32),
    "mse fp64": _MSE._replace(inputs=torch.float64, targets=torch.float64),
    "mse int64 targets": _MSE._replace(inputs=torch.float32, targets=torch.int64),
    "mse weight": _MSE._replace(weight=torch.float32),
    "mse mask": _MSE._replace(mask=True),
    "mse both": _MSE._replace(step="both"),
    "mse backward": _MSE._replace(step="backward"),
    "mse backward none": _MSE._replace(step="backward none"),
    "mse wide": _MSE._replace(rows=2**31 // 1001 + 2),
    "kl": _KL,
    "kl fp32": _KL._replace(inputs=torch.float32, targets=torch.float32),
    "kl fp64": _KL._replace(inputs=torch.float64, targets=torch.float64),
    "kl fp32 targets": _KL._replace(targets=torch.float32),
    "kl both": _KL._replace(step="both"),
    "kl log_target": _KL._replace(formula="kl of logs"),
    "kl log_target fp32": Pointwise("kl of logs", torch.float32, torch.float32),
    "kl log_target both": _KL._replace(formula="kl of logs", step="both"),
}

_CE, _FOCAL_ROWS, _LDAM = Rows("cross_entropy"), Rows("focal", (2.0,)), Rows("ldam", (30.0,))
_WEIGHED = _CE._replace(smoothing=0.1, weight=True)
_POLY_OF_ALL = Rows("poly", (2.0,), probabilities=torch.float32, weight=True, smoothing=0.1)
_DISTILLATION, _R_DROP, _JS = Rows("distillation", (2.0, 0.5)), Rows("r_drop", (1.0,)), Rows("js", labels=False)
# Several rows a tile, one, the longest; an odd vocabulary, an aligned one, and a million.
_CLASSES = (2, 20, 1000, 4096, 30522, 32768, 50257, 131072, 1000003)

ROWS: dict[str, Rows] = {
    **{f"ce {classes}": _CE._replace(num_classes=classes) for classes in _CLASSES},
    "ce 1000 fp32": _CE._replace(inputs=torch.float32),
    "ce 30522 fp32": _CE._replace(inputs=torch.float32, num_classes=30522),
    "ce 32768 fp32": _CE._replace(inputs=torch.float32, num_classes=32768),
    "ce 32768 fp32 backward none": _CE._replace(inputs=torch.float32, num_classes=32768, step="backward none"),
    "ce 1000 fp64": _CE._replace(inputs=torch.float64),
    "ce 30522 fp64": _CE._replace(inputs=torch.float64, num_classes=30522),
    "ce 1000 loss": _CE._replace(step="loss"),
    "ce 1000 backward": _CE._replace(step="backward"),
    "ce 1000 backward none": _CE._replace(step="backward none"),
    "ce 30522 backward": _CE._replace(step="backward", num_classes=30522),
    "ce 1000 wide": _CE._replace(rows=2**31 // 1000 + 2),
    "ce 1000 smoothing weight": _WEIGHED,
    "ce 1000 z_loss softcap": _CE._replace(z_loss=1e-4, softcap=30.0),
    "ce 30522 z_loss softcap": _CE._replace(z_loss=1e-4, softcap=30.0, num_classes=30522),
    # what spilled: two options at once, of each length at which rows are cut in another way
    "ce 20 smoothing weight": _WEIGHED._replace(num_classes=20),
    "ce 16000 fp32 smoothing weight": _WEIGHED._replace(inputs=torch.float32, num_classes=16000),
    "ce 32000 smoothing weight": _WEIGHED._replace(num_classes=32000),
    "ce 50257 fp64 smoothing weight": _WEIGHED._replace(inputs=torch.float64, num_classes=50257),
    "ce 20 fp64 smoothing weight softcap": _WEIGHED._replace(inputs=torch.float64, num_classes=20, softcap=30.0),
    "ce 1000 fp64 z_loss softcap": _CE._replace(inputs=torch.float64, z_loss=1e-4, softcap=30.0),
    "ce 16000 fp32 smoothing softcap": _CE._replace(
        inputs=torch.float32, num_classes=16000, smoothing=0.1, softcap=30.0
    ),
    "ce 1000 probabilities": _CE._replace(probabilities=torch.float32),
    "ce 30522 probabilities": _CE._replace(probabilities=torch.float32, num_classes=30522),
    "softmax focal 1000": _FOCAL_ROWS,
    "softmax focal 30522": _FOCAL_ROWS._replace(num_classes=30522),
    "softmax focal 3.7 1000": _FOCAL_ROWS._replace(params=(3.7,), weight=True),
    "softmax focal 1000 smoothing": _FOCAL_ROWS._replace(smoothing=0.1),
    "poly ce 1000": Rows("poly", (2.0,)),
    "poly ce 1000 probabilities": _POLY_OF_ALL,
    "poly ce 30522 probabilities": _POLY_OF_ALL._replace(num_classes=30522),
    "ldam 1000": _LDAM,
    **{f"distillation {classes}": _DISTILLATION._replace(num_classes=classes) for classes in (20, 1000, 8192, 30522)},
    "distillation 1000 alone": _DISTILLATION._replace(labels=False),
    "distillation 1000 fp32": _DISTILLATION._replace(inputs=torch.float32),
    **{f"r_drop {classes}": _R_DROP._replace(num_classes=classes) for classes in (1000, 30522)},
    "r_drop 20 fp64": _R_DROP._replace(num_classes=20, inputs=torch.float64),
    **{f"js {classes}": _JS._replace(num_classes=classes) for classes in (1000, 30522)},
    "js 1000 fp64": _JS._replace(inputs=torch.float64),
    "margin_mse 8": Rows("margin_mse", num_classes=8, labels=False),
}

_LAMBDA = Ranking("NDCGLoss2++")

LISTS: dict[str, Ranking] = {
    "lambda": _LAMBDA,
    "lambda bf16": _LAMBDA._replace(inputs=torch.bfloat16),
    "lambda fp64": _LAMBDA._replace(inputs=torch.float64),
    "lambda k": _LAMBDA._replace(k=10),
    "lambda 10": _LAMBDA._replace(length=10),
    "lambda 4096": _LAMBDA._replace(length=4096, mask=False),
    "lambda loss": _LAMBDA._replace(step="loss"),
    "lambda ndcg1": Ranking("NDCGLoss1"),
    "lambda ndcg2": Ranking("NDCGLoss2"),
    "lambda rank": Ranking("LambdaRank"),
    "rank_net": Ranking("RankNet"),
    "adr_mse": Ranking("adr_mse"),
    "adr_mse bf16": Ranking("adr_mse", inputs=torch.bfloat16),
    "adr_mse fp64": Ranking("adr_mse", inputs=torch.float64),
    "adr_mse 10": Ranking("adr_mse", length=10, mask=False),
    "adr_mse loss": Ranking("adr_mse", step="loss"),
    **{
        f"{formula} {length}": Ranking(formula, length=length)
        for formula in ("list_net", "p_list_mle", "multiple_negatives")
        for length in (10, 201, 4096)
    },
    "list_net bf16": Ranking("list_net", inputs=torch.bfloat16, mask=False),
    "list_net 4096 fp64": Ranking("list_net", length=4096, inputs=torch.float64),
    "list_mle 201": Ranking("list_mle"),
}

PASSES: dict[str, Pass] = {
    "count": Pass("count", targets=torch.int8, ignored=-100),
    "count mask": Pass("count", targets="sparse", mask=True),
    "positives": Pass("positives"),
    "positives float": Pass("positives", targets=torch.float32),
    "positives mask": Pass("positives", mask=True),
    "row sums": Pass("row sums"),
    "row sums float": Pass("row sums", targets=torch.float32),
    "row sums sparse": Pass("row sums", targets="sparse"),
    "histogram": Pass("histogram"),
    "histogram fp32": Pass("histogram", inputs=torch.float32),
    "histogram soft": Pass("histogram", targets=torch.float32),
    "histogram smoothing": Pass("histogram", smoothing=0.1),
    "histogram sparse": Pass("histogram", targets="sparse"),
    "sum": Pass("sum", inputs=torch.float32),
    "sum bf16": Pass("sum", denominator=63),
    "rescale": Pass("rescale", inputs=torch.float32),
    "rescale bf16": Pass("rescale"),
}

VARIANTS: dict[str, Sigmoid | Lines | Pointwise | Rows | Ranking | Pass] = {
    **SIGMOID,
    **LINES,
    **POINTWISE,
    **ROWS,
    **LISTS,
    **PASSES,
}
