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


def test_ssh_is_open_to_a_named_range_alone(cluster: dict[str, Any]) -> None:
    """With a group of its user's own, Ray adds no rule: its own group allows ssh from everywhere."""
    assert "security_group" not in cluster["provider"]
    for name, node_type in cluster["available_node_types"].items():
        assert node_type["node_config"]["SecurityGroupIds"], name
    commands = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert "authorize-security-group-ingress" in commands
    assert "0.0.0.0/0" not in commands


def test_disks_are_encrypted_and_data_cannot_ask_for_a_nodes_credentials(cluster: dict[str, Any]) -> None:
    for node_type in cluster["available_node_types"].values():
        config = node_type["node_config"]
        assert all(disk["Ebs"]["Encrypted"] is True for disk in config["BlockDeviceMappings"])
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert config["MetadataOptions"]["HttpPutResponseHopLimit"] == 1


def test_a_node_may_do_what_it_has_to_alone(cluster: dict[str, Any]) -> None:
    profiles = {
        name: node_type["node_config"]["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        for name, node_type in cluster["available_node_types"].items()
    }
    assert profiles == {
        "head": "vlmtune-head",
        "gpu_spot": "vlmtune-worker",
        "gpu_on_demand": "vlmtune-worker",
    }
    for name, services in {"head": {"s3", "ec2", "iam"}, "worker": {"s3"}}.items():
        policy = json.loads((ROOT / "docs" / f"aws-{name}-policy.json").read_text(encoding="utf-8"))
        actions = [action for one in policy["Statement"] for action in one["Action"]]
        assert {action.partition(":")[0] for action in actions} == services
        assert not [action for action in actions if "*" in action and action != "ec2:Describe*"]
        for one in policy["Statement"]:
            assert one["Effect"] == "Allow"
            everything = one["Resource"] == "*"
            assert not everything or one["Action"] == ["ec2:Describe*"] or "Condition" in one
