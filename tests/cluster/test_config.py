"""Configuration: what is wrong is named with its place and what would be valid; what is right becomes one launch."""

from pathlib import Path
from typing import Any

import pytest

from distserve.cluster.config import ServeConfig, load_config
from distserve.cluster.seats import PlannedLimits, WantedInstance
from distserve.cluster.sizing import PROCESS_BYTES, KvRequest, Room, free_memory, least_kv, size_kv
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role
from distserve.core.errors import ConfigError
from distserve.core.topology import ClusterSpec, Gpu, PlacedInstance, Placement
from distserve.demo import model_dir


def load(tmp_path: Path, text: str, **flags: Any) -> ServeConfig:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return load_config(file, flags, model_dir())


def test_nothing_said_is_the_demo_model_on_one_instance_each() -> None:
    config = load_config(None, {}, model_dir())
    assert config.model_dir == model_dir()
    assert config.pools == ((Role.PREFILL, 1), (Role.DECODE, 1))
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.served_model_names == ("distserve-demo",)


def test_the_file_is_read_and_flags_win(tmp_path: Path) -> None:
    text = f"""
model: {model_dir()}
slo: {{ttft: 0.4, tpot: 0.04, attainment: 0.9}}
workload: {{trace: azure2023_conv.csv}}
cluster: {{gpu: h100-sxm, nodes: 4}}
placement:
  prefill: {{instances: 3}}
  decode: {{instances: 2}}
engine: {{dtype: bfloat16, kv_tokens: 4096, threads: 2, prefix_caching: true, kv_transport: tcp, kv_interface: eth1}}
serving: {{port: 9000, served_model_name: "a, b,a"}}
"""
    config = load(tmp_path, text, **{"placement.prefill.instances": 1, "serving.port": 9001, "engine.dtype": None})
    assert config.pools == ((Role.PREFILL, 1), (Role.DECODE, 2))
    assert config.port == 9001
    assert config.engine.dtype == "bfloat16"
    assert config.engine.kv == KvRequest(num_tokens=4096)
    assert config.engine.prefix_caching
    assert (config.engine.kv_transport, config.engine.kv_interface) == ("tcp", "eth1")
    assert config.served_model_names == ("a", "b")


