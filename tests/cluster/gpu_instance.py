"""An instance on a fake card, in a process of its own: run by ``test_gpu_serve.py``.

Says its card first, then an answer to each command.
"""

from distserve.cluster.gpu import Hardware
from distserve.cluster.instance import Instance
from distserve.cluster.parts import ClusterKey, EnginePlan, InstanceConfig
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.demo import model_dir
from distserve.engine.device.backend import HostBackend
from tests.peers import Line
from tests.transfer.fake_device import FakeDevice

KV = KvConfig(num_blocks=64)
SCHEDULER = SchedulerConfig(max_batch_tokens=48, max_in_flight=2, lookahead=True, report_interval=0.02)


def spec(role: str) -> InstanceSpec:
    return InstanceSpec(f"{role}-0", Role(role), KV, SCHEDULER)


def main(line: Line, role: str, key: ClusterKey) -> None:
    device = FakeDevice()
    config = InstanceConfig(
        spec(role),
        EnginePlan(model_dir(), "float32", 1, device="cuda:0"),
        key,
        host=None,
        first_core=0,
        num_cores=1_000_000,
    )
    instance = Instance(config, lambda _: Hardware(device, HostBackend()))
    instance.load()
    line.say(instance.card)
    for name, *arguments in line.commands():
        match name:
            case "meet":
                answer = instance.meet(*arguments)
            case "start":
                answer = instance.start()
            case "copies":
                answer = device.num_launched
            case "refuse":
                answer = device.num_to_refuse
                device.num_to_refuse = arguments[0]
        line.say(answer)
