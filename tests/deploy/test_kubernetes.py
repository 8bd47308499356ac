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
from service.edges.grpc.stubs import vqa_pb2
from service.edges.http import operations
from service.media.workers import MEMORY_BYTES, PIXEL_MEMORY_BYTES
from service.settings import Settings, read_settings, secret_names
from tests.deploy import triton_options
from tests.deploy.metric_names import known_metrics, metrics_in
from tests.support.paths import PROJECT

pytestmark = pytest.mark.slow  # together: almost every test runs kubectl

KUBERNETES = PROJECT / "deploy" / "kubernetes"
OVERLAYS = ("overlays/cpu", "overlays/gpu", "overlays/gpu-multinode", "canary")
WHOLE = OVERLAYS[:3]
MULTINODE = KUBERNETES / "overlays" / "gpu-multinode" / "Dockerfile"
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
GRPC_SERVICE = vqa_pb2.DESCRIPTOR.services_by_name["VisualQuestionAnswering"].full_name
STOP_GRACE_S = 40  # of the manifests' gateways
DNS_CACHE_S, DNS_INTERVAL_S = 30, 5  # CoreDNS keeps an answer, gateways ask again
ROUTES = {route.path for route in operations.router.routes}  # type: ignore[attr-defined]
NAMESPACE, MONITORING, ELSEWHERE = "glimpse", "monitoring", "somebody-else-s"
WAYS_TO_DNS: dict[str, dict[str, Any]] = {
    "CoreDNS": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}},
    "NodeLocal DNSCache": {"ipBlock": {"cidr": "169.254.20.10/32"}},
}
STRANGER = {"app": "somebody-else"}

Object = dict[str, Any]
Labels = dict[str, str]


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
    texts = (PROJECT / "Dockerfile").read_text() + MULTINODE.read_text()
    return set(re.findall(r"^FROM \S+ AS (\S+)$", texts, re.MULTILINE))


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


def command_of(container: Object) -> str:
    """What the container runs, in one line."""
    return " ".join([*container.get("command", ()), *container.get("args", ())]).replace("\\\n", " ")


def faults_of_arguments(found: list[Object]) -> list[str]:
    """Each `glimpse` command and each tritonserver has these options and values."""
    faults = []
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for where, container in containers(found):
        faults += [f"{where}: {fault}" for fault in triton_options.faults_of_options(command_of(container))]
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


def faults_of_probes(found: list[Object]) -> list[str]:
    """Probes ask routes and ports that exist; so does Prometheus."""
    faults = []
    for where, container in containers(found):
        ports = {port[key] for port in container.get("ports", ()) for key in ("name", "containerPort")}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            for what, asked in container.get(kind, {}).items():
                if what in ("httpGet", "grpc", "tcpSocket") and asked["port"] not in ports:
                    faults.append(f"{where}: {kind} asks port {asked['port']}")
                if what == "httpGet" and asked["path"] not in ROUTES:
                    faults.append(f"{where}: {kind} asks {asked['path']}")
    for monitor in of_kind(found, "ServiceMonitor").values():
        faults += [
            f"{name(monitor)} asks {each['path']}"
            for each in monitor["spec"]["endpoints"]
            if each["path"] not in ROUTES
        ]
    return faults


def faults_of_open_metrics(found: list[Object]) -> list[str]:
    """Whoever may ask a gateway also reaches its metrics, so those need a key, which Prometheus has."""
    faults = [f"{where}: anyone reads its metrics" for where, container in containers(found)
              for each in container.get("env", ())
              if each["name"] == "GLIMPSE_METRICS_WITHOUT_KEY" and each.get("value") != "false"]  # fmt: skip
    for monitor in of_kind(found, "ServiceMonitor").values():
        if monitor["spec"]["selector"]["matchLabels"]["glimpse/job"] == "glimpse":
            faults += [f"{name(monitor)} has no key" for each in monitor["spec"]["endpoints"]
                       if not each.get("authorization", {}).get("credentials", {}).get("name")]  # fmt: skip
    return faults


