"""The manifests in deploy/cluster are valid, and agree with the settings and with one another.

Kubernetes' own kinds are held to the schemas of its API server, unknown fields included
(kubernetes-validate). Of the kinds that operators add, whose schemas nobody packages, those parts
are held to a schema that are Kubernetes' own: pods, and how an autoscaler behaves. No cluster was
at hand.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from flask import Flask

from qwenvl_app.settings import PREFIX, Settings, load_settings
from qwenvl_app.version import VERSION
from tests.test_deploy import needs, run
from tests.test_metrics import parse
from tests.wire import GOOD, MULTIPART, ROUTE

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "deploy" / "cluster"
KUBERNETES = "1.34"  # the first whose pods may sleep before they stop without a feature gate
NO_MANIFESTS = {"kustomization.yaml"}
ADDED_KINDS = {"ScaledObject", "PodMonitor", "RayService"}
NAME = "app.kubernetes.io/name"
REMOTE = {"backend", "remote_url", "remote_model", "remote_api_key"}

Manifest = dict[str, Any]


def load(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


FILES = sorted({path.name for path in CLUSTER.glob("*.yaml")} - NO_MANIFESTS)
MANIFESTS = [(name, manifest) for name in FILES for manifest in load(name)]


def get(kind: str, name: str) -> Manifest:
    (found,) = [
        each for _, each in MANIFESTS if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


FRONT, ENGINE = get("Deployment", "qwenvl"), get("StatefulSet", "engine")
RAY = get("RayService", "ray")


def templates() -> Iterator[Manifest]:
    yield FRONT["spec"]["template"]
    yield ENGINE["spec"]["template"]
    cluster = RAY["spec"]["rayClusterConfig"]
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]


def container(workload: Manifest) -> Manifest:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    return only


def flags(engine: Manifest) -> dict[str, str]:
    return dict(flag.removeprefix("--").partition("=")[::2] for flag in container(engine)["args"])


def settings_of_the_front() -> dict[str, str]:
    return get("ConfigMap", "qwenvl")["data"]


def is_valid(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param(each, id=f"{name}-{each['kind']}-{each['metadata']['name']}")
        for name, each in MANIFESTS
        if each["kind"] not in ADDED_KINDS
    ],
)
def test_what_kubernetes_knows_is_valid(manifest: Manifest):
    is_valid(manifest)


def test_the_check_can_fail():
    wrong = yaml.safe_load(yaml.safe_dump(FRONT))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        is_valid(wrong)


def test_the_pods_of_ray_are_valid():
    for template in templates():
        is_valid({"apiVersion": "v1", "kind": "Pod", **template})


def test_the_file_for_kustomize_lists_all_but_the_alternative():
    kustomization = yaml.safe_load((CLUSTER / "kustomization.yaml").read_text(encoding="utf-8"))
    assert sorted([*kustomization["resources"], "ray.yaml"]) == FILES
    assert kustomization["namespace"] == get("Namespace", "qwenvl")["metadata"]["name"]
    (image,) = kustomization["images"]
    assert f"{image['name']}:{image['newTag']}" == container(FRONT)["image"]


def test_images_are_pinned():
    images = [each["image"] for template in templates() for each in template["spec"]["containers"]]
    for image in images:
        assert re.search(r":v?\d+\.\d+\.\d+[\w.-]*$", image), image
    assert container(FRONT)["image"].endswith(f":{VERSION}")
    ray = RAY["spec"]["rayClusterConfig"]["rayVersion"]
    assert all(f":{ray}-" in image for image in images if "ray" in image)


def test_pods_have_the_least_that_they_need():
    for template in templates():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        person = spec["securityContext"]
        assert person["runAsNonRoot"] is True
        assert person["runAsUser"] > 0
        assert person["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in spec["containers"]:
            assert each["securityContext"]["allowPrivilegeEscalation"] is False
            assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(each["resources"]["requests"])
            assert "memory" in each["resources"]["limits"]
            mounted = {mount["name"] for mount in each["volumeMounts"]}
            assert mounted == {volume["name"] for volume in spec["volumes"]}
    for workload in (FRONT, ENGINE):
        assert container(workload)["securityContext"]["readOnlyRootFilesystem"] is True
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert f"USER {FRONT['spec']['template']['spec']['securityContext']['runAsUser']}" in dockerfile


def test_who_runs_is_answered_before_a_pod_ends():
    grace = FRONT["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    sleep = container(FRONT)["lifecycle"]["preStop"]["sleep"]["seconds"]
    limit = float(settings_of_the_front()[PREFIX + "REQUEST_TIMEOUT_S"])
    assert grace > sleep + limit + 10  # graceful_timeout in config/gunicorn.conf.py
    grace = ENGINE["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    drained = float(flags(ENGINE)["shutdown-timeout"])
    assert drained >= limit
    assert grace > container(ENGINE)["lifecycle"]["preStop"]["sleep"]["seconds"] + drained


def test_probes_ask_what_is_there(app: Flask):
    paths = {rule.rule for rule in app.url_map.iter_rules()}
    for workload in (FRONT, ENGINE):
        each = container(workload)
        ports = {port["name"] for port in each["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert each[probe]["httpGet"]["port"] in ports
    front = container(FRONT)
    asked = {probe: front[probe]["httpGet"]["path"] for probe in front if probe.endswith("Probe")}
    assert set(asked.values()) <= paths
    # An engine that is down must not have the front ends restarted.
    assert asked["livenessProbe"] == asked["startupProbe"] == "/livez"
    assert asked["readinessProbe"] == "/readyz"


def test_the_front_is_told_what_it_knows():
    given = settings_of_the_front()
    keys = {name.removeprefix(PREFIX).lower() for name in given}
    assert all(name.startswith(PREFIX) for name in given)
    assert keys <= set(Settings.model_fields) | REMOTE
    given |= {f"{PREFIX}API_KEYS": "a", f"{PREFIX}REMOTE_API_KEY": "b"}
    unknown = REMOTE - set(Settings.model_fields)
    load_settings({key: given[key] for key in given if key[len(PREFIX) :].lower() not in unknown})


def test_the_front_asks_the_engines():
    given = settings_of_the_front()
    service = get("Service", "engine")
    (port,) = service["spec"]["ports"]
    assert service["spec"]["clusterIP"] == "None"
    assert ENGINE["spec"]["serviceName"] == "engine"
    most = get("ScaledObject", "engine")["spec"]["maxReplicaCount"]
    urls = [f"http://engine-{number}.engine:{port['port']}" for number in range(most)]
    assert given[PREFIX + "REMOTE_URL"].split(",") == urls
    told = flags(ENGINE)
    assert str(port["port"]) == told["port"]
    assert container(ENGINE)["ports"][0]["containerPort"] == port["port"]
    assert given[PREFIX + "REMOTE_MODEL"] == told["served-model-name"]


def test_a_permit_is_a_slot():
    """As many front ends as engines, and as many permits as slots: requests wait in front."""
    permits = int(settings_of_the_front()[PREFIX + "MAX_CONCURRENCY"])
    assert permits == int(flags(ENGINE)["max-num-seqs"])
    front, engine = (get("ScaledObject", name)["spec"] for name in ("qwenvl", "engine"))
    for key in ("minReplicaCount", "maxReplicaCount"):
        assert front[key] == engine[key]
    asked = [each["triggers"][0]["metadata"] for each in (front, engine)]
    assert asked[0] == asked[1]
    assert 0.5 * permits < float(asked[0]["threshold"]) < permits


def test_both_sides_of_the_key_are_one_secret():
    (secret,) = [each["secretRef"]["name"] for each in container(FRONT)["envFrom"][1:]]
    (key,) = [each for each in container(ENGINE)["env"] if each["name"] == "VLLM_API_KEY"]
    assert key["valueFrom"]["secretKeyRef"] == {"name": secret, "key": PREFIX + "REMOTE_API_KEY"}
    for _, manifest in MANIFESTS:
        assert manifest["kind"] != "Secret"  # none lies in a repository


def matches(selector: Manifest, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def test_selectors_find_pods():
    labels = [template["metadata"]["labels"] for template in templates()]
    for workload in (FRONT, ENGINE):
        assert matches(
            workload["spec"]["selector"], workload["spec"]["template"]["metadata"]["labels"]
        )
    for _, manifest in MANIFESTS:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Service":
            assert any(spec["selector"].items() <= each.items() for each in labels)
        elif manifest["kind"] == "PodDisruptionBudget":
            assert any(matches(spec["selector"], each) for each in labels)
        elif manifest["kind"] == "NetworkPolicy":
            for peer in peers(manifest):
                if "namespaceSelector" not in peer:
                    assert any(matches(peer["podSelector"], each) for each in labels)
    monitored = get("PodMonitor", "qwenvl")["spec"]["selector"]["matchExpressions"]
    assert monitored == [{"key": NAME, "operator": "In", "values": ["qwenvl", "engine"]}]


def peers(policy: Manifest) -> Iterator[Manifest]:
    for way, side in (("ingress", "from"), ("egress", "to")):
        for rule in policy["spec"].get(way, []):
            yield from rule[side]


def test_nobody_reaches_anybody_but():
    assert get("NetworkPolicy", "nothing")["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    assert "egress" not in get("NetworkPolicy", "engine")["spec"]  # the default is none
    engines, names = get("NetworkPolicy", "qwenvl")["spec"]["egress"]
    assert engines == {
        "to": [{"podSelector": {"matchLabels": {NAME: "engine"}}}],
        "ports": [{"protocol": "TCP", "port": 8000}],
    }
    assert {port["port"] for port in names["ports"]} == {53}
    (admitted,) = get("NetworkPolicy", "qwenvl")["spec"]["ingress"]
    assert admitted["ports"] == [{"protocol": "TCP", "port": 8000}]
    assert container(FRONT)["ports"][0]["containerPort"] == 8000


SCALED = [get("ScaledObject", name) for name in ("qwenvl", "engine")]


@pytest.mark.parametrize("scaled", SCALED, ids=lambda each: each["metadata"]["name"])
def test_autoscalers_scale_what_is_there(scaled: Manifest):
    spec = scaled["spec"]
    target = get(spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
    assert "replicas" not in target["spec"]  # applied again, it would undo the autoscaler's work
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    is_valid(
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": scaled["metadata"],
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", **spec["scaleTargetRef"]},
                "minReplicas": spec["minReplicaCount"],
                "maxReplicas": spec["maxReplicaCount"],
                "behavior": behavior,
            },
        }
    )
    # KEDA has a fallback only for averages.
    assert spec["triggers"][0]["metricType"] == "AverageValue"
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"


@needs("promtool", "prometheus")
def test_autoscalers_ask_for_what_is_measured(app: Flask, tmp_path: Path):
    client = app.test_client()
    client.post(ROUTE, data=GOOD, content_type=MULTIPART)
    measured = {sample.partition("{")[0] for sample in parse(client.get("/metrics").text)}
    query = SCALED[0]["spec"]["triggers"][0]["metadata"]["query"]
    named = re.findall(r"qwenvl_\w+", re.sub(r"\{.*?\}", "", query))
    assert "qwenvl_num_requests_waiting" in named
    assert set(named) <= measured
    rules = {"groups": [{"name": "a", "rules": [{"record": "a", "expr": query}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    done = run("promtool", "check", "rules", str(tmp_path / "rules.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_ray_has_the_gpus_that_its_copies_need():
    (app,) = yaml.safe_load(RAY["spec"]["serveConfigV2"])["applications"]
    (model,) = app["args"]["llm_configs"]
    engine, deployment = model["engine_kwargs"], model["deployment_config"]
    needed = engine["tensor_parallel_size"] * engine["pipeline_parallel_size"]
    (group,) = RAY["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert group["rayStartParams"]["num-gpus"] == str(gpus)
    assert group["replicas"] * gpus == deployment["num_replicas"] * needed
    assert deployment["max_ongoing_requests"] == engine["max_num_seqs"]


def test_the_page_names_files_and_flags_that_exist():
    page = (CLUSTER / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page):
        assert (CLUSTER / target).exists(), target
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    for word in shlex.split(blocks, comments=True):
        if word.startswith("deploy/"):
            assert (ROOT / word).exists(), word
    for key in re.findall(rf"{PREFIX}([A-Z_]+)", page):
        assert key.lower() in set(Settings.model_fields) | REMOTE, key
