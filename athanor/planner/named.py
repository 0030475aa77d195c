"""Clusters that nobody measured: an accelerator's name and what is said of its links, priced by datasheet."""

from __future__ import annotations

from typing import Any

from athanor.cluster.spec import ClusterSpec, check_precision, load_accelerator
from athanor.cost.calibrate import mappings
from athanor.cost.coefficients import load
from athanor.cost.datasheet import Datasheet, accelerator, machine_of, usual_kernel
from athanor.cost.measured import WIDTH_BYTES
from athanor.cost.memory import GIB
from athanor.foundation.errors import UserError
from athanor.foundation.recipe import Cluster

DATASHEET = "datasheet"  # the source of such a ClusterSpec
OWN_PROGRAM = "fsdp"  # of the programs whose speed is known, the one like our own trainer


def named_cluster(wanted: Cluster) -> ClusterSpec:
    """The cluster of a recipe's `cluster.accelerator`.

    Raises UserError for an unknown accelerator, without a number of devices, or for a bandwidth that is a node's.
    """
    name = load_accelerator(wanted.accelerator or "")["name"]
    if wanted.devices is None:
        raise UserError(f"on how many {name}? Set cluster.devices")
    facts = accelerator(name)
    per_node = wanted.per_node or int(min(wanted.devices, facts.get("scale_up_devices", 8)))
    check_network(name, wanted.nic_gbps, per_node)
    peaks = {dtype: facts[key] for dtype in WIDTH_BYTES if (key := f"peak_{dtype}_flops") in facts}
    network = facts.get("nic_bits_per_second", 4e11) if wanted.nic_gbps is None else wanted.nic_gbps * 1e9
    return ClusterSpec(name, "cuda", wanted.devices, per_node, 1, facts["memory_bytes"], peaks, facts["memory_bytes_per_second"],
                       disk={"write_bytes_per_second": wanted.write_bytes_per_second or load()["stage"]["save_bytes_per_second"]},
                       source=DATASHEET, network_bytes_per_second=network / 8)


def check_network(name: str, nic_gbps: float | None, per_node: float) -> None:
    """Refuse what is the bandwidth of a whole node: nic_gbps is of one device everywhere."""
    usual = accelerator(name).get("nic_bits_per_second", 0.0) / 1e9
    if nic_gbps and per_node > 1 and nic_gbps == usual * per_node:
        raise UserError(f"nic_gbps={nic_gbps:g} is what a whole node of {per_node:g} {name} has; it is of one device: "
                        f"nic_gbps={usual:g}")


def facts_of(spec: ClusterSpec) -> dict[str, Any]:
    """What `machine_of` is told of a cluster.toml beside the accelerator's name."""
    network = {} if spec.network_bytes_per_second is None else {"nic_gbps": spec.network_bytes_per_second * 8 / 1e9}
    return {"per_node": spec.per_node, "memory_gib": spec.memory_bytes / GIB, **network}


def datasheet_rates(spec: ClusterSpec, dtype: str) -> Datasheet:
    """Rates of our trainer on such a cluster. Raises UserError for a dtype that it does not compute in."""
    check_precision(spec.accelerator, dtype)
    machine = machine_of([{**facts_of(spec), "accelerator": spec.accelerator, "program": OWN_PROGRAM,
                           "kernel": usual_kernel(OWN_PROGRAM), "product_bytes": float(WIDTH_BYTES[dtype])}])
    return Datasheet(machine, mappings()[0])


def caveat(spec: ClusterSpec) -> str:
    """What must be said beside a forecast by datasheet."""
    return (f"rates are the datasheet's of {spec.accelerator}, with efficiencies fitted to published runs; nothing was measured "
            f"on these {spec.devices:,} devices, whose network is taken to be {(spec.network_bytes_per_second or 0) * 8 / 1e9:g} "
            "Gbit/s a device. Muon's update is priced as AdamW's")