def leads_nowhere(services: dict[str, Object], host: str, port: int) -> bool:
    return port not in [each["port"] for each in services.get(host, {"spec": {"ports": []}})["spec"]["ports"]]


def faults_of_names(found: list[Object]) -> list[str]:
    """What one object says of another: services, scaled Deployments, labels, priority classes."""
    faults, services = [], of_kind(found, "Service")
    for each in found:
        spec = each.get("spec", {})
        if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = spec["scaleTargetRef"]
            if target["name"] not in of_kind(found, target.get("kind", "Deployment")):
                faults.append(f"{name(each)} scales nothing")
        if each["kind"] == "ServiceMonitor":
            chosen = list(monitored(found, each))
            if not chosen:
                faults.append(f"{name(each)} selects no Service")
            for service in chosen:
                ports = {port["name"] for port in service["spec"]["ports"]}
                faults += [f"{name(each)}: {name(service)} has no port {endpoint['port']}"
                           for endpoint in spec["endpoints"] if endpoint["port"] not in ports]  # fmt: skip
        if each["kind"] == "HTTPRoute":
            backends = [(backend["name"], backend["port"]) for rule in spec["rules"] for backend in rule["backendRefs"]]
            faults += [f"{name(each)}: {host} leads nowhere" for host, port in backends
                       if leads_nowhere(services, host, port)]  # fmt: skip
        if each["kind"] == "PodDisruptionBudget":
            labels = [template["metadata"]["labels"] for other in found for template in templates(other)]
            if not any(spec["selector"]["matchLabels"].items() <= these.items() for these in labels):
                faults.append(f"{name(each)} selects no pod")
        for template in templates(each):
            priority = template["spec"].get("priorityClassName")
            if priority is not None and priority not in of_kind(found, "PriorityClass"):
                faults.append(f"{name(each)}: there is no priority class {priority}")
    for where, container in containers(found):
        faults += [f"{where}: {what} leads nowhere"
                   for what, host, port in addresses(container) if leads_nowhere(services, host, port)]  # fmt: skip
    return faults


def monitored(found: list[Object], monitor: Object) -> Iterator[Object]:
    """The Services that a ServiceMonitor selects."""
    job = monitor["spec"]["selector"]["matchLabels"]["glimpse/job"]
    yield from (
        each for each in of_kind(found, "Service").values() if each["metadata"]["labels"].get("glimpse/job") == job
    )


def addresses(container: Object) -> Iterator[tuple[str, str, int]]:
    """(what says it, host, port) of each address that a container is given."""
    said = [(each["name"], each.get("value", "")) for each in container.get("env", ()) if each["name"].endswith("_URL")]
    said += [(argument, argument.removeprefix("http://")) for argument in container.get("args", ())
             if re.fullmatch(r"http://[\w.-]+:\d+", argument)]  # fmt: skip
    for what, address in said:
        host, colon, port = address.rpartition(":")
        if colon:
            yield what, host, int(port)


def selects(selector: Object, labels: Labels) -> bool:
    every = selector.get("matchLabels", {}).items() <= labels.items()
    return every and all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ()))


def lets(found: list[Object], way: str, pod: Labels, other: Labels, namespace: str, port: int) -> bool:
    """Whether the policies let the pod call (`Egress`) the other one, or be called by it (`Ingress`)."""

    def is_peer(peer: Object) -> bool:
        if "namespaceSelector" in peer:
            there = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
        else:
            there = namespace == NAMESPACE and "podSelector" in peer
        return there and selects(peer.get("podSelector", {}), other)

    policies = [
        each["spec"]
        for each in of_kind(found, "NetworkPolicy").values()
        if way in each["spec"]["policyTypes"] and selects(each["spec"]["podSelector"], pod)
    ]
    key, side = way.lower(), "to" if way == "Egress" else "from"
    return not policies or any(
        (side not in rule or any(is_peer(peer) for peer in rule[side]))
        and ("ports" not in rule or any(each["port"] == port for each in rule["ports"]))
        for policy in policies
        for rule in policy.get(key, ())
    )


