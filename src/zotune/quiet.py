"""What other libraries say while they are imported and load, and which tells a user of the command line nothing. Imports none."""

from __future__ import annotations

import logging
import warnings

# Kernels for machines that this one is not (torchao, bitsandbytes), and deprecations between libraries.
TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")


def libraries() -> None:
    """Before they are imported: errors of theirs alone are said."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
