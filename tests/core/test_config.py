"""What a specification must not say."""

import pytest

from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.errors import ConfigError


def test_a_prefix_cache_is_a_part_of_memory() -> None:
    for tokens in (None, 16, 160):
        scheduler = SchedulerConfig(prefix_caching=True, prefix_cache_tokens=tokens)
        InstanceSpec("decode-0", Role.DECODE, KvConfig(10, 16), scheduler).check_prefix_cache()
    for tokens in (15, 161):
        scheduler = SchedulerConfig(prefix_caching=True, prefix_cache_tokens=tokens)
        with pytest.raises(ConfigError, match="does not fit decode-0"):
            InstanceSpec("decode-0", Role.DECODE, KvConfig(10, 16), scheduler).check_prefix_cache()
