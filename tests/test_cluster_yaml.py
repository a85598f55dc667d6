import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return config


def test_it_follows_rays_schema(cluster: dict[str, Any]) -> None:
    jsonschema.validate(cluster, SCHEMA)
    wrong = copy.deepcopy(cluster)
    wrong["available_node_types"]["gpu_spot"]["gpus"] = 1
    with pytest.raises(jsonschema.ValidationError, match="gpus"):
        jsonschema.validate(wrong, SCHEMA)


def test_ray_accepts_it_with_its_defaults_filled_in(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert prepared["worker_setup_commands"] == cluster["setup_commands"]
    assert prepared["available_node_types"].keys() == cluster["available_node_types"].keys()


def test_the_head_has_no_gpu_and_workers_only_come_when_needed(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head = types[cluster["head_node_type"]]
    assert head["resources"].get("GPU", 0) == 0 and head["resources"]["CPU"] > 0
    assert not re.match("[gp][0-9]", head["node_config"]["InstanceType"])
    assert head["max_workers"] == 0
    workers = [node_type for name, node_type in types.items() if name != cluster["head_node_type"]]
    assert all(node_type["resources"]["GPU"] == 1 and node_type["min_workers"] == 0 for node_type in workers)
    assert 0 < cluster["idle_timeout_minutes"] <= 30


def test_spot_comes_first_and_on_demand_is_the_same_machine(cluster: dict[str, Any]) -> None:
    spot, on_demand = (
        copy.deepcopy(cluster["available_node_types"][name]) for name in ("gpu_spot", "gpu_on_demand")
    )
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot["node_config"] == on_demand["node_config"]
    assert spot["resources"] == on_demand["resources"]
    assert spot["priority"] > on_demand["priority"]
    assert on_demand["max_workers"] > 0
    images = {node_type["node_config"]["ImageId"] for node_type in cluster["available_node_types"].values()}
    assert len(images) == 1  # one Python version on every node


def test_the_dashboard_is_not_open_to_the_world(cluster: dict[str, Any]) -> None:
    (start,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start.split()
    assert "security_group" not in cluster["provider"]  # Ray's own group opens ssh alone
    assert not re.search(r"0\.0\.0\.0|::/0|docker run|--network", json.dumps(cluster))


def test_every_node_asks_for_the_token(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert re.search(r"export [^;]*RAY_AUTH_MODE=token", start)
    assert any("chmod 600 ~/.ray/auth_token" in command for command in cluster["setup_commands"])


def test_every_node_installs_the_tested_versions(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/vlmtune"] == "."
    installs = [command for command in cluster["setup_commands"] if "pip install" in command]
    assert len(installs) == 2 and "torch==" in installs[0] and installs[1].endswith(" ~/vlmtune")
    assert all("-c ~/vlmtune/constraints.txt" in command for command in installs)


def test_the_head_comment_names_the_ray_that_is_installed() -> None:
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    (version,) = re.findall(
        r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert f"ray[default]=={version}" in text