def may_call(found: list[Object], caller: Labels, target: Labels, port: int, namespace: str = NAMESPACE) -> bool:
    """Whether a pod, of this namespace or another one, reaches a pod of Glimpse."""
    leaves = namespace != NAMESPACE or lets(found, "Egress", caller, target, NAMESPACE, port)
    return leaves and lets(found, "Ingress", target, caller, namespace, port)


def pods_behind(found: list[Object], service: Object, port: str) -> Iterator[tuple[Labels, int]]:
    """(labels, number of the port) of each kind of pod that a Service chooses."""
    for each in found:
        for template in templates(each):
            labels = template["metadata"]["labels"]
            if service["spec"]["selector"].items() <= labels.items():
                numbers = {known["name"]: known["containerPort"]
                           for container in template["spec"]["containers"] for known in container["ports"]}  # fmt: skip
                if port in numbers:
                    yield labels, numbers[port]


def reaches_dns(found: list[Object], pod: Labels, way: Object) -> bool:
    """Whether a policy lets the pod ask this kind of DNS, a peer of a policy, by UDP and TCP."""
    ports = [
        port["protocol"]
        for policy in of_kind(found, "NetworkPolicy").values()
        if selects(policy["spec"]["podSelector"], pod)
        for rule in policy["spec"].get("egress", ())
        if way in rule.get("to", ())
        for port in rule["ports"]
        if port["port"] == 53
    ]
    return {*ports} == {"UDP", "TCP"}


def faults_of_network(found: list[Object]) -> list[str]:
    """The policies let through what Glimpse's parts say to each other, and strangers to the gateways alone."""
    faults, services = [], of_kind(found, "Service")
    calls = []
    for each in found:
        for template in templates(each):
            said = [address for container in template["spec"]["containers"] for address in addresses(container)]
            said += [("Redis", "glimpse-redis", 6379)] * (each["metadata"]["name"] == "glimpse-gateway")
            calls += [(name(each), template["metadata"]["labels"], host) for _, host, _ in said if host in services]
    for where, caller, host in calls:
        port = services[host]["spec"]["ports"][0]["targetPort"]
        faults += [f"{where} may not call {host}" for target, number in pods_behind(found, services[host], port)
                   if not may_call(found, caller, target, number)]  # fmt: skip
    for monitor in of_kind(found, "ServiceMonitor").values():
        for service in monitored(found, monitor):
            port = monitor["spec"]["endpoints"][0]["port"]
            faults += [
                f"Prometheus may not call {name(service)}"
                for target, number in pods_behind(found, service, port)
                if not may_call(found, {}, target, number, MONITORING)
            ]
    for each in found:
        for template in templates(each):
            labels = template["metadata"]["labels"]
            faults += [f"{name(each)} has no way to {what}" for what, way in WAYS_TO_DNS.items()
                       if not reaches_dns(found, labels, way)]  # fmt: skip
            numbers = [port["containerPort"] for container in template["spec"]["containers"]
                       for port in container.get("ports", ())]  # fmt: skip
            if labels["app.kubernetes.io/component"] != "gateway":
                faults += [f"strangers may call {name(each)} at {number}"
                           for number in numbers if may_call(found, STRANGER, labels, number, ELSEWHERE)]  # fmt: skip
            if lets(found, "Egress", labels, STRANGER, ELSEWHERE, 443):
                faults.append(f"{name(each)} may call anybody")
    return faults


