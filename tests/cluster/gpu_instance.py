"""An instance on a fake card, in a process of its own, driven line by line: run by ``test_gpu_serve.py``.

``argv[1]`` is JSON: name, role and key of the instance. Reads JSON commands, answers each by a line.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from distserve.cluster.gpu import Hardware
from distserve.cluster.instance import Instance
from distserve.cluster.parts import Card, ClusterKey, EnginePlan, InstanceConfig
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.demo import model_dir
from distserve.engine.device.backend import HostBackend
from tests.transfer.fake_device import FakeDevice

KV = KvConfig(num_blocks=64)
SCHEDULER = SchedulerConfig(max_batch_tokens=48, max_in_flight=2, lookahead=True, report_interval=0.02)


def spec(name: str, role: str) -> InstanceSpec:
    return InstanceSpec(name, Role(role), KV, SCHEDULER)


def main() -> None:
    options = json.loads(sys.argv[1])
    device = FakeDevice()
    config = InstanceConfig(
        spec(options["name"], options["role"]),
        EnginePlan(model_dir(), "float32", 1, device="cuda:0"),
        ClusterKey(**options["key"]),
        host=None,
        first_core=0,
        num_cores=1_000_000,
    )
    instance = Instance(config, lambda _: Hardware(device, HostBackend()))
    instance.load()
    print(json.dumps(asdict(instance.card)), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        match name:
            case "meet":
                answer = instance.meet([Card(**card) for card in arguments[0]])
            case "start":
                answer = instance.start()
            case "copies":
                answer = device.num_launched
            case "refuse":
                answer = device.num_to_refuse
                device.num_to_refuse = arguments[0]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
