"""Kubernetes's manifests: rendered, valid, and in step with the code. No cluster has run them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from service.admission.quota import UNITS
from service.admission.scheduler import Kind, Resource
from service.cli.main import app
from service.settings import Settings, read_settings, secret_names
from tests.deploy.metric_names import known_metrics, metrics_in
from tests.support.paths import PROJECT

pytestmark = pytest.mark.slow  # together: almost every test runs kubectl

KUBERNETES = PROJECT / "deploy" / "kubernetes"
OVERLAYS = ("overlays/cpu", "overlays/gpu", "overlays/gpu-multinode", "canary")
WHOLE = OVERLAYS[:3]
SCHEMAS = Path(__file__).parent / "schemas"
CUSTOM = {
    "Gateway": "gateway-v1",
    "HTTPRoute": "httproute-v1",
    "LeaderWorkerSet": "leaderworkerset-v1",
    "ScaledObject": "keda-scaledobject-v1alpha1",
    "ServiceMonitor": "servicemonitor-v1",
}
IMAGES_OF_OTHERS = {
    "redis": "docker-compose.yml",
    "nvcr.io/nvidia/tritonserver": "docker-compose.yml",
}
METRICS_OF_TENSORRT_LLM = {"nv_trt_llm_kv_cache_block_metrics"}
# What the labels of queries can be.
LABELS = {
    "kind": set(Kind),
    "resource": set(Resource),
    "unit": {*UNITS},
    "kv_cache_block_type": {"fraction"},  # TensorRT-LLM's
}
GATEWAY_PORTS = {"http": Settings().http_port, "grpc": Settings().grpc_port}
TRITON_PORTS = {"grpc": 8001, "metrics": 8002}

Object = dict[str, Any]


def rendered(folder: Path) -> list[Object]:
    """What `kubectl apply --kustomize` would send. Raises RuntimeError."""
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


@cache
def objects(overlay: str) -> list[Object]:
    return rendered(KUBERNETES / overlay)


def name(each: Object) -> str:
    return f"{each['kind']} {each['metadata']['name']}"


def of_kind(found: list[Object], kind: str) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in found if each["kind"] == kind}


def templates(each: Object) -> Iterator[Object]:
    """The pod templates inside an object."""
    spec = each.get("spec", {})
    match each["kind"]:
        case "Deployment":
            yield spec["template"]
        case "CronJob":
            yield spec["jobTemplate"]["spec"]["template"]
        case "LeaderWorkerSet":
            yield from (spec["leaderWorkerTemplate"][key] for key in ("leaderTemplate", "workerTemplate"))


def containers(found: list[Object]) -> Iterator[tuple[str, Object]]:
    for each in found:
        for template in templates(each):
            yield from ((name(each), container) for container in template["spec"]["containers"])


def closed(schema: Any) -> Any:
    """The schema, which refuses what it does not name: Kubernetes would drop it."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        inner["additionalProperties"] = False
    return inner


@cache
def validator_of(schema: str) -> jsonschema.Draft7Validator:
    document = json.loads((SCHEMAS / f"{schema}.json").read_text())
    if "metadata" in document["properties"]:
        document["properties"]["metadata"] = {"type": "object"}  # the schema names none of its fields
    return jsonschema.Draft7Validator(closed(document))


def faults_of_schemas(found: list[Object]) -> list[str]:
    """Core kinds strictly, custom resources by the schemas beside this file."""
    return [fault for each in found for fault in faults_of_schema(json.dumps(each))]


@cache  # validating takes longer than all else here, and a broken copy breaks one object
def faults_of_schema(text: str) -> list[str]:
    each = json.loads(text)
    try:
        if (schema := CUSTOM.get(each["kind"])) is None:
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
            return []
        validator = validator_of(schema)
        whole = "spec" in validator.schema["properties"]
        validator.validate(each if whole else each["spec"])
        for template in templates(each):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return [f"{name(each)}: {error.message}"]
    return []


