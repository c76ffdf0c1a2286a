"""manifests.py FILE...: checks rendered Kubernetes manifests.

Compares them with Kubernetes' schemas, the Pod Security profile `restricted`, the rules of this
project, and each other. Afterwards each check must find a problem in manifests with a wrong change.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import kubernetes_validate
import yaml

# The oldest supported version, and the newest version of which the package has schemas.
VERSIONS = ["1.27.0", "1.37.0"]

Document = dict


def schema(documents: list[Document]) -> Iterator[str]:
    for document in documents:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = ".".join(str(part) for part in error.path)
                yield f"{name_of(document)}: {where}: {error.message} (Kubernetes {version})"


def restricted(documents: list[Document]) -> Iterator[str]:
    """The profiles baseline and restricted for Linux.

    https://kubernetes.io/docs/concepts/security/pod-security-standards
    """
    for owner, pod in pods(documents):
        of_pod = pod.get("securityContext", {})
        for flag in ["hostNetwork", "hostPID", "hostIPC"]:
            if pod.get(flag):
                yield f"{owner}: {flag}"
        if of_pod.get("sysctls"):
            yield f"{owner}: sysctls"
        allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"}
        allowed |= {"persistentVolumeClaim", "projected", "secret"}
        for volume in pod.get("volumes", []):
            if kinds := volume.keys() - allowed - {"name"}:
                yield f"{owner}: volume {volume['name']}: {', '.join(kinds)}"
        for container in containers(pod):
            where = f"{owner}: container {container['name']}"
            own = container.get("securityContext", {})
            either = of_pod | own
            if own.get("privileged") or own.get("procMount", "Default") != "Default":
                yield f"{where}: privileged or procMount"
            if any(port.get("hostPort") for port in container.get("ports", [])):
                yield f"{where}: hostPort"
            if any(handler.get("host") for handler in handlers(container)):
                yield f"{where}: a probe or hook with a host"
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{where}: allowPrivilegeEscalation is not false"
            capabilities = own.get("capabilities", {})
            added = set(capabilities.get("add", []))
            if "ALL" not in capabilities.get("drop", []) or added - {"NET_BIND_SERVICE"}:
                yield f"{where}: capabilities"
            if either.get("runAsNonRoot") is not True or either.get("runAsUser") == 0:
                yield f"{where}: may run as root"
            if either.get("seccompProfile", {}).get("type") not in ["RuntimeDefault", "Localhost"]:
                yield f"{where}: seccompProfile"
            if either.get("seLinuxOptions") or either.get("appArmorProfile", {}).get("type") == "Unconfined":
                yield f"{where}: seLinuxOptions or appArmorProfile"


def house(documents: list[Document]) -> Iterator[str]:
    for owner, pod in pods(documents):
        if pod.get("enableServiceLinks") is not False or pod.get("automountServiceAccountToken") is not False:
            yield f"{owner}: enableServiceLinks and automountServiceAccountToken must be false"
        for container in containers(pod):
            where = f"{owner}: container {container['name']}"
            if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield f"{where}: readOnlyRootFilesystem is not true"
            for probe in ["startupProbe", "readinessProbe", "livenessProbe"]:
                if probe not in container:
                    yield f"{where}: no {probe}"
    for document in documents:
        if document["kind"] == "Namespace":
            labels = document["metadata"].get("labels", {})
            if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
                yield f"{name_of(document)}: does not enforce the profile `restricted`"


def installable(documents: list[Document]) -> Iterator[str]:
    """Settings that an overlay must add to the base."""
    for owner, pod in pods(documents):
        for container in containers(pod):
            where = f"{owner}: container {container['name']}"
            if container["image"].rpartition(":")[2] in ["", "latest", container["image"]]:
                yield f"{where}: image {container['image']} has no version"
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            if {"cpu", "memory"} - requests.keys() or "memory" not in limits:
                yield f"{where}: resources"


def references(documents: list[Document]) -> Iterator[str]:
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    if len(names) != len(documents):
        yield "two objects have the same kind and name"
    namespaces = {name for kind, name in names if kind == "Namespace"}
    for document in documents:
        where, spec = name_of(document), document.get("spec", {})
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") not in namespaces:
            yield f"{where}: the namespace is not in the file"
        if document["kind"] == "Service":
            served = ports(documents, spec["selector"])
            for port in spec["ports"]:
                if served.get(port["targetPort"]) != port["port"]:
                    target = port["targetPort"]
                    yield f"{where}: port {port['port']} has targetPort {target}, the pods have {served}"
        if document["kind"] == "PodDisruptionBudget":
            if not select(documents, spec["selector"]["matchLabels"]):
                yield f"{where}: selects no pods"
        if document["kind"] == "NetworkPolicy":
            served = ports(documents, spec["podSelector"]["matchLabels"])
            opened = [port["port"] for rule in spec["ingress"] for port in rule.get("ports", [])]
            # A rule without ports may only allow pods of the same kind.
            among_themselves = {"from": [{"podSelector": spec["podSelector"]}]}
            unlimited = [rule for rule in spec["ingress"] if "ports" not in rule]
            if any(rule != among_themselves for rule in unlimited):
                yield f"{where}: opens all ports to others"
            if (opened or not unlimited) and sorted(opened) != sorted(served.values()):
                yield f"{where}: opens {opened}, the pods have {served}"
            if not all(rule["from"] for rule in spec["ingress"]):
                yield f"{where}: a rule allows all sources"
        if document["kind"] == "StatefulSet":
            if ("Service", spec["serviceName"]) not in names:
                yield f"{where}: no Service {spec['serviceName']}"
            labels = spec["template"]["metadata"]["labels"]
            if not spec["selector"]["matchLabels"].items() <= labels.items():
                yield f"{where}: the selector does not match its own pods"
            if not any(polices(other, labels) for other in documents):
                yield f"{where}: no NetworkPolicy"
            pod = spec["template"]["spec"]
            claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            for container in containers(pod):
                mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
                if mounted != claims | volumes.keys():
                    yield f"{where}: mounts {sorted(mounted)}, has {sorted(claims | volumes.keys())}"
                named = {port["name"] for port in container["ports"]}
                for handler in handlers(container):
                    if "port" in handler and handler["port"] not in named:
                        yield f"{where}: a probe uses the unknown port {handler['port']}"
            for volume in volumes.values():
                if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in names:
                    yield f"{where}: no ConfigMap {volume['configMap']['name']}"


def pods(documents: list[Document]) -> Iterator[tuple[str, dict]]:
    for document in documents:
        if "template" in document.get("spec", {}):
            yield name_of(document), document["spec"]["template"]["spec"]


def containers(pod: dict) -> list[dict]:
    return [*pod["containers"], *pod.get("initContainers", []), *pod.get("ephemeralContainers", [])]


def handlers(container: dict) -> Iterator[dict]:
    parents = [container.get(probe, {}) for probe in ["startupProbe", "readinessProbe", "livenessProbe"]]
    parents += container.get("lifecycle", {}).values()
    for parent in parents:
        for kind in ["httpGet", "tcpSocket", "grpc"]:
            if kind in parent:
                yield parent[kind]


def select(documents: list[Document], labels: dict) -> list[Document]:
    owners = [document for document in documents if "template" in document.get("spec", {})]
    return [
        owner for owner in owners if labels.items() <= owner["spec"]["template"]["metadata"]["labels"].items()
    ]


def ports(documents: list[Document], labels: dict) -> dict[str, int]:
    specs = [owner["spec"]["template"]["spec"] for owner in select(documents, labels)]
    found = [port for spec in specs for container in containers(spec) for port in container["ports"]]
    return {port["name"]: port["containerPort"] for port in found}


def polices(document: Document, labels: dict) -> bool:
    if document["kind"] != "NetworkPolicy":
        return False
    return document["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def name_of(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def find(documents: list[Document], kind: str, name: str) -> Document:
    return next(
        document
        for document in documents
        if (document["kind"], document["metadata"]["name"]) == (kind, name)
    )


def wrong(change: str) -> Callable[[list[Document]], None]:
    """Returns a function that applies a change, which is Python code.

    The code can use the worker's pod (`pod`), its container (`container`) and any object (`find`).
    """

    def apply(documents: list[Document]) -> None:
        pod = find(documents, "StatefulSet", "lora-worker")["spec"]["template"]["spec"]
        scope = {
            "pod": pod,
            "container": pod["containers"][0],
            "find": lambda kind, name: find(documents, kind, name),
        }
        exec(change, scope)

    return apply


WRONG = {
    schema: [
        "pod['enableServicelinks'] = False",
        "pod['terminationGracePeriodSeconds'] = '150s'",
        "container['livenessProbe']['httpGet'].pop('port')",
        "find('StatefulSet', 'lora-worker')['spec'].pop('selector')",
        "find('NetworkPolicy', 'lora-worker')['spec']['ingress'][0]['from'] = {}",
    ],
    restricted: [
        "pod['hostNetwork'] = True",
        "pod['volumes'].append({'name': 'host', 'hostPath': {'path': '/'}})",
        "pod['securityContext'].pop('runAsNonRoot')",
        "pod['securityContext']['runAsUser'] = 0",
        "pod['securityContext'].pop('seccompProfile')",
        "pod['securityContext']['sysctls'] = [{'name': 'kernel.msgmax', 'value': '1'}]",
        "container.pop('securityContext')",
        "container['securityContext']['privileged'] = True",
        "container['securityContext'].pop('allowPrivilegeEscalation')",
        "container['securityContext']['capabilities'] = {'drop': ['NET_RAW']}",
        "container['securityContext']['capabilities']['add'] = ['SYS_PTRACE']",
        "container['securityContext']['seLinuxOptions'] = {'user': 'system_u'}",
        "container['ports'][0]['hostPort'] = 7410",
        "container['livenessProbe']['httpGet']['host'] = 'example.com'",
    ],
    house: [
        "pod.pop('enableServiceLinks')",
        "pod['automountServiceAccountToken'] = True",
        "container['securityContext'].pop('readOnlyRootFilesystem')",
        "container.pop('readinessProbe')",
        "find('Namespace', 'loractl')['metadata']['labels'].pop('pod-security.kubernetes.io/enforce')",
    ],
    installable: [
        "container['image'] = 'registry:5000/lora-worker:latest'",
        "container['image'] = 'lora-worker'",
        "container['resources']['limits'].pop('memory')",
        "container.pop('resources')",
    ],
    references: [
        "find('Service', 'lora-worker')['spec']['ports'][0]['targetPort'] = 'peers'",
        "find('Service', 'lora-coordinator')['spec']['ports'][0]['port'] = 7500",
        "find('Service', 'lora-worker')['metadata']['name'] = 'lora-workers'",
        "find('Service', 'lora-worker')['spec']['selector'] = {'app.kubernetes.io/name': 'worker'}",
        "find('StatefulSet', 'lora-worker')['metadata']['namespace'] = 'default'",
        "find('StatefulSet', 'lora-worker')['spec']['selector']['matchLabels'].update({"
        "'app.kubernetes.io/name': 'worker'})",
        "find('StatefulSet', 'lora-worker')['metadata']['name'] = 'lora-coordinator'",
        "find('PodDisruptionBudget', 'lora-worker')['spec']['selector']['matchLabels'] = {'a': 'b'}",
        "find('NetworkPolicy', 'lora-worker')['spec']['ingress'][0]['ports'][0]['port'] = 7400",
        "find('NetworkPolicy', 'lora-worker')['spec']['ingress'][1].pop('ports')",
        "find('NetworkPolicy', 'lora-worker')['spec']['ingress'][1]['from'] = []",
        "find('NetworkPolicy', 'lora-worker')['spec']['podSelector']['matchLabels']['a'] = 'b'",
        "pod['volumes'][0]['name'] = 'other'",
        "next(v for v in pod['volumes'] if 'configMap' in v)['configMap']['name'] = 'lora-worker'",
        "container['livenessProbe']['httpGet']['port'] = 'https'",
    ],
}


def main(files: list[Path]) -> None:
    problems, missed = [], []
    for file in files:
        documents = [document for document in yaml.safe_load_all(file.read_text()) if document]
        # The base is not installed without an overlay.
        checks = [check for check in WRONG if check is not installable or file.stem != "base"]
        found = [f"{file.name}: {problem}" for check in checks for problem in check(documents)]
        problems += found
        print(f"{file.name}: {len(documents)} objects, {len(found)} problems")
        for check in checks if not found else []:
            for change in WRONG[check]:
                changed = copy.deepcopy(documents)
                wrong(change)(changed)
                if not list(check(changed)):
                    missed.append(f"{check.__name__} in {file.name} finds no problem after: {change}")
    if problems or missed:
        sys.exit("\n".join(problems + missed))
    print(f"the checks find all {sum(map(len, WRONG.values()))} wrong changes")


main([Path(argument) for argument in sys.argv[1:]])
