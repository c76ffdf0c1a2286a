"""Makes all golden files: `python tests/oracle/make.py`. See README.md."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

import adamw_8bit
import arrow_files
import cases
import chat
import chat_loss
import configs
import curve
import expressions
import initial
import jobs
import models
import optimizer
import quant
import targets

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    GOLDEN.mkdir(exist_ok=True)
    models.make_all(GOLDEN / "models")
    cases.make_all(GOLDEN / "models", GOLDEN / "cases")
    configs.make_all(GOLDEN / "models", GOLDEN)
    curve.make_all(GOLDEN / "models", GOLDEN / "curve")
    jobs.make_all(GOLDEN / "jobs")
    initial.make_all(GOLDEN / "models", GOLDEN / "initial")
    optimizer.make_all(GOLDEN)
    adamw_8bit.make_all(GOLDEN)
    targets.make_all(GOLDEN / "models", GOLDEN)
    chat.make_all(GOLDEN / "chat")
    arrow_files.make_all(GOLDEN / "arrow")
    chat_loss.make_all(GOLDEN / "chat" / "losses.json")
    expressions.make_all(GOLDEN / "chat" / "expressions.json")
    quant.make_all(GOLDEN / "quant")


if __name__ == "__main__":
    main()
