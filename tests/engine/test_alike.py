"""The shards of a stage are on GPUs of one type; stages may differ."""

import pytest

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.engine.group.memory import check_alike


def test_stages_may_differ():
    check_alike(ParallelConfig(2, 2), {0: "H100", 1: "H100", 2: "A100", 3: "A100"})
    check_alike(ParallelConfig(1, 2), {0: "H100", 1: "A100"})


def test_shards_may_not():
    with pytest.raises(ConfigError, match=r"stage 1 of an instance of tp 2 has different GPUs: A100, H100\."):
        check_alike(ParallelConfig(2, 2), {2: "H100", 3: "A100"})
