"""One switch for everything that would fetch from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock


@contextmanager
def network(allowed: bool) -> Iterator[None]:
    """Keeps `huggingface_hub` and `datasets` to their local caches unless ``allowed``."""
    with ExitStack() as stack:
        if not allowed:
            import huggingface_hub.constants

            stack.enter_context(mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            try:
                import datasets.config
            except ImportError:
                pass  # then nothing of it can reach for the network
            else:
                stack.enter_context(mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True))
        yield
