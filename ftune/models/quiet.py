"""Keep the libraries' progress bars and warnings off the terminal; what matters in them becomes an ftune error."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the hub client's progress bars; does not import transformers."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            enable_progress_bars()
        else:  # transformers may have turned them on inside
            disable_progress_bars()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, the hub client, bitsandbytes and torchao inside, and put everything back after it."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # They say at their import, which peft causes, that optional kernels are absent.
    loggers = {logger: logger.level for logger in map(getLogger, ("bitsandbytes", "torchao", "torch.utils._pytree"))}
    with quiet_hub(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(ERROR)
        try:
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)
            logging.set_verbosity(verbosity)
            if had_bars:
                logging.enable_progress_bar()
