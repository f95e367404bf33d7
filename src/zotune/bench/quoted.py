"""Figures of arXiv 2402.11592, to set a report beside. Quoted, never measured here.

† not confirmed by a second source.
"""

from __future__ import annotations

SOURCE = "arXiv 2402.11592"

SST2_COLUMNS = tuple(
    f"{model}, {scheme}" for model in ("RoBERTa-large", "OPT-1.3B") for scheme in ("full", "lora", "prefix", "prompt")
)
SST2_TITLE = "SST-2 test accuracy (%), table 2"
SST2 = {
    "fo-sgd": ("91.4", "91.2†", "89.6†", "90.3†", "91.1", "93.6", "93.1", "92.8"),
    "forward-grad": ("90.1†", "89.7†", "89.5†", "87.3†", "90.3†", "90.3†", "90.0†", "82.4†"),
    "zo-sgd": ("89.4†", "90.8†", "90.0†", "87.6†", "90.8", "90.1", "91.4", "84.4"),
    "zo-sgd-mmt": ("89.6†", "90.9†", "90.1†", "88.6†", "85.2†", "91.3†", "91.2†", "86.9†"),
    "zo-sgd-cons": ("89.6†", "91.6†", "90.1†", "88.5†", "88.3†", "90.5†", "81.8†", "84.7†"),
    "zo-sgd-sign": ("52.5†", "90.2†", "53.6†", "86.1†", "87.2", "91.5", "89.5", "72.9"),
    "zo-adam": ("89.8†", "89.5†", "90.2†", "88.8†", "84.4", "92.3", "91.4", "75.7"),
}

ALIGNMENT_COLUMNS = ("SST-2, with", "SST-2, without", "RTE, with", "RTE, without")
ALIGNMENT_TITLE = "Alignment: RoBERTa-large, full, accuracy (%) with and without the template"
ALIGNMENT = {
    "fo-sgd": ("91.6†", "91.5†", "70.9†", "61.4†"),
    "zo-sgd": ("89.4†", "79.2†", "68.7†", "60.4†"),
    "zo-adam": ("89.8†", "79.2†", "69.2†", "58.7†"),
}
