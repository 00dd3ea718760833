"""Keep the libraries' progress bars and warnings off the terminal; what matters in them becomes an ftune error."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""They say at their import, which peft causes, that optional kernels are absent."""


def hush_imports() -> None:
    """Silence for good what libraries say of themselves, whoever imports them first; imports none of them."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


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
    from transformers.utils import logging as spoken

    verbosity, had_bars = spoken.get_verbosity(), spoken.is_progress_bar_enabled()
    loggers = {logger: logger.level for logger in map(logging.getLogger, _TALKATIVE)}
    with quiet_hub(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spoken.set_verbosity_error()
        spoken.disable_progress_bar()
        hush_imports()
        try:
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)
            spoken.set_verbosity(verbosity)
            if had_bars:
                spoken.enable_progress_bar()