def faults_of_routes(found: list[Object]) -> list[str]:
    """The front door takes keys by TLS alone, leads to every port of the gateways and cuts no answer."""
    faults = []
    for door in of_kind(found, "Gateway").values():
        faults += [
            f"{name(door)}: {each['name']} takes keys in clear text"
            for each in door["spec"]["listeners"]
            if each["protocol"] != "HTTPS" or "tls" not in each
        ]
    for route in of_kind(found, "HTTPRoute").values():
        reached = set()
        for rule in route["spec"]["rules"]:
            (match,) = rule["matches"]
            path, ports = match["path"]["value"], {backend["port"] for backend in rule["backendRefs"]}
            reached |= ports
            if rule.get("timeouts", {}).get("request") != "0s":
                faults.append(f"{name(route)}: {path} is cut after the door's own timeout")
            if ports != ({GATEWAY_PORTS["grpc"]} if path == f"/{GRPC_SERVICE}" else {GATEWAY_PORTS["http"]}):
                faults.append(f"{name(route)}: {path} leads to {ports}")
        if reached != set(GATEWAY_PORTS.values()):
            faults.append(f"{name(route)} leads to {reached} alone")
    return faults


def faults_of_metrics(found: list[Object]) -> list[str]:
    """KEDA's queries give one element, of metrics and label values that exist."""
    faults = []
    for scaled in of_kind(found, "ScaledObject").values():
        if scaled["spec"]["fallback"].get("behavior") != "currentReplicasIfHigher":
            faults.append(f"{name(scaled)} shrinks if metrics are missing")
        for trigger in scaled["spec"].get("triggers", ()):
            query = trigger["metadata"]["query"]
            # Gateways have theirs from the start, a Triton's LLM only once it is loaded.
            if trigger["metadata"].get("ignoreNullValues") != ("false" if "glimpse_" in query else "true"):
                faults.append(f"{name(scaled)} takes metrics that are missing for no load, or the reverse")
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


def ends_after_s(container: Object) -> float:
    """How long a container needs after its pod was deleted."""
    notice_s = float(container["lifecycle"]["preStop"]["sleep"]["seconds"])
    settings = {variable["name"]: variable.get("value") for variable in container.get("env", ())}
    if container["name"] == "gateway":
        stop_s = float(settings["GLIMPSE_STOP_NOTICE_S"]) + float(settings["GLIMPSE_STOP_GRACE_S"])
        return notice_s + stop_s + 1 + 2  # to cut connections, to end the process
    command = command_of(container)
    if "glimpse triton" in command:
        return notice_s + exit_timeout_s(container) + 2  # as service/triton_server/supervision.py stops it
    if "mpirun" in command:
        return notice_s + 2 * sigkill_timeout_s(command) + 2  # before SIGTERM and after it; to end itself
    return notice_s + exit_timeout_s(container)


def exit_timeout_s(container: Object) -> float:
    """How long a Triton in the container may end its requests; 0 if there is none."""
    command = command_of(container)
    if "glimpse triton" in command:
        given = {variable["name"]: variable.get("value") for variable in container.get("env", ())}
        return float(given.get("GLIMPSE_TRITON_EXIT_TIMEOUT_S", Settings().triton_exit_timeout_s))
    options = dict(triton_options.options(command))
    return float(options.get("--exit-timeout-secs", triton_options.EXIT_TIMEOUT_S)) if options else 0


def sigkill_timeout_s(command: str) -> float:
    """How long Open MPI lets its ranks live, before SIGTERM and after it."""
    given = re.search(r"-mca odls_base_sigkill_timeout (\d+)", command)
    return float(given[1]) if given else 1  # its default


def faults_of_a_triton_s_end(container: Object) -> Iterator[str]:
    """Gateways call it until they find its address gone, and what they called has as long as they give it."""
    given_s = exit_timeout_s(container)
    if not given_s:
        return
    if given_s < STOP_GRACE_S:
        yield f"requests in flight have {given_s:g} s, gateways give them {STOP_GRACE_S}"
    if (notice_s := container["lifecycle"]["preStop"]["sleep"]["seconds"]) < DNS_CACHE_S + DNS_INTERVAL_S:
        yield f"gateways may call it longer than the {notice_s} s of its preStop"


