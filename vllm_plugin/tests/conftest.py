"""vLLM in this process, without a network and without caches that another run left."""

import os
import tempfile

CACHES = tempfile.TemporaryDirectory()
os.environ |= {
    "HF_HOME": CACHES.name,
    "HF_HUB_OFFLINE": "1",
    "VLLM_CACHE_ROOT": CACHES.name,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