def test_mixed_instances_need_no_others() -> None:
    config = load_config(None, {"placement.mixed.instances": 2}, model_dir())
    assert config.pools == ((Role.MIXED, 2),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: x", ["serve.yaml, line 1: modle is unknown", "model"]),
        ("engine:\n  dtype: int4", ["line 2: engine.dtype", "'int4'", "'float32' or 'bfloat16'"]),
        ("engine:\n  kv_tokns: 5", ["line 2: engine.kv_tokns is unknown", "kv_tokens"]),
        ("serving:\n\n  port: 70000", ["line 3: serving.port", "70000", "65535"]),
        ("slo: {ttft: -1, tpot: 0.1}", ["slo.ttft", "-1", "greater than 0"]),
        ("slo: {ttft: 1}", ["slo.tpot"]),
        ("placement: best", ["cannot read the plan", "best", "distserve plan"]),
        ("placement: [1]", ["line 1: placement", "auto", "path of a plan", "pools"]),
        ("placement: {prefill: {instances: 0}, decode: {instances: 0}}", ["no instances"]),
        ("placement: {prefill: {instances: 0}}", ["no prefill instance"]),
        ("placement: {decode: {instances: 0}}", ["no decode instance"]),
        ("placement: {decode: {instances: two}}", ["placement.decode.instances", "'two'"]),
        ("placement: {decode: {count: 2}}", ["placement.decode.count is unknown", "instances"]),
        ("model: /nowhere/at/all", ["/nowhere/at/all"]),
        ("- model", ["expected keys"]),
        ("a: [", ["not valid YAML", "line"]),
        ("engine: {kv_transport: rdma}", ["engine.kv_transport", "'rdma'", "'auto', 'shm', 'tcp' or 'nccl'"]),
        ("engine: {kv_transport: shm, kv_interface: eth1}", ["engine.kv_interface", "shm", "drop one"]),
        ("engine: {kv_transport: nccl}", ["kv_transport nccl", "compute on CPUs", "auto, shm or tcp"]),
        ("cluster:\n  gpu: cpu\n  gpuz: 4", ["line 3: cluster.gpuz is unknown", "gpus_per_node", "latency"]),
        ("engine: {threads: 0}\nserving: {drain_timeout: -1}", ["engine.threads", "serving.drain_timeout"]),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    for part in expected:
        assert part in str(error.value)


PLAN = """
placement:
  prefill: {instances: 2, tp: 2, gpus: [[[0, 0], [0, 1]], [[1, 0], [1, 1]]]}
  decode: {instances: 1, pp: 2, gpus: [[[0, 2], [1, 2]]], max_batch_size: 48, kv_tokens: 9000}
cluster: {gpu: h100-sxm, nodes: 2, gpus_per_node: 4, intra_node_bandwidth: 450.0e+9, inter_node_bandwidth: 50.0e+9}
engine: {dtype: bfloat16}
slo: {ttft: 0.4, tpot: 0.04}
workload: {prompt: 100, output: 10}
prediction: {attainment: 0.97}
"""


def test_a_plan_says_which_instances_sit_where(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    # The plan is looked for beside the file that names it, and is a configuration itself.
    for config in (load(tmp_path, "placement: plan.yaml"), load_config(tmp_path / "plan.yaml", {}, model_dir())):
        assert config.pools == ((Role.PREFILL, 2), (Role.DECODE, 1))
        assert config.instances[1].parallel == ParallelConfig(tp=2)
        assert config.instances[1].gpus == (Gpu(1, 0), Gpu(1, 1))
        assert config.instances[2].gpus == (Gpu(0, 2), Gpu(1, 2))
        assert config.instances[2].limits == PlannedLimits(None, 48, 9000)
        assert config.cluster == ClusterSpec("h100-sxm", 2, 4, 450e9, 50e9)
        assert config.engine.dtype == "bfloat16", "what its memory was planned in"
    (tmp_path / "plan.yaml").write_text(PLAN.replace("engine: {dtype: bfloat16}\n", ""))
    with pytest.raises(ConfigError, match=r"planned in a data type that nobody says here: give engine\.dtype"):
        load(tmp_path, "placement: plan.yaml")


def test_flags_win_over_a_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    config = load(tmp_path, "placement: plan.yaml", **{"placement.mixed.instances": 1})
    assert config.pools == ((Role.MIXED, 1),)
    assert config.cluster is None
    limits = {"engine.max_batch_size": 8, "engine.kv_memory": 2e9}
    config = load(tmp_path, "placement: plan.yaml", **limits)
    assert {instance.limits for instance in config.instances} == {PlannedLimits()}
    assert (config.engine.max_batch_size, config.engine.kv) == (8, KvRequest(num_bytes=2 * 10**9))


def test_kv_memory_is_said_in_one_way(tmp_path: Path) -> None:
    config = load(tmp_path, "engine: {kv_tokens: 4096}", **{"engine.kv_memory": 1e6})
    assert config.engine.kv == KvRequest(num_bytes=10**6)
    config = load(tmp_path, "engine: {kv_memory: 1.0e+6}", **{"engine.kv_tokens": 4096})
    assert config.engine.kv == KvRequest(num_tokens=4096)
    for text, flags in (
        ("engine: {kv_tokens: 4096, kv_memory: 1.0e+6}", {}),
        ("{}", {"engine.kv_tokens": 4096, "engine.kv_memory": 1e6}),
    ):
        with pytest.raises(ConfigError, match="kv_tokens and kv_memory both say"):
            load(tmp_path, text, **flags)


def test_files_are_found_beside_the_one_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-llama").symlink_to(model_dir())
    assert load(tmp_path, "model: my-llama").model_dir == model_dir().resolve()
    with pytest.raises(ConfigError, match="model directory my-llama does not exist"):
        load(tmp_path, "{}", model="my-llama")
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path, "{}", model="my-llama").model_dir == model_dir().resolve()


@pytest.mark.parametrize("key", ["", "two words", "schl\u00fcssel"])
def test_a_key_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        load_config(None, {"serving.api_key": key}, model_dir())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("placement:", "placment:"), "no section placement"),
        (("[[0, 2], [1, 2]]", "[[0, 2]]"), "2 ranks .* 1 GPUs"),
        (("[[0, 2], [1, 2]]", "[[0, 2], [0, 1]]"), "GPU 1 of node 0 is given to 2 ranks"),
        (("nodes: 2", "nodes: 1"), "no GPU 0 on a node 1"),
        (("instances: 2", "instances: 3"), "lists the GPUs of 2 instances, there are 3"),
        (("[0, 2], [1, 2]", "[0, 2], [1]"), r"placement.decode.gpus.0.1"),
        (("gpus_per_node: 4, ", ""), "cluster.gpus_per_node"),
        (("450.0e+9", "-1"), "cluster.intra_node_bandwidth"),
        ((", gpus: [[[0, 2], [1, 2]]]", ""), "placement.decode.gpus is missing"),
        (("placement:", "model: /models/opt-66b\nplacement:"), "for the model /models/opt-66b"),
        (("{", "["), "not valid YAML"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.replace(*change))
    with pytest.raises(ConfigError, match=expected) as error:
        load(tmp_path, "placement: plan.yaml")
    assert "plan.yaml" in str(error.value)