def faults_of_the_drain(found: list[Object]) -> list[str]:
    """A pod goes on while callers learn that it ends, and is killed only after all that it does then."""
    faults = []
    for each in found:
        ends_s = []
        for template in templates(each):
            for container in template["spec"]["containers"]:
                if container["name"] not in ("gateway", "triton"):
                    continue
                if "preStop" not in container.get("lifecycle", {}):
                    faults.append(f"{name(each)}: {container['name']} ends while it is called")
                    continue
                command = command_of(container)
                faults += [f"{name(each)}: {fault}" for fault in faults_of_a_triton_s_end(container)]
                if "mpirun" in command and sigkill_timeout_s(command) < exit_timeout_s(container):
                    faults.append(f"{name(each)}: mpirun kills its ranks after {sigkill_timeout_s(command):g} s")
                ends_s.append(ends_after_s(container))
                if template["spec"]["terminationGracePeriodSeconds"] < ends_s[-1]:
                    faults.append(f"{name(each)} needs {ends_s[-1]:g} s to end")
        if ends_s != sorted(ends_s):
            faults.append(f"{name(each)}: the worker ends before its leader")
    return faults


CHECKS: tuple[Callable[[list[Object]], list[str]], ...] = (
    faults_of_schemas,
    faults_of_security,
    faults_of_images,
    faults_of_arguments,
    faults_of_environment,
    faults_of_ports,
    faults_of_probes,
    faults_of_routes,
    faults_of_metrics,
    faults_of_open_metrics,
    faults_of_the_drain,
)
CHECKS_OF_THE_WHOLE = (faults_of_names, faults_of_network)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_no_fault(overlay: str):
    found = objects(overlay)
    checks = [*CHECKS, *CHECKS_OF_THE_WHOLE] if overlay in WHOLE else CHECKS
    assert [fault for check in checks for fault in check(found)] == []