def faults_of_security(found: list[Object]) -> list[str]:
    """What the profile `restricted` and our own rules refuse."""
    faults = []
    for each in found:
        for template in templates(each):
            pod = template["spec"]
            context = pod.get("securityContext", {})
            for wrong, what in (
                (context.get("runAsNonRoot") is not True or not context.get("runAsUser"), "may run as root"),
                (context.get("seccompProfile", {}).get("type") != "RuntimeDefault", "has no seccomp profile"),
                (pod.get("enableServiceLinks") is not False, "gets service links"),
                (pod.get("automountServiceAccountToken") is not False, "gets a token of the cluster"),
                (set(pod) & {"hostNetwork", "hostPID", "hostIPC"}, "shares the host"),
            ):
                faults += [f"{name(each)} {what}"] if wrong else []
            for container in pod["containers"]:
                inner = container.get("securityContext", {})
                for wrong, what in (
                    (inner.get("allowPrivilegeEscalation") is not False, "may gain privileges"),
                    (inner.get("readOnlyRootFilesystem") is not True, "writes its root"),
                    (inner.get("capabilities") != {"drop": ["ALL"]}, "has capabilities"),
                    ("memory" not in container["resources"].get("limits", {}), "has no memory limit"),
                ):
                    faults += [f"{name(each)} {container['name']} {what}"] if wrong else []
    return faults


