"""k8s/rayjob.yaml: what a search on Kubernetes must not lose. Its schema was checked by hand, see
docs/cluster.md."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from vlmtune.config.parse import parse

ROOT = Path(__file__).parents[1]
SPEC: dict[str, Any] = yaml.safe_load((ROOT / "k8s/rayjob.yaml").read_text())["spec"]
CLUSTER = SPEC["rayClusterSpec"]
PODS = [
    CLUSTER["headGroupSpec"]["template"]["spec"],
    *(group["template"]["spec"] for group in CLUSTER["workerGroupSpecs"]),
]


def test_its_command_is_one_that_the_project_understands() -> None:
    words = shlex.split(SPEC["entrypoint"])
    assert words[:2] == ["python", "ray_jobs/tune.py"]
    settings = parse(words[2:], search=True, preset=False)
    assert settings.run.output_dir.startswith("/")
    assert settings.run.storage_path == "/runs"


def test_ray_is_the_tested_version_and_asks_for_a_token() -> None:
    assert f"ray=={CLUSTER['rayVersion']}" in (ROOT / "constraints.txt").read_text()
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_no_pod_runs_as_root_or_writes_the_data() -> None:
    for pod in PODS:
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]
        mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert mounts == {"/data": True, "/runs": False}


def test_the_number_of_gpus_is_bounded() -> None:
    (workers,) = CLUSTER["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["maxReplicas"] == workers["replicas"]
    assert PODS[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