@pytest.mark.parametrize(
    ("file", "good", "bad", "fault"),
    [
        ("base/gateway/deployment.yaml", "readinessProbe:", "readynessProbe:", "readynessProbe"),
        ("base/gateway/deployment.yaml", "enableServiceLinks: false", "enableServiceLinks: true", "service links"),
        ("base/gateway/deployment.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "as root"),
        ("base/gateway/deployment.yaml", "image: glimpse/gateway", "image: glimpse/gate", "no target"),
        ("base/gateway/deployment.yaml", "GLIMPSE_LOG_FORMAT", "GLIMPSE_LOG_FORM", "GLIMPSE_LOG_FORM is not"),
        ("base/gateway/deployment.yaml", "- name: GLIMPSE_LOG_FORMAT",
         '- {name: GLIMPSE_METRICS_WITHOUT_KEY, value: "true"}\n            - name: GLIMPSE_LOG_FORMAT',
         "anyone reads its metrics"),
        ("base/monitoring.yaml", "name: glimpse-metrics\n          key: key", "key: key", "glimpse-gateway has no key"),
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
        ("base/vision.yaml", "ignoreNullValues:", "ignoreNull:", "glimpse-vision takes metrics that are missing"),
        ("base/llm.yaml", 'Values: "false"', 'Values: "true"', "glimpse-llm takes metrics that are missing"),
        ("overlays/gpu/scaling.yaml", 'Values: "false"', 'Values: "true"', "takes metrics that are missing"),
        ("base/llm.yaml", "behavior: currentReplicasIfHigher", "behavior: static", "shrinks if metrics are missing"),
        ("base/llm.yaml", "cooldownPeriod", "coolDownPeriod", "coolDownPeriod"),
        ("base/monitoring.yaml", "jobLabel", "joblabel", "joblabel"),
        ("base/llm.yaml", 'threshold: "6144"', "threshold: 6144", "6144 is not of type 'string'"),
        ("base/canary.yaml", "glimpse, canary", "glimpse, bird", "no command glimpse bird"),
        ("base/monitoring.yaml", "endpoints:", "endpoint:", "endpoints"),
        ("base/routes.yaml", "weight: 100", "weight: -1", "-1 is less"),
        ("base/routes.yaml", "timeouts:\n        request: 0s\n", "timeouts: {}\n",
         "/glimpse.v1.VisualQuestionAnswering is cut"),
        ("base/routes.yaml", "request: 0s #", "request: 15s #", "/v1 is cut"),
        ("base/routes.yaml", "request: 0s #", "requests: 0s #", "requests"),
        ("base/routes.yaml", "protocol: HTTPS", "protocol: HTTP", "in clear text"),
        ("base/routes.yaml", "certificateRefs:", "certificates:", "certificates"),
        ("base/routes.yaml", "/glimpse.v1.Vis", "/glimpse.v2.Vis", "VisualQuestionAnswering leads to {8081}"),
        ("base/redis.yaml", "redis:7.2-bookworm", "redis:latest", "no version"),
        ("base/gateway/deployment.yaml", "path: /health/ready", "path: /ready", "readinessProbe asks /ready"),
        ("base/gateway/deployment.yaml", "port: http\n            periodSeconds: 5", "port: web", "asks port web"),
        ("base/monitoring.yaml", "path: /metrics", "path: /stats", "asks /stats"),
        ("base/monitoring.yaml", "port: metrics", "port: http", "has no port http"),
        ("base/canary.yaml", "glimpse-gateway:8080", "glimpse-gateway:80", "leads nowhere"),
        ("base/routes.yaml", "port: 8080", "port: 80", "glimpse-gateway leads nowhere"),
        ("base/vision.yaml", "preStop:", "postStart:", "triton ends while it is called"),
        ("base/network-policies.yaml", "values: [vision, llm]\n      ports:", "values: [vision]\n      ports:",
         "Deployment glimpse-gateway may not call glimpse-llm"),
        ("base/network-policies.yaml", "cidr: 169.254.20.10/32", "cidr: 169.254.20.9/32", "no way to NodeLocal"),
        ("base/network-policies.yaml", "port: 8002", "port: 8003", "Prometheus may not call Service glimpse-vision"),
        ("base/network-policies.yaml", "name: glimpse-redis\nspec:\n  podSelector:\n    matchLabels:\n      app",
         "name: glimpse-redis\nspec:\n  podSelector:\n    matchLabels:\n      app2", "may not call glimpse-redis"),
        ("base/network-policies.yaml", "gateway\n      ports:\n        - port: 8001",
         "gateway\n    - ports:\n        - port: 8001", "strangers may call Deployment glimpse-llm at 8001"),
        ("base/network-policies.yaml", "egress:\n    - to:\n        - namespace",
         "egress:\n    - {}\n    - to:\n        - namespace", "glimpse-redis may call anybody"),
        ("overlays/gpu/llm.yaml", "--load-model=llm", "--load-model=lm", "no call needs the model lm"),
        ("overlays/gpu/vision.yaml", "--disable-auto-complete-config", "--no-auto", "no option --no-auto"),
        ("overlays/gpu/vision.yaml", "- --allow-http=false", "- --log-info=true", "opens HTTP"),
        ("overlays/gpu-multinode/llm.yaml", "restricted-protocol=shared-memory,", "restricted-protocol=",
         "lets every caller load models"),
        ("overlays/gpu-multinode/llm.yaml", "seconds: 130", "seconds: 90", "the worker ends before its leader"),
        ("overlays/gpu-multinode/llm.yaml", "odls_base_sigkill_timeout 45", "odls_base_verbose 1",
         "mpirun kills its ranks after 1 s"),
        ("overlays/gpu-multinode/llm.yaml", "Seconds: 150", "Seconds: 100", "needs 127 s to end"),
        ("base/llm.yaml", 'value: "40"', 'value: "8"', "llm: requests in flight have 8 s, gateways give them 40"),
        ("base/llm.yaml", "Seconds: 90", "Seconds: 60", "needs 77 s to end"),
        ("base/vision.yaml", "seconds: 35", "seconds: 10", "longer than the 10 s of its preStop"),
        ("overlays/gpu/llm.yaml", "- --exit-timeout-secs=40", "", "requests in flight have 30 s, gateways give"),
    ],
)  # fmt: skip
def test_a_broken_copy_is_found(tmp_path: Path, file: str, good: str, bad: str, fault: str):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    broken = tmp_path / "kubernetes" / file
    text = broken.read_text()
    assert good in text
    broken.write_text(text.replace(good, bad))
    overlay = "overlays/cpu" if file.startswith("base") else str(Path(file).parent)
    found = rendered(tmp_path / "kubernetes" / overlay)
    faults = faults_of_schemas(found) or [each for check in (*CHECKS, *CHECKS_OF_THE_WHOLE) for each in check(found)]
    assert fault in "\n".join(faults)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_network_is_believed_to_be_of_proxies_before_somebody_names_it(overlay: str):
    gateways = [each for where, each in containers(objects(overlay)) if each["name"] == "gateway"]
    assert gateways
    for gateway in gateways:
        assert "GLIMPSE_TRUSTED_PROXIES" not in {variable["name"] for variable in gateway["env"]}


def test_a_redis_outside_takes_the_place_of_ours(tmp_path: Path):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    mine = tmp_path / "kubernetes" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text("resources: [../cpu]\ncomponents: [../../outside-redis]\n")
    found = rendered(mine)
    assert [fault for check in (*CHECKS, *CHECKS_OF_THE_WHOLE) for fault in check(found)] == []
    assert [name(each) for each in found if "redis" in name(each)] == ["NetworkPolicy glimpse-outside-redis"]
    (way_out,) = [each for each in found if "redis" in name(each)]
    (gateway,) = (of_kind(found, "Deployment")["glimpse-gateway"]["spec"]["template"]["metadata"],)
    assert selects(way_out["spec"]["podSelector"], gateway["labels"])


def readme_commands(word: str) -> str:
    """The block of commands in the README that has this word."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (KUBERNETES / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return str(found)


def test_the_readme_s_overlay_takes_images_from_a_registry(tmp_path: Path):
    shutil.copytree(KUBERNETES, tmp_path / "deploy" / "kubernetes")
    commands = "docker() { echo $*; }\n" + readme_commands("overlays/mine/kustomization.yaml")
    said = subprocess.run(["bash", "-euc", commands], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = rendered(tmp_path / "deploy" / "kubernetes" / "overlays" / "mine")
    ours = {container["image"] for where, container in containers(found) if where != "Deployment glimpse-redis"}
    assert ours == {line.split()[1] for line in said.splitlines() if line.startswith("push")}
    assert ours == {"REGISTRY/glimpse/gateway:0.1.0", "REGISTRY/glimpse/triton-cpu:0.1.0"}
    for monitor in of_kind(found, "ServiceMonitor").values():
        assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_the_readme_s_canary_takes_its_image_from_the_registry_and_on_gpus_the_engines(tmp_path: Path):
    shutil.copytree(KUBERNETES, tmp_path / "deploy" / "kubernetes")
    mine = tmp_path / "deploy" / "kubernetes" / "overlays" / "mine-canary"

    def follow(word: str) -> tuple[str, list[Object]]:
        commands = "docker() { echo $*; }\n" + readme_commands(word)
        done = subprocess.run(["bash", "-euc", commands], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout, rendered(mine)

    said, found = follow("overlays/mine-canary/kustomization.yaml <<")
    (gateway,) = [container for _, container in containers(found)]
    assert said.splitlines()[-1] == f"push {gateway['image']}"
    assert gateway["image"] == "REGISTRY/glimpse/gateway:next"
    _, found = follow("gpu/gateway.yaml")
    (stable,) = [each for where, each in containers(objects("overlays/gpu")) if each["name"] == "gateway"]
    (canary,) = [container for _, container in containers(found)]
    assert {**canary, "image": ""} == {**stable, "image": ""}
    assert of_kind(found, "Deployment").keys() == {"glimpse-gateway-canary"}


def test_the_readme_s_commands_make_objects_of_the_rules(tmp_path: Path):
    """Its loop, with a kubectl that keeps what it is given."""
    keep = f"kubectl() {{ cat >> {tmp_path}/kept.yaml; echo --- >> {tmp_path}/kept.yaml; }}\n"
    subprocess.run(["bash", "-euc", keep + readme_commands("PrometheusRule")], cwd=PROJECT, check=True)
    kept = [each for each in yaml.safe_load_all((tmp_path / "kept.yaml").read_text()) if each]
    files = sorted((PROJECT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    assert [each["spec"] for each in kept] == [yaml.safe_load(path.read_text()) for path in files]
    for each in kept:
        assert each["kind"] == "PrometheusRule"
        assert each["metadata"]["labels"] == {
            "release": "kube-prometheus-stack"
        }  # else the chart's Prometheus reads none
        assert re.fullmatch(r"glimpse-[a-z-]+", each["metadata"]["name"])


def test_the_canary_is_a_set_of_its_own_behind_a_service_of_its_own():
    stable = of_kind(objects("overlays/cpu"), "Service")["glimpse-gateway"]["spec"]["selector"]
    (pod,) = [template for each in objects("canary") for template in templates(each)]
    assert not stable.items() <= pod["metadata"]["labels"].items()
    route = yaml.safe_load((KUBERNETES / "canary" / "route.yaml").read_text())
    assert faults_of_schemas([route]) == []
    assert faults_of_routes([route]) == []
    services = {**of_kind(objects("overlays/cpu"), "Service"), **of_kind(objects("canary"), "Service")}
    for rule in route["spec"]["rules"]:
        backends = {each["name"]: each["weight"] for each in rule["backendRefs"]}
        assert backends == {"glimpse-gateway": 90, "glimpse-gateway-canary": 10}
        assert not [each for each in rule["backendRefs"] if leads_nowhere(services, each["name"], each["port"])]


def test_only_a_component_for_trials_opens_the_front_door_without_tls(tmp_path: Path):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    mine = tmp_path / "kubernetes" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text("resources: [../cpu]\ncomponents: [../../plain-http]\n")
    found = rendered(mine)
    faults = [fault for check in (*CHECKS, *CHECKS_OF_THE_WHOLE) for fault in check(found)]
    assert faults == ["Gateway glimpse: http takes keys in clear text"]


def test_a_gateway_s_memory_limit_holds_all_that_it_may_take():
    settings = Settings()
    caches = settings.feature_cache_bytes + settings.visual_cache_bytes + settings.image_store_bytes
    decoder = 60_000_000 + MEMORY_BYTES + PIXEL_MEMORY_BYTES * settings.max_image_pixels
    most = caches + 4 * settings.max_bytes_in_flight + 250_000_000 + settings.decode_workers * decoder
    (gateway,) = [each for _, each in containers(objects("overlays/cpu")) if each["name"] == "gateway"]
    limit = int(gateway["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert limit - (1 << 30) < most < limit
    compose = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]["gateway"]["mem_limit"]
    assert f"{compose.removesuffix('g')}Gi" == gateway["resources"]["limits"]["memory"]


def test_the_ranks_of_another_node_are_started_by_a_user_that_ssh_knows():
    (group,) = of_kind(objects("overlays/gpu-multinode"), "LeaderWorkerSet").values()
    leader, worker = templates(group)
    command, user = command_of(worker["spec"]["containers"][0]), worker["spec"]["securityContext"]["runAsUser"]
    secret = "/run/secrets/glimpse-mpi"
    for option in (f"AuthorizedKeysFile={secret}/authorized_keys", "StrictModes=no", "PidFile=none", "UsePAM=no"):
        assert f"-o {option}" in command
    assert f"-i {secret}/key" in command_of(leader["spec"]["containers"][0])
    text = MULTINODE.read_text()
    assert f"glimpse:x:{user}:{user}:" in text
    assert "openssh-server" in text
    (base,) = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert base in (PROJECT / "docker-compose.yml").read_text()  # the version of the other Tritons
    made = readme_commands("ssh-keygen")
    assert all(name in made for name in ("--from-file key ", "authorized_keys=key.pub", "--from-file host-key"))


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