def targets() -> set[str]:
    return set(re.findall(r"^FROM \S+ AS (\S+)$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE))


def faults_of_images(found: list[Object]) -> list[str]:
    """Ours are targets of the Dockerfile, all others are pinned to the versions of another file."""
    faults = []
    for where, container in containers(found):
        repository, _, tag = container["image"].partition(":")
        if repository.startswith("glimpse/"):
            if repository.removeprefix("glimpse/") not in targets():
                faults.append(f"{where}: the Dockerfile has no target for {repository}")
        elif repository not in IMAGES_OF_OTHERS:
            faults.append(f"{where}: {repository} is unknown")
        elif container["image"] not in (PROJECT / IMAGES_OF_OTHERS[repository]).read_text():
            faults.append(f"{where}: {container['image']} is not the image of {IMAGES_OF_OTHERS[repository]}")
        if not tag or tag == "latest":
            faults.append(f"{where}: {repository} has no version")
    return faults


def faults_of_arguments(found: list[Object]) -> list[str]:
    """Each `glimpse` command has these options and values."""
    faults = []
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for where, container in containers(found):
        match container.get("args"):
            case ["glimpse", command, *arguments]:
                try:
                    commands[command].make_context(command, list(arguments))
                except KeyError:
                    faults.append(f"{where}: there is no command glimpse {command}")
                except Exception as error:  # click's own, of its parser
                    faults.append(f"{where}: glimpse {command}: {error}")
    return faults


def faults_of_environment(found: list[Object]) -> list[str]:
    """Every GLIMPSE_ variable is a setting, with a value that it takes."""
    faults = []
    for where, container in containers(found):
        given = {
            each["name"]: each.get("value", "")
            for each in container.get("env", ())
            if each["name"].startswith("GLIMPSE_")
        }
        secrets = [variable for variable in given if variable.removesuffix("_FILE") in secret_names()]
        try:
            read_settings({key: value for key, value in given.items() if key not in secrets})
        except ValueError as error:
            faults.append(f"{where}: {error}")
        mounts = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
        faults += [f"{where}: nothing is mounted at {given[key]}" for key in secrets
                   if str(Path(given[key]).parent) not in mounts]  # fmt: skip
    return faults


def faults_of_ports(found: list[Object]) -> list[str]:
    """Services reach ports that containers name, and ours have the numbers of the code."""
    faults = []
    pods = [(name(each), template) for each in found for template in templates(each)]
    for where, template in pods:
        for container in template["spec"]["containers"]:
            known = {"gateway": GATEWAY_PORTS, "triton": TRITON_PORTS}.get(container["name"], {})
            for port in container.get("ports", ()):
                if known.get(port["name"], port["containerPort"]) != port["containerPort"]:
                    faults.append(f"{where}: {port['name']} is {known[port['name']]}")
    for service in of_kind(found, "Service").values():
        chosen = [
            template for _, template in pods
            if service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        ]  # fmt: skip
        if not chosen:
            faults.append(f"{name(service)} selects no pod")
        for template in chosen:
            ports = {port["name"] for container in template["spec"]["containers"] for port in container["ports"]}
            faults += [
                f"{name(service)}: no pod has a port {port['targetPort']}"
                for port in service["spec"]["ports"]
                if port["targetPort"] not in ports
            ]
    return faults


def faults_of_names(found: list[Object]) -> list[str]:
    """What one object says of another: services, scaled Deployments, labels, priority classes."""
    faults, services = [], of_kind(found, "Service")
    monitored = {service["metadata"]["labels"].get("glimpse/job") for service in services.values()}
    for each in found:
        spec = each.get("spec", {})
        if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = spec["scaleTargetRef"]
            if target["name"] not in of_kind(found, target.get("kind", "Deployment")):
                faults.append(f"{name(each)} scales nothing")
        if each["kind"] == "ServiceMonitor" and spec["selector"]["matchLabels"]["glimpse/job"] not in monitored:
            faults.append(f"{name(each)} selects no Service")
        if each["kind"] == "PodDisruptionBudget":
            labels = [template["metadata"]["labels"] for other in found for template in templates(other)]
            if not any(spec["selector"]["matchLabels"].items() <= these.items() for these in labels):
                faults.append(f"{name(each)} selects no pod")
        for template in templates(each):
            priority = template["spec"].get("priorityClassName")
            if priority is not None and priority not in of_kind(found, "PriorityClass"):
                faults.append(f"{name(each)}: there is no priority class {priority}")
    for where, container in containers(found):
        for variable in container.get("env", ()):
            host, colon, port = variable.get("value", "").rpartition(":")
            if variable["name"].endswith("_URL") and colon:
                ports = [each["port"] for each in services.get(host, {"spec": {"ports": []}})["spec"]["ports"]]
                if int(port) not in ports:
                    faults.append(f"{where}: {variable['name']} leads nowhere")
    return faults


def faults_of_metrics(found: list[Object]) -> list[str]:
    """KEDA's queries give one element, of metrics and label values that exist."""
    faults = []
    for scaled in of_kind(found, "ScaledObject").values():
        for trigger in scaled["spec"].get("triggers", ()):
            query = trigger["metadata"]["query"]
            unknown = metrics_in(query) - known_metrics() - METRICS_OF_TENSORRT_LLM
            faults += [f"{name(scaled)}: there is no metric {metric}" for metric in unknown]
            for label, chosen in re.findall(r'(\w+)=~?"([^"]+)"', query):
                faults += [
                    f"{name(scaled)}: no series has {label}={value}"
                    for value in chosen.split("|")
                    if value not in LABELS[label]
                ]
            if not all(part.startswith("sum(") for part in query.split(" + ")):
                faults.append(f"{name(scaled)}: {query} may give several elements")
    return faults


def faults_of_the_drain(found: list[Object]) -> list[str]:
    """A pod is killed only after all that it does when it ends."""
    faults = []
    for each in found:
        for template in templates(each):
            for container in template["spec"]["containers"]:
                if container["name"] != "gateway":
                    continue
                settings = {variable["name"]: variable.get("value") for variable in container["env"]}
                needed_s = (
                    container["lifecycle"]["preStop"]["sleep"]["seconds"]
                    + float(settings["GLIMPSE_STOP_NOTICE_S"])
                    + float(settings["GLIMPSE_STOP_GRACE_S"])
                    + 1  # to cut connections
                    + 2  # to end the process
                )
                if template["spec"]["terminationGracePeriodSeconds"] < needed_s:
                    faults.append(f"{name(each)} needs {needed_s:g} s to end")
    return faults


CHECKS: tuple[Callable[[list[Object]], list[str]], ...] = (
    faults_of_schemas,
    faults_of_security,
    faults_of_images,
    faults_of_arguments,
    faults_of_environment,
    faults_of_ports,
    faults_of_metrics,
    faults_of_the_drain,
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_no_fault(overlay: str):
    found = objects(overlay)
    checks = [*CHECKS, faults_of_names] if overlay in WHOLE else CHECKS
    assert [fault for check in checks for fault in check(found)] == []


@pytest.mark.parametrize(
    ("file", "good", "bad", "fault"),
    [
        ("base/gateway/deployment.yaml", "readinessProbe:", "readynessProbe:", "readynessProbe"),
        ("base/gateway/deployment.yaml", "enableServiceLinks: false", "enableServiceLinks: true", "service links"),
        ("base/gateway/deployment.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "as root"),
        ("base/gateway/deployment.yaml", "image: glimpse/gateway", "image: glimpse/gate", "no target"),
        ("base/gateway/deployment.yaml", "GLIMPSE_LOG_FORMAT", "GLIMPSE_LOG_FORM", "GLIMPSE_LOG_FORM is not"),
        ("base/gateway/deployment.yaml", "containerPort: 8080", "containerPort: 8088", "http is 8080"),
        ("base/gateway/deployment.yaml", "value: glimpse-llm:8001", "value: glimpse-lm:8001", "leads nowhere"),
        ("base/gateway/deployment.yaml", "Seconds: 60", "Seconds: 50", "needs 55 s to end"),
        ("base/gateway/service.yaml", "component: gateway\n    glimpse/track", "component: gate\n    glimpse/track",
         "selects no pod"),
        ("base/vision.yaml", "--pool, vision", "--pool, eyes", "glimpse triton"),
        ("base/vision.yaml", "sum(glimpse_resource_used", "sum(glimpse_resources", "no metric glimpse_resources"),
        ("base/vision.yaml", "single_image|multi", "one_image|multi", "no series has kind=one_image"),
        ("base/vision.yaml", "query: sum(", "query: max by (x) (", "several elements"),
        ("base/vision.yaml", "triggers:", "trigger:", "triggers"),
        ("base/llm.yaml", "cooldownPeriod", "coolDownPeriod", "coolDownPeriod"),
        ("base/monitoring.yaml", "jobLabel", "joblabel", "joblabel"),
        ("base/llm.yaml", 'threshold: "6144"', "threshold: 6144", "6144 is not of type 'string'"),
        ("base/canary.yaml", "glimpse, canary", "glimpse, bird", "no command glimpse bird"),
        ("base/monitoring.yaml", "endpoints:", "endpoint:", "endpoints"),
        ("base/routes.yaml", "weight: 100", "weight: -1", "-1 is less"),
        ("base/redis.yaml", "redis:7.2-bookworm", "redis:latest", "no version"),
    ],
)  # fmt: skip
def test_a_broken_copy_is_found(tmp_path: Path, file: str, good: str, bad: str, fault: str):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    broken = tmp_path / "kubernetes" / file
    text = broken.read_text()
    assert good in text
    broken.write_text(text.replace(good, bad))
    found = rendered(tmp_path / "kubernetes" / "overlays" / "cpu")
    faults = [each for check in (*CHECKS, faults_of_names) for each in check(found)]
    assert fault in "\n".join(faults)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_network_is_believed_to_be_of_proxies_before_somebody_names_it(overlay: str):
    gateways = [each for where, each in containers(objects(overlay)) if each["name"] == "gateway"]
    assert gateways
    for gateway in gateways:
        assert "GLIMPSE_TRUSTED_PROXIES" not in {variable["name"] for variable in gateway["env"]}


def test_the_canary_is_a_set_of_its_own_behind_a_service_of_its_own():
    stable = of_kind(objects("overlays/cpu"), "Service")["glimpse-gateway"]["spec"]["selector"]
    (pod,) = [template for each in objects("canary") for template in templates(each)]
    assert not stable.items() <= pod["metadata"]["labels"].items()
    route = yaml.safe_load((KUBERNETES / "canary" / "route.yaml").read_text())
    assert faults_of_schemas([route]) == []
    backends = {each["name"]: each["weight"] for each in route["spec"]["rules"][0]["backendRefs"]}
    services = {**of_kind(objects("overlays/cpu"), "Service"), **of_kind(objects("canary"), "Service")}
    assert backends == {"glimpse-gateway": 90, "glimpse-gateway-canary": 10}
    assert backends.keys() <= services.keys()


def test_gpu_pools_ask_for_gpus_and_cpu_pools_for_none():
    def gpus(overlay: str) -> dict[str, str | None]:
        return {
            where: container["resources"]["limits"].get("nvidia.com/gpu")
            for where, container in containers(objects(overlay))
            if container["name"] == "triton"
        }

    assert gpus("overlays/cpu") == {"Deployment glimpse-llm": None, "Deployment glimpse-vision": None}
    assert gpus("overlays/gpu") == {"Deployment glimpse-llm": "1", "Deployment glimpse-vision": "1"}
    assert gpus("overlays/gpu-multinode") == {"Deployment glimpse-vision": "1", "LeaderWorkerSet glimpse-llm": "8"}