def test_planned_gpus_need_their_cluster(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no section cluster"):
        load(tmp_path, "placement: {mixed: {gpus: [[[0, 0]]]}}")
    with pytest.raises(ConfigError, match=r"cluster\.nodes"):
        load(tmp_path, "placement: {mixed: {gpus: [[[0, 0]]]}}\ncluster: {gpu: cpu, gpus_per_node: 2}")


def test_auto_asks_the_planner_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planner(file: Path, model: Path) -> Placement:
        assert (file, model) == (tmp_path / "serve.yaml", model_dir())
        spec = InstanceSpec("mixed-0", Role.MIXED, KvConfig(8))
        return Placement(ClusterSpec("cpu", 1, 2, 1.0, 1.0), (PlacedInstance(spec, (Gpu(0, 1),)),))

    monkeypatch.setattr("distserve.cluster.config.find_planner", lambda: planner)
    config = load(tmp_path, "placement: auto")
    # The limits a placement was simulated with come with it.
    limits = PlannedLimits(max_batch_tokens=512, max_batch_size=64, kv_tokens=128)
    assert config.instances == (WantedInstance(Role.MIXED, ParallelConfig(), (Gpu(0, 1),), limits),)
    assert config.cluster is not None
    assert config.cluster.gpu == "cpu"


def test_auto_without_a_planner_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distserve.cluster.config.find_planner", lambda: None)
    with pytest.raises(ConfigError, match="needs the planner, which is not installed; give counts"):
        load(tmp_path, "placement: auto")
    # It reads the file, and would plan for something else than is started.
    for flag, value in (("engine.dtype", "bfloat16"), ("model", str(model_dir()))):
        with pytest.raises(ConfigError, match=f"planned from .*serve.yaml: say {flag}: {value} there, by no flag"):
            load(tmp_path, "placement: auto", **{flag: value})


def test_mistakes_in_flags_are_named_as_flags() -> None:
    with pytest.raises(ConfigError, match="--block-size"):
        load_config(None, {"engine.block_size": 0}, model_dir())
    with pytest.raises(ConfigError, match="--prefill"):
        load_config(None, {"placement.prefill.instances": -2}, model_dir())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        load_config(tmp_path / "gone.yaml", {}, model_dir())


GIB = 2**30
SIZES = {"weight_bytes": GIB, "token_bytes": 1024, "max_model_len": 4096, "num_instances": 2, "num_ranks": 2}


def test_kv_is_what_was_asked_for() -> None:
    assert size_kv(KvRequest(num_tokens=100), free=16 * GIB, **SIZES).num_blocks == 7
    assert size_kv(KvRequest(num_bytes=64 * 1024), free=16 * GIB, **SIZES).num_tokens == 64
    assert size_kv(KvRequest(num_tokens=100, block_size=8), free=16 * GIB, **SIZES).num_blocks == 13


def test_kv_by_default_fits_and_holds_a_full_sequence() -> None:
    for free in (4 * GIB, 6 * GIB, 64 * GIB):
        kv = size_kv(KvRequest(), free=free, **SIZES)
        assert kv.num_tokens >= SIZES["max_model_len"]
        assert 2 * (GIB + PROCESS_BYTES + kv.num_tokens * 1024) <= free
    # Also one that ends within a block, when that is all there is room for, or more than is usual.
    for token_bytes, free in ((1024, 2 * (GIB + PROCESS_BYTES) + 9 * 2**20), (128 * 1024, 16 * GIB)):
        sizes = {**SIZES, "max_model_len": 4095, "token_bytes": token_bytes}
        assert size_kv(KvRequest(), free=free, **sizes).num_tokens == 4096


def test_files_that_were_read_leave_room_in_a_control_group(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\nfile 600000\nactive_file 250000\ninactive_file 350000\n")
    assert free_memory(tmp_path) == 700_000
    (tmp_path / "memory.current").write_text("1900000\n")
    assert free_memory(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 1_000_000


def test_more_instances_than_memory_holds_is_an_error_with_numbers() -> None:
    with pytest.raises(ConfigError) as error:
        size_kv(KvRequest(num_tokens=2**20), free=4 * GIB, **SIZES)
    for part in ("2 instances need 4.8 GiB", "4.0 GiB are free", "1.0 GiB of KV (1048576 tokens)", "kv_tokens"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="3 would fit"):
        size_kv(KvRequest(num_tokens=1024), free=5 * GIB, **{**SIZES, "num_instances": 10, "num_ranks": 10})
    with pytest.raises(ConfigError, match=r"2 instances need 3\.3 GiB.* for its processes.*1 would fit"):
        size_kv(KvRequest(num_tokens=1024), free=3 * GIB, **{**SIZES, "num_ranks": 4})
    with pytest.raises(ConfigError, match="not a single block"):
        size_kv(KvRequest(num_bytes=100), free=64 * GIB, **SIZES)


def test_kv_by_default_is_what_the_node_with_the_least_memory_allows() -> None:
    model = {name: SIZES[name] for name in ("weight_bytes", "token_bytes", "max_model_len")}
    large, small = Room(2, 2, 64 * GIB), Room(1, 1, int(1.6 * GIB), "on node b")
    assert least_kv([large, small], KvRequest(), **model) == least_kv([small], KvRequest(), **model)
    assert (
        least_kv([large, small], KvRequest(), **model).num_blocks < least_kv([large], KvRequest(), **model).num_blocks
    )
    with pytest.raises(ConfigError, match=r"^on node b: 1 instance needs 2\.4 GiB"):
        least_kv([large, small], KvRequest(num_tokens=2**20), **model)


def test_a_node_with_some_stages_of_an_instance_needs_memory_for_those_alone() -> None:
    model = {name: SIZES[name] for name in ("weight_bytes", "token_bytes", "max_model_len")}
    asked = KvRequest(num_tokens=2**20)
    whole, half = Room(1, 2, 2 * GIB, "on node b"), Room(1, 1, 2 * GIB, "on node b", share=0.5)
    assert least_kv([half, half], asked, **model).num_tokens == 2**20
    with pytest.raises(ConfigError, match=r"^on node b: 1 instance needs 2\.6 GiB"):
        least_kv([whole], asked, **model)
    # By default too: half the weights, half of every token.
    assert least_kv([half], KvRequest(), **model).num_blocks > least_kv([whole], KvRequest(), **model).num_blocks
